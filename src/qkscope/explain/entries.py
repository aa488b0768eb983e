"""Kept pairs as entries of a sparse tensor [query features, key features, heads] of importance, and what chance gives.

Two nulls, both with each head's number of pairs and its importances, which are dealt out anew among its pairs:

- "kept": a head keeps its features, each in as many pairs as before; only which of them meet is left to chance.
- "free": any head may have any of the layer's features, each in as many pairs of the layer as before.

Pairs beyond "free" but not beyond "kept" say that heads share features; beyond "kept", that they share pairs.

Drawn by swaps of features between two entries (of one head, or of the layer) that leave no pair twice in a head; all
draws at once, some rounds of as many swaps as there are disjoint partners. A head that pairs one feature with all of
its others cannot be rewired, and its "kept" null is then what was found, but for the importances.

Shapes: P entries, S draws, N heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition import Decomposition

NULLS = ("kept", "free")
ROUNDS = 16  # of swaps, half of them tried (after 8, figures of a layer with 1,700 entries stay as they are)


@dataclass(frozen=True)
class Entries:
    """Importance of kept pairs, nats, and where it stands; of several draws at once, or of one (S = 1)."""

    query_SP: Tensor
    key_SP: Tensor
    """int64, as in `Pairs`: a side's bias stands behind its features."""
    head_P: Tensor
    worth_SP: Tensor
    """float64."""
    n_query: int
    n_key: int
    n_heads: int

    @classmethod
    def of(cls, dec: Decomposition, bias: bool = False) -> Entries:
        """A decomposition's pairs, on the CPU; `bias`: those with a side's bias too."""
        p, worth = dec.pairs, dec.importance_P.detach().cpu().double()
        query, key, head = p.query_P.cpu(), p.key_P.cpu(), p.head_P.cpu()
        kept = torch.ones_like(query, dtype=torch.bool) if bias else (query < p.n_query) & (key < p.n_key)
        return cls(query[kept][None], key[kept][None], head[kept], worth[kept][None], p.n_query, p.n_key, p.n_heads)

    def __len__(self) -> int:
        return len(self.head_P)

    @property
    def cell_SP(self) -> Tensor:
        """Which (query feature, key feature) an entry is of, as one number."""
        return self.query_SP * (self.n_key + 1) + self.key_SP

    def draw(self, s: int) -> Entries:
        """One of the draws alone."""
        one = slice(s, s + 1)
        return Entries(
            self.query_SP[one], self.key_SP[one], self.head_P, self.worth_SP[one],
            self.n_query, self.n_key, self.n_heads,
        )  # fmt: skip


def rewired(entries: Entries, null: str, draws: int, seed: int = 0) -> Entries:
    """`draws` chance versions of the entries of one decomposition, under the null "kept" or "free"."""
    assert null in NULLS and len(entries.query_SP) == 1
    g = torch.Generator().manual_seed(seed)
    count = draws * len(entries)
    draw = torch.arange(draws).repeat_interleave(len(entries))
    head = draw * entries.n_heads + entries.head_P.repeat(draws)
    group = head if null == "kept" else draw
    feature = {"query": entries.query_SP[0].repeat(draws), "key": entries.key_SP[0].repeat(draws)}
    for turn in range(ROUNDS):
        side, other = ("key", "query") if turn % 2 else ("query", "key")
        one, two = _partners(group, g)
        left, right = feature[side][one], feature[side][two]
        width = max(entries.n_query, entries.n_key) + 1
        stands = (head * width + feature[other]) * width
        after = torch.stack([stands[one] + right, stands[two] + left])
        # A fair coin, or two entries that may always swap would be back after an even number of rounds.
        good = _new(after, stands + feature[side]).all(0) & (torch.rand(len(one), generator=g) < 0.5)
        feature[side][one[good]], feature[side][two[good]] = right[good], left[good]
    worth = torch.empty(count, dtype=torch.float64)
    # Each head's entries in a random order are dealt its importances.
    worth[_mixed(head, g)] = entries.worth_SP[0].repeat(draws)[head.argsort(stable=True)]
    shape = draws, len(entries)
    return Entries(
        feature["query"].view(shape), feature["key"].view(shape), entries.head_P, worth.view(shape),
        entries.n_query, entries.n_key, entries.n_heads,
    )  # fmt: skip


def _mixed(group: Tensor, g: torch.Generator) -> Tensor:
    """An order in which groups follow each other and each group's entries are in a random order."""
    return (group + torch.rand(len(group), generator=g, dtype=torch.float64)).argsort()


def _partners(group: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Disjoint pairs of entries of one group, at random; of an odd number one stays alone."""
    order = _mixed(group, g)
    grouped = group[order]
    sizes = torch.bincount(grouped) if len(grouped) else grouped
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[grouped]
    first = ((place % 2 == 0) & (place + 1 < sizes[grouped])).nonzero()[:, 0]
    return order[first], order[first + 1]


def _new(after: Tensor, before: Tensor) -> Tensor:
    """Which places would be new: not taken before, and wanted only once."""
    _, inverse, counts = after.unique(return_inverse=True, return_counts=True)
    return (counts[inverse] == 1) & ~torch.isin(after, before)
