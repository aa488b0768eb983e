"""What to call a feature, from what its layer's folder holds: the label that it is known to predict, or its tokens.

A label (truth.json, embedded corpus only) names a feature from an F1 of `NAMED` on; other features are called by the
tokens that their strongest examples have in the middle (examples.parquet), the most common first. Those are counted
when a feature is asked for: a layer may have a hundred thousand.

Shapes: R examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..evaluate.stored import Layer, read
from ..tables.feature_examples import STRONGEST
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
        if side not in self._middles:
            return {}
        feature_R, code_R, texts = self._middles[side]
        low, high = np.searchsorted(feature_R, [feature, feature + 1])
        counts = Counter(code_R[low:high].tolist())
        return {texts[code]: n / counts.total() for code, n in counts.items()}

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
    def _middles(self) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
        """By side, of the strongest examples: feature (rising) and middle token's code, [R] each; the codes' texts."""
        path = self._layer.folder / "examples.parquet"
        table = read(path, _strongest)
        if table is None:
            return {}
        coded = table["middle"].combine_chunks().dictionary_encode()
        texts, code_R = coded.dictionary.to_pylist(), coded.indices.to_numpy()
        query_R, feature_R = table["query"].to_numpy(), table["feature"].to_numpy().astype(np.int64)  # as it is sought
        found = {}
        for side, here_R in (("query", query_R), ("key", ~query_R)):
            order = np.argsort(feature_R[here_R], kind="stable")
            found[side] = feature_R[here_R][order], code_R[here_R][order], texts
        return found


def _strongest(path: Path) -> pa.Table:
    """Side, feature and middle token of the strongest examples, [R]; read in parts, as the whole may be large."""
    file = pq.ParquetFile(path)
    ranged = "range" in file.schema_arrow.names  # earlier artefacts have no others
    columns = ["side", "feature", "center", "tokens", *(["range"] if ranged else [])]
    parts = []
    for batch in file.iter_batches(columns=columns):
        rows = batch.filter(pc.field("range") == STRONGEST) if ranged else batch
        lists = rows["tokens"]
        starts = lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py()
        middle = lists.flatten().take(pa.array(starts + rows["center"].to_numpy()))
        query = pc.call_function("equal", [rows["side"], "query"])
        parts.append({"query": query, "feature": rows["feature"], "middle": middle})
    kinds = pa.schema({"query": pa.bool_(), "feature": pa.int32(), "middle": pa.string()})
    return pa.Table.from_batches([pa.record_batch(part, schema=kinds) for part in parts], kinds)


def _first(shares: dict[str, float], count: int) -> list[str]:
    return sorted(shares, key=lambda name: -shares[name])[:count]


def _listed(tokens: dict[str, float]) -> str:
    """The most common tokens, quoted."""
    return ", ".join(shown(token) for token in _first(tokens, TOKENS))
