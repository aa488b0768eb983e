"""Faithfulness: does the ranking of the pairs say what matters, and can what was dropped do harm?

- *Keep-only*: the kept pairs cut to the most important n, and beside it to n drawn at random.
- *Remove-only*: the kept pairs without the most important n. Where the ranking is right the loss is large at once;
  where pairs stand in for each other it is not.
- The adversary of adversary.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..attention import AttentionSite
from ..data.sequences import Batch
from ..decomposition import Decomposition
from ..training.stream import harvest_finite
from .adversary import adversary
from .patched import PatchedScore, as_source
from .patterns import KLScore, add_kls

CUTS = ("keep", "remove", "keep_random")
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
CURVE_TOKENS = 8_192  # held-out tokens of the curves, and ...
ADVERSARY_TOKENS = 1_024  # ... of the adversary, who learns on what it is measured on


def first_of(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """As many whole sequences as hold about that many tokens."""
    out = []
    for batch in batches:
        if tokens <= 0:
            break
        lengths = batch.real_BT.sum(1)
        count = max(int((lengths.cumsum(0) <= tokens).sum()), 1)
        tokens -= int(lengths[:count].sum())
        out.append(batch.first(count))
    return out


def against_adversary(
    dec: Decomposition, site: AttentionSite, batches: Sequence[Batch], *, steps: int, seed: int
) -> dict[str, Any]:
    """The adversary's figures on the first of these batches."""
    few = [batch.until(ADVERSARY_TOKENS) for batch in first_of(batches, ADVERSARY_TOKENS)]
    found = adversary(dec, site, few, steps=steps, seed=seed)
    return {"adversary": found, "adversary_tokens": sum(batch.n_tokens for batch in few)}


@torch.no_grad()
def curve(dec: Decomposition, site: AttentionSite, batches: Sequence[Batch], seed: int) -> list[dict[str, Any]]:
    """For each share of the kept pairs what the map is worth with only those, without them, and with as many others.

    Of a model without a head only pattern figures.
    """
    order = dec.importance_P.argsort(descending=True)
    mixed = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).to(order.device)
    counts = list(dict.fromkeys(n for n in (round(share * len(order)) for share in SHARES) if n))
    variants = {
        (n, name): (dec.pairs.take(index), dec.strength_P[index.sort().values])
        for n in counts
        for name, index in zip(CUTS, (order[:n], order[n:], mixed[:n]), strict=True)
    }
    scores = {name: KLScore() for name in variants}
    patched = PatchedScore()
    for batch in batches:
        inputs = harvest_finite(site, batch)
        logs = {name: dec.kept_by_head(inputs, *pairs) for name, pairs in variants.items()}
        add_kls(inputs, {scores[name]: log for name, log in logs.items()})
        if site.has_head:
            patched.add(site, batch, {str(name): as_source(log) for name, log in logs.items()})
        del logs  # before those of the next batch are made
    return [{"pairs": n, **{name: _figures(scores[n, name], patched, str((n, name))) for name in CUTS}} for n in counts]


def _figures(score: KLScore, patched: PatchedScore, name: str) -> dict[str, Any]:
    out = {"pattern_kl": score.kl.figure()}
    if name in patched.kl:
        out |= {"logit_kl": patched.kl[name].figure(), "ce_increase": patched.increase(name)}
    return out
