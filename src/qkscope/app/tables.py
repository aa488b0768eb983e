"""Tables that are paged: columns in memory, each sorted once, and rows of Parquet files read by their key.

Shapes: R rows of a table, X keys that are asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PAGE = 100  # rows of one page
GROUPS_KEPT = 16  # decoded row groups of a file, about 6 MB each


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

    def take_each(self, rows: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """`take` for each of several lists of rows, in one go."""
        ends = np.cumsum([0, *(len(one) for one in rows)]).tolist()
        whole = self.take(np.concatenate([np.zeros(0, np.int64), *rows]))["columns"]
        return [{"columns": {name: v[a:b] for name, v in whole.items()}} for a, b in pairwise(ends)]


def _taken(values: Any, rows: np.ndarray) -> list[Any]:
    return plain(values[rows]) if isinstance(values, np.ndarray) else [values[row] for row in rows.tolist()]


def plain(values: Any) -> list[Any]:
    """Numbers as JSON knows them: no more digits than tell a float32 from its neighbours; None: not finite."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        return array.tolist()
    written = np.zeros(array.shape)
    some = array != 0  # most of an example's activations are: writing digits takes longest
    written[some] = array[some].astype("U32").astype(np.float64)
    out: Any = written.tolist()
    for place in np.flatnonzero(~np.isfinite(array)).tolist():
        out[place] = None
    return out


def records(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of an Arrow table as JSON's values, column by column rather than value by value."""
    columns = [_values(column.combine_chunks()) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    if isinstance(column, pa.ChunkedArray):  # no chunk at all
        return column.to_pylist()
    if pa.types.is_list(column.type):
        flat = _values(column.flatten())
        ends = np.cumsum(pc.call_function("list_value_length", [column]).fill_null(0).to_numpy()).tolist()
        return [flat[a:b] for a, b in pairwise([0, *ends])]
    if pa.types.is_floating(column.type):
        return plain(column.fill_null(float("nan")).to_numpy())
    if column.null_count == 0 and pa.types.is_string(column.type):
        coded = column.dictionary_encode()
        texts = coded.dictionary.to_pylist()
        return [texts[i] for i in coded.indices.to_numpy().tolist()]
    return column.to_pylist()


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

    def of(self, keys: Sequence[int] | np.ndarray) -> list[list[dict[str, Any]]]:
        """The rows with each of these keys [X], in the file's order."""
        low, high = (np.searchsorted(self._keys, keys, side=side) for side in ("left", "right"))
        ends = np.cumsum([0, *(high - low)])
        rows = self._order[np.repeat(low - ends[:-1], high - low) + np.arange(ends[-1])]
        group = np.searchsorted(self._starts, rows, side="right") - 1
        found: list[Any] = [None] * len(rows)
        for number in np.unique(group).tolist():
            here = np.flatnonzero(group == number)
            read = records(self._group(number).take(rows[here] - self._starts[number]))
            for place, row in zip(here.tolist(), read, strict=True):
                found[place] = row
        return [found[a:b] for a, b in pairwise(ends.tolist())]

    def _group(self, number: int) -> Any:
        with self._lock:
            if number not in self._groups:
                self._groups[number] = self._file.read_row_group(number)
                while len(self._groups) > GROUPS_KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]
