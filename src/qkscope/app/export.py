"""`qkscope export DIR --site OUT`: the page as files that any web host serves, under any path.

The page asks the same of files as of the server, but for records, several of which lie in a file (features by number,
pairs by the cell that they begin with, see `starts`), and tables, whose columns lie in chunks that the page filters and
sorts itself. What is large is compressed, and the page unpacks it: a host need not know how. Only live tracing is left
out.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..decomposition import SIDES
from ..errors import UserError
from ..files import disk_errors
from .server import STATIC, encoded
from .store import LayerStore, Run
from .tables import Missing, Table

MARK = "qkscope-site.txt"  # what an export may be written over
FEATURES_A_SHARD, PAIRS_A_SHARD, ROWS_A_CHUNK = 16, 64, 20_000
READABLE = ("run", "report")  # are written as they are: a person follows a link to them
LEVEL = 5  # of compression; 9 takes twice as long for 2 % less


def export(folder: Path, site: Path) -> None:
    """Write a run's page to `site`, whole or not at all; `UserError` where that holds other than an earlier export."""
    run = Run(folder)
    _require_free(site)
    made = site.with_name(f".{site.name}.{os.getpid()}.tmp")
    with disk_errors(site):
        try:
            shutil.copytree(STATIC, made)
            (made / MARK).write_text("Written by qkscope export, and written over by it.\n", encoding="utf-8")
            shards = {"features": FEATURES_A_SHARD, "rows": ROWS_A_CHUNK}
            _write(made, "run", {**run.summary(), "live": False, "static": True, "shards": shards})
            for number in run.numbers:
                run.layer(number).warm()
                for name, record in records(run.layer(number)):
                    _write(made, f"{number}/{name}", record)
                print(f"qkscope: layer {number} is exported", file=sys.stderr)
            shutil.rmtree(site, ignore_errors=True)
            made.replace(site)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    print(f"qkscope: {site} can be served by any web host, e.g. python -m http.server -d {site}")


def records(layer: LayerStore) -> Iterator[tuple[str, Any]]:
    """Every file of a layer's data: its name and what it holds."""
    with suppress(Missing):  # the page says so
        yield "report", layer.report()
    for side in SIDES:
        yield from _chunks(f"features/{side}", layer.features.table(side))
        numbers = layer.features.numbers[side]
        for shard in np.unique(numbers // FEATURES_A_SHARD).tolist():
            inside = numbers[numbers // FEATURES_A_SHARD == shard].tolist()
            found = layer.features.records(side, inside)
            yield f"feature/{side}/{shard}", dict(zip(inside, found, strict=True))
    yield from _chunks("pairs", layer.pairs.table)
    yield from _pairs(layer)
    for n in range(layer.heads):
        yield f"head/{n}", layer.of_heads.head(n)
        with suppress(Missing):
            yield f"pattern/{n}", layer.pattern(n)
    yield "heads", layer.of_heads.likeness()


def _pairs(layer: LayerStore) -> Iterator[tuple[str, Any]]:
    """Pairs by their cell, as their examples lie on disk; `starts` says which cell each file begins with."""
    cells = layer.pairs.cells
    order = np.argsort(cells, kind="stable")
    shards = [order[start : start + PAIRS_A_SHARD] for start in range(0, len(order), PAIRS_A_SHARD)]
    yield "pair/starts", {"width": layer.cell_width, "starts": [int(cells[rows[0]]) for rows in shards]}
    for shard, rows in enumerate(shards):
        yield f"pair/{shard}", dict(zip(cells[rows].tolist(), layer.pairs.records(rows), strict=True))


def _chunks(name: str, table: Table) -> Iterator[tuple[str, Any]]:
    for start in range(0, max(len(table), 1), ROWS_A_CHUNK):
        yield f"{name}/{start // ROWS_A_CHUNK}", table.take(np.arange(start, min(start + ROWS_A_CHUNK, len(table))))


def _require_free(site: Path) -> None:
    if site.exists() and not site.is_dir():
        raise UserError(f"--site {site}: is a file; name a folder")
    if site.is_dir() and any(site.iterdir()) and not (site / MARK).is_file():
        raise UserError(f"--site {site}: holds other files and no earlier export; choose another --site")


def _write(site: Path, name: str, record: Any) -> None:
    path = site / "data" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.stem in READABLE:
        path.write_bytes(encoded(record))
    else:  # without a time, so that the same run gives the same bytes
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(encoded(record), LEVEL, mtime=0))
