"""The stored distance profiles against rotations as matrices, and their bins against loops."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, rows_of, some_decomposition, some_inputs, turn_matrix
from torch import Tensor

from qkscope.pairs.pair_map import with_bias
from qkscope.tables import distance_table
from qkscope.tables.distance_table import NAME, binned, bins, write_distances

ROTARY = {name: options for name, options in LAYERS.items() if "rotary" in options}
LENGTH = 23  # its last bins hold several distances


def rows(folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    table = pq.read_table(folder / NAME)
    return json.loads(table.schema.metadata[b"distances"]), table.to_pylist()


@pytest.mark.parametrize("name", ROTARY)
def test_the_table_is_what_rotations_and_loops_give(name: str, tmp_path: Path) -> None:
    inputs = some_inputs(**ROTARY[name], length=LENGTH, batch=2)
    dec = some_decomposition(inputs)
    write_distances(dec, [inputs], tmp_path)
    edges, found = rows(tmp_path)
    pairs, rule = dec.pairs, inputs.rule
    assert edges[0] == 0 and edges[-1] == LENGTH and len(found) == len(pairs)
    left, right = (r.detach().double() for r in rows_of(inputs, (dec.query, dec.key)))
    acts_q, acts_k = (with_bias(side.encode(inputs.x_BTD)).detach().double() for side in (dec.query, dec.key))
    turns = [turn_matrix(rule.rotary, 0, t, left.shape[-1]) for t in range(LENGTH)]
    for p, row in enumerate(found):
        a, b, head = int(pairs.query_P[p]), int(pairs.key_P[p]), int(pairs.head_P[p])
        named = (a if a < pairs.n_query else -1, b if b < pairs.n_key else -1, head)
        assert (row["query_feature"], row["key_feature"], row["head"]) == named
        if p % 5:
            continue
        q, k = left[a, head], right[b, head * dec.shape.G // dec.shape.N]
        strength = [float(dec.strength_P[p]) * float((turns[d] @ q) @ (turns[0] @ k)) for d in range(LENGTH)]
        use = [0.0] * LENGTH
        for s in range(2):
            visible = rule.visible_BQK[s if len(rule.visible_BQK) > 1 else 0]
            for i in range(LENGTH):
                for j in range(i + 1):
                    if visible[i, j] and inputs.real_BT[s, i] and inputs.real_BT[s, j]:
                        use[i - j] += float(acts_q[s, i, a] * acts_k[s, j, b]) ** 2
        for n, (start, end) in enumerate(pairwise(edges)):
            here = strength[start:end]
            assert row["mean"][n] == pytest.approx(sum(here) / len(here), abs=1e-5)
            assert row["low"][n] == pytest.approx(min(here), abs=1e-5)
            assert row["high"][n] == pytest.approx(max(here), abs=1e-5)
            assert row["use"][n] == pytest.approx(sum(use[start:end]) / (sum(use) or 1), rel=1e-4, abs=1e-6)
        average = sum(m * u for m, u in zip(strength, use, strict=True)) / (sum(use) or 1)
        assert row["average"] == pytest.approx(average, abs=1e-5)
        assert (row["position"] is None) == (sum(use) == 0)


@given(st.integers(1, 5000))
def test_bins_are_single_at_first_and_few(length: int) -> None:
    found = bins(length)
    edges = [*found, length]
    assert edges[0] == 0 and all(a < b for a, b in pairwise(edges))
    assert found[: min(length, 9)] == list(range(min(length, 9)))
    assert all(b - a <= 0.25 * a + 1 for a, b in pairwise(edges[9:]))
    assert len(found) <= 9 + 4 * max(length, 8).bit_length() - 12


@given(st.integers(1, 40), st.integers(0, 9))
def test_bins_are_reduced_as_slices(length: int, seed: int) -> None:
    values = torch.randn(3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts = bins(length)
    whole: dict[str, Any] = {"mean": Tensor.mean, "amin": Tensor.amin, "amax": Tensor.amax, "sum": Tensor.sum}
    for how, slow in whole.items():
        edges = zip(starts, [*starts[1:], length], strict=True)
        wanted = torch.stack([slow(values[:, a:b], 1) for a, b in edges], 1)
        torch.testing.assert_close(binned(values, starts, how), wanted)


def test_the_most_important_pairs_are_kept_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some_inputs(rotary="half")
    dec = some_decomposition(inputs)
    write_distances(dec, [inputs], tmp_path)
    _, whole = rows(tmp_path)
    monkeypatch.setattr(distance_table, "MOST_PAIRS", 20)
    monkeypatch.setattr(distance_table, "BLOCK_ELEMENTS", 6 * 7)
    write_distances(dec, [inputs], tmp_path)
    _, found = rows(tmp_path)
    best = dec.importance_P.argsort(descending=True, stable=True)[:20].sort().values.tolist()
    assert found == [whole[p] for p in best] and len(whole) > 20


def test_what_has_no_profile_leaves_no_file(tmp_path: Path) -> None:
    rotary = some_inputs(rotary="half")
    behind = some_inputs(rotary="half", mask="bidirectional")
    for inputs in (some_inputs(), behind):
        write_distances(some_decomposition(rotary), [rotary], tmp_path)
        assert (tmp_path / NAME).exists()
        write_distances(some_decomposition(inputs), [inputs], tmp_path)
        assert not (tmp_path / NAME).exists()
    dec = some_decomposition(rotary)
    none = replace(dec, pairs=dec.pairs.take(torch.zeros(0, dtype=torch.int64)), importance_P=dec.importance_P[:0])
    write_distances(none, [rotary], tmp_path)
    assert not (tmp_path / NAME).exists()
