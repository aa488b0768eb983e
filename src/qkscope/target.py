"""A target in place of numbers: bounds on the pattern's KL and on the model's cross-entropy.

1. Step 1 is steered to a share of the bound (training/steering.py), so nobody says k.
2. A bound on cross-entropy is turned into a KL for that: what small errors of the layer's pattern cost the model is
   measured with the untrained dictionaries, whose errors are scaled down until they have about the KL in question.
3. Tune prunes by halves for as long as validation text stays under the bounds themselves (one_pass.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionSite
from .config import RunConfig, TargetConfig
from .data import Batch
from .decomposition import Decomposition
from .dictionary import SparseTranscoder
from .errors import UserError
from .evaluate.patched import PatchedScore, as_source
from .evaluate.patterns import KLScore
from .pattern import AttentionInputs, HeadPatterns
from .training.stream import harvest_finite

STEERED = ("batchtopk", "jumprelu")  # activations whose k can be any number
SCALES = (1.0, 0.5, 0.25, 0.12)  # of the untrained dictionaries' errors


@dataclass(frozen=True)
class Bounds:
    """What a pruned map may cost on validation text; None: no bound."""

    kl: float | None
    """Pattern KL, nats."""
    ce: float | None = None
    """Increase of cross-entropy, nats a token."""


@dataclass(frozen=True)
class Cost:
    """What a pruned map does cost there."""

    kl: float
    ce: float | None = None

    def within(self, bounds: Bounds) -> bool:
        return (bounds.kl is None or self.kl <= bounds.kl) and (
            bounds.ce is None or (self.ce is not None and self.ce <= bounds.ce)
        )

    def said(self, bounds: Bounds) -> str:
        """What is bounded, as a person reads it."""
        parts = []
        for what, value, bound in (("KL", self.kl, bounds.kl), ("cross-entropy increase", self.ce, bounds.ce)):
            if bound is not None and value is not None:
                under = "under" if value <= bound else "NOT under"
                parts.append(f"validation {what} {value:.4f}, {under} the bound of {bound:g}")
        return "; ".join(parts)


def bounds_of(config: RunConfig) -> Bounds | None:
    """The bounds that a run's pairs are to satisfy; None where it is told a count."""
    if config.target.given:
        return Bounds(config.target.max_kl, config.target.max_ce)
    return None if config.pairs.max_kl is None else Bounds(config.pairs.max_kl)


def require_target(config: RunConfig, variants: Iterable[RunConfig], sites: Sequence[AttentionSite]) -> None:
    """`UserError` for options that a target does not go with."""
    target, pairs = config.target, config.pairs
    if not target.given:
        return
    if pairs.max_kl is not None:
        raise UserError(f"--pairs.max-kl {pairs.max_kl:g}: --target bounds the pairs too; leave one of them out")
    if pairs.tokens == 0:
        raise UserError("--pairs.tokens 0: a --target prunes by tune, which trains; leave one of them out")
    if pairs.method != "tune":
        raise UserError(f"--pairs.method {pairs.method}: a --target prunes by tune; leave one of them out")
    for k in config.sweep.k:
        raise UserError(f"--sweep.k {k:g}: a --target finds k; leave one of them out")
    for dictionary in (variant.dictionary for variant in variants):
        if dictionary.activation not in STEERED:
            said = f"activation {dictionary.activation} (recipe {dictionary.recipe})"
            raise UserError(f"{said}: a --target finds k, any number; choose batchtopk or jumprelu")
    if target.max_ce is not None and not sites[0].has_head:
        raise UserError(f"--target.max-ce {target.max_ce:g}: this model predicts no tokens; use --target.max-kl")


def outcome(target: TargetConfig, report: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, and whether the pruned map stays under it on held-out text: `target` in report.json."""
    ce = report.get("ce_increase", {}).get("map_pruned", {}).get("mean")
    cost = Cost(report["pattern_kl"]["map_pruned"]["mean"], ce)
    return {**target.model_dump(), "reached": cost.within(Bounds(target.max_kl, target.max_ce))}


@torch.no_grad()
def cost_of(dec: Decomposition, site: AttentionSite, batches: Sequence[Batch], bounds: Bounds) -> Cost:
    """What a decomposition's pruned map costs on these batches."""
    score, patched = KLScore(), PatchedScore()
    for batch in batches:
        inputs = harvest_finite(site, batch)
        kept = dec.kept_by_head(inputs)
        score.add(inputs, kept)
        if bounds.ce is not None:
            patched.add(site, batch, {"map": as_source(kept)})
    return Cost(score.kl.figure()["mean"], None if bounds.ce is None else patched.increase("map")["mean"])


@torch.no_grad()
def step1_kl(
    bounds: Bounds, share: float, query: SparseTranscoder, key: SparseTranscoder, x_nD: Tensor, site: AttentionSite,
    batches: Sequence[Batch],
) -> float:  # fmt: skip
    """The pattern KL that step 1 is steered to: this share of what the bounds allow, in nats.

    `query` and `key` are untrained, and left as they are; `x_nD` sets their thresholds for the occasion. What
    cross-entropy a KL costs depends on the layer and on how large the KL is. The logits' KL stands for it: it is less
    noisy and, for errors that know nothing of the next token, the same on average.
    """
    found = [] if bounds.kl is None else [share * bounds.kl]
    if bounds.ce is not None:
        before = [t.threshold.detach().clone() for t in (query, key)]
        for transcoder in (query.eval(), key.eval()):
            transcoder.calibrate(x_nD)
        points = [_paid(scaled_errors(query, key, scale), site, batches) for scale in SCALES]
        for transcoder, threshold in zip((query.train(), key.train()), before, strict=True):
            transcoder.threshold.copy_(threshold)
        found.append(kl_for(share * bounds.ce, points))
    return min(found)


def kl_for(loss: float, points: Sequence[tuple[float, float]]) -> float:
    """The KL at which this much is lost, by points (KL, loss), between which both go as powers of each other.

    Below the points loss is taken to be in proportion to KL; above them, KL is that of the last.
    """
    known = sorted((max(y, 1e-9), max(x, 1e-9)) for x, y in points)
    if loss <= known[0][0]:
        return known[0][1] * loss / known[0][0]
    for (y0, x0), (y1, x1) in itertools.pairwise(known):
        if loss <= y1:
            return x0 * (x1 / x0) ** (math.log(loss / y0) / math.log(y1 / y0))
    return known[-1][1]


def _paid(
    log_pattern: Callable[[AttentionInputs], HeadPatterns], site: AttentionSite, batches: Sequence[Batch]
) -> tuple[float, float]:
    """Pattern KL and logit KL of a log-pattern."""
    score, patched = KLScore(), PatchedScore()
    for batch in batches:
        inputs = harvest_finite(site, batch)
        scaled = log_pattern(inputs)
        score.add(inputs, scaled)
        patched.add(site, batch, {"scaled": as_source(scaled)})
    return score.kl.figure()["mean"], patched.kl["scaled"].figure()["mean"]


def scaled_errors(
    query: SparseTranscoder, key: SparseTranscoder, scale: float
) -> Callable[[AttentionInputs], HeadPatterns]:
    """The log-pattern of dictionaries with their errors of queries and keys scaled."""

    def log_pattern(inputs: AttentionInputs) -> HeadPatterns:
        x, q, k = inputs.x_BTD.float(), inputs.q_BTNH.float(), inputs.k_BTGH.float()
        q_hat, k_hat = query(x).view(q.shape), key(x).view(k.shape)
        return inputs.rule.log_pattern_by_head(q + scale * (q_hat - q), k + scale * (k_hat - k))

    return log_pattern
