"""Step 2's jobs: train what is kept, through the sparse map, on the pattern's KL.

`refit` trains one factor a pair and nothing else. `tune` trains the dictionaries too, so that features arrange
themselves to need few pairs; between its stages the map is pruned by importance. In both a pair's strength is its
factor times what its decoder rows give, so Adam's steps are relative to each pair's own size.

Nothing in the KL through the map says what a dropped pair's decoder rows give, and they drift until the dictionaries
reproduce the pattern through the kept pairs alone (on one layer the KL of q̂k̂ went from 0.10 to 0.73 nats while that of
the map stood at 0.21). So tune has the pair penalty on the dropped pairs: they are made small, not merely left out.

A feature that no kept pair names has no say in any score: tune drops it with its last pair, so that the active features
a token may have are spent on those that matter. (Left in, a third to a half of them died.) And a pair without any
importance goes after each stage, be it the last, for its features have died or never meet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..dictionary import SparseTranscoder
from ..kernels.mostly_zero import MostlyZero, count
from ..pattern import PatternRule
from ..training.job import Job
from ..training.objective import PatternTarget, sparsity_loss
from ..training.pair_penalty import pair_penalty
from .active import Active
from .pair_map import Pairs, active_kl, rows, weight_strength


class MapJob(Job):
    """A sparse map between two dictionaries."""

    query_P: Tensor
    key_P: Tensor
    head_P: Tensor

    def __init__(
        self,
        layer: int,
        variant: str,
        query: SparseTranscoder,
        key: SparseTranscoder,
        pairs: Pairs,
        *,
        dictionary_rate: float,
        strength_rate: float,
        sparsity: float = 0.0,
        dropped_sparsity: float = 0.0,
    ) -> None:
        super().__init__(layer, variant, query, key)
        self.n_heads = pairs.n_heads
        self.dictionary_rate, self.strength_rate = dictionary_rate, strength_rate
        self.sparsity, self.dropped_sparsity = sparsity, dropped_sparsity
        # ReLU dictionaries: L0 of the first batch, which the penalty keeps them at. Without it they grow dense to lower
        # the KL; with all of it they go on growing sparse, L0 14.8 to 7.9 in a short tune at more KL than without tune.
        self.register_buffer("l0_query", torch.zeros(()))
        self.register_buffer("l0_key", torch.zeros(()))
        self.register_buffer("query_P", pairs.query_P)
        self.register_buffer("key_P", pairs.key_P)
        self.register_buffer("head_P", pairs.head_P)
        self.factor_P = nn.Parameter(torch.ones(len(pairs), device=query.W_dec.device))
        self._pairs: Pairs | None = None
        self._frozen_P: tuple[Tensor, Tensor] | None = None  # of which pairs, and their weights' strengths
        self.worth_P: Tensor | None = None  # importance of the pairs as last measured, for the next pruning
        self.train()

    def train(self, mode: bool = True) -> MapJob:
        """Dictionaries that are not tuned stay in evaluation mode: their thresholds are what a reader will use."""
        super().train(mode)
        for side in (self.query, self.key):
            side.train(mode and self.dictionary_rate > 0)
        return self

    @property
    def pairs(self) -> Pairs:
        """The kept pairs; rebuilt when a checkpoint or a pruning has changed them."""
        if self._pairs is None or self._pairs.query_P is not self.query_P:
            self._pairs = Pairs(self.query_P, self.key_P, self.head_P, self.query.width, self.key.width, self.n_heads)
        return self._pairs

    def parameter_groups(self) -> list[dict]:
        """Parameters with their peak learning rate."""
        tuned = self.dictionary_rate > 0
        for side in (self.query, self.key):
            side.requires_grad_(tuned)
            side.threshold.requires_grad_(tuned and side.activation == "jumprelu")
        dictionaries = [p for side in (self.query, self.key) for p in side.parameters() if p.requires_grad]
        groups = [{"params": [self.factor_P], "lr": self.strength_rate, "peak": self.strength_rate}]
        if dictionaries:
            groups.append({"params": dictionaries, "lr": self.dictionary_rate, "peak": self.dictionary_rate})
        return groups

    def strengths(self, rule: PatternRule) -> Tensor:
        """What multiplies a pair's activations before the scale (with a rotary embedding: its M(i-j)), [P]."""
        if rule.rotary is not None:
            return self.factor_P
        if self.dictionary_rate > 0:
            return self.factor_P * self._weights(rule)
        if self._frozen_P is None or self._frozen_P[0] is not self.query_P:
            self._frozen_P = self.query_P, self._weights(rule).detach()
        return self.factor_P * self._frozen_P[1]

    def _weights(self, rule: PatternRule) -> Tensor:
        return weight_strength(self.pairs, rows(self.query, self.n_heads), rows(self.key, self.n_groups(rule)))

    def n_groups(self, rule: PatternRule) -> int:
        head_width = self.query.W_dec.shape[1] // self.n_heads
        return self.key.W_dec.shape[1] // head_width

    def kl_rows(self, target: PatternTarget) -> tuple[Tensor, dict[str, Active]]:
        """KL of each row under the sparse map, [B, N, Q], and each side's active features; without gradients.

        Of frozen dictionaries only features that a pair names are encoded, where they are few.
        """
        (_, kl_rows), active, _ = self._through_map(target)
        return kl_rows, active

    def _through_map(self, target: PatternTarget) -> tuple[tuple[Tensor, Tensor], dict[str, Active], Tensor]:
        """The mean KL and `kl_rows`, and the sparsity loss of both sides and of the dropped pairs."""
        active: dict[str, Active] = {}
        sparsity = target.x_nD.new_zeros(())
        if not self.dictionary_rate:
            for name, side, named in (("query", self.query, self.pairs.queries), ("key", self.key, self.pairs.keys)):
                active[name] = Active.read(side, target.x_nD, target.real_BT, named)
        else:
            acts: dict[str, Tensor | MostlyZero] = {}
            for name, side in (("query", self.query), ("key", self.key)):
                acts[name], pre = fired = side.fire(target.x_nD)
                active[name] = Active.on_tokens(side.reach(*fired), target.real_BT)
                if self._too_dense(name, acts[name]):
                    sparsity = sparsity + sparsity_loss(side, pre, acts[name], self.sparsity)
                del pre, fired  # at width as large as all that is trained
            if self.dropped_sparsity:
                kept = (self.query_P, self.key_P, self.head_P)
                penalty = pair_penalty(target, self.query, self.key, acts["query"], acts["key"], self.draw, free=kept)
                sparsity = sparsity + self.dropped_sparsity * penalty
        kl = active_kl(
            self.pairs,
            self.strengths(target.rule),
            active["query"],
            active["key"],
            lambda: (rows(self.query, self.n_heads), rows(self.key, self.n_groups(target.rule))),
            target.rule,
            target.by_head,
        )
        return kl, active, sparsity

    @torch.no_grad()
    def _too_dense(self, side: str, acts: Tensor | MostlyZero) -> bool:
        """Whether ReLU activations are denser than the first batch's; the other activations hold L0 themselves."""
        if getattr(self, side).activation != "relu":
            return True
        first, now = self.get_buffer(f"l0_{side}"), parallel.mean(count(acts) / len(acts))
        if self.training and not bool(first):
            first.copy_(now)
        return bool(now > first)

    def loss(self, target: PatternTarget, autocast: torch.autocast) -> tuple[Tensor, dict[str, Any]]:
        """KL(P ‖ P(sparse map)) and the dictionaries' sparsity on one batch, and what to log of it."""
        (kl, _), active, sparsity = self._through_map(target)
        log = {"pattern_kl": kl.detach(), "pairs": float(len(self.factor_P))}
        for side in ("query", "key"):
            log[f"l0_{side}"] = active[side].l0  # of refit: of the features that a pair names, where these are few
        return kl + sparsity, log

    @torch.no_grad()
    def keep(self, index: Tensor) -> None:
        """Prune to these of the pairs; tune also drops the features that none of them names."""
        index, self.worth_P = index.sort().values, None
        self.query_P, self.key_P, self.head_P = self.query_P[index], self.key_P[index], self.head_P[index]
        self.factor_P = nn.Parameter(self.factor_P.detach()[index])
        if self.dictionary_rate > 0:
            self.query_P, self.key_P = _narrow(self.query, self.query_P), _narrow(self.key, self.key_P)


def _narrow(side: SparseTranscoder, feature_P: Tensor) -> Tensor:
    """Drop a side's features that no pair names; the pairs' features by their new numbers.

    Where every pair names the bias, one feature stays: an empty dictionary has no activation to choose.
    """
    least = [side.width] if bool((feature_P < side.width).any()) else [0, side.width]
    used, new_P = torch.cat([feature_P, feature_P.new_tensor(least)]).unique(return_inverse=True)
    side.keep(used[:-1])  # the last one is the bias
    return new_P[: len(feature_P)]
