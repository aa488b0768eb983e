"""Step 1's pattern KLs and their gradients against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, OFF, close, job_for, slow_kl, slow_kl_rows, slow_pattern_of, slow_scores, some_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qkscope.kernels import pattern_kl as kernel
from qkscope.kernels.pattern_kl import pattern_kl
from qkscope.pattern import AttentionInputs
from qkscope.training.objective import PatternTarget

PARTS = 3.0, 1.0, 1.0


def replaced(inputs: AttentionInputs, seed: int) -> tuple[Tensor, Tensor]:
    """Other queries and keys, as they enter the rotary embedding."""
    g = torch.Generator().manual_seed(seed)
    q, k = (y + 0.5 * torch.randn(y.shape, generator=g) for y in (inputs.q_BTNH, inputs.k_BTGH))
    return q.requires_grad_(), k.requires_grad_()


def solve(inputs: AttentionInputs, q: Tensor, k: Tensor, parts: kernel.Parts = PARTS) -> tuple[Tensor, ...]:
    """Weighted sum, the three KLs, and the sum's gradients in what enters the rotary embedding."""
    target, rule = PatternTarget(inputs), inputs.rule
    meet = target.turn(q) * rule.scaling, target.turn(k)
    loss, kl_3 = pattern_kl(
        *target.rotated, *meet, rule.visible_BQK, target.weight_BQ, rule.sink_N, rule.softcap, parts
    )
    assert not kl_3.requires_grad
    return loss.detach(), kl_3, *torch.autograd.grad(1.7 * loss, (q, k))


def slow_solve(inputs: AttentionInputs, q: Tensor, k: Tensor, parts: kernel.Parts = PARTS) -> tuple[Tensor, ...]:
    q, k = (y.detach().double().requires_grad_() for y in (q, k))
    kl_3 = torch.stack([slow_kl(inputs, q, k), slow_kl(inputs, q, inputs.k_BTGH), slow_kl(inputs, inputs.q_BTNH, k)])
    loss = (kl_3 * torch.tensor(parts)).sum()
    return loss.detach(), kl_3.detach(), *torch.autograd.grad(1.7 * loss, (q, k))


@pytest.mark.parametrize("parts", [PARTS, (0.7, 2.0, 0.0), (0.0, 0.5, 4.0)])
@pytest.mark.parametrize("name", LAYERS)
def test_loss_and_gradients_are_the_references(name: str, parts: kernel.Parts) -> None:
    inputs = some_inputs(1, **LAYERS[name])
    q, k = replaced(inputs, 9)
    wanted = slow_solve(inputs, q, k, parts)
    assert wanted[1].min() > 0.01 and min(g.abs().max() for g in wanted[2:]) > 1e-3
    for one, two in zip(solve(inputs, q, k, parts), wanted, strict=True):
        close(one, two)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    length=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 3), (3, 3)]),
    width=st.sampled_from([2, 4]),
    mask=st.sampled_from(["causal", "sliding", "bidirectional"]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    sink=st.booleans(),
    rotary=st.sampled_from([None, "half"]),
    block=st.sampled_from([1, 10, 40, 1 << 16]),
    rows=st.integers(1, 4),
)
def test_any_layer(seed: int, heads: tuple[int, int], block: int, rows: int, **options: Any) -> None:
    inputs = some_inputs(seed, heads=heads[0], groups=heads[1], padding=options["length"] > 2, **options)
    q, k = replaced(inputs, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CPU_BLOCK", block)
        patch.setattr(kernel, "ROWS", rows)
        found = solve(inputs, q, k)
    for one, two in zip(found, slow_solve(inputs, q, k), strict=True):
        close(one, two, 2e-4, floor=0.02)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 12),
    groups=st.integers(1, 5),
    each=st.integers(1, 3),
    size=st.integers(36, 200),
)
def test_blocks_cover_what_is_seen_once(seed: int, length: int, groups: int, each: int, size: int) -> None:
    """And their masks hide exactly the rest of what they cover."""
    visible = torch.rand(length, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    visible |= torch.eye(length, dtype=torch.bool)
    covered = torch.zeros(groups, length, length)
    for heads, queries, keys, hull, mask in kernel._blocks(visible, groups, each, size):
        open_QK = torch.zeros(queries.stop - queries.start, keys.stop - keys.start)
        assert (heads.stop - heads.start) * each * open_QK.numel() <= size
        if mask is not None:
            open_QK[:, hull] += mask
        covered[heads, queries, keys] += (open_QK == 0).float()
    assert torch.equal(covered, visible.float().expand_as(covered))


def test_keys_to_come_are_not_touched() -> None:
    """A causal mask leaves nearly half of the work, a sliding window its own width and a block's."""
    length, work = 512, {}
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for name, visible in {"causal": distance >= 0, "sliding": (distance >= 0) & (distance < 32)}.items():
        blocks = kernel._blocks(visible, 1, 1, kernel.CPU_BLOCK)
        work[name] = sum((q.stop - q.start) * (k.stop - k.start) for _, q, k, *_ in blocks) / length**2
    assert 0.5 < work["causal"] < 0.57
    assert work["sliding"] < (32 + kernel.ROWS) / length


def test_what_no_query_sees_has_no_say() -> None:
    inputs = some_inputs(2)
    inputs.rule.visible_BQK[..., 5:] = False
    q, k = replaced(inputs, 3)
    wanted = solve(inputs, q, k)
    for keys in (inputs.k_BTGH, k.data):
        keys[:, 5:] = torch.nan
    for one, two in zip(solve(inputs, q, k), wanted, strict=True):
        assert torch.isfinite(one).all()
        close(one, two, 1e-6)


@pytest.mark.parametrize("name", ["causal", "half-split", "padded"])
def test_a_constant_added_to_a_row_of_scores_changes_nothing(name: str) -> None:
    """One more dimension, where keys are 1 and queries differ, true and reconstructed ones apart."""
    inputs = some_inputs(4, **LAYERS[name])
    target = PatternTarget(inputs)
    q, k = (y.detach() for y in replaced(inputs, 5))
    plain = [*target.rotated, target.turn(q), target.turn(k)]
    g = torch.Generator().manual_seed(6)

    def wider(i: int, y: Tensor) -> Tensor:
        more = torch.ones(*y.shape[:3], 1) if i % 2 else 3 * torch.randn(*y.shape[:3], 1, generator=g)
        return torch.cat([y, more], -1)

    found = []
    for case in (plain, [wider(i, y) for i, y in enumerate(plain)]):
        true_q, true_k, q_hat, k_hat = (y.requires_grad_() for y in case)
        rest = inputs.rule.visible_BQK, target.weight_BQ, None, None, PARTS
        loss, kl_3 = pattern_kl(true_q, true_k, q_hat, k_hat, *rest)
        found.append((kl_3, *(g[..., : q.shape[-1]] for g in torch.autograd.grad(loss, (q_hat, k_hat)))))
    for one, two in zip(*found, strict=True):
        close(one, two, 2e-5)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    inputs = some_inputs(4)
    q, k = replaced(inputs, 5)
    target = PatternTarget(inputs)
    target.kl(q, k.detach())[0].backward()
    assert q.grad is not None and q.grad.abs().max() > 0 and k.grad is None
    with torch.no_grad():
        loss, kl_3 = target.kl(q, k)
    assert not loss.requires_grad
    close(loss, kl_3 @ torch.tensor(PARTS), 1e-6)


def test_weights_count_rows() -> None:
    """Row weights enter linearly, the same for every head: a row of weight 0 adds nothing, not even a gradient."""
    inputs = some_inputs(5, batch=3)
    rule, (q, k) = inputs.rule, replaced(inputs, 1)
    weight = torch.rand(3, 7, generator=torch.Generator().manual_seed(1))
    weight[1, 3] = 0
    true = slow_pattern_of(rule, slow_scores(rule, inputs.q_BTNH, inputs.k_BTGH))
    rows = slow_kl_rows(true, slow_pattern_of(rule, slow_scores(rule, q.detach(), k.detach())))
    rotated = PatternTarget(inputs).rotated
    loss, kl_3 = pattern_kl(*rotated, q * rule.scaling, k, rule.visible_BQK, weight, None, None, PARTS)
    close(kl_3[0], (rows * weight[:, None]).sum())
    loss.backward()
    assert q.grad is not None and torch.all(q.grad[1, 3] == 0) and (q.grad[1, 2] != 0).any()


def test_huge_scores_stay_finite() -> None:
    inputs = some_inputs(6, size=1.5)
    q, k = replaced(inputs, 7)
    found = solve(inputs, q.detach().mul(3000).requires_grad_(), k)
    assert all(torch.isfinite(y).all() for y in found) and found[0] > 10


def test_narrow_numbers_are_computed_with_in_float32() -> None:
    inputs = some_inputs(7)
    target = PatternTarget(inputs)
    q, k, q_hat, k_hat = (y.detach().bfloat16() for y in (*target.rotated, *replaced(inputs, 8)))
    rest = inputs.rule.visible_BQK, target.weight_BQ, None, None, PARTS
    found = pattern_kl(q, k, q_hat, k_hat, *rest)
    wanted = pattern_kl(q.float(), k.float(), q_hat.float(), k_hat.float(), *rest)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[1], wanted[1])


def test_without_triton_a_gpu_takes_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    assert kernel.solver.__wrapped__(torch.device("cuda")) is kernel.blocked


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that any operation gave while open."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(y.numel() for y in tree_leaves(out) if isinstance(y, Tensor))])
        return out


def test_no_pattern_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole step of step 1, the target's making and the backward pass included."""
    monkeypatch.setattr(kernel, "CPU_BLOCK", 1024)
    length, heads = 128, 4
    inputs = some_inputs(8, batch=1, length=length, heads=heads, rotary="half", padding=True)
    job = job_for(inputs, sparsity=0.1)
    with Sizes() as sizes:
        job.loss(PatternTarget(inputs), OFF)[0].backward()
    # The mask is the model's own, and of bytes; beside it only the block's work, 9 times 1024 scores.
    assert sizes.largest == length**2 < length**2 * heads
    assert job.query.W_dec.grad is not None and job.query.W_dec.grad.any()
