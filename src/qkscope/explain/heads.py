"""Heads seen through their pairs, from the artefact alone: what each rests on, what they share, which are alike.

What is notable:
- Pairs with a bias can hold most of a head's importance ("attend there whatever the query") and are few: what heads
  share is measured without them, and once more with them.
- Nothing is called shared or alike without chance beside it: the nulls of entries.py. A head's likest head is the best
  of N - 1, so it is compared with the best of N - 1 in each draw.
- Heads form a cluster while their average similarity is above what the likest two heads of a draw reach in one draw of
  twenty.

Shapes: P kept pairs, N heads, S draws, C distinct (query feature, key feature).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..decomposition import SIDES, Decomposition
from .entries import NULLS, Entries, rewired

DRAWS = 100  # of each null ...
DRAWN_ENTRIES = 500_000  # ... or as many as have so many entries together, but at least FEWEST
FEWEST = 20
TOP = (1, 5, 20)
CHANCE = 0.05  # of the draws, whose likest two heads are as alike as a cluster's must be


# What each head has


def pair_heads(dec: Decomposition) -> pa.Table:
    """The table head × pair: a row for each kept pair of a head, most important first.

    `pair`: its place in `dec.pairs`; `importance` in nats a query row, `share` of its head's; `heads`: how many heads
    have this pair of features.
    """
    e = Entries.of(dec, bias=True)
    total_N = torch.zeros(e.n_heads, dtype=torch.float64).index_add(0, e.head_P, e.worth_SP[0])
    order = e.worth_SP[0].argsort(descending=True, stable=True)
    return pa.table(
        {
            "pair": order.numpy(),
            "query_feature": _unbiased(e.query_SP[0], e.n_query)[order].numpy(),
            "key_feature": _unbiased(e.key_SP[0], e.n_key)[order].numpy(),
            "head": e.head_P[order].numpy(),
            "importance": e.worth_SP[0][order].numpy(),
            "share": (e.worth_SP[0] / total_N[e.head_P].clamp(min=1e-30))[order].numpy(),
            "heads": heads_of(e)[0][order].numpy(),
        }
    )


def feature_heads(dec: Decomposition) -> pa.Table:
    """The table head × feature: a row for each feature (-1: the bias) that a head has pairs of, by head and importance.

    `importance` in nats a query row, `share` of its head's.
    """
    e = Entries.of(dec, bias=True)
    total_N = torch.zeros(e.n_heads, dtype=torch.float64).index_add(0, e.head_P, e.worth_SP[0])
    parts = []
    for side in SIDES:
        feature, width = (e.query_SP[0], e.n_query) if side == "query" else (e.key_SP[0], e.n_key)
        cells, inverse, pairs = (e.head_P * (width + 1) + feature).unique(return_inverse=True, return_counts=True)
        worth = torch.zeros(len(cells), dtype=torch.float64).index_add(0, inverse, e.worth_SP[0])
        order = worth.argsort(descending=True, stable=True)
        order = order[(cells // (width + 1))[order].argsort(stable=True)]
        head = (cells // (width + 1))[order]
        parts.append(
            pa.table(
                {
                    "side": [side] * len(cells),
                    "feature": _unbiased(cells % (width + 1), width)[order].numpy(),
                    "head": head.numpy(),
                    "pairs": pairs[order].numpy(),
                    "importance": worth[order].numpy(),
                    "share": (worth[order] / total_N[head].clamp(min=1e-30)).numpy(),
                }
            )
        )
    return pa.concat_tables(parts)


def concentration(entries: Entries) -> list[dict[str, Any]]:
    """For each head its pairs, their importance in nats, the share of its top 1, 5, 20 and the effective number.

    The effective number is exp of the entropy of the pairs' shares: n pairs of equal importance count as n.
    """
    worth = entries.worth_SP[0]
    order = worth.argsort(descending=True)
    order = order[entries.head_P[order].argsort(stable=True)]
    head, worth = entries.head_P[order], worth[order]
    counts = torch.bincount(head, minlength=entries.n_heads)
    place = torch.arange(len(head)) - (counts.cumsum(0) - counts)[head]

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(entries.n_heads, dtype=torch.float64).index_add(0, head, values)

    total = sums(worth)
    share = worth / total[head].clamp(min=1e-30)
    effective = sums(-torch.xlogy(share, share)).exp().where(total > 0, 0.0).tolist()
    top = torch.stack([sums(share * (place < n)) for n in TOP], 1).tolist()
    return [
        {
            "head": n,
            "pairs": int(counts[n]),
            "importance": float(total[n]),
            "top": dict(zip(map(str, TOP), top[n], strict=True)),
            "effective": effective[n],
        }
        for n in range(entries.n_heads)
    ]


# What heads share


def heads_of(entries: Entries) -> Tensor:
    """How many heads have each entry's (query feature, key feature), in its own draw, int64 [S, P]."""
    draw = torch.arange(len(entries.cell_SP))[:, None] * (entries.n_query + 1) * (entries.n_key + 1)
    _, inverse, counts = (draw + entries.cell_SP).unique(return_inverse=True, return_counts=True)
    return counts[inverse]


def by_heads(entries: Entries) -> tuple[Tensor, Tensor]:
    """(query feature, key feature) that 1, 2 ... N heads have, and the share of importance in them, float64 [S, N]."""
    heads_SP = heads_of(entries)
    n, (draws, _) = entries.n_heads, heads_SP.shape
    zeros = torch.zeros(draws, n, dtype=torch.float64)
    # A pair of k heads is there k times.
    pairs = zeros.scatter_add(1, heads_SP - 1, 1 / heads_SP.double()).round()
    total = entries.worth_SP.sum(1, keepdim=True).clamp(min=1e-30)
    return pairs, zeros.scatter_add(1, heads_SP - 1, entries.worth_SP / total)


def sharing(entries: Entries, nulls: dict[str, Entries]) -> dict[str, Any]:
    """How many (query feature, key feature) are of 1, 2 ... N heads, by number and share of importance, beside chance.

    `shared`: of several heads; mean and 95 % interval over the draws of each null.
    """

    def figures(e: Entries) -> dict[str, Any]:
        pairs, worth = by_heads(e)
        shared = 1 - pairs[:, 0] / pairs.sum(1).clamp(min=1e-30)
        return {"pairs": pairs, "importance": worth, "shared_pairs": shared, "shared_importance": 1 - worth[:, 0]}

    found = {name: values[0].tolist() for name, values in figures(entries).items()} if len(entries) else {}
    chance = {null: {name: interval(values) for name, values in figures(e).items()} for null, e in nulls.items()}
    return {**found, "chance": chance if len(entries) else {}}


def interval(values_S: Tensor) -> dict[str, Any]:
    """Mean over draws and the interval that holds 95 % of them; of numbers [S] or lists [S, n]."""
    ends = values_S.quantile(values_S.new_tensor([0.025, 0.975]), dim=0)
    return {"mean": values_S.mean(0).tolist(), "ci95": ends.movedim(0, -1).tolist()}


# Which heads are alike


def similarity(entries: Entries) -> Tensor:
    """Cosine of the heads' importances over (query feature, key feature), float64 [S, N, N]; 0 for a head without."""
    out = []
    for cell, worth in zip(entries.cell_SP, entries.worth_SP, strict=True):
        _, column = cell.unique(return_inverse=True)
        heads_NC = torch.zeros(entries.n_heads, int(column.max()) + 1 if len(column) else 1, dtype=torch.float64)
        heads_NC[entries.head_P, column] = worth
        heads_NC /= heads_NC.norm(dim=1, keepdim=True).clamp(min=1e-30)
        out.append(heads_NC @ heads_NC.T)
    return torch.stack(out)


def likeness(entries: Entries, nulls: dict[str, Entries]) -> dict[str, Any]:
    """The similarity of all heads, each head's likest, and the clusters, beside chance.

    `chance` of a head: its similarity with its likest head in the draws. `above`: beyond the upper end of "kept".
    `likest` is None for a head that shares no pair.
    """
    found = similarity(entries)[0]
    off = ~torch.eye(entries.n_heads, dtype=torch.bool)
    draws = {null: similarity(e) * off for null, e in nulls.items()}
    cut = float(draws["kept"].amax((1, 2)).quantile(1 - CHANCE))
    best = (found * off - (~off).double()).max(1)
    chance = {null: interval(drawn.amax(2)) for null, drawn in draws.items()}
    heads = []
    for n in range(entries.n_heads if entries.n_heads > 1 else 0):
        beside = {null: {"mean": c["mean"][n], "ci95": c["ci95"][n]} for null, c in chance.items()}
        value = float(best.values[n])
        above = value > beside["kept"]["ci95"][1]
        likest = int(best.indices[n]) if value > 0 else None
        heads.append({"head": n, "likest": likest, "similarity": value, "above": above, "chance": beside})
    merges = average_linkage(found)
    return {
        "similarity": found.tolist(),
        "heads": heads,
        "merges": [vars(merge) for merge in merges],
        "cut": cut,
        "clusters": clusters(entries.n_heads, merges, cut),
    }


@dataclass(frozen=True)
class Merge:
    """Two clusters that become one: their heads, and the average similarity between them."""

    one: list[int]
    other: list[int]
    similarity: float


def average_linkage(similarity_NN: Tensor) -> list[Merge]:
    """Agglomerative clustering by average similarity (UPGMA; Sokal and Michener 1958), N - 1 merges, likest first."""
    between = similarity_NN.double().clone().fill_diagonal_(-torch.inf)
    members = [[n] for n in range(len(between))]
    merges = []
    for _ in range(len(between) - 1):
        i, j = sorted(divmod(int(between.argmax()), len(between)))
        merges.append(Merge(sorted(members[i]), sorted(members[j]), float(between[i, j])))
        sizes = len(members[i]), len(members[j])
        row = (sizes[0] * between[i] + sizes[1] * between[j]) / sum(sizes)  # -inf stays -inf
        between[i], between[:, i] = row, row
        between[j], between[:, j] = -torch.inf, -torch.inf
        between[i, i] = -torch.inf
        members[i] = members[i] + members[j]
    return merges


def clusters(n_heads: int, merges: list[Merge], cut: float) -> list[list[int]]:
    """Heads together after the merges with a similarity above `cut`; those of one head too."""
    found = {n: [n] for n in range(n_heads)}
    for merge in merges:
        if merge.similarity > cut:
            together = sorted(merge.one + merge.other)
            found |= dict.fromkeys(together, together)
    return [list(heads) for heads in sorted({tuple(heads) for heads in found.values()})]


# All of it


def describe(dec: Decomposition, seed: int = 0) -> dict[str, Any]:
    """What a decomposition says of its heads, without the pairs that have a bias ("two_features") and with all."""
    out: dict[str, Any] = {}
    for name, bias in (("two_features", False), ("all", True)):
        entries = Entries.of(dec, bias)
        draws = min(DRAWS, max(DRAWN_ENTRIES // max(len(entries), 1), FEWEST))
        nulls = {null: rewired(entries, null, draws, seed) for null in NULLS}
        out[name] = {
            "pairs": len(entries),
            "importance": float(entries.worth_SP.sum()),
            "draws": draws,
            "heads": concentration(entries),
            "sharing": sharing(entries, nulls),
            "likeness": likeness(entries, nulls),
        }
    return out


def _unbiased(feature: Tensor, width: int) -> Tensor:
    """-1 for the bias, which stands behind the features."""
    return feature.where(feature < width, -1)
