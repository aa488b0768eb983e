"""What is told of dense features, against loops over pairs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from qkscope.decomposition import SIDES
from qkscope.evaluate.dense import dense_features, first_share

TOKENS, SEQUENCES = 1000, 10


def tables(seed: int) -> tuple[pa.Table, pa.Table]:
    rng = np.random.default_rng(seed)
    rows = []
    for side, width in (("query", 12), ("key", 15)):
        for feature in range(width):
            density = float(rng.choice([0.0, 0.01, 0.05, 0.2, 0.6]))
            mean = float(rng.uniform(0.5, 2))
            total = density * TOKENS * mean
            first = total * float(rng.choice([0.0, 0.3, 0.9]))  # of which falls on first tokens
            rows.append({
                "side": side, "feature": feature, "density": density, "mean_activation": mean, "live": density > 0,
                "by_position": float(rng.uniform()), "positions": [first / SEQUENCES, 0.1],
            })  # fmt: skip
    pairs = [
        {"query_feature": int(rng.integers(-1, 12)), "key_feature": int(rng.integers(-1, 15)), "head": 0,
         "importance": float(rng.exponential())}
        for _ in range(60)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows), pa.Table.from_pylist(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_importance_are_sums_over_pairs(seed: int) -> None:
    features, pairs = tables(seed)
    found = dense_features(features, pairs, TOKENS, SEQUENCES)
    of = {(row["side"], row["feature"]): row for row in features.to_pylist()}
    whole = sum(pair["importance"] for pair in pairs.to_pylist())
    for side, other in zip(SIDES, SIDES[::-1], strict=True):
        for name in ("dense", "others"):
            ours = [
                row for (s, _), row in of.items()
                if s == side and row["live"] and (row["density"] > 0.1) == (name == "dense")
            ]  # fmt: skip
            mine = first = bias = 0.0
            for pair in pairs.to_pylist():
                row = of.get((side, pair[f"{side}_feature"]))
                if row is None or row not in ours:
                    continue
                mine += pair["importance"]
                partner = of.get((other, pair[f"{other}_feature"]))
                if partner is None:
                    bias += pair["importance"]
                elif partner["live"]:
                    share = partner["positions"][0] * SEQUENCES
                    share /= partner["density"] * partner["mean_activation"] * TOKENS
                    first += pair["importance"] * (share > 0.5)
            told = found[side][name]
            assert told["count"] == len(ours)
            assert told["positional"] == sum(row["by_position"] > 0.5 for row in ours)
            assert told["importance"] == pytest.approx(mine / whole)
            assert told["first"] == (pytest.approx(first / mine) if mine else None)
            assert told["bias"] == (pytest.approx(bias / mine) if mine else None)


def test_a_feature_of_the_first_token_alone_has_all_of_its_activation_there() -> None:
    rows = pa.Table.from_pylist(
        [
            {"positions": [3.0, 0.0], "density": SEQUENCES / TOKENS, "mean_activation": 3.0},
            {"positions": [0.0, 1.0], "density": 0.5, "mean_activation": 1.0},
            {"positions": [0.0, 0.0], "density": 0.0, "mean_activation": 0.0},
        ]
    )
    assert first_share(rows, TOKENS, SEQUENCES).tolist() == pytest.approx([1.0, 0.0, 0.0])
