"""Examples against a slow reference: one feature, one sequence, one token at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from qkscope.config import DataConfig, RunConfig
from qkscope.data.sequences import Batch
from qkscope.decomposition import Decomposition, SiteShape
from qkscope.dictionary import SparseTranscoder
from qkscope.pairs.pair_map import Pairs
from qkscope.tables.examples import Examples, token_texts

WIDTHS = {"query": 7, "key": 5}
HEADS = 4


class Letters:
    """A tokenizer whose token i is the letter i, and 0 the BOS."""

    all_special_ids = (0,)
    bos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 96 for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(96 + i) if i else "<s>" for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return "<s>"


def decomposition(bos: bool = True) -> Decomposition:
    """Some pairs, the biases' among them; feature 0 is in none."""
    generator = torch.Generator().manual_seed(3)
    query = torch.tensor([1, 1, 1, 1, 1, 2, 3, 7, 6])
    key = torch.tensor([1, 2, 3, 1, 5, 2, 4, 1, 5])
    head = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    pairs = Pairs.of(query, key, head, WIDTHS["query"], WIDTHS["key"], HEADS)
    values = torch.rand(len(pairs), generator=generator)
    query_side, key_side = (SparseTranscoder(6, width, 8, "relu", 2) for width in WIDTHS.values())
    config = RunConfig(data=DataConfig(prepend_bos=bos))
    shape = SiteShape(6, HEADS, HEADS, 2, False)
    return Decomposition(3, shape, query_side, key_side, pairs, values, values, values, config)


def batches(
    count: int = 6, sequences: int = 3, length: int = 11, bos: bool = True
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Random batches with padding, under which activations are not zero; the last feature of a side never fires."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        lengths = torch.randint(3, length + 1, (sequences, 1), generator=generator)
        real = torch.arange(length) < lengths
        tokens = torch.randint(1, 27, (sequences, length), generator=generator)
        tokens[:, 0] = 0
        documents = torch.arange(sequences) + 10 * number
        batch = Batch(tokens, real, documents, torch.randint(0, 50, (sequences,), generator=generator), bos)
        acts = {}
        for side, width in WIDTHS.items():
            # Rounded, so that equal activations occur and the earlier of them has to stand.
            acts[side] = (torch.randn(sequences, length, width, generator=generator).relu() * 4).round() / 4
            acts[side][..., -1] = 9.0 * ~real
        yield batch, acts


def slow_examples(side: str, most: int, window: int, bos: bool) -> list[dict[str, Any]]:
    out = []
    for feature in range(WIDTHS[side]):
        found = []
        for batch, acts in batches(bos=bos):
            for b, length in enumerate(batch.real_BT.sum(1).tolist()):
                values = acts[side][b, :length, feature].tolist()
                at = values.index(max(values))
                if values[at] == 0:
                    continue
                low, high = max(at - window, 0), min(at + window + 1, length)
                position = int(batch.offset_B[b]) + at - bos
                found.append(
                    {
                        "side": side,
                        "feature": feature,
                        "range": -1,
                        "activation": values[at],
                        "document": int(batch.document_B[b]),
                        "position": -1 if bos and at == 0 else position,
                        "center": at - low,
                        "tokens": ["<s>" if i == 0 else chr(96 + i) for i in batch.tokens_BT[b, low:high].tolist()],
                        "activations": values[low:high],
                    }
                )
        found.sort(key=lambda row: -row["activation"])
        out += [{**row, "rank": rank} for rank, row in enumerate(found[:most])]
    return out


def written(tmp_path: Path, most: int, window: int = 4, bos: bool = True) -> tuple[pa.Table, pa.Table]:
    examples = Examples(decomposition(bos), most, window)
    for batch, acts in batches(bos=bos):
        examples.add(batch, acts)
    examples.write(tmp_path / "layer_3", Letters())
    names = ["examples.parquet", "features.parquet", "pair_examples.parquet"]
    assert sorted(p.name for p in (tmp_path / "layer_3").iterdir()) == names
    return pq.read_table(tmp_path / "layer_3" / "features.parquet"), pq.read_table(
        tmp_path / "layer_3" / "examples.parquet"
    )


@pytest.mark.parametrize(("most", "window", "bos"), [(4, 4, True), (1, 0, False), (40, 20, True)])
def test_examples_are_those_of_the_slow_reference(tmp_path: Path, most: int, window: int, bos: bool) -> None:
    _, table = written(tmp_path, most, window, bos)
    wanted = slow_examples("query", most, window, bos) + slow_examples("key", most, window, bos)
    assert table.to_pylist() == wanted
    assert len({(r["side"], r["feature"], r["document"]) for r in wanted}) == len(wanted)


def test_features_are_those_of_the_slow_reference(tmp_path: Path) -> None:
    table, _ = written(tmp_path, 2)
    dec = decomposition()
    rows = iter(table.to_pylist())
    for side, width in WIDTHS.items():
        acts = torch.cat([a[side][b.real_BT] for b, a in batches()])
        places = torch.cat([b.real_BT.nonzero()[:, 1] for b, _ in batches()])
        of_pair = (dec.pairs.query_P if side == "query" else dec.pairs.key_P).tolist()
        for feature in range(width):
            row, values = next(rows), acts[:, feature]
            fires = values[values > 0]
            assert (row["side"], row["feature"], row["live"]) == (side, feature, len(fires) > 0)
            assert row["density"] == pytest.approx(len(fires) / len(values))
            assert row["mean_activation"] == pytest.approx(float(fires.mean()) if len(fires) else 0.0)
            assert row["max_activation"] == pytest.approx(float(values.max()))
            worth = [0.0] * HEADS
            mine = [p for p, f in enumerate(of_pair) if f == feature]
            for p in mine:
                worth[int(dec.pairs.head_P[p])] += float(dec.importance_P[p])
            ranked = sorted((h for h in range(HEADS) if worth[h]), key=lambda h: -worth[h])
            assert row["top_heads"] == ranked[:3]
            assert row["by_position"] == pytest.approx(between(values, places), abs=1e-5)
            assert row["positions"] == pytest.approx(profile(values, places))
            assert row["histogram"] == slow_histogram(fires)
            found = zip(row["top_tokens"], row["top_token_counts"], row["top_token_activations"], strict=True)
            wanted = slow_tokens(side, feature)
            assert [one[:2] for one in found] == [one[:2] for one in wanted] and row["token_share"] == 1
            assert row["top_token_activations"] == pytest.approx([mean for _, _, mean in wanted])
            assert (row["pairs"], row["importance"]) == (len(mine), pytest.approx(sum(worth)))
    assert next(rows, None) is None
    assert not table["live"].to_pylist()[WIDTHS["query"] - 1]


def between(values: Tensor, places: Tensor) -> float:
    """Share of the variance that lies between the places 0, 1-2, 3-6, 7-14."""
    values = values.double()
    whole = ((values - values.mean()) ** 2).sum()
    parts = [values[(places >= low) & (places < 2 * low + 1)] for low in (0, 1, 3, 7)]
    share = sum(len(part) * (part.mean() - values.mean()) ** 2 for part in parts if len(part))
    return float(share / whole) if whole > 0 else 0.0


def profile(values: Tensor, places: Tensor) -> list[float]:
    """The mean at the places 0, 1-2, 3-6, 7-14."""
    return [float(values[(places >= low) & (places < 2 * low + 1)].mean()) for low in (0, 1, 3, 7)]


def slow_histogram(fires: Tensor) -> list[int]:
    edges = [2 ** (i / 2) for i in range(-32, 33)]
    return [sum(low <= v < high for v in fires.tolist()) for low, high in pairwise(edges)]


def slow_tokens(side: str, feature: int) -> list[tuple[str, int, float]]:
    """The ten most frequent of the tokens on which it fires, with count and mean; of equal ones the first letter."""
    found: dict[int, list[float]] = {}
    for batch, acts in batches():
        for token, real, value in zip(
            batch.tokens_BT.flatten().tolist(),
            batch.real_BT.flatten().tolist(),
            acts[side][..., feature].flatten().tolist(),
            strict=True,
        ):
            if real and value > 0:
                found.setdefault(token, []).append(value)
    ranked = sorted(found.items(), key=lambda one: (-len(one[1]), one[0]))[:10]
    return [(chr(96 + t) if t else "<s>", len(values), sum(values) / len(values)) for t, values in ranked]


def splitmix(*parts: int) -> int:
    """A hash of numbers as a signed 64-bit integer, in Python's integers."""
    h, last = 0, (1 << 64) - 1
    for part in parts:
        h = (h + part + 0x9E3779B97F4A7C15) & last
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & last
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & last
        h ^= h >> 31
    return h - (h >> 63 << 64)


def slow_drawn(side: str, drawn: int) -> list[tuple[int, int, int, float, int, int]]:
    """Feature, range, rank, activation, document and position of what is drawn: the lowest hashes of each range."""
    out = []
    for feature in range(WIDTHS[side]):
        fires = []
        for batch, acts in batches():
            for b, at in batch.real_BT.nonzero().tolist():
                if (value := float(acts[side][b, at, feature])) > 0:
                    number = (int(batch.document_B[b]) << 31) + int(batch.offset_B[b])
                    place = splitmix(number, at, 2 * feature + (side == "key"))
                    position = -1 if at == 0 else int(batch.offset_B[b]) + at - 1
                    fires.append((place, value, int(batch.document_B[b]), position))
        top = math.floor(math.log2(max((value for _, value, _, _ in fires), default=1)))
        for below in range(4):
            here = sorted(one for one in fires if min(top - math.floor(math.log2(one[1])), 3) == below)
            out += [(feature, below, rank, *one[1:]) for rank, one in enumerate(here[:drawn])]
    return out


@pytest.mark.parametrize("drawn", [1, 3, 100])
def test_examples_are_drawn_from_each_range(tmp_path: Path, drawn: int) -> None:
    examples = Examples(decomposition(), 2, drawn=drawn)
    for batch, acts in batches():
        examples.add(batch, acts)
    examples.write(tmp_path, Letters())
    rows = pq.read_table(tmp_path / "examples.parquet").to_pylist()
    names = ("feature", "range", "rank", "activation", "document", "position")
    for side in WIDTHS:
        found = [tuple(row[name] for name in names) for row in rows if row["side"] == side and row["range"] >= 0]
        assert found == slow_drawn(side, drawn)
        assert {below for _, below, *_ in found} == {0, 1, 2, 3}
    for row in rows:
        assert row["activations"][row["center"]] == row["activation"]


def test_a_feature_of_the_place_alone_is_all_position(tmp_path: Path) -> None:
    examples = Examples(decomposition(), 1, 1)
    for batch, acts in batches():
        at = torch.arange(batch.tokens_BT.shape[1])
        for side in WIDTHS:
            acts[side][..., 0] = (at == 0).float()
        examples.add(batch, acts)
    examples.write(tmp_path, Letters())
    rows = pq.read_table(tmp_path / "features.parquet").to_pylist()
    shares = {(row["side"], row["feature"]): row["by_position"] for row in rows}
    assert shares["query", 0] == pytest.approx(1) and shares["key", 0] == pytest.approx(1)
    assert shares["query", 1] < 0.3


def test_column_types(tmp_path: Path) -> None:
    features, examples = written(tmp_path, 2)
    assert dict(zip(features.column_names, map(str, features.schema.types), strict=True)) == {
        "side": "string",
        "feature": "int32",
        "density": "float",
        "mean_activation": "float",
        "max_activation": "float",
        "live": "bool",
        "top_heads": "list<element: int16>",
        "pairs": "int32",
        "importance": "float",
        "by_position": "float",
        "positions": "list<element: float>",
        "histogram": "list<element: int64>",
        "top_tokens": "list<element: string>",
        "top_token_counts": "list<element: int64>",
        "top_token_activations": "list<element: float>",
        "token_share": "float",
    }
    assert json.loads(features.schema.metadata[b"histogram_edges"]) == [2 ** (i / 2) for i in range(-32, 33)]
    assert dict(zip(examples.column_names, map(str, examples.schema.types), strict=True)) == {
        "side": "string",
        "feature": "int32",
        "range": "int8",
        "rank": "int32",
        "activation": "float",
        "document": "int64",
        "position": "int32",
        "center": "int32",
        "tokens": "list<element: string>",
        "activations": "list<element: float>",
    }


def test_no_examples_wanted_and_no_text_seen(tmp_path: Path) -> None:
    features, examples = written(tmp_path, 0)
    assert len(features) == sum(WIDTHS.values()) and len(examples) == 0
    untouched = Examples(decomposition(), 3)
    untouched.write(tmp_path / "layer_4", Letters())
    again = pq.read_table(tmp_path / "layer_4" / "examples.parquet")
    assert len(again) == 0 and again.schema == examples.schema
    assert not any(pq.read_table(tmp_path / "layer_4" / "features.parquet")["live"].to_pylist())


@pytest.mark.parametrize("name", ["gpt2-tokenizer", "stories260K", "TinyStories-656K"])
def test_tokens_keep_their_whitespace(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    text = "Once upon a time,\nthe dog ran."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, sorted({*ids, tokenizer.bos_token_id}))
    assert "".join(texts[i] for i in ids).removeprefix(" ") == text
    assert texts[tokenizer.bos_token_id] == tokenizer.bos_token
