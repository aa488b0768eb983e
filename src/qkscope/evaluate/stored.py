"""What a run left on disk, as the page reads it: everything optional, a damaged file refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ..errors import UserError
from ..tables.feature_examples import STRONGEST
from .charts import finite

PAIRS_SHOWN, LINKED_SHOWN, BIAS_ROWS_SHOWN, DENSEST_SHOWN, SNIPPETS = 30, 12, 10, 6, 2
SIDES = ("query", "key")
PAIR = ("query_feature", "key_feature", "head")


class Layer:
    """What one layer's folder holds; empty where a file is not there."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json."""
        return read(self.folder / "report.json", _json) or {}

    @cached_property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """The logged steps of each training phase."""
        phases: dict[str, list[dict[str, Any]]] = {}
        for line in read(self.folder / "metrics.jsonl", _json_lines) or []:
            if finite(line.get("pattern_kl")) and finite(line.get("tokens")):
                phases.setdefault(str(line.get("phase")), []).append(line)
        return phases

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Every kept pair, the most important first."""
        ranked = sorted(self.rows("pairs"), key=lambda row: -row["importance"])
        return [{**row, "place": place} for place, row in enumerate(ranked, 1)]

    @cached_property
    def shown_pairs(self) -> dict[str, list[dict[str, Any]]]:
        """The pairs the page shows: of two features, and with a side's bias (mostly position) apart from them; where
        the truth is known also those with the most importance along its links."""
        biased = [min(row["query_feature"], row["key_feature"]) < 0 for row in self.pairs]
        two = [row for row, bias in zip(self.pairs, biased, strict=True) if not bias]
        one = [row for row, bias in zip(self.pairs, biased, strict=True) if bias]
        linked = sorted((row for row in two if self.linked(row) > 0), key=lambda row: -self.linked(row))
        return {
            "Strongest pairs along links": linked[:LINKED_SHOWN],
            "Strongest pairs": two[:PAIRS_SHOWN],
            "Strongest pairs with a bias": one[:BIAS_ROWS_SHOWN],
        }

    @cached_property
    def densest(self) -> list[dict[str, Any]]:
        """The features of each side that fire on most tokens."""
        rows = sorted((row for row in self.rows("features") if row["live"]), key=lambda row: -row["density"])
        return [row for side in SIDES for row in [r for r in rows if r["side"] == side][:DENSEST_SHOWN]]

    @cached_property
    def examples(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """The first few of the strongest examples of each feature that is shown."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        wanted = {-1, *(row["feature"] for row in self.densest)}
        wanted |= {pair[f"{side}_feature"] for part in self.shown_pairs.values() for pair in part for side in SIDES}
        for row in self.rows("examples", [("rank", "<", SNIPPETS), ("feature", "in", wanted)]):
            if row.get("range", STRONGEST) == STRONGEST:  # earlier artefacts have no others
                found.setdefault((row["side"], row["feature"]), []).append(row)
        return found

    @cached_property
    def patterns(self) -> dict[str, Any]:
        """One held-out text's patterns."""
        return read(self.folder / "patterns.json", _json) or {}

    @cached_property
    def truth(self) -> dict[str, Any]:
        """What is known of each feature, pair and head on the embedded corpus."""
        return read(self.folder / "truth.json", _json) or {}

    def linked(self, pair: dict[str, Any]) -> float:
        """The part of a pair's importance along links, nats; 0 where that is not known."""
        return self._linked.get(tuple(pair[key] for key in PAIR), 0.0)

    @cached_property
    def _linked(self) -> dict[tuple[Any, ...], float]:
        return {
            tuple(row[key] for key in PAIR): row["linked"] for row in self.truth.get("pairs", []) if "linked" in row
        }

    def known(self, side: str, feature: int) -> dict[str, Any] | None:
        """The label of a feature with its figures, where there is one."""
        features = self.truth.get("features", {}).get(side, [])
        return features[feature] if 0 <= feature < len(features) else None

    def rows(self, name: str, filters: list | None = None) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.parquet"
        return read(path, lambda path: pq.read_table(path, filters=filters).to_pylist()) or []

    def figure(self, *keys: str) -> Any:
        """What stands in the report under these keys, or None."""
        at: Any = self.report
        for key in keys:
            at = at.get(key) if isinstance(at, dict) else None
        return at


def layers(run: Path) -> list[Layer]:
    numbers = [p.name.removeprefix("layer_") for p in run.glob("layer_*") if p.is_dir()]
    return [Layer(run / f"layer_{n}", n) for n in sorted(int(n) for n in numbers if n.isdecimal())]


def read(path: Path, how: Callable[[Path], Any]) -> Any:
    """The file's content, or None without one; a damaged file is a `UserError`."""
    try:
        return how(path) if path.is_file() else None
    except (ValueError, OSError, pa.ArrowException, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:120]})") from None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines: a killed run can leave half a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
