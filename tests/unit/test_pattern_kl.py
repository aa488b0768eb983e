"""Mean pattern KL and its gradients against float64 autograd; and the random layers that other tests stand on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkscope.config import Activation
from qkscope.dictionary import SparseTranscoder
from qkscope.kernels import pattern_kl as kernel
from qkscope.kernels.pattern_kl import pattern_kl
from qkscope.pattern import AttentionInputs, PatternRule
from qkscope.rotary import Rotary
from qkscope.training.objective import PatternTarget

# Random layers without a model, and the formulas of METHOD in float64 --------------------------------


def rotation(kind: str, length: int, width: int, batch: int = 1, scale: float = 1.0) -> Rotary:
    """Tables of a rotary embedding: half-split, interleaved, or half-split on half of the head ("partial")."""
    turned = width // 2 if kind == "partial" else width
    here = torch.arange(width)
    if kind == "interleaved":
        partner, plane = here ^ 1, here // 2
        first = here % 2 == 0
    else:
        first = here < turned // 2
        partner = torch.where(first, here + turned // 2, here - turned // 2)
        plane = here % (turned // 2)
    inside = here < turned
    partner = torch.where(inside, partner, here)
    speed = torch.where(inside, 1.7 / (1.0 + plane), 0.0)
    begin = torch.arange(batch)[:, None, None] * 2.0  # each sequence of a batch has positions of its own
    angle = (torch.arange(length)[None, :, None] + begin) * speed
    size = torch.where(inside, scale, 1.0)
    sign = torch.where(first, -1.0, 1.0) * inside
    return Rotary(angle.cos() * size, angle.sin() * sign * size, partner)


def some_inputs(
    seed: int = 0,
    *,
    batch: int = 2,
    length: int = 7,
    d: int = 6,
    heads: int = 4,
    groups: int = 2,
    width: int = 4,
    mask: str = "causal",
    softcap: float | None = None,
    sink: bool = False,
    rotary: str | None = None,
    padding: bool = False,
    size: float = 1.5,
    scaling: float = 0.6,
) -> AttentionInputs:
    """What an attention could have been handed: queries and keys linear in x, with every mask that models have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, d, generator=g) + 0.5 * torch.randn(d, generator=g)
    sides = []
    for n in (heads, groups):
        weight = torch.randn(d, n * width, generator=g) * size * d**-0.5
        sides.append((x @ weight + 0.5 * torch.randn(n * width, generator=g)).unflatten(2, (n, width)))
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    visible = {
        "causal": distance >= 0,
        "sliding": (distance >= 0) & (distance < 3),
        "bidirectional": distance > -length,
    }[mask][None]
    real = torch.ones(batch, length, dtype=torch.bool)
    if padding:
        real[0, length - 2 :] = False
        real[-1, : 1 if batch > 1 else 0] = False
        visible = visible & real[:, None]
        visible = visible | ~visible.any(-1, keepdim=True)
    sinks = torch.randn(heads, generator=g) if sink else None
    table = rotation(rotary, length, width, batch) if rotary else None
    return AttentionInputs(x, sides[0], sides[1], PatternRule(visible, scaling, softcap, sinks, table), real)


def some_dictionary(
    d: int, width: int, out: int, seed: int, activation: Activation = "relu", k: float = 3, size: float = 1.0
) -> SparseTranscoder:
    """A random dictionary in evaluation mode that fires on about half of its features, or k of them."""
    g = torch.Generator().manual_seed(seed)
    t = SparseTranscoder(d, width, out, activation, k)
    with torch.no_grad():
        t.W_enc.copy_(torch.randn(d, width, generator=g) * d**-0.5)
        t.W_dec.copy_(torch.randn(width, out, generator=g) * size * width**-0.5)
        for bias in (t.b_enc, t.b_in, t.b_out):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=g))
        if activation in ("batchtopk", "jumprelu"):
            t.threshold.fill_(0.4 * float(t.norms().mean()))
    return t.eval()


def some_sides(
    inputs: AttentionInputs, seed: int = 0, widths: tuple[int, int] = (9, 8), **options: Any
) -> tuple[SparseTranscoder, SparseTranscoder]:
    """A query and a key dictionary for a layer."""
    d, q, k = inputs.x_BTD.shape[2], inputs.q_BTNH, inputs.k_BTGH
    return (
        some_dictionary(d, widths[0], q.shape[2] * q.shape[3], 2 * seed + 100, **options),
        some_dictionary(d, widths[1], k.shape[2] * k.shape[3], 2 * seed + 101, **options),
    )


def turn_matrix(rotary: Rotary | None, b: int, t: int, width: int) -> Tensor:
    """R_t as a float64 matrix, entry by entry."""
    out = torch.eye(width, dtype=torch.float64)
    if rotary is None:
        return out
    b = b if len(rotary.cos_BTH) > 1 else 0
    for d in range(width):
        partner = int(rotary.partner_H[d])
        out[d, d] = float(rotary.cos_BTH[b, t, d])
        if partner != d:
            out[d, partner] = float(rotary.sin_BTH[b, t, d])
    return out


def slow_scores(rule: PatternRule, q: Tensor, k: Tensor) -> Tensor:
    """Scaled and capped scores in float64, row by row; differentiable."""
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    q, k = q.double(), k.double()
    out = []
    for b in range(batch):
        turns = [turn_matrix(rule.rotary, b, t, width) for t in range(length)]
        for n in range(heads):
            g = n // (heads // groups)
            keys = torch.stack([turns[j] @ k[b, j, g] for j in range(length)])
            for i in range(length):
                s = rule.scaling * (keys @ (turns[i] @ q[b, i, n]))
                out.append(s if rule.softcap is None else rule.softcap * torch.tanh(s / rule.softcap))
    return torch.stack(out).view(batch, heads, length, length)


def slow_pattern_of(rule: PatternRule, scores: Tensor) -> Tensor:
    """The softmax over visible keys (and the sink) of float64 scores, by exponentials; [B, N, Q, K (+ 1)]."""
    visible = rule.visible_BQK.expand(len(scores), -1, -1)[:, None]
    odds = scores.exp() * visible
    if rule.sink_N is not None:
        sink = rule.sink_N.double().exp()[None, :, None, None].expand(*odds.shape[:3], 1)
        odds = torch.cat([odds, sink], -1)
    return odds / odds.sum(-1, keepdim=True)


def slow_kl_rows(true: Tensor, hat: Tensor) -> Tensor:
    """KL of each row in nats, float64, leaving out outcomes without mass."""
    positive = true > 0
    ratio = torch.where(positive, true, 1.0).log() - torch.where(positive, hat, 1.0).log()
    return (true * ratio).sum(-1)


def slow_mean(rows: Tensor, real: Tensor) -> Tensor:
    """Mean over heads and unpadded queries, summed one by one."""
    total, count = rows.new_zeros(()), 0
    for b in range(rows.shape[0]):
        for i in range(rows.shape[2]):
            if real[b, i]:
                for n in range(rows.shape[1]):
                    total, count = total + rows[b, n, i], count + 1
    return total / count


def slow_kl(inputs: AttentionInputs, q: Tensor, k: Tensor) -> Tensor:
    """Mean pattern KL of queries and keys as they enter the rotary embedding, float64."""
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
    hat = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, q, k))
    return slow_mean(slow_kl_rows(true, hat), inputs.real_BT)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4, floor: float = 1e-6) -> None:
    """Equal up to a share of the largest entry, which is taken for at least `floor`."""
    scale = max(float(wanted.abs().max()), floor) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale)


LAYERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding": {"mask": "sliding"},
    "bidirectional": {"mask": "bidirectional", "groups": 4},
    "padded": {"padding": True},
    "bidirectional-padded": {"mask": "bidirectional", "padding": True},
    "softcap": {"softcap": 1.2},
    "sink": {"sink": True},
    "sink-softcap-padded": {"sink": True, "softcap": 1.5, "padding": True},
    "half-split": {"rotary": "half"},
    "interleaved": {"rotary": "interleaved", "groups": 1},
    "partial": {"rotary": "partial", "padding": True, "groups": 4},
    "all": {"rotary": "half", "softcap": 2.0, "sink": True, "padding": True, "mask": "sliding"},
}


# The kernel ------------------------------------------------------------------------------------------


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
