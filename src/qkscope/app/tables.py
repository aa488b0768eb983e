"""Tables that are paged: columns in memory, each sorted once, and rows of Parquet files read by their key.

Shapes: R rows of a table.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow.parquet as pq

PAGE = 100  # rows of one page
GROUPS_KEPT = 4  # decoded row groups of a file, about 50 MB each at their largest


class Missing(Exception):
    """An address that names nothing; the message names no path."""


@dataclass
class Table:
    """Columns of equal length [R]: numbers, or lists of anything that JSON knows (those cannot be sorted by)."""

    columns: dict[str, Any]
    _orders: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def sortable(self) -> list[str]:
        return [name for name, values in self.columns.items() if isinstance(values, np.ndarray)]

    def order(self, sort: str, descending: bool) -> np.ndarray:
        """Rows by a column, [R]: rows of equal value as they stand, missing values (NaN) last."""
        key = sort, descending
        if key not in self._orders:
            values = self.columns[sort].astype(np.float64)
            self._orders[key] = np.argsort(-values if descending else values, kind="stable")
        return self._orders[key]

    def page(self, sort: str, descending: bool, page: int, wanted: np.ndarray | None = None) -> dict[str, Any]:
        """One page of the rows that are `wanted` (bool [R]; None: all), as columns, and how many there are of those."""
        order = self.order(sort, descending)
        if wanted is not None:
            order = order[wanted[order]]
        return {"total": len(order), "page": page, **self.take(order[page * PAGE : (page + 1) * PAGE])}

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """Some rows, as JSON's values by column."""
        return {"columns": {name: _taken(values, rows) for name, values in self.columns.items()}}


def _taken(values: Any, rows: np.ndarray) -> list[Any]:
    return plain(values[rows]) if isinstance(values, np.ndarray) else [values[row] for row in rows.tolist()]


def plain(values: Any) -> list[Any]:
    """Numbers as JSON knows them: no more digits than tell a float32 from its neighbours; None: not finite."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        return array.tolist()
    written = array.astype("U32").astype(np.float64)
    return [value if good else None for value, good in zip(written.tolist(), np.isfinite(array).tolist(), strict=True)]


class KeyedRows:
    """Rows of a Parquet file by a whole-number key, read a row group at a time and kept while they are in use.

    `columns` are those the key is made of; `key` makes it from them, int64 [R]. The file need not be sorted; where it
    is (as qkscope writes it), the rows of one key lie in one group or two.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Any) -> None:
        self._path = path
        self._file = pq.ParquetFile(path)
        keys = key(self._file.read(columns=list(columns)))
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()  # one reader of the file at a time

    def of(self, key: int) -> list[dict[str, Any]]:
        """The rows with this key, in the file's order."""
        low, high = np.searchsorted(self._keys, [key, key + 1])
        rows = np.sort(self._order[low:high])
        group = np.searchsorted(self._starts, rows, side="right") - 1
        out: list[dict[str, Any]] = []
        for number in np.unique(group).tolist():
            out += self._group(number).take(rows[group == number] - self._starts[number]).to_pylist()
        return out

    def _group(self, number: int) -> Any:
        with self._lock:
            if number not in self._groups:
                self._groups[number] = self._file.read_row_group(number)
                while len(self._groups) > GROUPS_KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]
