"""Heads seen through their pairs: tables and measures against loops, nulls and clusters on constructed cases."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import some_decomposition, some_inputs
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from qkscope.explain import heads
from qkscope.explain.entries import NULLS, Entries, rewired

QUERIES, KEYS, HEADS = 9, 7, 5


def entries_of(rows: list[tuple[int, int, int, float]], n: tuple[int, int, int] = (QUERIES, KEYS, HEADS)) -> Entries:
    """Entries from (query feature, key feature, head, importance), sorted by head as a decomposition's are."""
    rows = sorted(rows, key=lambda row: row[2])
    query, key, head, worth = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Entries(query[None], key[None], head, worth.double()[None], *n)


def some_entries(seed: int, share: float = 0.3, n: tuple[int, int, int] = (QUERIES, KEYS, HEADS)) -> Entries:
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, generator=g) < share
    worth = torch.rand(n, generator=g, dtype=torch.float64) ** 3 + 1e-6
    return entries_of([(*at, float(worth[tuple(at)])) for at in kept.nonzero().tolist()], n)


def rows_of(entries: Entries, s: int = 0) -> list[tuple[int, int, int, float]]:
    columns = (entries.query_SP[s], entries.key_SP[s], entries.head_P, entries.worth_SP[s])
    return list(zip(*(c.tolist() for c in columns), strict=True))


# Nulls


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.6))
def test_nulls_keep_what_they_should(seed: int, share: float) -> None:
    entries = some_entries(seed, share, (6, 5, 3))
    found = rows_of(entries)
    for null in NULLS:
        drawn = rewired(entries, null, 4, seed)
        for s in range(4):
            rows = rows_of(drawn, s)
            assert len({row[:3] for row in rows}) == len(rows)  # no pair twice in a head
            for head in range(3):
                here, there = ([row for row in r if row[2] == head] for r in (found, rows))
                assert sorted(row[3] for row in here) == sorted(row[3] for row in there)
                if null == "kept":
                    for side in (0, 1):
                        assert Counter(row[side] for row in here) == Counter(row[side] for row in there)
            for side in (0, 1):
                assert Counter(row[side] for row in found) == Counter(row[side] for row in rows)


def test_nulls_follow_the_seed_and_move_what_can_move() -> None:
    entries = some_entries(3, 0.15, (30, 30, 4))
    for null in NULLS:
        one, same, other = (rewired(entries, null, 5, seed) for seed in (1, 1, 2))
        assert torch.equal(one.cell_SP, same.cell_SP) and torch.equal(one.worth_SP, same.worth_SP)
        assert not torch.equal(one.cell_SP, other.cell_SP)
        # By chance alone an entry's pair is one of 900.
        assert (one.cell_SP == entries.cell_SP).double().mean() < 0.05
        assert not torch.equal(one.draw(0).cell_SP, one.draw(1).cell_SP)


def test_kept_null_visits_every_arrangement_alike() -> None:
    """Two pairs without a common feature have two arrangements; three of a permutation have six."""
    for size in (2, 3):
        entries = entries_of([(i, i, 0, 1.0) for i in range(size)])
        drawn = rewired(entries, "kept", 1200)
        seen = Counter(tuple(sorted(zip(q, k, strict=True))) for q, k in _pairs(drawn))
        expected = 1200 / math.factorial(size)
        assert len(seen) == math.factorial(size)
        assert all(abs(n - expected) < 4 * expected**0.5 for n in seen.values()), seen


def _pairs(drawn: Entries) -> list[tuple[list[int], list[int]]]:
    return list(zip(drawn.query_SP.tolist(), drawn.key_SP.tolist(), strict=True))


def test_a_star_cannot_be_rewired_within_its_head() -> None:
    entries = entries_of([(i, 2, 1, 1.0 + i) for i in range(6)] + [(i, i, 0, 1.0) for i in range(5)])
    drawn = rewired(entries, "kept", 10)
    star = entries.head_P == 1
    assert all(set(row) == set(entries.cell_SP[0, star].tolist()) for row in drawn.cell_SP[:, star].tolist())
    assert any(
        set(row) != set(entries.cell_SP[0, star].tolist()) for row in rewired(entries, "free", 10).cell_SP[:, star]
    )


# Tables and measures


def test_tables_are_those_of_the_slow_reference() -> None:
    dec = some_decomposition(some_inputs())
    p = dec.pairs
    rows = [
        (i, a if a < p.n_query else -1, b if b < p.n_key else -1, h, w)
        for i, (a, b, h, w) in enumerate(
            zip(*(t.tolist() for t in (p.query_P, p.key_P, p.head_P, dec.importance_P)), strict=True)
        )
    ]
    assert any(a == -1 for _, a, *_ in rows) and any(b == -1 for _, _, b, *_ in rows)
    total: dict[int, float] = defaultdict(float)
    heads_of: dict[tuple[int, int], set[int]] = defaultdict(set)
    worth: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for _, a, b, h, w in rows:
        total[h] += w
        heads_of[a, b].add(h)
        worth["query", h, a].append(w)
        worth["key", h, b].append(w)
    table = heads.pair_heads(dec).to_pylist()
    assert [row["importance"] for row in table] == sorted((row[4] for row in rows), reverse=True)
    for row in table:
        _, a, b, h, w = rows[row["pair"]]
        assert (row["query_feature"], row["key_feature"], row["head"]) == (a, b, h)
        assert row["importance"] == w and row["share"] == pytest.approx(w / total[h])
        assert row["heads"] == len(heads_of[a, b])
    features = heads.feature_heads(dec).to_pylist()
    assert {(r["side"], r["head"], r["feature"]) for r in features} == worth.keys() and len(features) == len(worth)
    for row in features:
        values = worth[row["side"], row["head"], row["feature"]]
        assert row["pairs"] == len(values)
        assert row["importance"] == pytest.approx(sum(values))
        assert row["share"] == pytest.approx(sum(values) / total[row["head"]])
    order = [(r["side"] == "key", r["head"], -r["importance"]) for r in features]
    assert order == sorted(order)


def test_biases_are_left_out_or_kept() -> None:
    dec = some_decomposition(some_inputs())
    p = dec.pairs
    two = [
        (a, b, h)
        for a, b, h in zip(p.query_P.tolist(), p.key_P.tolist(), p.head_P.tolist(), strict=True)
        if a < p.n_query and b < p.n_key
    ]
    assert [row[:3] for row in rows_of(Entries.of(dec))] == two
    assert len(Entries.of(dec, bias=True)) == len(p) > len(two)


def test_concentration_is_that_of_the_slow_reference() -> None:
    entries = some_entries(1, n=(QUERIES, KEYS, HEADS + 1))
    entries = entries_of([row for row in rows_of(entries) if row[2] != 2], (QUERIES, KEYS, HEADS + 1))  # one has none
    for row in heads.concentration(entries):
        worth = sorted((w for *_, h, w in rows_of(entries) if h == row["head"]), reverse=True)
        assert row["pairs"] == len(worth) and row["importance"] == pytest.approx(sum(worth))
        if not worth:
            assert row["effective"] == 0 and set(row["top"].values()) == {0.0}
            continue
        shares = [w / sum(worth) for w in worth]
        assert row["top"] == pytest.approx({str(k): sum(shares[:k]) for k in (1, 5, 20)})
        assert row["effective"] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))
    equal = entries_of([(i, i, 0, 0.3) for i in range(6)])
    assert heads.concentration(equal)[0]["effective"] == pytest.approx(6)


def test_sharing_is_that_of_the_slow_reference() -> None:
    entries = rewired(some_entries(2), "free", 3)
    pairs, worth = heads.by_heads(entries)
    for s in range(3):
        of: dict[tuple[int, int], list[float]] = defaultdict(list)
        for a, b, _, w in rows_of(entries, s):
            of[a, b].append(w)
        whole = sum(map(sum, of.values()))
        for k in range(1, HEADS + 1):
            assert pairs[s, k - 1] == pytest.approx(sum(len(v) == k for v in of.values()))
            assert worth[s, k - 1] == pytest.approx(sum(sum(v) for v in of.values() if len(v) == k) / whole)


def test_similarity_is_that_of_the_slow_reference() -> None:
    entries = rewired(some_entries(5), "kept", 2)
    for s, found in enumerate(heads.similarity(entries)):
        of: list[dict[tuple[int, int], float]] = [{} for _ in range(HEADS)]
        for a, b, h, w in rows_of(entries, s):
            of[h][a, b] = w
        for one in range(HEADS):
            for other in range(HEADS):
                product = sum(w * of[other].get(cell, 0.0) for cell, w in of[one].items())
                norms = [sum(w * w for w in of[h].values()) ** 0.5 for h in (one, other)]
                assert found[one, other] == pytest.approx(product / (norms[0] * norms[1]))


# Sharing and likeness beside chance


def planted_heads(alike: bool) -> Entries:
    """Six heads with 40 random pairs each; `alike`: heads 1 and 4 have the same, at much the same importance."""
    g = torch.Generator().manual_seed(7)
    rows = []
    for head in range(6):
        cells = torch.randperm(30 * 30, generator=g)[:40]
        worth = torch.rand(40, generator=g).double() ** 3
        if alike and head == 4:
            first = [row for row in rows if row[2] == 1]
            rows += [(a, b, 4, w * (0.9 + 0.2 * float(torch.rand((), generator=g)))) for a, b, _, w in first]
        else:
            rows += [(int(c) // 30, int(c) % 30, head, float(w)) for c, w in zip(cells, worth, strict=True)]
    return entries_of(rows, (30, 30, 6))


def test_heads_with_the_same_pairs_are_each_others_likest() -> None:
    entries = planted_heads(alike=True)
    nulls = {null: rewired(entries, null, 60) for null in NULLS}
    found = heads.likeness(entries, nulls)
    of = {row["head"]: row for row in found["heads"]}
    assert (of[1]["likest"], of[4]["likest"]) == (4, 1)
    assert of[1]["similarity"] == pytest.approx(of[4]["similarity"]) == pytest.approx(found["similarity"][1][4])
    assert of[1]["similarity"] > 0.98 and of[1]["above"] and of[4]["above"]
    assert of[1]["chance"]["kept"]["ci95"][1] < 0.5
    assert found["clusters"] == [[0], [1, 4], [2], [3], [5]]
    shared = heads.sharing(entries, nulls)
    for null in NULLS:
        for name in ("shared_pairs", "shared_importance"):
            assert shared[name] > shared["chance"][null][name]["ci95"][1]
    assert sum(shared["pairs"]) == len(set(entries.cell_SP[0].tolist())) and sum(shared["importance"]) == pytest.approx(
        1
    )


def test_unrelated_heads_share_no_more_than_chance() -> None:
    entries = planted_heads(alike=False)
    nulls = {null: rewired(entries, null, 60) for null in NULLS}
    shared = heads.sharing(entries, nulls)
    for null in NULLS:
        for name in ("shared_pairs", "shared_importance"):
            low, high = shared["chance"][null][name]["ci95"]
            assert low <= shared[name] <= high
            assert low <= shared["chance"][null][name]["mean"] <= high
    assert heads.likeness(entries, nulls)["clusters"] == [[n] for n in range(6)]


# Clusters


def some_similarity(n: int, seed: int) -> Tensor:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    x /= x.norm(dim=1, keepdim=True)
    return (x @ x.T).fill_diagonal_(1)


@pytest.mark.parametrize(("n", "seed"), [(2, 0), (5, 1), (12, 2), (40, 3)])
def test_average_linkage_is_scipys(n: int, seed: int) -> None:
    similarity = some_similarity(n, seed)
    wanted = linkage(squareform((1 - similarity).numpy(), checks=False), "average")
    merges = heads.average_linkage(similarity)
    assert [1 - m.similarity for m in merges] == pytest.approx(wanted[:, 2].tolist())
    for cut in (0.5, 0.8, 0.95, 0.99):
        labels = fcluster(wanted, 1 - cut, "distance")
        groups = sorted([i for i in range(n) if labels[i] == label] for label in set(labels))
        assert heads.clusters(n, merges, cut) == groups


def test_a_head_that_shares_nothing_has_no_likest() -> None:
    entries = entries_of([(0, 1, 0, 1.0), (2, 1, 0, 2.0), (0, 1, 1, 1.0), (3, 3, 2, 1.0)], (4, 4, 3))
    found = heads.likeness(entries, {null: rewired(entries, null, 3) for null in NULLS})
    assert [row["likest"] for row in found["heads"]] == [1, 0, None] and found["heads"][2]["similarity"] == 0


def test_one_head_has_no_likest() -> None:
    entries = entries_of([(0, 1, 0, 1.0), (2, 1, 0, 2.0)], (3, 3, 1))
    nulls = {null: rewired(entries, null, 3) for null in NULLS}
    found = heads.likeness(entries, nulls)
    assert found["heads"] == [] and found["clusters"] == [[0]] and found["merges"] == []
    assert heads.sharing(entries, nulls)["shared_pairs"] == 0


# All of it


def test_describe_tells_biases_apart_and_is_json() -> None:
    dec = some_decomposition(some_inputs())
    found = json.loads(json.dumps(heads.describe(dec), allow_nan=False))
    assert found == heads.describe(dec)  # the same seed
    two, whole = found["two_features"], found["all"]
    assert two["pairs"] < whole["pairs"] == len(dec.pairs)
    assert two["importance"] < whole["importance"] == pytest.approx(float(dec.importance_P.sum()))
    assert sum(row["importance"] for row in two["heads"]) == pytest.approx(two["importance"])


def test_describe_with_nothing_but_biases() -> None:
    dec = some_decomposition(some_inputs())
    p = dec.pairs
    index = ((p.query_P == p.n_query) | (p.key_P == p.n_key)).nonzero()[:, 0]
    values = {name: getattr(dec, name)[index] for name in ("strength_P", "weight_strength_P", "importance_P")}
    only = replace(dec, pairs=p.take(index), **values)
    found = json.loads(json.dumps(heads.describe(only), allow_nan=False))
    assert found["two_features"]["pairs"] == 0 and found["two_features"]["sharing"] == {"chance": {}}
    assert found["all"]["pairs"] == len(index)
