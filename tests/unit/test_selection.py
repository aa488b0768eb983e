"""How many pairs: the fewest under a bound against brute force, the counts of the stages, and the map's KL."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    pairs_of,
    slow_kl_rows,
    slow_map,
    slow_mean,
    slow_pattern_of,
    slow_scores,
    some_inputs,
    some_of,
    some_sides,
)

from qkscope.config import PairsConfig
from qkscope.pairs.phases import phases_of
from qkscope.pairs.selection import LADDER, fewest, ladder, map_kl, mattering, top
from qkscope.pairs.tune import MapJob


def falling(seed: int, most: int) -> list[float]:
    """A KL that never rises with the count, with steps and level stretches."""
    steps = torch.rand(most, generator=torch.Generator().manual_seed(seed)).double()
    steps = steps * (steps > 0.4)
    return (steps.sum() - steps.cumsum(0)).tolist()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(1, 300), share=st.floats(-0.1, 1.1))
def test_fewest_against_brute_force(seed: int, most: int, share: float) -> None:
    kl = falling(seed, most)
    bound = kl[-1] + share * (kl[0] - kl[-1] + 1e-9)
    asked: list[int] = []

    def kl_at(n: int) -> float:
        assert 1 <= n <= most
        asked.append(n)
        return kl[n - 1]

    n, found = fewest(most, bound, kl_at)
    assert found == kl[n - 1]
    good = [c for c in range(1, most + 1) if kl[c - 1] <= bound]
    if not good:
        assert n == most
    else:
        assert kl[n - 1] <= bound
        assert good[0] <= n <= max(good[0] * LADDER + 1, good[0] + 1)  # at most one step of the ladder too many
    assert len(asked) <= 8


def test_fewest_with_one_pair_and_with_an_easy_bound() -> None:
    assert fewest(1, 0.5, lambda n: 0.1) == (1, 0.1)
    assert fewest(1, 0.5, lambda n: 0.9) == (1, 0.9)
    assert fewest(1000, 0.5, lambda n: 0.1) == (1, 0.1)
    assert fewest(1000, 0.5, lambda n: 0.9) == (1000, 0.9)
    assert fewest(7, 0.5, lambda n: 8 - n - 0.9) == (7, pytest.approx(0.1))


@settings(max_examples=60, deadline=None)
@given(first=st.floats(1, 50), count=st.integers(1, 100_000), stages=st.integers(1, 9))
def test_ladder(first: float, count: int, stages: int) -> None:
    counts = ladder(first, count, stages)
    assert len(counts) == stages and counts[-1] == count
    assert counts == sorted(counts, reverse=True)
    if stages > 1:
        assert counts[0] == round(first * count)
        for above, below in pairwise(counts):  # equal ratios, up to rounding
            assert abs(above - below * first ** (1 / (stages - 1))) < 1 + first ** (1 / (stages - 1))


def test_ladder_by_hand() -> None:
    assert ladder(8.0, 1000, 4) == [8000, 4000, 2000, 1000]
    assert ladder(8.0, 1000, 1) == [1000]


def test_top() -> None:
    worth = torch.tensor([0.1, 0.9, 0.0, 0.5, 0.7])
    assert top(worth, 3).tolist() == [1, 3, 4]
    assert top(worth, 99).tolist() == [0, 1, 2, 3, 4]
    assert top(torch.zeros(0), 3).tolist() == []


def test_map_kl_is_a_mean_over_tokens_of_all_batches() -> None:
    """Batches of unequal size count by their real tokens; the job is left in training."""
    sample = [some_inputs(1, padding=True, length=5), some_inputs(2, batch=1, length=4)]
    sides = some_sides(sample[0], widths=(4, 3))
    pairs = some_of(pairs_of(sample[0], sides), 0.5)
    job = MapJob(0, "", *sides, pairs, dictionary_rate=0.0, strength_rate=0.1)
    total = tokens = 0.0
    for inputs in sample:
        true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
        hat = slow_pattern_of(inputs.rule, slow_map(inputs, sides, pairs, job.strengths(inputs.rule).detach()))
        n = int(inputs.real_BT.sum())
        total, tokens = total + n * float(slow_mean(slow_kl_rows(true, hat), inputs.real_BT)), tokens + n
    assert map_kl(job, sample) == pytest.approx(total / tokens, rel=1e-4)
    assert job.training


def test_pairs_without_importance_do_not_matter() -> None:
    assert mattering(torch.tensor([0.0, 2.0, 0.0, 1e-9])).tolist() == [1, 3]
    assert mattering(torch.zeros(3)).tolist() == [0, 1, 2]  # a map of nothing has no pattern to learn from


def test_phases_of_step_two() -> None:
    """tune's counts fall to the asked one, and under a bound by halves below it; the tokens are those of all stages."""
    config = PairsConfig(count=1000, tokens=400, stages=4, first=8)
    assert [(p.name, p.count, p.tokens, p.spare) for p in phases_of(config)] == [
        ("tune1", 8000, 100, False), ("tune2", 4000, 100, False), ("tune3", 2000, 100, False),
        ("tune4", 1000, 100, False),
    ]  # fmt: skip
    bounded = phases_of(config.model_copy(update={"max_kl": 0.1, "count": 6}))
    assert [(p.name, p.count) for p in bounded if p.spare] == [("tune5", 3), ("tune6", 1)]
    assert [p.count for p in bounded] == [48, 24, 12, 6, 3, 1]
    assert [p.judged for p in bounded] == [False] * 3 + [True] * 3
    targeted = phases_of(config.model_copy(update={"count": 10}), target=True)
    assert [(p.name, p.count, p.tokens) for p in targeted] == [
        ("tune1", 80, 100), ("tune2", 40, 100), ("tune3", 20, 100), ("tune4", 10, 100),
    ]  # fmt: skip
    assert all(p.judged for p in targeted) and [p.spare for p in targeted] == [False, True, True, True]
    assert [p.count for p in phases_of(config.model_copy(update={"count": 1, "first": 2}), target=True)] == [2]
    for method in ("refit", "mask"):
        phases = phases_of(config.model_copy(update={"method": method}))
        assert [(p.name, p.count, p.tokens) for p in phases] == [(method, 1000, 400)]
    for none in ({"method": "importance"}, {"tokens": 0}):
        assert phases_of(config.model_copy(update=none)) == []
