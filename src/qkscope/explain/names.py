"""A few words for each feature: what a table can call it by.

Where the corpus knows its tokens' roles, the role that a feature predicts best (truth.json); elsewhere the tokens it
fires most strongly on (examples.parquet).
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..decomposition import SIDES

BIAS = "bias"
NAMED = 0.5  # F1 from which a role is a feature's name
TOKENS = 3  # that a feature without a role is called by


class FeatureNames:
    """Names of a layer's features, by side and number; empty words where nothing is known."""

    def __init__(self, by_side: dict[str, dict[int, str]]) -> None:
        self.by_side = by_side

    @classmethod
    def of(cls, folder: Path | None) -> FeatureNames:
        """Read from a layer's folder what is there."""
        names: dict[str, dict[int, str]] = {side: {} for side in SIDES}
        if folder is not None:
            with suppress(OSError, pa.ArrowException, KeyError):
                _by_tokens(folder / "examples.parquet", names)
            with suppress(OSError, ValueError, KeyError):
                _by_role(folder / "truth.json", names)
        return cls(names)

    def __call__(self, side: str, feature: int) -> str:
        return BIAS if feature < 0 else self.by_side[side].get(feature, "")

    def pair(self, query: int, key: int) -> str:
        """A pair as one reads it: query feature × key feature."""
        sides = (("query", query), ("key", key))
        said = [BIAS if f < 0 else f"{side[0]}{f} {self(side, f)}".rstrip() for side, f in sides]
        return " \u00d7 ".join(said)


def _by_tokens(path: Path, names: dict[str, dict[int, str]]) -> None:
    table = pq.read_table(path, columns=["side", "feature", "center", "tokens"]).to_pydict()
    seen: dict[tuple[str, int], Counter[str]] = {}
    for side, feature, center, tokens in zip(*table.values(), strict=True):
        seen.setdefault((side, feature), Counter())[tokens[center]] += 1
    for (side, feature), tokens in seen.items():
        names[side][feature] = " ".join(shown(token) for token, _ in tokens.most_common(TOKENS))


def _by_role(path: Path, names: dict[str, dict[int, str]]) -> None:
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    for side in SIDES:
        for number, found in enumerate(features[side]):
            if found and found["f1"] >= NAMED:
                names[side][number] = found["label"].replace("“ ", "“␣")


def shown(token: str) -> str:
    """A token in quotation marks, its white space and control characters visible."""
    visible = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "\u2018" + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in visible) + "\u2019"
