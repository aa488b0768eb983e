"""On which tokens each feature fires, and how strongly, in bounded memory.

What is notable: at most `TOKENS_KEPT` entries a feature, and still the same result for every order of the text. Each
firing has a level, the zeros at the end of its place's hash; a feature with too many entries counts on those of higher
levels alone, half as many each time (adaptive sampling: Flajolet 1990). Levels only rise, and what is of a feature's
last level was never left out. A feature that fires on few tokens is counted exactly.

Shapes: F features, E firings that come in, Z entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_KEPT = 256  # entries (a token at a level) a feature: 6 KB
LEVEL_BITS, TOKEN_BITS = 6, 32


class TokenCounts:
    """How often, and how strongly in sum, each feature fires on each token."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.level_F = torch.zeros(width, dtype=torch.int64, device=device)
        self.key_Z = torch.zeros(0, dtype=torch.int64, device=device)  # feature, token and level in one number; sorted
        self.count_Z = torch.zeros(0, dtype=torch.int64, device=device)
        self.sum_Z = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, feature_E: Tensor, token_E: Tensor, value_E: Tensor, hash_E: Tensor) -> None:
        """Count firings: `token` is what the text has there, `hash` that of the place."""
        level_E = _final_zeros(hash_E)
        counts = (level_E >= self.level_F[feature_E]).nonzero()[:, 0]
        feature, token, level = feature_E[counts], token_E[counts], level_E[counts]
        key = (((feature << TOKEN_BITS) + token) << LEVEL_BITS) + level
        self._take_in(key, torch.ones_like(key), value_E[counts].double())

    def merge(self, other: TokenCounts) -> None:
        self.level_F = torch.maximum(self.level_F, other.level_F)
        self._take_in(other.key_Z, other.count_Z, other.sum_Z)

    def _take_in(self, key: Tensor, count: Tensor, total: Tensor) -> None:
        self.key_Z, place = torch.cat([self.key_Z, key]).unique(return_inverse=True)
        zeros = torch.zeros_like(self.key_Z)
        self.count_Z = zeros.index_add(0, place, torch.cat([self.count_Z, count]))
        self.sum_Z = zeros.double().index_add_(0, place, torch.cat([self.sum_Z, total]))
        while True:
            feature = self.key_Z >> (TOKEN_BITS + LEVEL_BITS)
            keep = (self.key_Z & ((1 << LEVEL_BITS) - 1)) >= self.level_F[feature]
            self.key_Z, self.count_Z, self.sum_Z = self.key_Z[keep], self.count_Z[keep], self.sum_Z[keep]
            full = torch.bincount(feature[keep], minlength=len(self.level_F)) > TOKENS_KEPT
            if not bool(full.any()):
                return
            self.level_F += full

    def top(self, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each feature's `most` most frequent tokens: feature, token, count (an estimate where its level is above 0)
        and mean activation, [R] each, ordered by feature and falling count."""
        token_key, place = (self.key_Z >> LEVEL_BITS).unique(return_inverse=True)
        count = torch.zeros_like(token_key).index_add(0, place, self.count_Z)
        mean = torch.zeros_like(token_key).double().index_add(0, place, self.sum_Z) / count
        order = count.argsort(descending=True, stable=True)  # of equal counts the token with the lower number first
        order = order[(token_key >> TOKEN_BITS)[order].argsort(stable=True)]
        feature = (token_key >> TOKEN_BITS)[order]
        sizes = torch.bincount(feature, minlength=len(self.level_F))
        rank = torch.arange(len(feature), device=feature.device) - (sizes.cumsum(0) - sizes)[feature]
        order, feature = order[rank < most], feature[rank < most]
        return feature, token_key[order] & ((1 << TOKEN_BITS) - 1), count[order] << self.level_F[feature], mean[order]


def _final_zeros(numbers: Tensor) -> Tensor:
    """Zeros at the end of each number's binary form, at most 62."""
    lowest = numbers & -numbers
    return lowest.double().abs().clamp(min=1).log2().long().masked_fill(numbers == 0, 62).clamp(max=62)
