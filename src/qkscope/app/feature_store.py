"""What the page shows of a layer's features: the table of a side, what each goes by, and all there is of one.

Shapes: F features of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..decomposition import SIDES
from ..explain.names import FeatureNames
from .tables import KeyedRows, Missing, Table, records

if TYPE_CHECKING:
    from .store import LayerStore

NUMBERS = ("density", "importance", "pairs", "max_activation", "mean_activation", "by_position")
LISTS = ("positions", "histogram", "top_tokens", "top_token_counts", "top_token_activations")
KNOWN = ("label", "precision", "recall", "f1")
EXAMPLE = ("range", "activation", "document", "position", "center", "tokens", "activations")


class FeatureStore:
    """The features of one layer, both sides."""

    def __init__(self, layer: LayerStore) -> None:
        self._layer = layer
        self._names = FeatureNames(layer.folder)
        self.name = lru_cache(maxsize=None)(self._name)

    def warm(self) -> None:
        for side in SIDES:
            self.table(side)
        _ = self._examples

    # The table of a side

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """Each side's feature numbers, rising."""
        table = self._layer.table("features.parquet", ["side", "feature"])
        return {side: np.sort(table.filter(_equal(table["side"], side))["feature"].to_numpy()) for side in SIDES}

    @cached_property
    def _statistics(self) -> dict[str, pa.Table]:
        """Each side's rows of features.parquet, by feature."""
        table = self._layer.table("features.parquet")
        sides = {side: table.filter(_equal(table["side"], side)) for side in SIDES}
        return {side: part.take(np.argsort(part["feature"].to_numpy(), kind="stable")) for side, part in sides.items()}

    def table(self, side: str) -> Table:
        """A side's features as a table: numbers, `f1` of the label and the label or tokens it goes by."""
        return self._tables[side]

    @cached_property
    def _tables(self) -> dict[str, Table]:
        found = {}
        for side, table in self._statistics.items():
            columns: dict[str, Any] = {"feature": self.numbers[side]}
            columns |= {name: table[name].to_numpy() for name in NUMBERS if name in table.column_names}
            numbers = self.numbers[side].tolist()
            known = [self._layer.files.known(side, feature) or {} for feature in numbers]
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
        return {side: [_searched(name) for name in self.table(side).columns["name"]] for side in SIDES}

    def with_text(self, side: str, text: str) -> np.ndarray:
        """Which of a side's features have `text` in their label or tokens, or as their number, bool [F]."""
        words = text.lower().replace("␣", " ").replace("·", " ")
        found = np.asarray([words in searched for searched in self._text[side]], dtype=bool)
        if words.strip().isdecimal():
            found |= self.numbers[side] == int(words.strip()[:9])
        return found

    # Records

    def record(self, side: str, feature: int) -> dict[str, Any]:
        """All there is to show of one feature."""
        return self.records(side, [feature])[0]

    def records(self, side: str, features: Sequence[int]) -> list[dict[str, Any]]:
        """`record` of several features, in one go."""
        wanted = self._statistics[side].take(self._places(side, features))
        rows = records(wanted.drop_columns([name for name in ("side", "top_heads") if name in wanted.column_names]))
        examples = [[] for _ in features]
        if self._examples:
            examples = self._examples.of([self._key(SIDES.index(side), feature) for feature in features])
        every = zip(rows, examples, self._layer.pairs.partners(side, features), strict=True)
        return [self._record(side, *one) for one in every]

    def _record(
        self, side: str, row: dict[str, Any], examples: list[dict[str, Any]], partners: dict[str, Any]
    ) -> dict[str, Any]:
        feature = row["feature"]
        known = self._layer.files.known(side, feature)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        return {
            "side": side,
            "name": self.name(side, feature),
            "known": known and {name: known[name] for name in KNOWN if name in known},
            **numbers,
            **{name: row[name] for name in LISTS if row.get(name) is not None},
            "examples": [{"range": -1, **{name: one[name] for name in EXAMPLE if name in one}} for one in examples],
            "partners": partners,
        }

    def _places(self, side: str, features: Sequence[int]) -> np.ndarray:
        numbers = self.numbers[side]
        places = np.searchsorted(numbers, features)
        for feature, place in zip(features, places.tolist(), strict=True):
            if place >= len(numbers) or numbers[place] != feature:
                raise Missing(f"Layer {self._layer.number} has no {side} feature {feature}.")
        return places

    def _key(self, side: Any, feature: Any) -> Any:
        return side * self._layer.cell_width + feature

    @cached_property
    def _examples(self) -> KeyedRows | None:
        def key(table: pa.Table) -> np.ndarray:
            side = _equal(table["side"], SIDES[1]).to_numpy().astype(np.int64)
            return self._key(side, table["feature"].to_numpy())

        return self._layer.keyed("examples.parquet", ("side", "feature"), key)


def _equal(values: Any, value: str) -> Any:
    return pc.call_function("equal", [values, value])


def _searched(name: dict[str, Any]) -> str:
    """What a search looks through: the label, or the tokens."""
    return "\n".join([name["label"]] if "label" in name else name.get("tokens", [])).lower()
