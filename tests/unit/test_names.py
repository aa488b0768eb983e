"""What features are called, counted one example at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qkscope.explain.names import FeatureNames
from qkscope.tables.feature_examples import STRONGEST

WORDS = (" a", "b", "\n", " café", "")


@pytest.mark.parametrize("ranged", [True, False])
def test_tokens_are_those_in_the_middle_of_the_strongest_examples(tmp_path: Path, ranged: bool) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(300):
        tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 6))]
        rows.append(
            {
                "side": ("query", "key")[rng.integers(2)],
                "feature": int(rng.integers(0, 9)),
                "center": int(rng.integers(len(tokens))),
                "tokens": tokens,
                **({"range": int(rng.choice([STRONGEST, 0, 2]))} if ranged else {}),
            }
        )
    kinds = {"side": pa.string(), "feature": pa.int32(), "center": pa.int32(), "tokens": pa.list_(pa.string())}
    kinds |= {"range": pa.int8()} if ranged else {}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)), tmp_path / "examples.parquet", row_group_size=70)
    names = FeatureNames(tmp_path)
    for side in ("query", "key"):
        for feature in range(-1, 11):
            own = [row for row in rows if (row["side"], row["feature"]) == (side, feature)]
            counted = Counter(r["tokens"][r["center"]] for r in own if r.get("range", STRONGEST) == STRONGEST)
            wanted = [(token, n / counted.total()) for token, n in counted.items()]
            assert list(names.tokens(side, feature).items()) == wanted  # of equal counts the first one stands first


def test_without_examples_there_are_no_tokens(tmp_path: Path) -> None:
    assert FeatureNames(tmp_path).tokens("key", 3) == {} and FeatureNames(tmp_path).of("key", 3) == "k3"
