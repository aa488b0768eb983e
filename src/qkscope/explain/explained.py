"""How many pairs it takes to say why a head looks where it looks: over the confident rows of held-out text.

A row is confident where its most attended key has at least `CONFIDENT` of the attention and is not the first position.
Its log-odds against the strongest competitors is explained where the largest pairs, of either sign, add up to it within
1 - `EXPLAINED` (account.py): the model's own log-odds, where what the map misses counts as unexplained, or the map's,
which says how many pairs it needs for what it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..attention import AttentionSite
from ..data import Batch
from ..decomposition import Decomposition
from ..evaluate.figures import Ratio
from ..training.stream import harvest_finite
from .trace import Trace, Why

CONFIDENT = 0.5
FEW = (1, 3, 5, 10, 20, 50)  # numbers of pairs


@torch.no_grad()
def explained_rows(
    dec: Decomposition, site: AttentionSite, batches: Iterable[Batch], most: int = 2000
) -> dict[str, Any]:
    """Share of confident rows that at most 1, 3, … pairs explain; intervals over sequences.

    `most`: confident rows that are looked at, from as many sequences as it takes.
    """
    shares = {of: {n: Ratio() for n in FEW} for of in ("model", "map")}
    seen = 0
    for batch in batches:
        inputs = harvest_finite(site, batch)
        for b, length in enumerate(inputs.real_BT.sum(1).tolist()):
            if seen >= most:
                break
            accounts = [why.account for why in _confident(Trace.of_batch(dec, inputs, b, length))]
            seen += len(accounts)
            counts = {"model": [a.fewest() for a in accounts], "map": [a.fewest(total=a.pairs) for a in accounts]}
            for of, ratios in shares.items():
                for limit, ratio in ratios.items():
                    good = sum(n is not None and n <= limit for n in counts[of])
                    ratio.add(torch.tensor([float(good)]), torch.tensor([float(len(accounts))]))
        if seen >= most:
            break
    return {"rows": seen, **{of: {str(n): r.figure() for n, r in ratios.items()} for of, ratios in shares.items()}}


def _confident(first: Trace) -> Iterator[Why]:
    for head in range(first.dec.shape.N):
        one = first.of_head(head)
        top = one.pattern["true"][:, : len(one.tokens)].max(-1)
        for i in ((top.values >= CONFIDENT) & (top.indices > 0)).nonzero()[:, 0].tolist():
            yield one.why(i)
