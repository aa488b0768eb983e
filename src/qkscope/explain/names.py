"""What to call a feature, from what its layer's folder holds: the label that it is known to predict, or its tokens.

A label (truth.json, embedded corpus only) names a feature from an F1 of `NAMED` on; other features are called by the
tokens that their strongest examples have in the middle (examples.parquet), the most common first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..evaluate.stored import Layer, read
from .feature_examples import STRONGEST
from .text import shown

NAMED = 0.5  # F1 of a label from which it says more of a feature than its tokens do
TOKENS = 3  # in a name


class FeatureNames:
    """Names of one layer's features; `side` is "query" or "key", feature -1 the side's bias."""

    def __init__(self, folder: Path) -> None:
        self._layer = Layer(folder, 0)

    def label(self, side: str, feature: int) -> str | None:
        """The label that the feature is known to predict; None where none does well enough."""
        known = self._layer.known(side, feature)
        return known["label"] if known and known["f1"] >= NAMED else None

    def tokens(self, side: str, feature: int) -> dict[str, float]:
        """Tokens in the middle of the feature's examples, each with its share of them."""
        return self._tokens.get((side, feature), {})

    def of(self, side: str, feature: int) -> str:
        """The feature and its name, such as `q12 name_again` or `k7 “␣Tom”, “␣Ann”`."""
        if feature < 0:
            return "bias"
        label = self.label(side, feature)
        name = label.replace("“ ", "“␣") if label else _listed(self.tokens(side, feature))
        return f"{side[0]}{feature} {name}".strip()

    def pair(self, query: int, key: int) -> str:
        """A pair as one reads it: query feature → key feature."""
        return f"{self.of('query', query)} → {self.of('key', key)}"

    def of_group(self, side: str, shares: Iterable[tuple[int, float]]) -> str:
        """A name for features that belong together in these shares: the label with the largest share, a second one with
        at least half of that; or, where features without a label have more, the tokens that they have in common."""
        labels: dict[str, float] = {}
        tokens: dict[str, float] = {}
        unnamed = 0.0
        for feature, share in shares:
            if label := self.label(side, feature):
                labels[label] = labels.get(label, 0) + share
            else:
                unnamed += share
                for token, part in self.tokens(side, feature).items():
                    tokens[token] = tokens.get(token, 0) + share * part
        if tokens and unnamed > sum(labels.values()):
            return _listed(tokens)
        return " / ".join(name for name in _first(labels, 2) if labels[name] >= max(labels.values()) / 2) or "unnamed"

    @cached_property
    def _tokens(self) -> dict[tuple[str, int], dict[str, float]]:
        path = self._layer.folder / "examples.parquet"
        table = read(path, _strongest)
        if table is None:
            return {}
        lists = table["tokens"].combine_chunks()
        middle = lists.values.take(pa.array(lists.offsets.to_numpy()[:-1] + table["center"].to_numpy()))
        found: dict[tuple[str, int], Counter[str]] = {}
        for side, feature, token in zip(
            *(c.to_pylist() for c in (table["side"], table["feature"], middle)), strict=True
        ):
            found.setdefault((side, feature), Counter())[token] += 1
        return {key: {token: n / c.total() for token, n in c.items()} for key, c in found.items()}


def _strongest(path: Path) -> pa.Table:
    ranged = "range" in pq.read_schema(path).names  # earlier artefacts have no others
    only = [("range", "=", STRONGEST)] if ranged else None
    return pq.read_table(path, columns=["side", "feature", "center", "tokens"], filters=only)


def _first(shares: dict[str, float], count: int) -> list[str]:
    return sorted(shares, key=lambda name: -shares[name])[:count]


def _listed(tokens: dict[str, float]) -> str:
    """The most common tokens, quoted."""
    return ", ".join(shown(token) for token in _first(tokens, TOKENS))
