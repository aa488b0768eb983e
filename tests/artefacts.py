"""A finished run of any size without a model or training: what the page reads, with random numbers in it.

Shapes: F features a side, P pairs, N heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qkscope.config import RunConfig
from qkscope.decomposition import PAIR_COLUMNS
from qkscope.tables.distance_table import bins
from qkscope.tables.examples import GROUP_ROWS

WORDS = ("<bos>", " the", " name", ".", "\n", " to", "Ann", " 7", ",", " café")
HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"\'&amp;', "\u202egnp.exe", "🧑‍🚀", "\x00\x1b[31m",
    "</script>", "javascript:alert(1)", " \u200f\u05d0", "a" * 400,
)  # fmt: skip
SPAN = 17  # tokens of an example


def save_artefact(
    folder: Path,
    *,
    features: int = 40,
    pairs: int = 260,
    heads: int = 4,
    layers: Sequence[int] = (0, 1),
    words: Sequence[str] = WORDS,
    examples: int = 6,
    rotary: bool = False,
    seed: int = 0,
) -> Path:
    """Write a run of `layers` layers to `folder`; a tenth of its pairs have a bias and some values are equal."""
    rng = np.random.default_rng(seed)
    config = RunConfig(model=f"somewhere/{words[0]}", layers=tuple(layers)).model_dump(mode="json")
    site = {"D": 8, "N": heads, "G": heads, "H": 2, "rotary": rotary}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": config, "sites": {n: site for n in layers}}))
    for number in layers:
        layer = folder / f"layer_{number}"
        layer.mkdir()
        table = _pairs(rng, features, pairs, heads)
        pq.write_table(table, layer / "pairs.parquet")
        pq.write_table(_features(rng, features, words), layer / "features.parquet")
        pq.write_table(_examples(rng, features, words, examples), layer / "examples.parquet", row_group_size=GROUP_ROWS)
        pq.write_table(_pair_examples(rng, table, words), layer / "pair_examples.parquet", row_group_size=GROUP_ROWS)
        if rotary:
            pq.write_table(_distances(rng, table), layer / "pair_distance.parquet", row_group_size=GROUP_ROWS)
        _json(layer / "report.json", _report(rng, features, pairs, heads))
        _json(layer / "patterns.json", _patterns(rng, words, heads))
        _json(layer / "truth.json", _truth(rng, features, heads, words))
    return folder


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _lists(values: pa.Array, width: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, width), pa.int32()), values)


def _words(rng: np.random.Generator, words: Sequence[str], count: int) -> pa.Array:
    return pa.array(words, pa.string()).take(pa.array(rng.integers(0, len(words), count)))


def _pairs(rng: np.random.Generator, features: int, pairs: int, heads: int) -> pa.Table:
    width = features + 1
    cell = np.unique(rng.integers(0, heads * width * width, 2 * pairs))
    cell = rng.permutation(cell)[:pairs]
    query, key, head = cell // width % width, cell % width, cell // width**2
    importance = np.sort(np.round(rng.random(len(cell)) ** 8, 6).astype(np.float32))[::-1]
    columns = {
        "query_feature": np.where(query < features, query, -1),
        "key_feature": np.where(key < features, key, -1),
        "head": head,
        "strength": rng.normal(size=len(cell)),
        "weight_strength": rng.normal(size=len(cell)),
        "importance": importance,
        "rank": np.arange(len(cell)),
    }
    return pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in PAIR_COLUMNS.items()})


def _features(rng: np.random.Generator, features: int, words: Sequence[str]) -> pa.Table:
    n = 2 * features
    density = np.round(rng.random(n) ** 4, 3)
    return pa.table(
        {
            "side": pa.array(["query"] * features + ["key"] * features),
            "feature": pa.array(np.tile(np.arange(features), 2), pa.int32()),
            "density": pa.array(density, pa.float32()),
            "mean_activation": pa.array(rng.random(n), pa.float32()),
            "max_activation": pa.array(1 + rng.random(n), pa.float32()),
            "live": pa.array(density > 0),
            "by_position": pa.array(rng.random(n), pa.float32()),
            "positions": _lists(pa.array(rng.random(n * 7), pa.float32()), 7),
            "histogram": _lists(pa.array(rng.integers(0, 9, n * 64)), 64),
            "top_tokens": _lists(_words(rng, words, n * 10), 10),
            "top_token_counts": _lists(pa.array(rng.integers(1, 99, n * 10)), 10),
            "top_token_activations": _lists(pa.array(rng.random(n * 10), pa.float32()), 10),
            "token_share": pa.array(np.ones(n), pa.float32()),
            "top_heads": _lists(pa.array(rng.integers(0, 4, n * 3), pa.int16()), 3),
            "pairs": pa.array(rng.integers(0, 50, n), pa.int32()),
            "importance": pa.array(rng.random(n) ** 8, pa.float32()),
        }
    )


def _examples(rng: np.random.Generator, features: int, words: Sequence[str], each: int) -> pa.Table:
    n = 2 * features * each
    activations = np.where(rng.random((n, SPAN)) < 0.3, rng.random((n, SPAN)), 0)
    activations[:, 8] = 1 + rng.random(n)
    ranges = np.where(np.arange(each) < each - 2, -1, np.arange(each) % 4)
    return pa.table(
        {
            "side": pa.array(["query", "key"]).take(pa.array(np.arange(n) // (features * each))),
            "feature": pa.array(np.arange(n) // each % features, pa.int32()),
            "range": pa.array(np.tile(ranges, 2 * features), pa.int8()),
            "rank": pa.array(np.tile(np.arange(each), 2 * features), pa.int32()),
            "activation": pa.array(activations[:, 8], pa.float32()),
            "document": pa.array(rng.integers(0, 99, n)),
            "position": pa.array(rng.integers(8, 99, n), pa.int32()),
            "center": pa.array(np.full(n, 8), pa.int32()),
            "tokens": _lists(_words(rng, words, n * SPAN), SPAN),
            "activations": _lists(pa.array(activations.ravel(), pa.float32()), SPAN),
        }
    )  # fmt: skip


def _pair_examples(rng: np.random.Generator, pairs: pa.Table, words: Sequence[str]) -> pa.Table:
    """Two places a pair: one with windows apart, one where they overlap (the text is then one)."""
    order = np.lexsort([pairs[name].to_numpy() for name in ("key_feature", "query_feature", "head")])
    n = 2 * len(order)
    near = np.arange(n) % 2 == 1
    query_at = rng.integers(60, 99, n)
    base = {name: pairs[name].take(pa.array(np.repeat(order, 2))) for name in ("query_feature", "key_feature", "head")}
    text = rng.integers(0, len(words), (n, 128))
    names = pa.array(words, pa.string())

    def windows(at: np.ndarray) -> pa.Array:
        columns = at[:, None] + np.arange(-8, 9)
        return _lists(names.take(pa.array(np.take_along_axis(text, columns, 1).ravel())), SPAN)

    key_at = np.where(near, query_at - rng.integers(0, 9, n), query_at - 50)
    return pa.table(
        {
            **base,
            "rank": pa.array(np.tile([0, 1], len(order)), pa.int32()),
            "effect": pa.array(rng.normal(size=n) / 4, pa.float32()),
            "pattern": pa.array(rng.random(n), pa.float32()),
            "document": pa.array(rng.integers(0, 99, n)),
            "query_position": pa.array(query_at, pa.int32()),
            "query_center": pa.array(np.full(n, 8), pa.int32()),
            "query_tokens": windows(query_at),
            "key_position": pa.array(key_at, pa.int32()),
            "key_center": pa.array(np.full(n, 8), pa.int32()),
            "key_tokens": windows(key_at),
        }
    )


def _distances(rng: np.random.Generator, pairs: pa.Table) -> pa.Table:
    """Profiles of the nine tenths of the pairs that are most important, as evaluation writes them; one never active."""
    pairs = pairs.slice(0, max(len(pairs) * 9 // 10, 1))
    edges = [*bins(64), 64]
    n, each = len(pairs), len(edges) - 1
    mean = rng.normal(size=(n, each))
    apart = np.abs(rng.normal(size=(n, each))) * (np.diff(edges) > 1)
    use = rng.dirichlet(np.ones(each), n)
    use[0] = 0
    lists = {"mean": mean, "low": mean - apart, "high": mean + apart, "use": use}
    return pa.table(
        {
            **{name: pairs[name] for name in ("query_feature", "key_feature", "head")},
            **{name: _lists(pa.array(values.ravel(), pa.float32()), each) for name, values in lists.items()},
            "average": pa.array((mean * use).sum(1), pa.float32()),
            "position": pa.array([None, *rng.random(n - 1)], pa.float32()),
        }
    ).replace_schema_metadata({"distances": json.dumps(edges)})


def _figure(mean: float, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "ci95": [0.9 * mean, 1.1 * mean], **more}


def _report(rng: np.random.Generator, features: int, pairs: int, heads: int) -> dict[str, Any]:
    variants = ("transcoders", "map_pruned", "uniform")
    kl = {v: _figure(rng.random(), per_head=[_figure(rng.random()) for _ in range(heads)]) for v in variants}
    edges = np.arange(-6, 0.01, 0.25)
    return {
        "model": "/secret/place/model",
        "l0": {side: _figure(8.0) for side in ("query", "key")},
        "dead": {side: _figure(0.1) for side in ("query", "key")},
        "live": {side: features for side in ("query", "key")},
        "width": {side: features for side in ("query", "key")},
        "log10_density": {
            "edges": edges.tolist(),
            **{side: rng.integers(0, 9, len(edges) - 1).tolist() for side in ("query", "key")},
        },
        "pattern_kl": kl,
        "top1": kl,
        "ce_increase": {v: _figure(rng.random()) for v in (*variants, "zero")},
        "controls": {"random": {"pattern_kl": _figure(rng.random())}},
        "pairs": {
            "kept": pairs,
            "share_of_live": 0.1,
            "per_head": [1] * heads,
            "curve": [{"kept": pairs // n, "pattern_kl": _figure(0.1 * n)} for n in (1, 2, 4)],
        },
    }


def _patterns(rng: np.random.Generator, words: Sequence[str], heads: int) -> dict[str, Any]:
    length = 12

    def pattern() -> list[list[float]]:
        weights = np.tril(rng.random((length, length)))
        return np.round(weights / weights.sum(1, keepdims=True), 4).tolist()

    tokens = [words[i] for i in rng.integers(0, len(words), length)]
    names = ("true", "transcoders", "pruned")
    return {"tokens": tokens, "heads": [{"head": n, **{v: pattern() for v in names}} for n in range(heads)]}


def _truth(rng: np.random.Generator, features: int, heads: int, words: Sequence[str]) -> dict[str, Any]:
    def known() -> dict[str, Any]:
        f1 = round(float(rng.random()), 2)
        return {"label": f"role “{words[int(rng.integers(len(words)))]}”", "precision": f1, "recall": f1, "f1": f1}

    role = {"query": "name", "key": words[1], "attention": 0.2, "uniform": 0.1, "ce_increase": _figure(0.01)}
    return {
        "features": {side: [known() for _ in range(features)] for side in ("query", "key")},
        "pairs": [],
        "heads": [{"head": n, "role_pairs": [role]} for n in range(heads)],
    }
