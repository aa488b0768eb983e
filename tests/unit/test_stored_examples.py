"""Reading one feature's and one pair's examples back."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from layers import some_decomposition, some_inputs
from test_examples import Letters
from test_pair_examples import a_batch, acts_of

from qkscope.decomposition import Decomposition
from qkscope.errors import UserError
from qkscope.explain.stored import feature_examples, feature_statistics, pair_examples
from qkscope.explain.text import marked
from qkscope.tables.examples import Examples


@pytest.fixture
def layer(tmp_path: Path) -> tuple[Path, Decomposition]:
    """A layer's folder with what was gathered on two batches."""
    dec = some_decomposition(some_inputs(rotary="half"))
    examples = Examples(dec, 2, window=3, drawn=1, pairs=2, pair_window=2)
    for seed in range(2):
        inputs = some_inputs(seed, rotary="half")
        examples.add(a_batch(inputs, seed), acts_of(dec, inputs), inputs)
    dec.save(tmp_path)
    examples.write(tmp_path, Letters())
    return tmp_path, dec


def test_everything_is_read_back(layer: tuple[Path, Decomposition]) -> None:
    folder, dec = layer
    rows = pq.read_table(folder / "examples.parquet").to_pylist()
    features = pq.read_table(folder / "features.parquet").to_pylist()
    found = [
        vars(one)
        for side in ("query", "key")
        for feature in range(dec.query.width if side == "query" else dec.key.width)
        for one in feature_examples(folder, side, feature)
    ]
    assert found == rows and len(rows) > 40
    assert [vars(feature_statistics(folder, row["side"], row["feature"])) for row in features] == features
    pairs = pq.read_table(folder / "pairs.parquet").to_pylist()
    by_pair = sorted(pairs, key=lambda row: (row["head"], row["query_feature"] % 99, row["key_feature"] % 99))
    places = [
        vars(one)
        for row in by_pair
        for one in pair_examples(folder, row["query_feature"], row["key_feature"], row["head"])
    ]
    assert places == pq.read_table(folder / "pair_examples.parquet").to_pylist() and len(places) > len(pairs)


def test_each_is_one_line(layer: tuple[Path, Decomposition]) -> None:
    folder, dec = layer
    for example in feature_examples(folder, "query", 0):
        assert str(example) == f"{example.activation:8.3f}  {marked(example.tokens, example.center)}"
        before, token, after = re.split("[«»]", str(example).split("  ")[-1])
        assert before + token + after == "".join(example.tokens) and token == example.tokens[example.center]
    a, b, head = int(dec.pairs.query_P[0]), int(dec.pairs.key_P[0]), int(dec.pairs.head_P[0])
    place = pair_examples(folder, a if a < dec.query.width else -1, b if b < dec.key.width else -1, head)[0]
    effect, query, key = re.fullmatch(r" +([+-][\d.]+) of [\d.]+  (\S+)  →  (\S+)", str(place)).groups()  # type: ignore[union-attr]
    assert float(effect) == pytest.approx(place.effect, abs=1e-3)
    assert (query, key) == (
        marked(place.query_tokens, place.query_center),
        marked(place.key_tokens, place.key_center),
    )
    statistics = feature_statistics(folder, "query", 0)
    assert str(statistics).startswith("query feature 0 fires on ")
    assert f"“{statistics.top_tokens[0]}”" in str(statistics)


def test_marks_stand_close_to_the_token() -> None:
    assert marked(["I", " like", " this"], 1) == "I «like» this"
    assert marked(["a", " ", "\n", "b"], 1) == "a« »⏎b" and marked(["a", "\n"], 1) == "a«⏎»"


def test_what_is_not_there_is_said_in_one_line(layer: tuple[Path, Decomposition]) -> None:
    folder, dec = layer
    width = dec.query.width
    with pytest.raises(UserError, match=f"has no query feature {width}; "):
        feature_examples(folder, "query", width)
    with pytest.raises(UserError, match="side 'value': choose query or key"):
        feature_examples(folder, "value", 0)
    with pytest.raises(UserError, match=f"no pair of query feature {width} and key feature 0 in head 2; "):
        pair_examples(folder, width, 0, 2)
    path = folder / "pair_examples.parquet"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        pair_examples(folder, 0, 0, 0)
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path} is missing; qkscope evaluate writes it")):
        pair_examples(folder, 0, 0, 0)
    table = pq.read_table(folder / "examples.parquet").drop_columns(["range"])
    pq.write_table(table, folder / "examples.parquet")
    with pytest.raises(UserError, match="earlier version"):
        feature_examples(folder, "query", 0)
