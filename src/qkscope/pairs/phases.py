"""Which trainings step 2 consists of."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import PairsConfig
from .selection import ladder

HALVINGS = 6  # with a KL bound, tune goes on below `count` by halves, so many times at the most
LEAST = 10  # pairs; under a target the halves end here


@dataclass
class Phase:
    """One training of step 2: how many pairs are kept, and for how many tokens what is trained."""

    name: str
    count: int
    tokens: int
    judged: bool = False
    """Its map is held against the bounds, and a job that does not satisfy them ends."""
    spare: bool = False
    """Kept only while it satisfies the bounds: there is a larger map before it."""


def phases_of(pairs: PairsConfig, *, target: bool = False) -> list[Phase]:
    """Step 2's trainings in their order; none where pairs are only ranked.

    `target`: nobody said how many pairs; every halving is judged, from the first stage on.
    """
    if pairs.method == "importance" or pairs.tokens == 0:
        return []
    if pairs.method in ("refit", "mask"):
        return [Phase(pairs.method, pairs.count, pairs.tokens)]
    tokens = max(pairs.tokens // pairs.stages, 1)
    if target:
        first = round(pairs.first * pairs.count)
        counts = [first >> i for i in range(first.bit_length()) if first >> i >= LEAST] or [first]
        return [Phase(f"tune{i}", count, tokens, judged=True, spare=i > 1) for i, count in enumerate(counts, start=1)]
    counts = ladder(pairs.first, pairs.count, pairs.stages)
    bounded = pairs.max_kl is not None
    phases = [Phase(f"tune{i}", count, tokens, bounded and i == len(counts)) for i, count in enumerate(counts, start=1)]
    if bounded:
        halves = [pairs.count >> i for i in range(1, HALVINGS + 1) if pairs.count >> i]
        phases += [Phase(f"tune{len(counts) + i}", c, tokens, True, True) for i, c in enumerate(halves, start=1)]
    return phases
