"""An account: one number as a sum of signed pair terms and of what no pair of the map says.

    total = Σ_pairs value + Σ rest

A score, or a log-odds, is explained by few pairs where its few largest terms, of either sign, already add up to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EXPLAINED = 0.9  # share of a number from which it counts as explained


@dataclass(frozen=True)
class Account:
    """Terms by falling size, whatever their sign; S of them, at least one of which may be a side's bias (-1)."""

    query_S: Tensor
    """int64: query features, -1 the bias."""
    key_S: Tensor
    """int64: key features, -1 the bias."""
    value_S: Tensor
    """float32: what each pair adds, in units of the score."""
    rest: Mapping[str, float]
    """What else adds to the total, by name: `dropped` (pairs that are not kept), `error` (of the transcoders), …"""
    total: float

    @classmethod
    def of(cls, query_S: Tensor, key_S: Tensor, value_S: Tensor, rest: Mapping[str, float], total: float) -> Account:
        """The same in any order; terms of zero are left out."""
        order = value_S.abs().argsort(descending=True, stable=True)
        order = order[value_S[order] != 0]
        return cls(query_S[order], key_S[order], value_S[order], rest, total)

    def __len__(self) -> int:
        return len(self.value_S)

    @property
    def pairs(self) -> float:
        """What all pairs add together."""
        return float(self.value_S.double().sum())

    def fewest(self, share: float = EXPLAINED, total: float | None = None) -> int | None:
        """How many of the largest terms add up to the total within 1 - share of it; None where no number does.

        Terms are taken by size, helping and hindering alike: a set picked to cancel its own excess does not count.
        `total`: another number than the account's, e.g. what all its pairs come to.
        """
        total = self.total if total is None else total
        left = (self.value_S.double().cumsum(0) - total).abs()
        enough = (left <= (1 - share) * abs(total)).nonzero()
        return int(enough[0]) + 1 if len(enough) else None

    def top(self, count: int) -> list[tuple[int, int, float]]:
        """The largest terms: (query feature, key feature, value)."""
        return list(
            zip(*(t[:count].tolist() for t in (self.query_S, self.key_S, self.value_S)), strict=True)  # type: ignore[arg-type]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [{"query_feature": a, "key_feature": b, "value": v} for a, b, v in self.top(len(self))]
        return {"total": self.total, "pairs": self.pairs, "rest": dict(self.rest), "terms": rows}
