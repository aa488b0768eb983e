"""`qkscope export DIR --site OUT`: the page as files that any web host serves, under any path.

The page asks the same of files as of the server, but for records, several of which lie in a file (as in
`feature/query/shard/0`), and tables, whose columns lie in chunks that the page filters and sorts itself. Only live
tracing is left out.
"""

from __future__ import annotations

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
from .store import FEATURES_A_SHARD, ROWS_A_CHUNK, LayerStore, Run
from .tables import Missing, Table

MARK = "qkscope-site.txt"  # what an export may be written over


def export(folder: Path, site: Path) -> None:
    """Write a run's page to `site`, whole or not at all; `UserError` where that holds other than an earlier export."""
    run = Run(folder)
    _require_free(site)
    made = site.with_name(f".{site.name}.{os.getpid()}.tmp")
    with disk_errors(site):
        try:
            shutil.copytree(STATIC, made)
            (made / MARK).write_text("Written by qkscope export, and written over by it.\n", encoding="utf-8")
            _write(made, "run", {**run.summary(), "live": False, "static": True})
            for number in run.numbers:
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
        table = layer.features(side)
        yield from _chunks(f"features/{side}", table)
        numbers = table.columns["feature"]
        for shard in np.unique(numbers // FEATURES_A_SHARD).tolist():
            inside = numbers[numbers // FEATURES_A_SHARD == shard].tolist()
            yield f"feature/{side}/shard/{shard}", {f: layer.feature(side, f) for f in inside}
    yield from _chunks("pairs", layer.pairs)
    query, key, head = (layer.pairs.columns[name].astype(np.int64) for name in ("query", "key", "head"))
    shard_P = layer.pair_shard_of(query, key, head)
    order = np.argsort(shard_P, kind="stable")
    ends = np.searchsorted(shard_P[order], np.arange(layer.pair_shards + 1))
    for shard in range(layer.pair_shards):
        names = np.stack([query, key, head], 1)[order[ends[shard] : ends[shard + 1]]].tolist()
        yield f"pair/shard/{shard}", {f"{q}/{k}/{h}": layer.pair(q, k, h) for q, k, h in names}
    for n in range(layer.heads):
        yield f"head/{n}", layer.of_heads.head(n)
        with suppress(Missing):
            yield f"pattern/{n}", layer.pattern(n)
    yield "heads", layer.of_heads.likeness()


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
    path.write_bytes(encoded(record))
