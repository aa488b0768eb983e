"""What the page shows of a run, read from the artefact alone: plain values by name, nothing of the web.

What is notable:
- Columns of features and pairs are read once and stay in memory (about 30 bytes a pair); examples stay on disk but for
  the row groups in use, so a run may be larger than memory.
- Whatever a layer's folder lacks is None or empty; a damaged file is a `UserError`, an address that names nothing a
  `Missing` with words that a reader may see.
- Served and exported pages read the same records: one at a time here, many at a time there, by the same function.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any

import pyarrow.parquet as pq

from .. import __version__
from ..decomposition import read_run
from ..errors import UserError
from ..evaluate.stored import Layer, read
from ..explain.opening import layer_folders
from ..tables import distance_table
from .feature_store import FeatureStore
from .head_store import HeadStore
from .pair_store import PairStore
from .tables import PAGE, KeyedRows, Missing

FILES = {
    "report": "report.json",
    "examples": "examples.parquet",
    "pair_examples": "pair_examples.parquet",
    "distances": distance_table.NAME,
    "patterns": "patterns.json",
    "truth": "truth.json",
}


class Run:
    """A finished run's layers; `folder` is the run's, or one layer's in it."""

    def __init__(self, folder: Path) -> None:
        places = layer_folders(Path(folder))
        self.folder = places[0].parent
        self.config = read_run(self.folder)
        self._layers = {int(p.name.removeprefix("layer_")): p for p in (place.resolve() for place in places)}
        self._opened: dict[int, LayerStore] = {}
        self._lock = RLock()

    @property
    def numbers(self) -> list[int]:
        return list(self._layers)

    def layer(self, number: int) -> LayerStore:
        """A layer, opened when it is first asked for."""
        if number not in self._layers:
            raise Missing(f"This run has no layer {number}.")
        with self._lock:
            if number not in self._opened:
                site = (self.config.get("sites") or {}).get(number) or {}
                self._opened[number] = LayerStore(self._layers[number], number, site)
            return self._opened[number]

    def warm(self) -> None:
        """Read ahead what the first views of each layer need."""
        with suppress(UserError):  # it is said where it is asked for
            self.summary()
            for number in self.numbers:
                self.layer(number).warm()

    @cached_property
    def model(self) -> str:
        """The model's name; of a folder its last part."""
        return str(self.config["run"].get("model") or "the embedded model").rstrip("/").rsplit("/", 1)[-1]

    def summary(self) -> dict[str, Any]:
        """What the page must know of the run before it shows anything."""
        run = self.config["run"]
        source = str((run.get("data") or {}).get("source") or "")
        chosen = {
            "recipe": (run.get("dictionary") or {}).get("recipe"),
            "width": (run.get("dictionary") or {}).get("width"),
            "k": (run.get("dictionary") or {}).get("k"),
            "context": (run.get("data") or {}).get("context"),
            "text": source.rstrip("/").rsplit("/", 1)[-1],
            "training tokens": (run.get("training") or {}).get("tokens"),
            "pairs by": (run.get("pairs") or {}).get("method"),
            "seed": (run.get("training") or {}).get("seed"),
            "qkscope": (self.config.get("versions") or {}).get("qkscope"),
            "torch": (self.config.get("versions") or {}).get("torch"),
        }
        return {
            "model": self.model,
            "page": __version__,
            "rows": PAGE,
            "config": {name: value for name, value in chosen.items() if value not in (None, "")},
            "together": read(self.folder / "together.json", _json),
            "layers": [self.layer(number).summary() for number in self.numbers],
        }


class LayerStore:
    """One layer's folder."""

    def __init__(self, folder: Path, number: int, site: dict[str, Any]) -> None:
        self.folder, self.number, self.site = folder, number, site
        self.files = Layer(folder, number)
        self.features = FeatureStore(self)
        self.pairs = PairStore(self)
        self.of_heads = HeadStore(self)

    def summary(self) -> dict[str, Any]:
        """Numbers of the layer, and what can be asked of it; read without the tables themselves."""
        return {
            "layer": self.number,
            "heads": self.heads,
            "rotary": bool(self.site.get("rotary")),
            "width": {side: len(numbers) for side, numbers in self.features.numbers.items()},
            "numbers": {side: int(numbers.max(initial=-1)) + 1 for side, numbers in self.features.numbers.items()},
            "pairs": self.pairs.count,
            "has": {name: (self.folder / file).is_file() for name, file in FILES.items()},
        }

    def report(self) -> dict[str, Any]:
        """report.json, the model by its name and not by its place."""
        found = dict(self.files.report)
        if "model" in found:
            found["model"] = str(found["model"] or "").rstrip("/").rsplit("/", 1)[-1]
        if isinstance(given := found.get("given"), dict) and "source" in given:
            found["given"] = {**given, "source": str(given["source"]).rstrip("/").rsplit("/", 1)[-1]}
        if not found:
            raise Missing(f"Layer {self.number} has no report yet; qkscope evaluate writes it.")
        return found

    def warm(self) -> None:
        """Read what is kept in memory: columns, names, and where each feature's and pair's examples are."""
        self.features.warm()
        self.pairs.warm()

    @cached_property
    def heads(self) -> int:
        """N; of an artefact that does not say it, as many as have pairs."""
        return int(self.site.get("N") or self.pairs.table.columns["head"].max(initial=-1) + 1)

    @cached_property
    def cell_width(self) -> int:
        """More than any feature's number and its bias, which is 0 in `cell`."""
        return 2 + max(int(numbers.max(initial=0)) for numbers in self.features.numbers.values())

    def cell(self, query: Any, key: Any, head: Any) -> Any:
        """A pair as one number: by head, query feature, key feature."""
        return (head * self.cell_width + query + 1) * self.cell_width + key + 1

    def keyed(self, name: str, columns: Sequence[str], key: Any) -> KeyedRows | None:
        """Rows of a file by a key; None without the file."""
        return read(self.folder / name, lambda path: KeyedRows(path, columns, key))

    def table(self, name: str, columns: Sequence[str] | None = None) -> Any:
        """A table that every finished run has."""
        found = read(self.folder / name, lambda path: pq.read_table(path, columns=columns))
        if found is None:
            raise UserError(f"{self.folder / name} is missing; qkscope evaluate writes it")
        return found

    def pattern(self, head: int) -> dict[str, Any]:
        """One head's patterns on the stored text."""
        found = self.files.patterns
        one = next((one for one in found.get("heads", []) if one["head"] == head), None)
        if one is None:
            raise Missing(f"Layer {self.number} stores no pattern of head {head}.")
        return {"tokens": found["tokens"], **one}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
