"""Mean pattern KL and its gradients against float64 autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, close, slow_kl, slow_kl_rows, slow_pattern_of, slow_scores, some_inputs

from qkscope.kernels import pattern_kl as kernel
from qkscope.kernels.pattern_kl import pattern_kl
from qkscope.pattern import AttentionInputs, PatternRule
from qkscope.training.objective import PatternTarget


def check(inputs: AttentionInputs, seed: int = 9) -> None:
    """Loss and both gradients of replaced queries and keys equal the reference's, padding weighed zero."""
    g = torch.Generator().manual_seed(seed)
    target = PatternTarget(inputs)
    q, k = (y + 0.5 * torch.randn(y.shape, generator=g) for y in (inputs.q_BTNH, inputs.k_BTGH))
    q1, k1 = q.clone().requires_grad_(), k.clone().requires_grad_()
    found = 1.7 * target.kl(target.turn(q1) * inputs.rule.scaling, target.turn(k1))
    q2, k2 = q.double().requires_grad_(), k.double().requires_grad_()
    wanted = 1.7 * slow_kl(inputs, q2, k2)
    close(found.detach(), wanted.detach())
    for one, two in zip(torch.autograd.grad(found, (q1, k1)), torch.autograd.grad(wanted, (q2, k2)), strict=True):
        assert two.abs().max() > 1e-3
        close(one, two)


@pytest.mark.parametrize("name", LAYERS)
def test_loss_and_gradients_are_the_references(name: str) -> None:
    check(some_inputs(1, **LAYERS[name]))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 3), (3, 3)]),
    width=st.sampled_from([2, 4]),
    mask=st.sampled_from(["causal", "sliding", "bidirectional"]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    sink=st.booleans(),
    block=st.sampled_from([1, 30, 1 << 16]),
)
def test_any_layer(seed: int, heads: tuple[int, int], block: int, **options: Any) -> None:
    inputs = some_inputs(seed, heads=heads[0], groups=heads[1], padding=options["length"] > 2, **options)
    whole, kernel.CPU_BLOCK = kernel.CPU_BLOCK, block
    try:
        g = torch.Generator().manual_seed(seed)
        q, k = (torch.randn(y.shape, generator=g) for y in (inputs.q_BTNH, inputs.k_BTGH))
        target = PatternTarget(inputs)
        close(target.kl(q * inputs.rule.scaling, k), slow_kl(inputs, q, k), 2e-4, floor=0.02)
    finally:
        kernel.CPU_BLOCK = whole


@pytest.mark.parametrize("rows_a_block", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("name", ["all", "padded", "sink"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, rows_a_block: int) -> None:
    """8 (sequence, head) patterns of 7 × 7 in blocks that divide them evenly, unevenly, or not at all."""
    inputs = some_inputs(2, **LAYERS[name])
    target = PatternTarget(inputs)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(y.shape, generator=g).requires_grad_() for y in (inputs.q_BTNH, inputs.k_BTGH))
    monkeypatch.setattr(kernel, "CPU_BLOCK", 1 << 20)
    whole = target.kl(q, k)
    wanted = torch.autograd.grad(whole, (q, k))
    monkeypatch.setattr(kernel, "CPU_BLOCK", 49 * rows_a_block)
    found = target.kl(q, k)
    close(found.detach(), whole.detach(), 1e-6)
    for one, two in zip(torch.autograd.grad(found, (q, k)), wanted, strict=True):
        close(one, two, 1e-6)


def test_the_cpu_block_does_not_depend_on_the_length() -> None:
    """Longer than a block's side: a pattern with more scores than a block is still one block."""
    length = math.isqrt(kernel.CPU_BLOCK) + 3
    inputs = some_inputs(3, batch=1, length=length, heads=2, groups=1)
    target = PatternTarget(inputs)
    q = inputs.q_BTNH * 0.8
    hat = inputs.rule.log_pattern(q, inputs.k_BTGH).double()
    true = inputs.log_pattern_BNQK.double()
    wanted = (true.exp() * (true - hat).masked_fill(true == -torch.inf, 0)).sum(-1).mean()
    close(target.kl(q_BTNH=q * inputs.rule.scaling), wanted)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    inputs = some_inputs(4)
    target = PatternTarget(inputs)
    q = torch.randn_like(inputs.q_BTNH).requires_grad_()
    target.kl(q_BTNH=q).backward()
    assert q.grad is not None and q.grad.abs().max() > 0
    assert not inputs.k_BTGH.requires_grad and inputs.k_BTGH.grad is None


def test_weights_count_rows() -> None:
    """Row weights enter linearly, the same for every head: a row of weight 0 adds nothing, not even a gradient."""
    inputs = some_inputs(5, batch=3)
    target = PatternTarget(inputs)
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(y.shape, generator=g) for y in (inputs.q_BTNH, inputs.k_BTGH))
    weight = torch.rand(3, 7, generator=g)
    weight[1, 3] = 0
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
    plain = PatternRule(inputs.rule.visible_BQK, 1.0)
    rows = slow_kl_rows(true, slow_pattern_of(plain, slow_scores(plain, q, k)))
    q1 = q.clone().requires_grad_()
    found = pattern_kl(q1, k, target.pattern_BNQK, target.entropy_BNQ, inputs.rule.visible_BQK, weight)
    close(found.detach(), (rows * weight[:, None]).sum())
    found.backward()
    assert q1.grad is not None and torch.all(q1.grad[1, 3] == 0) and (q1.grad[1, 2] != 0).any()


def test_huge_scores_stay_finite() -> None:
    inputs = some_inputs(6, size=1.5)
    target = PatternTarget(inputs)
    q = (inputs.q_BTNH * 3000).requires_grad_()
    loss = target.kl(q_BTNH=q)
    loss.backward()
    assert torch.isfinite(loss) and loss > 10
    assert q.grad is not None and torch.isfinite(q.grad).all()
