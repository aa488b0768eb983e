"""One pass over held-out text that measures all a decomposition claims, beside baselines and controls.

A long text may be measured in parts, by several processes: `Sums` of its parts merge into those of the whole. Report.py
makes figures of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSite
from ..data.sequences import Batch
from ..decomposition import SIDES, Decomposition
from ..pairs.active import Active
from ..pairs.pair_map import Pairs, active_scores_by_head, rows, with_bias
from ..pattern import AttentionInputs, HeadPatterns
from ..tables.examples import Examples
from ..training.stream import harvest_finite
from .controls import explicit_scores, shuffled_pairs, untrained
from .figures import Ratio, t_quantile
from .patched import PatchedScore, as_source, zero_pattern
from .patterns import KLScore, MeanPattern, PatternScores, add_kls, uniform_log_pattern, uniform_pattern

DENSE = 0.1  # a feature that fires on more than this share of tokens is dense
HISTOGRAM_EDGES = [-6 + 0.25 * i for i in range(25)]  # log10 of the share of tokens a feature fires on
CURVE = (1.0, 0.5, 0.25, 0.125, 0.0625)  # shares of the kept pairs at which the pruned map is measured again
CONTROLS = ("random", "svd", "shuffled")
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

    def merge(self, other: Activity) -> None:
        """Take in what follows in the text."""
        self.counts += other.counts
        self.lengths += other.lengths

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


@dataclass
class Sums:
    """What is added up over a text."""

    examples: Examples
    scores: PatternScores = field(default_factory=PatternScores)
    curve: dict[float, KLScore] = field(default_factory=dict)
    """By share of the kept pairs."""
    activity: dict[str, Activity] = field(default_factory=lambda: {side: Activity() for side in SIDES})
    active: Ratio = field(default_factory=Ratio)
    """Kept pairs with both features active, for each (query, visible key, head)."""
    patched: PatchedScore = field(default_factory=PatchedScore)
    tokens: int = 0
    sequences: int = 0
    check: float | None = None
    """Of the first batch: how far q̂k̂ is from the sum over every pair of active features, one by one."""

    def merge(self, other: Sums) -> None:
        """Take in those of what follows in the text."""
        self.examples.merge(other.examples)
        self.scores.merge(other.scores)
        for share, score in other.curve.items():
            self.curve.setdefault(share, KLScore()).kl.merge(score.kl)
        for side, activity in self.activity.items():
            activity.merge(other.activity[side])
        self.active.merge(other.active)
        self.patched.merge(other.patched)
        self.tokens += other.tokens
        self.sequences += other.sequences
        self.check = other.check if self.check is None else self.check


@dataclass(frozen=True)
class Sources:
    """What is held against the true pattern."""

    log_patterns: dict[str, Callable[[AttentionInputs], HeadPatterns]]
    mean: MeanPattern
    curve: dict[float, tuple[Pairs, Tensor]]
    """The most important of the kept pairs, by share."""

    @classmethod
    def of(
        cls,
        dec: Decomposition,
        sample: list[AttentionInputs],
        *,
        step1: Decomposition | None = None,
        controls: bool = True,
    ) -> Sources:
        """Those of one layer.

        `sample` is training text (for the mean pattern and the controls' starts), `step1` the dictionaries before they
        were tuned, where they were.
        """
        mean = MeanPattern(sample)
        found: dict[str, Callable[[AttentionInputs], HeadPatterns]] = {
            "transcoders": dec.all_by_head,
            "map_pruned": dec.kept_by_head,
            "uniform": uniform_log_pattern,
            "mean": mean.log,
        }
        if step1 is not None:
            found["step1"] = step1.all_by_head
        if controls:
            found |= {name: c.all_by_head for name, c in untrained(dec, sample, sample_l0(dec, sample)).items()}
            pairs, strength = shuffled_pairs(dec)
            found["shuffled"] = lambda inputs: dec.kept_by_head(inputs, pairs, strength)
        return cls(found, mean, {share: _strongest(dec, share) for share in CURVE if round(share * len(dec.pairs))})


def measure(
    dec: Decomposition, site: AttentionSite, text: Iterable[Batch], sources: Sources, examples: Examples
) -> Sums:
    """Add up over a text, and collect examples of features and pairs on the way."""
    sums = Sums(examples)
    for batch in text:
        inputs = harvest_finite(site, batch)
        acts = {s: t.encode(inputs.x_BTD.float()) for s, t in zip(SIDES, (dec.query, dec.key), strict=True)}
        for side in SIDES:
            sums.activity[side].add(acts[side], batch.real_BT)
        examples.add(batch, acts, inputs)
        patterns = {name: source(inputs) for name, source in sources.log_patterns.items()}
        patterns["map_all"] = _map_all(dec, inputs, acts)
        sums.scores.add(inputs, patterns)
        kept = {share: dec.kept_by_head(inputs, *pairs) for share, pairs in sources.curve.items()}
        add_kls(inputs, {sums.curve.setdefault(share, KLScore()): hat for share, hat in kept.items()})
        _add_active(sums.active, dec, inputs, acts)
        if sums.check is None:
            sums.check = _check_map(dec, inputs)
        if site.has_head:
            again = [name for name in ("transcoders", "map_pruned", "step1") if name in patterns]
            variants = {name: as_source(patterns[name]) for name in again}
            variants |= {"zero": zero_pattern, "uniform": uniform_pattern, "mean": sources.mean}
            sums.patched.add(site, batch, variants)
            del variants
        del patterns, kept  # before those of the next batch are made
        sums.tokens += batch.n_tokens
        sums.sequences += len(batch.tokens_BT)
    return sums


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


def _map_all(dec: Decomposition, inputs: AttentionInputs, acts: dict[str, Tensor]) -> HeadPatterns:
    """The pattern with every pair kept, biases included as features: by the map's rows rather than by `decode`."""
    q = torch.einsum("btf,fnh->btnh", with_bias(acts["query"]), rows(dec.query, dec.shape.N))
    k = torch.einsum("btf,fgh->btgh", with_bias(acts["key"]), rows(dec.key, dec.shape.G))
    return inputs.rule.log_pattern_by_head(q, k)


def _check_map(dec: Decomposition, inputs: AttentionInputs) -> float:
    """Largest difference of log-patterns between q̂k̂ and the sum over every pair of active features, one by one."""
    short = inputs.crop(min(CHECK_TOKENS, inputs.x_BTD.shape[1]))
    heads = [short.rule.cap(explicit_scores(dec, short, head)) for head in range(dec.shape.N)]
    one_by_one = short.rule.masked(torch.stack(heads, 1)).log_softmax(-1)
    difference = (one_by_one - dec.log_pattern_all(short)).abs()
    return float(difference[torch.isfinite(difference)].max())


def _add_active(active: Ratio, dec: Decomposition, inputs: AttentionInputs, acts: dict[str, Tensor]) -> None:
    fires = {side: with_bias((a > 0).float()) for side, a in acts.items()}
    ones = torch.ones_like(dec.strength_P)
    both = Active.of(fires["query"]), Active.of(fires["key"])
    counts = active_scores_by_head(
        dec.pairs, ones, *both, lambda: (rows(dec.query, dec.shape.N), rows(dec.key, dec.shape.G)), inputs.rule.plain()
    )
    seen = inputs.rule.visible_BQK & inputs.real_BT[..., None]
    counted_B = torch.zeros(len(seen), device=seen.device)
    for heads in inputs.head_blocks():
        counted_B += (counts(heads) * seen[:, None]).sum((1, 2, 3))
    active.add(counted_B, seen.sum((1, 2)).float() * dec.shape.N)
