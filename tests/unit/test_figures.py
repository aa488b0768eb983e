"""Figures and their intervals: the mean of tokens, and the spread over the sequences that tokens come in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from qkscope.evaluate.figures import Ratio, ratio_figure, t_quantile


def clustered(n: int, seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Sums and counts of `batch` texts of n sequences of unequal length, whose tokens share their sequence's level."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (batch, n), generator=g).double()
    level = 1 + 0.5 * torch.randn(batch, n, generator=g).double()
    noise = torch.randn(batch, n, generator=g).double() * lengths.sqrt()
    return level * lengths + 0.3 * noise, lengths


def test_the_mean_counts_tokens_not_sequences() -> None:
    found = ratio_figure(torch.tensor([10.0, 2.0]), torch.tensor([10.0, 1.0]))
    assert found["mean"] == pytest.approx(12 / 11)


def test_interval_by_hand() -> None:
    """Linearised ratio: residuals sums - mean·weights of every sequence, their spread over the total weight."""
    sums, weights = [3.0, 1.0, 8.0, 2.0, 5.0], [4.0, 2.0, 6.0, 3.0, 4.0]
    mean = sum(sums) / sum(weights)
    spread = sum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True)) * 5 / 4
    half = t_quantile(4) * math.sqrt(spread) / sum(weights)
    found = ratio_figure(torch.tensor(sums).double(), torch.tensor(weights).double())
    assert found["mean"] == pytest.approx(mean)
    assert found["ci95"] == pytest.approx([mean - half, mean + half])


def test_interval_agrees_with_the_bootstrap_over_sequences() -> None:
    sums, weights = (x[0] for x in clustered(150, 0))
    pick = torch.randint(150, (20_000, 150), generator=torch.Generator().manual_seed(1))
    drawn = (sums[pick].sum(1) / weights[pick].sum(1)).sort().values
    low, high = float(drawn[500]), float(drawn[19_500])
    found = ratio_figure(sums, weights)["ci95"]
    assert found[1] - found[0] == pytest.approx(high - low, rel=0.05)
    assert found[0] == pytest.approx(low, abs=0.1 * (high - low))
    by_token = 2 * 1.96 * 0.6 / float(weights.sum()) ** 0.5  # as if tokens were independent: far too sure
    assert found[1] - found[0] > 2 * by_token


@pytest.mark.parametrize(("n", "at_least"), [(6, 0.90), (12, 0.92), (40, 0.935)])
def test_the_interval_covers_the_truth(n: int, at_least: float) -> None:
    """On clustered tokens the true mean of 1 is inside about 95 % of the intervals."""
    sums, weights = clustered(n, 2, batch=3000)
    figures = [ratio_figure(s, w)["ci95"] for s, w in zip(sums, weights, strict=True)]
    inside = sum(low <= 1 <= high for low, high in figures) / len(figures)
    assert at_least < inside < 0.97


@pytest.mark.parametrize("degrees", range(1, 200))
def test_t_quantile(degrees: int) -> None:
    wanted = float(stats.t.ppf(0.975, degrees))
    assert t_quantile(degrees) == pytest.approx(wanted, rel=0.01 if degrees >= 4 else 1e-6)


def test_t_quantile_at_its_ends() -> None:
    assert t_quantile(0) == math.inf
    assert t_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 9), factor=st.floats(0.1, 10), empty=st.integers(0, 3))
def test_what_leaves_a_figure_as_it_is(seed: int, n: int, factor: float, empty: int) -> None:
    """The order of sequences, sequences without weight, and the unit of the weights on both sides."""
    sums, weights = (x[0] for x in clustered(n, seed))
    wanted = ratio_figure(sums, weights)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(empty, dtype=torch.float64)
    found = ratio_figure(factor * torch.cat([sums[order], nothing]), factor * torch.cat([weights[order], nothing]))
    assert found["mean"] == pytest.approx(wanted["mean"])
    assert found["ci95"] == pytest.approx(wanted["ci95"])


def test_too_little_text() -> None:
    assert ratio_figure(torch.zeros(3), torch.zeros(3)) == {"mean": None, "ci95": None}
    assert ratio_figure(torch.tensor([2.0]), torch.tensor([4.0])) == {"mean": 0.5, "ci95": None}
    assert ratio_figure(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0])) == {"mean": 0.5, "ci95": None}


def test_batches_and_heads() -> None:
    """Sums of batches [B, N]: the whole adds heads within a sequence, each head has a figure of its own."""
    g = torch.Generator().manual_seed(0)
    sums, lengths = torch.rand(7, 3, generator=g), torch.randint(1, 9, (7, 1), generator=g).float()
    ratio = Ratio()
    for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
        ratio.add(sums[part], lengths[part])
    assert ratio.mean == pytest.approx(float(sums.sum() / lengths.sum() / 3))
    whole = ratio_figure(sums.double().sum(1), 3 * lengths[:, 0].double())
    assert ratio.figure()["mean"] == pytest.approx(whole["mean"])
    assert ratio.figure()["ci95"] == pytest.approx(whole["ci95"])
    for n, found in enumerate(ratio.per_part()):
        wanted = ratio_figure(sums[:, n].double(), lengths[:, 0].double())
        assert found["mean"] == pytest.approx(wanted["mean"]) and found["ci95"] == pytest.approx(wanted["ci95"])
