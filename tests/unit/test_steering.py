"""k steered by the KL: it ends at the KL that was asked for, and shared so that both sides need few features."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import OFF, job_for, some_inputs
from torch import Tensor

from qkscope.config import TrainingConfig
from qkscope.training.objective import PatternTarget
from qkscope.training.steering import FROM, Steering

STEPS = 1000
SHORT = TrainingConfig(tokens=STEPS * 1000, batch_tokens=1000)
LONG = TrainingConfig(tokens=1_000_000, batch_tokens=1000)
MOST = torch.tensor([500.0, 500.0], dtype=torch.float64)


def world(log_k_2: Tensor, sizes: tuple[float, float], power: float) -> Tensor:
    """KLs of dictionaries whose error falls as a power of k: of both, of the query side, of the key side."""
    query, key = (size * math.exp(-power * k) for size, k in zip(sizes, log_k_2.tolist(), strict=True))
    return torch.tensor([query + key, query, key])


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.floats(0.3, 1.5), st.floats(0.3, 1.5)),
    power=st.floats(0.7, 1.2),  # so that no side needs more than MOST
    kl=st.floats(0.05, 0.15),
    start=st.floats(2.0, 60.0),
)
def test_k_ends_at_the_least_that_has_the_kl(sizes: tuple[float, float], power: float, kl: float, start: float) -> None:
    """Against the best of a grid of all k's of both sides."""
    steering, log_k = Steering(kl, SHORT), torch.tensor([start, start], dtype=torch.float64).log()
    for step in range(STEPS):
        log_k = steering.step(log_k, world(log_k, sizes, power), MOST, step / STEPS)
    assert float(world(log_k, sizes, power)[0]) == pytest.approx(kl, rel=0.06)  # what no training took from it
    grid = torch.linspace(0, math.log(500), 400, dtype=torch.float64).exp()
    fits = (sizes[0] * grid**-power)[:, None] + sizes[1] * grid**-power <= kl
    least = (grid[:, None] + grid)[fits].min()
    assert float(log_k.exp().sum()) == pytest.approx(float(least), rel=0.15)


def test_k_stays_within_bounds_and_still_at_first() -> None:
    far, near = torch.tensor([9.0, 5.0, 4.0]), torch.tensor([1e-6, 1e-7, 1e-7])
    steering, log_k = Steering(0.1, LONG), torch.tensor([3.0, 4.0], dtype=torch.float64).log()
    assert torch.equal(steering.step(log_k, far, MOST, FROM - 0.01), log_k)
    for kl_3, end in ((far, MOST), (near, torch.ones(2))):
        moved = log_k
        for _ in range(3000):
            moved = steering.step(moved, kl_3, MOST, 1.0)
        assert torch.allclose(moved.exp(), end.double())
    nothing = steering.step(log_k, torch.zeros(3), MOST, 1.0)  # a KL of nothing is no error
    assert torch.isfinite(nothing).all()


def test_the_kl_may_be_larger_while_the_rate_is_high() -> None:
    steering, log_k = Steering(0.1, LONG), torch.tensor([8.0, 8.0], dtype=torch.float64).log()
    above = torch.tensor([0.13, 0.08, 0.08])
    assert bool((steering.step(log_k, above, MOST, 0.4) < log_k).all())
    assert bool((steering.step(log_k, above, MOST, 0.95) > log_k).all())


def test_a_job_takes_its_k_from_the_steering() -> None:
    """Only a steered job's k moves, and as the batch says."""
    target = PatternTarget(some_inputs(seed=3))
    for kl, grows in ((1e-3, True), (50.0, False), (None, None)):
        job = job_for(target.inputs, activation="batchtopk", k=1.5)
        job.steering = None if kl is None else Steering(kl, LONG)
        for done in (0.5, 0.6):
            job.before_step(done)
            job.loss(target, OFF)
            job.after_step()
        job.before_step(1.0)
        found = [job.query.k, job.key.k]
        if grows is None:
            assert found == [1.5, 1.5]
        else:
            assert all((k > 1.5) is grows and 1 <= k <= 2.25 for k in found), found
