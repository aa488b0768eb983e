"""A figure: a mean over tokens with a 95 % interval over sequences.

Tokens of one sequence are not independent, so the interval is that of a ratio of sums with the sequence as the unit
(linearised), with Student's t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Z = 1.959963984540054
FEW = (12.706204736, 4.302652730, 3.182446305)  # Student's quantiles at 1, 2 and 3 degrees, where the expansion is poor


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t, by the Cornish-Fisher expansion from 4 degrees on (within 1 %)."""
    if degrees <= 0:
        return math.inf
    if degrees <= len(FEW):
        return FEW[degrees - 1]
    v = degrees
    return (
        Z
        + (Z**3 + Z) / (4 * v)
        + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * v**2)
        + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * v**3)
    )


@dataclass
class Ratio:
    """Sums of a quantity and of its weight, a sequence at a time; both may have trailing dimensions (e.g. heads)."""

    sums: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, sums_B: Tensor, weights_B: Tensor) -> None:
        self.sums.append(sums_B.detach().double().cpu())
        self.weights.append(weights_B.detach().double().cpu().expand_as(sums_B))

    def merge(self, other: Ratio) -> None:
        """Take in what follows in the text."""
        self.sums += other.sums
        self.weights += other.weights

    def totals(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.sums), torch.cat(self.weights)

    @property
    def mean(self) -> float:
        sums, weights = self.totals()
        return float(sums.sum() / weights.sum())

    def figure(self) -> dict[str, Any]:
        """{"mean", "ci95"} of the whole; the interval is null with a single sequence."""
        sums, weights = self.totals()
        return ratio_figure(sums.reshape(len(sums), -1).sum(1), weights.reshape(len(weights), -1).sum(1))

    def per_part(self) -> list[dict[str, Any]]:
        """A figure for each place along the trailing dimension (each head)."""
        sums, weights = self.totals()
        return [ratio_figure(sums[:, n], weights[:, n]) for n in range(sums.shape[1])]


def ratio_figure(sums_S: Tensor, weights_S: Tensor) -> dict[str, Any]:
    """Σ sums / Σ weights with its 95 % interval over sequences S."""
    total = float(weights_S.sum())
    if total == 0:
        return {"mean": None, "ci95": None}
    mean = float(sums_S.sum()) / total
    used = int((weights_S != 0).sum())
    if used < 2:
        return {"mean": mean, "ci95": None}
    residual = sums_S - mean * weights_S
    error = math.sqrt(float(residual.square().sum()) * used / (used - 1)) / abs(total)
    half = t_quantile(used - 1) * error
    return {"mean": mean, "ci95": [mean - half, mean + half]}
