"""report.json: one pass over held-out text that measures all a decomposition claims, beside baselines and controls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionInputs, AttentionSite
from ..data.sequences import Batch
from ..decomposition import SIDES, Decomposition
from ..pairs.pair_map import Pairs, pair_scores, rows, with_bias
from ..tables.examples import Examples
from ..training.stream import harvest_finite
from .controls import explicit_scores, shuffled_pairs, untrained
from .figures import Ratio, t_quantile
from .patched import PatchedScore, ready, zero_pattern
from .patterns import KLScore, MeanPattern, PatternScores, uniform_log_pattern, uniform_pattern

DENSE = 0.1  # a feature that fires on more than this share of tokens is dense
HISTOGRAM_EDGES = [-6 + 0.25 * i for i in range(25)]  # log10 of the share of tokens a feature fires on
CURVE = (1.0, 0.5, 0.25, 0.125, 0.0625)  # shares of the kept pairs at which the pruned map is measured again
CHECK_TOKENS = 24  # positions of one sequence on which every pair of active features is summed one by one


@dataclass
class Activity:
    """How often each feature of one side fires, sequence by sequence."""

    counts: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)

    def add(self, acts_BTF: Tensor, real_BT: Tensor) -> None:
        fires = (acts_BTF > 0) & real_BT[..., None]
        self.counts.append(fires.sum(1).cpu())
        self.lengths.append(real_BT.sum(1).cpu())

    def report(self) -> dict[str, Any]:
        """L0, live and dense features; intervals of shares by the jackknife over sequences."""
        counts, lengths = torch.cat(self.counts).double(), torch.cat(self.lengths).double()
        l0 = Ratio([counts.sum(1)], [lengths])
        total, tokens = counts.sum(0), lengths.sum()
        density = total / tokens
        without = total - counts  # [S, F]: counts without each sequence
        dead = (without == 0).double().mean(1)
        dense = (without / (tokens - lengths).clamp(min=1)[:, None] > DENSE).double().mean(1)
        log_density = density[total > 0].log10()
        histogram = torch.histc(log_density, len(HISTOGRAM_EDGES) - 1, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
        return {
            "l0": l0.figure(),
            "live": int((total > 0).sum()),
            "dead": _jackknife(float((total == 0).double().mean()), dead),
            "dense": _jackknife(float((density > DENSE).double().mean()), dense),
            "log10_density": histogram.int().tolist(),
        }


def _jackknife(value: float, without_S: Tensor) -> dict[str, Any]:
    n = len(without_S)
    if n < 2:
        return {"mean": value, "ci95": None}
    spread = float((without_S - without_S.mean()).square().sum()) * (n - 1) / n
    half = t_quantile(n - 1) * spread**0.5
    return {"mean": value, "ci95": [max(value - half, 0.0), min(value + half, 1.0)]}


def in_brief(report: dict[str, Any]) -> str:
    """A report's headline as one line."""
    kl, l0 = report["pattern_kl"], [report["l0"][side]["mean"] for side in SIDES]
    said = f"L0 {l0[0]:.1f}/{l0[1]:.1f}, {report['pairs']['kept']:,} pairs, pattern KL {kl['map_pruned']['mean']:.4f}"
    said += f" (uniform {kl['uniform']['mean']:.3f})"
    if lost := report.get("ce_increase"):
        said += f", cross-entropy {lost['map_pruned']['mean']:+.4f}"
    if target := report.get("target"):
        said += "; the target is reached" if target["reached"] else "; the target is NOT reached"
    return said


def measure(
    dec: Decomposition,
    site: AttentionSite,
    heldout: Iterable[Batch],
    sample: list[AttentionInputs],
    examples: Examples,
    *,
    step1: Decomposition | None = None,
    controls: bool = True,
) -> dict[str, Any]:
    """The figures of one layer on held-out text.

    `sample` is training text (for the mean pattern and the controls' starts), `step1` the dictionaries before they were
    tuned, where they were. `examples` collects examples of features and pairs on the way.
    """
    mean = MeanPattern(sample)
    sources: dict[str, Any] = {
        "transcoders": dec.log_pattern_all,
        "map_pruned": dec.log_pattern_kept,
        "uniform": uniform_log_pattern,
        "mean": lambda inputs: mean(inputs).clamp(min=1e-12).log(),  # never seen is not impossible
    }
    if step1 is not None:
        sources["step1"] = step1.log_pattern_all
    others: dict[str, Any] = {}
    if controls:
        l0 = sample_l0(dec, sample)
        others = {name: c.log_pattern_all for name, c in untrained(dec, sample, l0).items()}
        pairs, strength = shuffled_pairs(dec)
        others["shuffled"] = lambda inputs: _masked(inputs, dec.scores(inputs, pairs, strength))
    curve = {share: _strongest(dec, share) for share in CURVE if round(share * len(dec.pairs)) >= 1}
    scores = PatternScores()
    curve_kl = {share: KLScore() for share in curve}
    activity = {side: Activity() for side in SIDES}
    active = Ratio()
    patched = PatchedScore()
    tokens = sequences = 0
    check: float | None = None
    for batch in heldout:
        inputs = harvest_finite(site, batch)
        acts = {s: t.encode(inputs.x_BTD.float()) for s, t in zip(SIDES, (dec.query, dec.key), strict=True)}
        for side in SIDES:
            activity[side].add(acts[side], batch.real_BT)
        examples.add(batch, acts, inputs)
        patterns = {name: source(inputs) for name, source in {**sources, **others}.items()}
        patterns["map_all"] = _map_all(dec, inputs, acts)
        scores.add(inputs, patterns)
        for share, (pairs, strength) in curve.items():
            curve_kl[share].add(inputs, _masked(inputs, dec.scores(inputs, pairs, strength)))
        _add_active(active, dec, inputs, acts)
        if check is None:
            check = _check_map(dec, inputs)
        if site.has_head:
            again = ("transcoders", "map_pruned", *(["step1"] if step1 is not None else []))
            variants = {name: ready(patterns[name]) for name in again}
            variants |= {"zero": zero_pattern, "uniform": uniform_pattern, "mean": mean}
            patched.add(site, batch, variants)
        tokens += batch.n_tokens
        sequences += len(batch.tokens_BT)
    found = {side: activity[side].report() for side in SIDES}
    report: dict[str, Any] = {
        "layer": dec.layer,
        "tokens": {"evaluated": tokens, "sequences": sequences},
        **{key: {side: found[side][key] for side in SIDES} for key in ("l0", "dead", "dense", "live")},
        "width": {"query": dec.query.width, "key": dec.key.width},
        "width_trained": dec.width_trained,
        "log10_density": {"edges": HISTOGRAM_EDGES, **{side: found[side]["log10_density"] for side in SIDES}},
        "pairs": _pair_report(dec, found, active, {s: k.kl.figure() for s, k in curve_kl.items()}, curve),
        "map_all_check": {"largest_log_pattern_difference": check, "positions": CHECK_TOKENS},
    }
    by_variant = {name: score.report() for name, score in scores.items()}
    for metric in ("pattern_kl", "top1", "absolute_error"):
        report[metric] = {name: by_variant[name][metric] for name in by_variant if name not in others}
    report["controls"] = {name: {m: by_variant[name][m] for m in ("pattern_kl", "top1")} for name in others}
    if site.has_head:
        report |= patched.report()
    return report


def _masked(inputs: AttentionInputs, scores: Tensor) -> Tensor:
    return inputs.rule.masked(scores).log_softmax(-1)


def sample_l0(dec: Decomposition, sample: list[AttentionInputs]) -> dict[str, float]:
    """Active features a side on the first of a sample: what the controls get."""
    totals = dict.fromkeys(SIDES, 0.0)
    count = 0
    for inputs in sample[:16]:
        x = inputs.x_BTD[inputs.real_BT].float()
        count += len(x)
        for side, transcoder in zip(SIDES, (dec.query, dec.key), strict=True):
            totals[side] += float((transcoder.encode(x) > 0).sum())
    return {side: max(total / count, 1e-3) for side, total in totals.items()}


def _strongest(dec: Decomposition, share: float) -> tuple[Pairs, Tensor]:
    index = dec.importance_P.topk(round(share * len(dec.pairs))).indices.sort().values
    return dec.pairs.take(index), dec.strength_P[index]


def _map_all(dec: Decomposition, inputs: AttentionInputs, acts: dict[str, Tensor]) -> Tensor:
    """The pattern with every pair kept, biases included as features: by the map's rows rather than by `decode`."""
    q = torch.einsum("btf,fnh->btnh", with_bias(acts["query"]), rows(dec.query, dec.shape.N))
    k = torch.einsum("btf,fgh->btgh", with_bias(acts["key"]), rows(dec.key, dec.shape.G))
    return inputs.rule.log_pattern(q, k)


def _check_map(dec: Decomposition, inputs: AttentionInputs) -> float:
    """Largest difference of log-patterns between q̂k̂ and the sum over every pair of active features, one by one."""
    t = min(CHECK_TOKENS, inputs.x_BTD.shape[1])
    short = AttentionInputs(
        inputs.x_BTD[:1, :t], inputs.q_BTNH[:1, :t], inputs.k_BTGH[:1, :t], inputs.rule.crop(t), inputs.real_BT[:1, :t],
        inputs.residual,
    )  # fmt: skip
    heads = [short.rule.cap(explicit_scores(dec, short, head)) for head in range(dec.shape.N)]
    one_by_one = _masked(short, torch.stack(heads, 1))
    difference = (one_by_one - dec.log_pattern_all(short)).abs()
    return float(difference[torch.isfinite(difference)].max())


def _add_active(active: Ratio, dec: Decomposition, inputs: AttentionInputs, acts: dict[str, Tensor]) -> None:
    """Kept pairs with both features active, for each (query, visible key, head)."""
    fires = {side: with_bias((a > 0).float()) for side, a in acts.items()}
    ones = torch.ones_like(dec.strength_P)
    none = torch.zeros(dec.query.width + 1, dec.shape.N, 1), torch.zeros(dec.key.width + 1, dec.shape.G, 1)
    counting = inputs.rule.plain()
    counts = pair_scores(dec.pairs, ones, fires["query"], fires["key"], *none, counting)
    seen = inputs.rule.visible_BQK & inputs.real_BT[..., None]
    weights = seen.sum((1, 2)).float() * dec.shape.N
    active.add((counts * seen[:, None]).sum((1, 2, 3)), weights)


def _pair_report(
    dec: Decomposition,
    found: dict[str, Any],
    active: Ratio,
    curve_kl: dict[float, dict[str, Any]],
    curve: dict[float, tuple[Pairs, Tensor]],
) -> dict[str, Any]:
    """Kept pairs as shares: of all between the features that step 1 trained, and of those between what lives now.

    Each side's bias counts as a feature in both.
    """
    kept, heads = len(dec.pairs), dec.shape.N
    trained = dec.width_trained  # tune drops features with their last pair; a share is of what it began with
    total = (trained["query"] + 1) * (trained["key"] + 1) * heads
    live = (found["query"]["live"] + 1) * (found["key"]["live"] + 1) * heads
    bias_q, bias_k = dec.pairs.query_P == dec.pairs.n_query, dec.pairs.key_P == dec.pairs.n_key
    worth = dec.importance_P.sum().clamp(min=1e-30)
    return {
        "kept": kept,
        "total": total,
        "total_live": live,
        "share_of_total": kept / total,
        "share_of_live": kept / live,
        "active_per_score": active.figure(),
        "with_query_bias": {"kept": int(bias_q.sum()), "importance": float(dec.importance_P[bias_q].sum() / worth)},
        "with_key_bias": {"kept": int(bias_k.sum()), "importance": float(dec.importance_P[bias_k].sum() / worth)},
        "per_head": torch.bincount(dec.pairs.head_P, minlength=heads).tolist(),
        "curve": [{"kept": len(curve[share][0]), "pattern_kl": kl} for share, kl in curve_kl.items()],
    }
