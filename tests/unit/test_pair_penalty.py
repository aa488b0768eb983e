"""The pair penalty and the sum of a product's absolute entries, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, close, job_for, pairs_of, some_inputs, some_of, some_sides, turn_matrix
from torch import Tensor

from qkscope.kernels import product_norm as kernel
from qkscope.kernels.product_norm import EPSILON, product_norm
from qkscope.pattern import AttentionInputs
from qkscope.training import pair_penalty as module
from qkscope.training.objective import PatternTarget
from qkscope.training.pair_penalty import drawn_places, pair_penalty


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), heads=st.integers(1, 3), a=st.integers(0, 5), b=st.integers(0, 5),
    block=st.sampled_from([1, 7, 1 << 18]),
)  # fmt: skip
def test_product_norm_and_its_gradients(seed: int, heads: int, a: int, b: int, block: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # In float64: where |m| < ε its slope is m/ε, and rounding of m counts ten thousandfold.
    left, right = (torch.randn(heads, n, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (a, b))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CPU_BLOCK", block)
        found = product_norm(left, right)
        (2 * found).backward()
    slow_left, slow_right = (x.detach().clone().requires_grad_() for x in (left, right))
    wanted = slow_left.new_zeros(())
    for z in range(heads):
        for i in range(a):
            for j in range(b):
                m = sum(slow_left[z, i, h] * slow_right[z, j, h] for h in range(3))
                size = abs(m)  # type: ignore[arg-type]
                wanted = wanted + (size - EPSILON / 2 if size > EPSILON else size * size / (2 * EPSILON))
    close(found.detach(), wanted.detach())
    if a and b:
        (2 * wanted).backward()
        for fast, slow in ((left, slow_left), (right, slow_right)):
            assert fast.grad is not None and slow.grad is not None
            close(fast.grad, slow.grad)


def slow_penalty(inputs: AttentionInputs, sides, draw: int, kept: set[tuple[int, int, int]]) -> Tensor:
    """Every pair of every head, one by one."""
    query, key = sides
    n_heads, n_groups = inputs.q_BTNH.shape[2], inputs.k_BTGH.shape[2]
    real = inputs.real_BT
    acts_q, acts_k = (side.encode(inputs.x_BTD[real]).double() for side in sides)
    width = inputs.q_BTNH.shape[3]
    places = [p.tolist() for p in drawn_places(PatternTarget(inputs), draw)]
    total = torch.zeros((), dtype=torch.float64)
    for h in range(n_heads):
        g = h // (n_heads // n_groups)
        turns = [turn_matrix(inputs.rule.rotary, places[0][h], places[s][h], width) for s in (1, 2)]
        for a in range(query.width):
            rms = acts_q[:, a].square().mean().sqrt()
            row_q = turns[0] @ query.W_dec[a].double().view(n_heads, width)[h]
            for b in range(key.width):
                sd = (acts_k[:, b] - acts_k[:, b].mean()).square().mean().sqrt()
                row_k = turns[1] @ key.W_dec[b].double().view(n_groups, width)[g]
                if (a, b, h) not in kept:
                    total = total + inputs.rule.scaling * (row_q @ row_k).abs() * rms * sd
    return total / n_heads


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("free", [False, True])
def test_the_penalty_sums_what_every_pair_moves(name: str, free: bool) -> None:
    inputs = some_inputs(71, **LAYERS[name])
    sides = some_sides(inputs, widths=(5, 4))
    pairs = some_of(pairs_of(inputs, sides), 0.4)
    columns = (pairs.query_P, pairs.key_P, pairs.head_P)
    kept = set(zip(*(c.tolist() for c in columns), strict=True)) if free else set()
    target = PatternTarget(inputs)
    acts = [side.encode(target.x_nD) for side in sides]
    found = pair_penalty(target, *sides, acts[0], acts[1], 5, free=columns if free else None)
    close(found.detach(), slow_penalty(inputs, sides, 5, kept).detach(), 5e-3)


def test_every_pair_free_costs_nothing_and_order_does_not_matter() -> None:
    inputs = some_inputs(72, **LAYERS["half-split"])
    query, key = sides = some_sides(inputs, widths=(6, 5))
    target = PatternTarget(inputs)
    acts = [side.encode(target.x_nD) for side in sides]
    pairs = pairs_of(inputs, sides)
    free = pair_penalty(target, *sides, acts[0], acts[1], 0, free=(pairs.query_P, pairs.key_P, pairs.head_P))
    whole = pair_penalty(target, *sides, acts[0], acts[1], 0)
    close(free.detach(), torch.zeros(()), floor=float(whole.detach()))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    query.keep(order)
    close(pair_penalty(target, query, key, acts[0][:, order], acts[1], 0).detach(), whole.detach())


def test_of_many_features_some_are_drawn_and_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some_inputs(75)
    sides = some_sides(inputs, widths=(6, 5))
    target, pairs = PatternTarget(inputs), some_of(pairs_of(inputs, sides), 0.4)
    free = (pairs.query_P, pairs.key_P, pairs.head_P)
    acts = [side.encode(target.x_nD) for side in sides]
    whole = pair_penalty(target, *sides, acts[0], acts[1], 0, free=free)
    (wanted,) = torch.autograd.grad(whole, sides[0].W_dec)
    monkeypatch.setattr(module, "DRAWN", 3)
    found = [pair_penalty(target, *sides, acts[0], acts[1], draw, free=free) for draw in range(600)]
    (gradient,) = torch.autograd.grad(torch.stack(found).mean(), sides[0].W_dec)
    values = torch.stack(found).detach()
    assert len(values.unique()) > 50
    assert float((values.mean() - whole.detach()).abs()) < 4 * float(values.std()) / 600**0.5
    close(gradient, wanted, 0.1)


@pytest.mark.parametrize("name", ["half-split", "sink-softcap-padded", "all"])
def test_places_are_real_queries_and_keys_they_see(name: str) -> None:
    inputs = some_inputs(73, **LAYERS[name])
    target = PatternTarget(inputs)
    drawn = {draw: [p.tolist() for p in drawn_places(target, draw)] for draw in range(20)}
    for places in drawn.values():
        for b, i, j in zip(*places, strict=True):
            assert inputs.real_BT[b, i]
            assert inputs.rule.visible_BQK[b if len(inputs.rule.visible_BQK) > 1 else 0, i, j]
    assert len({str(places) for places in drawn.values()}) > 10
    assert drawn[3] == [p.tolist() for p in drawn_places(target, 3)]


def test_training_with_it_lowers_it() -> None:
    inputs = some_inputs(74, length=12, batch=4)
    target = PatternTarget(inputs)
    left = {}
    for weight in (0.0, 0.3):
        job = job_for(inputs, width=12, k=4, pair_sparsity=weight)
        optimizer = torch.optim.Adam(job.parameter_groups())
        for step in range(150):
            job.before_step(step / 150)
            optimizer.zero_grad()
            job.loss(target, torch.autocast("cpu", enabled=False))[0].backward()
            optimizer.step()
        with torch.no_grad():
            acts = [side.encode(target.x_nD) for side in (job.query, job.key)]
            left[weight] = float(pair_penalty(target, job.query, job.key, acts[0], acts[1], 0))
    assert left[0.3] < 0.5 * left[0.0]
