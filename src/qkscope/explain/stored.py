"""Statistics and examples of one feature or one pair, read from a layer's folder.

Each is read by itself: Parquet files are sorted, so one feature's rows lie together. Printed, an example is a line of
text with its token «marked».
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..decomposition import SIDES
from ..errors import UserError
from .text import marked, shown

T = TypeVar("T")
AGAIN = "qkscope evaluate writes it"


@dataclass(frozen=True)
class FeatureStatistics:
    """A row of features.parquet."""

    side: str
    feature: int
    density: float
    """Share of tokens on which it fires."""
    mean_activation: float
    """Where it fires."""
    max_activation: float
    live: bool
    by_position: float
    positions: list[float]
    """Mean activation over the tokens at places 0, 1-2, 3-6, 7-14 ... of a sequence."""
    histogram: list[int]
    """Activations by size: half octaves from 2⁻¹⁶ to 2¹⁶ (`feature_examples.HISTOGRAM_EDGES`)."""
    top_tokens: list[str]
    top_token_counts: list[int]
    top_token_activations: list[float]
    token_share: float
    """Share of its firings that the counts are estimated from; 1: all."""
    top_heads: list[int]
    pairs: int
    importance: float

    def __str__(self) -> str:
        tokens = ", ".join(
            f"{shown(token)} {count}" for token, count in zip(self.top_tokens, self.top_token_counts, strict=True)
        )
        fires = f"fires on {self.density:.3%} of tokens, at most {self.max_activation:.3g}" if self.live else "is dead"
        return f"{self.side} feature {self.feature} {fires}" + (f"; on {tokens}" if tokens else "")


@dataclass(frozen=True)
class Example:
    """A row of examples.parquet."""

    side: str
    feature: int
    range: int
    """-1: one of the strongest. 0 to 3: drawn from so many octaves below the strongest's, 3 also from further below."""
    rank: int
    activation: float
    document: int
    position: int
    """In the document, in content tokens from 0; -1: BOS."""
    center: int
    """The token's place in `tokens`."""
    tokens: list[str]
    activations: list[float]

    def __str__(self) -> str:
        return f"{self.activation:8.3f}  {marked(self.tokens, self.center)}"


@dataclass(frozen=True)
class PairExample:
    """A row of pair_examples.parquet."""

    query_feature: int
    """-1: the bias; so with the key."""
    key_feature: int
    head: int
    rank: int
    effect: float
    """What the pair does to the pattern there, to first order: below 0 where it inhibits."""
    pattern: float
    """The pruned map's pattern there."""
    document: int
    query_position: int
    query_center: int
    query_tokens: list[str]
    key_position: int
    key_center: int
    key_tokens: list[str]

    def __str__(self) -> str:
        query, key = marked(self.query_tokens, self.query_center), marked(self.key_tokens, self.key_center)
        return f"{self.effect:+8.3f} of {self.pattern:.3f}  {query}  →  {key}"


def feature_statistics(folder: str | Path, side: str, feature: int) -> FeatureStatistics:
    """One feature's row of a layer's features.parquet; `UserError` where there is none."""
    rows = _of_feature(Path(folder) / "features.parquet", side, feature)
    if not rows:
        raise UserError(f"{folder} has no {side} feature {feature}; features.parquet lists those that there are")
    return _as(FeatureStatistics, rows[0], Path(folder))


def feature_examples(folder: str | Path, side: str, feature: int) -> list[Example]:
    """A feature's examples, the strongest first, then those drawn from each range; none where it is dead.

    Raises `UserError` for a feature that the layer does not have, and for a file that is missing or damaged.
    """
    folder = Path(folder)
    rows = _of_feature(folder / "examples.parquet", side, feature)
    if not rows:
        feature_statistics(folder, side, feature)
    return [_as(Example, row, folder) for row in rows]


def pair_examples(folder: str | Path, query: int, key: int, head: int) -> list[PairExample]:
    """The places where a kept pair does most to the pattern, by falling size of the effect; -1 is a side's bias.

    Raises `UserError` for a pair that was not kept, and for a file that is missing or damaged.
    """
    folder = Path(folder)
    wanted = [("query_feature", "=", query), ("key_feature", "=", key), ("head", "=", head)]
    rows = _rows(folder / "pair_examples.parquet", wanted)
    if not rows and not _rows(folder / "pairs.parquet", wanted):
        raise UserError(
            f"{folder} keeps no pair of query feature {query} and key feature {key} in head {head}; pairs.parquet "
            "lists those that it keeps"
        )
    return [_as(PairExample, row, folder) for row in rows]


def _of_feature(path: Path, side: str, feature: int) -> list[dict[str, Any]]:
    if side not in SIDES:
        raise UserError(f"side {side!r}: choose {' or '.join(SIDES)}")
    return _rows(path, [("side", "=", side), ("feature", "=", feature)])


def _rows(path: Path, wanted: list[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path, filters=wanted).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {AGAIN}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); {AGAIN}") from None


def _as(kind: type[T], row: dict[str, Any], folder: Path) -> T:
    try:
        return kind(**{name: row[name] for name in kind.__dataclass_fields__})  # type: ignore[attr-defined]
    except KeyError as error:
        raise UserError(f"{folder} was evaluated by an earlier version (no column {error}); {AGAIN} anew") from None
