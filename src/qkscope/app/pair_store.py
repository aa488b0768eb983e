"""What the page shows of a layer's kept pairs: their table, the pairs of a feature, and all there is of one.

Shapes: P kept pairs (-1: a side's bias).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..decomposition import SIDES
from ..evaluate.stored import PAIR, read
from ..tables import distance_table
from .tables import KeyedRows, Missing, Table

if TYPE_CHECKING:
    from .store import LayerStore

PARTNERS = 200  # pairs of a feature that are read with it; all are in the table of pairs
CELL = ("query", "key", "head")
WORTH = ("strength", "weight_strength", "importance")


class PairStore:
    """The kept pairs of one layer."""

    def __init__(self, layer: LayerStore) -> None:
        self._layer = layer

    def warm(self) -> None:
        _ = self._by_side, self._by_features, self._examples, self._distances

    # The table

    @cached_property
    def count(self) -> int:
        """P, without reading them."""
        found = read(self._layer.folder / "pairs.parquet", pq.read_metadata)
        return found.num_rows if found else len(self.table)

    @cached_property
    def table(self) -> Table:
        """Kept pairs, the most important first, `rank` from 0."""
        table = self._layer.table("pairs.parquet")
        order = np.argsort(-table["importance"].to_numpy(), kind="stable")
        stored = {**dict(zip(CELL, PAIR, strict=True)), **{name: name for name in WORTH}}
        columns = {name: table[column].to_numpy()[order] for name, column in stored.items()}
        return Table({"rank": np.arange(len(order)), **columns})

    def rows(self, rows: np.ndarray) -> dict[str, Any]:
        """Rows of the table, with what their features go by."""
        return self.named(self.table.take(rows))

    def named(self, page: dict[str, Any], sides: Sequence[str] = SIDES) -> dict[str, Any]:
        """A page of the table, with what its features go by."""
        for side in sides:
            page["columns"][f"{side}_name"] = [self._layer.features.name(side, f) for f in page["columns"][side]]
        return page

    @cached_property
    def _by_side(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Rows by a side's feature, and that feature."""
        return {side: _sorted(self.table.columns[side]) for side in SIDES}

    @cached_property
    def _by_features(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows by both features, and the cell of those two."""
        query, key, _ = self._named_in(slice(None))
        return _sorted(self._layer.cell(query, key, 0))

    def _named_in(self, rows: Any) -> list[np.ndarray]:
        """Query feature, key feature and head of some rows, int64 each."""
        return [self.table.columns[name][rows].astype(np.int64) for name in CELL]

    @cached_property
    def cells(self) -> np.ndarray:
        """Each row's pair as one number, int64 [P]."""
        return self._layer.cell(*self._named_in(slice(None)))

    def partners(self, side: str, features: Sequence[int]) -> list[dict[str, Any]]:
        """Each feature's most important pairs with the other side's names, and how many there are."""
        order, values = self._by_side[side]
        low, high = (np.searchsorted(values, features, side=end) for end in ("left", "right"))
        rows = [order[a : min(a + PARTNERS, b)] for a, b in zip(low, high, strict=True)]
        other = [one for one in SIDES if one != side]
        pages = (self.named(page, other) for page in self.table.take_each(rows))
        return [{"total": int(n), **page} for n, page in zip(high - low, pages, strict=True)]

    # Records

    def record(self, query: int, key: int, head: int) -> dict[str, Any]:
        """All there is to show of one pair, in the given head and in the others that have it."""
        rows = self._in_heads(np.asarray([self._layer.cell(query, key, 0)]))[0]
        rows = rows[self.table.columns["head"][rows] == head]
        if not len(rows):
            raise Missing(f"Layer {self._layer.number} keeps no pair of query feature {query} and key feature {key} "
                          f"in head {head}.")  # fmt: skip
        return self.records(rows)[0]

    def records(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """`record` of several rows of the table, in one go."""
        query, key, head = self._named_in(rows)
        heads = self.table.take_each(self._in_heads(self._layer.cell(query, key, 0)))
        examples = self._examples.of(self.cells[rows]) if self._examples else [[] for _ in rows]
        distances = self._distances.of(self.cells[rows]) if self._distances else [[] for _ in rows]
        named = (column.tolist() for column in (rows, query, key, head))
        every = zip(*named, heads, examples, distances, strict=True)
        return [self._record(*one) for one in every]

    def _record(
        self,
        rank: int,
        query: int,
        key: int,
        head: int,
        heads: dict[str, Any],
        examples: list[dict[str, Any]],
        distances: list[dict[str, Any]],
    ) -> dict[str, Any]:
        names = {side: self._layer.features.name(side, f) for side, f in zip(SIDES, (query, key), strict=True)}
        return {
            "query": query,
            "key": key,
            "head": head,
            "names": names,
            "kept": len(self.table),
            "heads": heads["columns"],
            "neighbours": self._neighbours(rank),
            "linked": self._layer.files.linked(dict(zip(PAIR, (query, key, head), strict=True))),
            "examples": [_without(one, *PAIR, "rank") for one in examples],
            "distance": {"edges": self._edges, **_without(distances[0], *PAIR)} if distances else None,
        }

    def _in_heads(self, features: np.ndarray) -> list[np.ndarray]:
        """The rows of two features in any head, for each such cell, the most important first."""
        order, values = self._by_features
        low, high = (np.searchsorted(values, features, side=end) for end in ("left", "right"))
        return [order[a:b] for a, b in zip(low, high, strict=True)]

    def _neighbours(self, rank: int) -> dict[str, list[int] | None]:
        """The pairs before and after one by importance, each as [query, key, head]."""
        out: dict[str, list[int] | None] = {}
        for name, other in (("before", rank - 1), ("after", rank + 1)):
            inside = 0 <= other < len(self.table)
            out[name] = [int(self.table.columns[c][other]) for c in CELL] if inside else None
        return out

    @cached_property
    def _examples(self) -> KeyedRows | None:
        return self._layer.keyed("pair_examples.parquet", PAIR, self._key)

    @cached_property
    def _distances(self) -> KeyedRows | None:
        return self._layer.keyed(distance_table.NAME, PAIR, self._key)

    @cached_property
    def _edges(self) -> list[int]:
        """Where each bin of distances starts, and where the last one ends."""
        return read(self._layer.folder / distance_table.NAME, _edges)

    def _key(self, table: pa.Table) -> np.ndarray:
        return self._layer.cell(*(table[name].to_numpy().astype(np.int64) for name in PAIR))


def _edges(path: Path) -> list[int]:
    return json.loads((pq.read_schema(path).metadata or {}).get(b"distances", b"[]"))


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _sorted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of values, those that are equal as they stand, and the values in it."""
    order = np.argsort(values, kind="stable")
    return order, values[order]
