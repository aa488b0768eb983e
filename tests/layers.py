"""Random layers without a model, decompositions of them, and the formulas of METHOD, slow and in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkscope.config import Activation, DictionaryConfig, RunConfig, TrainingConfig
from qkscope.decomposition import Decomposition, SiteShape
from qkscope.dictionary import SparseTranscoder
from qkscope.pairs.pair_map import Pairs, pair_scores, rows, weight_strength, with_bias
from qkscope.pattern import AttentionInputs, HeadPatterns, PatternRule
from qkscope.rotary import Rotary
from qkscope.training.recipes import resolved
from qkscope.training.step1 import Step1Job

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)
Sides = tuple[SparseTranscoder, SparseTranscoder]

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


# The pair map -----------------------------------------------------------------------------------------


def all_pairs(n_query: int, n_key: int, n_heads: int) -> Pairs:
    """Every pair of every head, bias rows included, in no order."""
    head, a, b = torch.ones(n_heads, n_query + 1, n_key + 1).nonzero(as_tuple=True)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    return Pairs.of(a[order], b[order], head[order], n_query, n_key, n_heads)


def some_of(pairs: Pairs, share: float, seed: int = 0) -> Pairs:
    keep = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
    return pairs.take(keep.nonzero()[:, 0])


def pairs_of(inputs: AttentionInputs, sides: Sides) -> Pairs:
    return all_pairs(sides[0].width, sides[1].width, inputs.q_BTNH.shape[2])


def rows_of(inputs: AttentionInputs, sides: Sides) -> tuple[Tensor, Tensor]:
    return rows(sides[0], inputs.q_BTNH.shape[2]).detach(), rows(sides[1], inputs.k_BTGH.shape[2]).detach()


def strengths_of(inputs: AttentionInputs, sides: Sides, pairs: Pairs) -> Tensor:
    """What a map at its own weights has: with a rotary embedding a factor of 1."""
    if inputs.rule.rotary is not None:
        return torch.ones(len(pairs))
    return weight_strength(pairs, *rows_of(inputs, sides))


def map_scores(inputs: AttentionInputs, sides: Sides, pairs: Pairs, strength: Tensor | None = None) -> Tensor:
    """`pair_scores` of a layer; by default at the weights' own strengths."""
    acts_q, acts_k = (with_bias(side.encode(inputs.x_BTD)).detach() for side in sides)
    rows_q, rows_k = rows_of(inputs, sides)
    strength = strengths_of(inputs, sides, pairs) if strength is None else strength
    return pair_scores(pairs, strength, acts_q, acts_k, rows_q, rows_k, inputs.rule)


def slow_map(
    inputs: AttentionInputs, sides: Sides, pairs: Pairs, strength: Tensor, acts: list[Tensor] | None = None
) -> Tensor:
    """Capped scores by loops over sequences, pairs and positions, float64."""
    rule, (batch, length, heads, width) = inputs.rule, inputs.q_BTNH.shape
    groups = inputs.k_BTGH.shape[2]
    acts_q, acts_k = acts or [with_bias(side.encode(inputs.x_BTD)).detach().double() for side in sides]
    left, right = (r.double() for r in rows_of(inputs, sides))
    sums = torch.zeros(batch, heads, length, length).tolist()
    for b in range(batch):
        turns = [turn_matrix(rule.rotary, b, t, width) for t in range(length)]
        for p in range(len(pairs)):
            a, c, n = int(pairs.query_P[p]), int(pairs.key_P[p]), int(pairs.head_P[p])
            g = n // (heads // groups)
            queries, keys = [turn @ left[a, n] for turn in turns], [turn @ right[c, g] for turn in turns]
            factor = rule.scaling * float(strength[p])
            on_q, on_k = acts_q[b, :, a].tolist(), acts_k[b, :, c].tolist()
            for i in range(length):
                for j in range(length):
                    if on_q[i] and on_k[j]:
                        m = 1.0 if rule.rotary is None else float(queries[i] @ keys[j])
                        sums[b][n][i][j] += factor * on_q[i] * m * on_k[j]
    out = torch.tensor(sums, dtype=torch.float64)
    return out if rule.softcap is None else rule.softcap * torch.tanh(out / rule.softcap)


# Jobs and artefacts -----------------------------------------------------------------------------------


def job_for(inputs: AttentionInputs, seed: int = 0, **config: Any) -> Step1Job:
    values = {"recipe": "seed", "width": 9, "width_key": 8, "k": 3, **config}
    wanted = resolved(DictionaryConfig(**values), TrainingConfig())
    assert wanted.activation is not None
    return Step1Job(0, "", wanted, *some_sides(inputs, seed, activation=wanted.activation))


def doubled(inputs: AttentionInputs) -> AttentionInputs:
    """Every sequence twice."""

    def twice(t: Tensor) -> Tensor:
        return torch.cat([t, t])

    rule = inputs.rule
    if rule.rotary is not None:
        table = rule.rotary
        rule = replace(rule, rotary=replace(table, cos_BTH=twice(table.cos_BTH), sin_BTH=twice(table.sin_BTH)))
    if len(rule.visible_BQK) > 1:
        rule = replace(rule, visible_BQK=twice(rule.visible_BQK))
    return AttentionInputs(twice(inputs.x_BTD), twice(inputs.q_BTNH), twice(inputs.k_BTGH), rule, twice(inputs.real_BT))


def some_decomposition(
    inputs: AttentionInputs, share: float = 0.4, widths: tuple[int, int] = (9, 8), seed: int = 0
) -> Decomposition:
    """A decomposition of a random layer with random strengths."""
    sides = some_sides(inputs, widths=widths)
    pairs = some_of(pairs_of(inputs, sides), share)
    q, k = inputs.q_BTNH, inputs.k_BTGH
    shape = SiteShape(inputs.x_BTD.shape[2], q.shape[2], k.shape[2], q.shape[3], inputs.rule.rotary is not None)
    values = {"dictionary": {"width": widths[0], "width_key": widths[1], "k": 3}, "training": {"seed": seed}}
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(seed))
    return Decomposition(3, shape, *sides, pairs, strength, strength, strength.abs(), RunConfig.model_validate(values))


def by_head(log_pattern: Tensor) -> HeadPatterns:
    """A log-pattern that is there already, some heads at a time."""
    return lambda heads: log_pattern[:, heads]


def whole(patterns: HeadPatterns, inputs: AttentionInputs) -> Tensor:
    """All heads of a pattern at once."""
    return patterns(slice(0, inputs.q_BTNH.shape[2]))
