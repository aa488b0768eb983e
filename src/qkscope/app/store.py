"""What the page shows of a run, read from the artefact alone: plain values by name, nothing of the web.

What is notable:
- Columns of features and pairs are read once and stay in memory (about 30 bytes a pair); examples stay on disk but for
  the row groups in use, so a run may be larger than memory.
- Whatever a layer's folder lacks is None or empty; a damaged file is a `UserError`, an address that names nothing a
  `Missing` with words that a reader may see.
- Served and exported pages read the same records: the export's files hold several at a time (`feature_shard` ...).

Shapes: F features of a side, P kept pairs (-1: a side's bias), N heads.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .. import __version__
from ..decomposition import SIDES, read_run
from ..errors import UserError
from ..evaluate.stored import Layer, read
from ..explain.names import FeatureNames
from ..explain.opening import layer_folders
from .head_store import HeadStore
from .tables import PAGE, KeyedRows, Missing, Table, plain

PARTNERS = 200  # pairs of a feature that are read with it; all are in the table of pairs
FEATURES_A_SHARD, PAIRS_A_SHARD, ROWS_A_CHUNK = 16, 64, 20_000
FEATURE_NUMBERS = ("density", "importance", "pairs", "max_activation", "mean_activation", "by_position")


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
        self._names = FeatureNames(folder)
        self.name = lru_cache(maxsize=None)(self._name)

    # Whole files

    def summary(self) -> dict[str, Any]:
        """Numbers of the layer, and what can be asked of it."""
        return {
            "layer": self.number,
            "heads": self.heads,
            "rotary": bool(self.site.get("rotary")),
            "width": {side: len(numbers) for side, numbers in self._numbers.items()},
            "numbers": {side: int(numbers.max(initial=-1)) + 1 for side, numbers in self._numbers.items()},
            "pairs": len(self.pairs),
            "shards": {"features": FEATURES_A_SHARD, "pairs": self.pair_shards, "rows": ROWS_A_CHUNK},
            "has": {
                name: (self.folder / file).is_file()
                for name, file in (
                    ("report", "report.json"),
                    ("examples", "examples.parquet"),
                    ("pair_examples", "pair_examples.parquet"),
                    ("patterns", "patterns.json"),
                    ("truth", "truth.json"),
                )
            },
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
        for side in SIDES:
            self.features(side)
        _ = self._by_side, self._examples, self._pair_examples

    @cached_property
    def heads(self) -> int:
        """N."""
        least = int(self.pairs.columns["head"].max(initial=-1)) + 1
        return max(int(self.site.get("N") or 0), least)

    # Features

    def features(self, side: str) -> Table:
        """A side's features as a table: numbers, `f1` of the label and the label or tokens it goes by."""
        return self._features[side]

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        """Each side's feature numbers, rising."""
        return {side: table["feature"].to_numpy() for side, table in self._statistics.items()}

    @cached_property
    def _statistics(self) -> dict[str, pa.Table]:
        """Each side's rows of features.parquet, by feature."""
        table = read(self.folder / "features.parquet", pq.read_table)
        if table is None:
            raise UserError(f"{self.folder / 'features.parquet'} is missing; qkscope evaluate writes it")
        sides = {side: table.filter(_equal(table["side"], side)) for side in SIDES}
        return {side: part.take(np.argsort(part["feature"].to_numpy(), kind="stable")) for side, part in sides.items()}

    @cached_property
    def _features(self) -> dict[str, Table]:
        found = {}
        for side, table in self._statistics.items():
            columns: dict[str, Any] = {"feature": self._numbers[side]}
            for name in FEATURE_NUMBERS:
                if name in table.column_names:
                    columns[name] = table[name].to_numpy()
            numbers = self._numbers[side].tolist()
            known = [self.files.known(side, feature) or {} for feature in numbers]
            if any(known):
                columns["f1"] = np.asarray([one.get("f1", np.nan) for one in known], dtype=np.float64)
            columns["name"] = [self.name(side, feature) for feature in numbers]
            found[side] = Table(columns)
        return found

    def _name(self, side: str, feature: int) -> dict[str, Any]:
        """What a feature goes by: the label it predicts, or the tokens it fires on most."""
        if feature < 0:
            return {"bias": True}
        if label := self._names.label(side, feature):
            return {"label": label}
        tokens = self._names.tokens(side, feature)
        return {"tokens": sorted(tokens, key=lambda token: -tokens[token])[:3]}

    @cached_property
    def _text(self) -> dict[str, list[str]]:
        """What a search for features looks through."""
        return {side: [_searched(name) for name in self.features(side).columns["name"]] for side in SIDES}

    def with_text(self, side: str, text: str) -> np.ndarray:
        """Which of a side's features have `text` in their label or tokens, or as their number, bool [F]."""
        words = text.lower().replace("␣", " ").replace("·", " ")
        found = np.asarray([words in searched for searched in self._text[side]], dtype=bool)
        if words.strip().isdecimal():
            found |= self.features(side).columns["feature"] == int(words.strip()[:9])
        return found

    def feature(self, side: str, feature: int) -> dict[str, Any]:
        """All there is to show of one feature."""
        place = self._place(side, feature)
        row = self._statistics[side].slice(place, 1).to_pylist()[0]
        known = self.files.known(side, feature)
        examples = [
            {
                "range": row.get("range", -1),
                "activation": _single(row["activation"]),
                "document": row["document"],
                "position": row["position"],
                "center": row["center"],
                "tokens": row["tokens"],
                "activations": plain(np.asarray(row["activations"], dtype=np.float32)),
            }
            for row in (self._examples.of(SIDES.index(side) * self.key_width + feature) if self._examples else [])
        ]
        numbers = {name: _single(value) for name, value in row.items() if isinstance(value, int | float)}
        lists = {
            name: [_single(value) for value in row[name]]
            for name in ("positions", "histogram", "top_tokens", "top_token_counts", "top_token_activations")
            if row.get(name) is not None
        }
        return {
            "side": side,
            "feature": feature,
            "name": self.name(side, feature),
            "known": known and {key: known[key] for key in ("label", "precision", "recall", "f1") if key in known},
            **numbers,
            **lists,
            "examples": examples,
            "partners": self.partners(side, feature),
        }

    def _place(self, side: str, feature: int) -> int:
        numbers = self._numbers[side]
        place = int(np.searchsorted(numbers, feature))
        if place >= len(numbers) or numbers[place] != feature:
            raise Missing(f"Layer {self.number} has no {side} feature {feature}.")
        return place

    @cached_property
    def key_width(self) -> int:
        """More than any feature's number."""
        return 1 + max(int(numbers.max(initial=0)) for numbers in self._numbers.values())

    @cached_property
    def _examples(self) -> KeyedRows | None:
        def key(table: pa.Table) -> np.ndarray:
            side = _equal(table["side"], SIDES[1]).to_numpy().astype(np.int64)
            return side * self.key_width + table["feature"].to_numpy()

        return self._keyed("examples.parquet", ("side", "feature"), key)

    def partners(self, side: str, feature: int, most: int = PARTNERS) -> dict[str, Any]:
        """A feature's most important pairs, by head, and how many there are."""
        order, values = self._by_side[side]
        low, high = np.searchsorted(values, [feature, feature + 1])
        rows = np.sort(order[low:high])  # the table is by falling importance
        return {"total": len(rows), **self.pair_rows(rows[:most])}

    # Pairs

    @cached_property
    def pairs(self) -> Table:
        """Kept pairs, the most important first, `rank` from 0."""
        table = read(self.folder / "pairs.parquet", pq.read_table)
        if table is None:
            raise UserError(f"{self.folder / 'pairs.parquet'} is missing; the run has no pairs")
        order = np.argsort(-table["importance"].to_numpy(), kind="stable")
        names = {"query": "query_feature", "key": "key_feature"}
        columns = {name: table[names.get(name, name)].to_numpy()[order] for name in
                   ("query", "key", "head", "strength", "weight_strength", "importance")}  # fmt: skip
        return Table({"rank": np.arange(len(order)), **columns})

    @cached_property
    def _by_side(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        out = {}
        for side in SIDES:
            order = np.argsort(self.pairs.columns[side], kind="stable")
            out[side] = order, self.pairs.columns[side][order]
        return out

    def pair_rows(self, rows: np.ndarray) -> dict[str, Any]:
        """Rows of the pair table, with what their features go by."""
        return self.named(self.pairs.take(rows))

    def named(self, page: dict[str, Any]) -> dict[str, Any]:
        """A page of the pair table, with what its features go by."""
        for side in SIDES:
            page["columns"][f"{side}_name"] = [self.name(side, feature) for feature in page["columns"][side]]
        return page

    def pair(self, query: int, key: int, head: int) -> dict[str, Any]:
        """All there is to show of one pair, in the given head and in the others that have it."""
        order, values = self._by_side["query"]
        low, high = np.searchsorted(values, [query, query + 1])
        rows = np.sort(order[low:high])
        rows = rows[self.pairs.columns["key"][rows] == key]
        heads = self.pairs.columns["head"][rows]
        if head not in heads:
            raise Missing(f"Layer {self.number} keeps no pair of query feature {query} and key feature {key} "
                          f"in head {head}.")  # fmt: skip
        examples = self._pair_examples.of(self.cell(query, key, head)) if self._pair_examples else []
        for row in examples:
            row["effect"], row["pattern"] = _single(row["effect"]), _single(row["pattern"])
            for name in ("query_feature", "key_feature", "head", "rank"):
                row.pop(name, None)
        return {
            "query": query,
            "key": key,
            "head": head,
            "names": {side: self.name(side, feature) for side, feature in zip(SIDES, (query, key), strict=True)},
            "kept": len(self.pairs),
            "heads": self.pairs.take(rows)["columns"],
            "neighbours": self._neighbours(int(rows[heads == head][0])),
            "linked": plain([self.files.linked({"query_feature": query, "key_feature": key, "head": head})])[0],
            "examples": examples,
        }

    def _neighbours(self, rank: int) -> dict[str, list[int] | None]:
        """The pairs before and after one by importance, each as [query, key, head]."""
        out: dict[str, list[int] | None] = {}
        for name, other in (("before", rank - 1), ("after", rank + 1)):
            inside = 0 <= other < len(self.pairs)
            out[name] = [int(self.pairs.columns[c][other]) for c in ("query", "key", "head")] if inside else None
        return out

    def cell(self, query: Any, key: Any, head: Any) -> Any:
        width = self.key_width + 1
        return (head * width + query + 1) * width + key + 1

    @cached_property
    def _pair_examples(self) -> KeyedRows | None:
        names = ("query_feature", "key_feature", "head")

        def key(table: pa.Table) -> np.ndarray:
            return self.cell(*(table[name].to_numpy().astype(np.int64) for name in names))

        return self._keyed("pair_examples.parquet", names, key)

    def _keyed(self, name: str, columns: tuple[str, ...], key: Any) -> KeyedRows | None:
        return read(self.folder / name, lambda path: KeyedRows(path, columns, key))

    # Heads

    @cached_property
    def of_heads(self) -> HeadStore:
        return HeadStore(self)

    def pattern(self, head: int) -> dict[str, Any]:
        """One head's patterns on the stored text."""
        found = self.files.patterns
        one = next((one for one in found.get("heads", []) if one["head"] == head), None)
        if one is None:
            raise Missing(f"Layer {self.number} stores no pattern of head {head}.")
        return {"tokens": found["tokens"], **one}

    # Shards of the export

    @cached_property
    def pair_shards(self) -> int:
        return max(-(-len(self.pairs) // PAIRS_A_SHARD), 1)

    def pair_shard_of(self, query: Any, key: Any, head: Any) -> Any:
        """The shard that holds a pair; static/data.js has the same sum."""
        return ((query + 1) * 7919 + (key + 1) * 31 + head) % self.pair_shards


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _single(value: Any) -> Any:
    """A float32 that was read as a float64 with its own digits; anything else as it is."""
    return plain(np.asarray([value], np.float32))[0] if isinstance(value, float) else value


def _equal(values: Any, value: str) -> Any:
    return pc.call_function("equal", [values, value])


def _searched(name: dict[str, Any]) -> str:
    """What a search looks through: the label, or the tokens."""
    return "\n".join([name["label"]] if "label" in name else name.get("tokens", [])).lower()
