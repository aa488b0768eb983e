"""The KL from scores that come head by head: rows and gradients are the slow formulas', in whatever blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import LAYERS, close, pairs_of, slow_kl_rows, slow_pattern_of, slow_scores, some_inputs, some_of, some_sides
from torch import Tensor

from qkscope.kernels import head_kl
from qkscope.pairs.active import Active
from qkscope.pairs.pair_map import active_kl, active_scores, rows, with_bias
from qkscope.training.objective import PatternTarget


@pytest.mark.parametrize("block", [1, 10, 1 << 18])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_and_gradient_are_the_slow_ones(
    name: str, turned: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_kl, "CPU_BLOCK", block)
    inputs = some_inputs(81, **LAYERS[name])
    target, rule = PatternTarget(inputs), inputs.rule
    g = torch.Generator().manual_seed(1)
    given = torch.randn(2, 4, 7, 7, generator=g) * 2
    scores = given.double().requires_grad_()
    capped = scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)
    true = slow_pattern_of(rule, slow_scores(rule, inputs.q_BTNH, inputs.k_BTGH))
    wanted = slow_kl_rows(true, slow_pattern_of(rule, capped))
    loss = (wanted * target.weight_BQ[:, None]).sum()
    (gradient,) = torch.autograd.grad(loss, scores)
    real = inputs.real_BT
    for head in range(4):
        here = given[:, head].clone()
        here = here.mT.contiguous().mT if turned else here
        assert here.is_contiguous() is not turned
        found = target.by_head.rows_(head, here, gradient=True)
        close(found[real], wanted.detach()[:, head][real], 1e-5)
        close(here, gradient[:, head], 1e-5, floor=1e-3)
        again = given[:, head].clone()
        close(target.by_head.rows_(head, again, gradient=False), found, 1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_through_a_map_all_gradients_are_those_of_whole_scores(name: str) -> None:
    inputs = some_inputs(82, **LAYERS[name])
    sides = query, key = some_sides(inputs)
    pairs = some_of(pairs_of(inputs, sides), 0.4)
    target, g = PatternTarget(inputs), torch.Generator().manual_seed(2)
    queries, keys = (Active.of(with_bias(side.encode(inputs.x_BTD))) for side in sides)
    both_rows = rows(query, 4).detach(), rows(key, inputs.k_BTGH.shape[2]).detach()
    leaves = [
        t.detach().requires_grad_()
        for t in (torch.randn(len(pairs), generator=g), queries.act_L, keys.act_L, *both_rows)
    ]
    strength, act_q, act_k, rows_q, rows_k = leaves

    both = replace(queries, act_L=act_q), replace(keys, act_L=act_k)
    used = leaves if inputs.rule.rotary else leaves[:3]
    kl, found = active_kl(pairs, strength, *both, lambda: (rows_q, rows_k), inputs.rule, target.by_head)
    wanted = target.kl_rows(active_scores(pairs, strength, *both, lambda: (rows_q, rows_k), inputs.rule))
    close(kl.detach(), target.mean(wanted).detach(), 1e-5)
    assert not found.requires_grad
    close(found.transpose(1, 2)[inputs.real_BT], wanted.detach().transpose(1, 2)[inputs.real_BT], 1e-5)
    ones = torch.autograd.grad(2 * kl, used), torch.autograd.grad(2 * target.mean(wanted), used)
    for one, other in zip(*ones, strict=True):
        close(one, other, 1e-4)


def test_what_needs_no_gradient_is_given_none() -> None:
    inputs = some_inputs(83, **LAYERS["half-split"])
    sides = some_sides(inputs)
    pairs, target = some_of(pairs_of(inputs, sides), 0.4), PatternTarget(inputs)
    both = [Active.of(with_bias(side.encode(inputs.x_BTD)).detach()) for side in sides]

    def kl(strength: Tensor) -> Tensor:
        of_rows = rows(sides[0], 4).detach(), rows(sides[1], 2).detach()
        return active_kl(pairs, strength, both[0], both[1], lambda: of_rows, inputs.rule, target.by_head)[0]

    assert not kl(torch.ones(len(pairs))).requires_grad
    strength = torch.ones(len(pairs), requires_grad=True)
    (gradient,) = torch.autograd.grad(kl(strength), strength)
    step = torch.zeros(len(pairs))
    step[gradient.abs().argmax()] = 1e-2
    with torch.no_grad():
        slope = (kl(strength + step) - kl(strength - step)) / 2e-2
    close(slope, gradient.abs().max() * gradient[gradient.abs().argmax()].sign(), 2e-2)
