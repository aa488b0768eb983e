"""Which trainings step 2 consists of."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import PairsConfig
from .selection import ladder

HALVINGS = 6  # with a KL bound, tune goes on below `count` by halves, so many times at the most


@dataclass
class Phase:
    """One training of step 2: how many pairs are kept, and for how many tokens what is trained."""

    name: str
    count: int
    tokens: int
    spare: bool = False
    """Below the asked count; kept only while it satisfies the KL bound."""


def phases_of(pairs: PairsConfig) -> list[Phase]:
    """Step 2's trainings in their order; none where pairs are only ranked."""
    if pairs.method == "importance" or pairs.tokens == 0:
        return []
    if pairs.method in ("refit", "mask"):
        return [Phase(pairs.method, pairs.count, pairs.tokens)]
    counts = ladder(pairs.first, pairs.count, pairs.stages)
    tokens = max(pairs.tokens // pairs.stages, 1)
    phases = [Phase(f"tune{i}", count, tokens) for i, count in enumerate(counts, start=1)]
    if pairs.max_kl is not None:
        halves = [pairs.count >> i for i in range(1, HALVINGS + 1) if pairs.count >> i]
        phases += [Phase(f"tune{len(counts) + i}", c, tokens, spare=True) for i, c in enumerate(halves, start=1)]
    return phases
