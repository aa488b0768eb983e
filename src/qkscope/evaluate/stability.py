"""Do two runs of one layer find the same? Features matched by when they fire, and the pairs between matched features.

A feature recurs in the other run if some feature there has activations of cosine `SAME` or more with its own, over
held-out tokens. A pair recurs if the other run keeps, in the same head, a pair of the features that its two sides match
(a bias matches the bias). Chance is what untrained random dictionaries of the same width and L0 match, and for pairs
what recurs once the other run's key features are permuted within each head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSite
from ..data.sequences import Batch
from ..decomposition import SIDES, Decomposition
from ..dictionary import SparseTranscoder
from ..pairs.pair_map import Pairs
from ..pattern import AttentionInputs
from ..training.stream import harvest_finite
from .controls import shuffled_pairs, untrained
from .measure import sample_l0

SAME = 0.7  # cosine: half of a feature's energy


@dataclass
class Overlap:
    """Cosines of one side's activations in two dictionaries, summed up over batches."""

    products: Tensor
    """[F of the one, F of the other], float64."""
    one: Tensor
    other: Tensor

    @classmethod
    def empty(cls, n_one: int, n_other: int, device: torch.device | str = "cpu") -> Overlap:
        sizes = ((n_one, n_other), (n_one,), (n_other,))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, one_nF: Tensor, other_nF: Tensor) -> None:
        a, b = one_nF.double(), other_nF.double()
        self.products += a.T @ b
        self.one += a.square().sum(0)
        self.other += b.square().sum(0)

    def cosines(self) -> Tensor:
        """[F of the one, F of the other]; 0 for a feature that never fired."""
        return self.products / (self.one[:, None] * self.other).sqrt().clamp(min=1e-12)


@torch.no_grad()
def recurrence(
    one: Decomposition,
    other: Decomposition,
    site: AttentionSite,
    heldout: Iterable[Batch],
    sample: list[AttentionInputs],
) -> dict[str, Any]:
    """What of `one` recurs in `other`: shares of its live features and of its pairs' importance, with chance beside."""
    chance = untrained(other, sample, sample_l0(other, sample))["random"]
    overlaps = {
        (name, side): Overlap.empty(_of(one, side).width, _of(dec, side).width, _of(one, side).W_dec.device)
        for name, dec in (("other", other), ("chance", chance))
        for side in SIDES
    }
    for batch in heldout:
        x_nD = harvest_finite(site, batch).x_BTD[batch.real_BT].float()
        for (name, side), overlap in overlaps.items():
            overlap.add(_of(one, side).encode(x_nD), _of(other if name == "other" else chance, side).encode(x_nD))
    out: dict[str, Any] = {}
    for side in SIDES:
        live = overlaps["other", side].one > 0
        best = {name: overlaps[name, side].cosines().amax(1)[live] for name in ("other", "chance")}
        out[side] = {
            "live": int(live.sum()),
            "recur": float((best["other"] >= SAME).double().mean()),
            "cosine": float(best["other"].mean()),
            "chance": float((best["chance"] >= SAME).double().mean()),
        }
    matched = [_matched(overlaps["other", side]) for side in SIDES]
    out["pairs"] = {
        "kept": len(one.pairs),
        "recur": _pair_share(one, matched, other.pairs),
        "chance": _pair_share(one, matched, shuffled_pairs(other)[0]),
    }
    return out


def _of(dec: Decomposition, side: str) -> SparseTranscoder:
    return dec.query if side == "query" else dec.key


def _matched(overlap: Overlap) -> Tensor:
    """The other run's feature that each one is, -1: none; the bias, which stands last in both, is the bias."""
    best, index = overlap.cosines().max(1)
    return torch.cat([index.where(best >= SAME, -1), index.new_tensor([len(overlap.other)])])


def _pair_share(one: Decomposition, matched: list[Tensor], kept: Pairs) -> float:
    """Share of importance of one run's pairs whose match is among the other's."""
    pairs = one.pairs
    a, b = matched[0][pairs.query_P], matched[1][pairs.key_P]
    place = (pairs.head_P * (kept.n_query + 1) + a) * (kept.n_key + 1) + b
    there = (kept.head_P * (kept.n_query + 1) + kept.query_P) * (kept.n_key + 1) + kept.key_P
    recurs = (a >= 0) & (b >= 0) & torch.isin(place, there)
    worth = one.importance_P.double()
    return float(worth[recurs].sum() / worth.sum().clamp(min=1e-30))
