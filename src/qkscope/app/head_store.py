"""What the page shows of a layer's heads: what each rests on, which are alike and what they share.

Shapes: P kept pairs, N heads.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..explain import heads as heads_room
from ..explain.entries import NULLS, Entries, rewired
from .tables import Missing, plain

if TYPE_CHECKING:
    from .store import LayerStore

HEAD_PAIRS, LIKE, SHARED = 100, 5, 10
DRAWS = 20  # of each null, for what is alike by chance ...
CHANCE_PAIRS = 10_000  # ... and none for more pairs than these, which take some seconds


class HeadStore:
    """The heads of one layer."""

    def __init__(self, layer: LayerStore) -> None:
        self._layer = layer
        self._lock = Lock()

    def head(self, head: int) -> dict[str, Any]:
        """One head: its pairs, the heads most like it and what it shares with them, its roles where they are known."""
        if not 0 <= head < self._layer.heads:
            raise Missing(f"Layer {self._layer.number} has no head {head}.")
        rows = np.flatnonzero(self._layer.pairs.table.columns["head"] == head)
        figures = {
            metric: {variant: f["per_head"][head] for variant, f in (self._layer.files.report.get(metric) or {}).items()
                     if len(f.get("per_head") or []) > head}
            for metric in ("pattern_kl", "top1")
        }  # fmt: skip
        roles = [one for one in self._layer.files.truth.get("heads", []) if one["head"] == head]
        similar = self.similarity[head]
        like = [n for n in np.argsort(-similar, kind="stable").tolist() if n != head and similar[n] > 0][:LIKE]
        return {
            "head": head,
            "heads": self._layer.heads,
            **self.concentration[head],
            **figures,
            "roles": roles[0]["role_pairs"] if roles else [],
            "strongest": {"total": len(rows), **self._layer.pairs.rows(rows[:HEAD_PAIRS])},
            "similarity": plain(similar),
            "like": [{"head": n, "similarity": plain([similar[n]])[0], **self._shared(head, n)} for n in like],
        }

    def _shared(self, one: int, other: int) -> dict[str, Any]:
        """The pairs of two features that two heads both have, by the product of their importances."""
        columns, (first, second) = self._layer.pairs.table.columns, self._by_head[[one, other]]
        _, a, b = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
        here, there = first[1][a], second[1][b]
        worth = columns["importance"][here].astype(np.float64) * columns["importance"][there]
        chosen = np.argsort(-worth, kind="stable")[:SHARED]
        shared = self._layer.pairs.rows(here[chosen])
        shared["columns"]["importance_there"] = plain(columns["importance"][there[chosen]])
        return {"shared": len(here), **shared}

    @cached_property
    def _by_head(self) -> np.ndarray:
        """For each head, (query, key) of its pairs without a bias as one number, and their rows."""
        columns = self._layer.pairs.table.columns
        cell = self._layer.cell(columns["query"].astype(np.int64), columns["key"].astype(np.int64), 0)
        two = (columns["query"] >= 0) & (columns["key"] >= 0)
        out = np.empty(self._layer.heads, dtype=object)
        for n in range(self._layer.heads):
            rows = np.flatnonzero(two & (columns["head"] == n))
            out[n] = cell[rows], rows
        return out

    def _entries(self, bias: bool) -> Entries:
        columns, width = self._layer.pairs.table.columns, self._layer.cell_width
        kept = (
            np.ones(len(self._layer.pairs.table), dtype=bool)
            if bias
            else (columns["query"] >= 0) & (columns["key"] >= 0)
        )
        query, key, head = (torch.from_numpy(columns[n][kept].astype(np.int64)) for n in ("query", "key", "head"))
        worth = torch.from_numpy(columns["importance"][kept].astype(np.float64))
        last = torch.tensor(width)
        query, key = query.where(query >= 0, last), key.where(key >= 0, last)
        return Entries(query[None], key[None], head, worth[None], width, width, self._layer.heads)

    @cached_property
    def similarity(self) -> np.ndarray:
        """Cosine of the heads' importances over pairs of two features, float64 [N, N]."""
        return heads_room.similarity(self._entries(False))[0].numpy()

    @cached_property
    def concentration(self) -> list[dict[str, Any]]:
        """What each head's importance rests on, the biases' pairs included."""
        return heads_room.concentration(self._entries(True))

    def likeness(self) -> dict[str, Any]:
        """Each head's likest and the clusters, beside chance; takes seconds, once. `draws` is 0 for too many pairs."""
        with self._lock:
            return self._likeness

    @cached_property
    def _likeness(self) -> dict[str, Any]:
        entries = self._entries(False)
        if len(entries) > CHANCE_PAIRS:
            return {"draws": 0}
        nulls = {null: rewired(entries, null, DRAWS) for null in NULLS}
        found = heads_room.likeness(entries, nulls)
        return {"draws": DRAWS, **{name: found[name] for name in ("heads", "cut", "clusters")}}
