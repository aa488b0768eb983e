"""A target's arithmetic: what bounds allow, and the KL that a loss is worth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import some_inputs, some_sides, whole

from qkscope.config import RunConfig, TargetConfig
from qkscope.kernels.row_kl import exp
from qkscope.target import Bounds, Cost, bounds_of, kl_for, outcome, scaled_errors


@given(
    size=st.floats(0.01, 2.0), power=st.floats(0.5, 3.0), loss=st.floats(1e-4, 1.0),
    kls=st.lists(st.floats(0.03, 1.0), min_size=2, max_size=5, unique=True),
)  # fmt: skip
def test_a_power_law_between_points_is_read_back(size: float, power: float, loss: float, kls: list[float]) -> None:
    points = [(kl, size * kl**power) for kl in kls]
    lowest, highest = min(points), max(points)
    found = kl_for(loss, points)
    if loss < lowest[1]:
        assert found == pytest.approx(lowest[0] * loss / lowest[1])
    elif loss > highest[1]:
        assert found == highest[0]
    else:
        assert found == pytest.approx((loss / size) ** (1 / power), rel=1e-6)


def test_points_without_loss_are_no_error() -> None:
    assert math.isfinite(kl_for(0.01, [(0.5, 0.0), (0.2, 0.0), (0.1, -1e-4)]))
    assert kl_for(0.01, [(0.5, 0.02), (0.1, 0.0)]) < 0.5


@pytest.mark.parametrize("layer", [{}, {"rotary": "half", "padding": True}, {"softcap": 1.2, "sink": True}])
def test_scaled_errors_lead_from_the_true_pattern_to_the_dictionaries(layer: dict[str, Any]) -> None:
    inputs = some_inputs(**layer)
    query, key = some_sides(inputs)
    with torch.no_grad():
        patterns = (scaled_errors(query, key, scale)(inputs) for scale in (0.0, 1.0, 0.5))
        none, full, half = (exp(whole(pattern, inputs)) for pattern in patterns)
        x = inputs.x_BTD.float()
        q, k = query(x).view(inputs.q_BTNH.shape), key(x).view(inputs.k_BTGH.shape)
        own = exp(inputs.rule.log_pattern(q, k))
    true = exp(inputs.log_pattern_BNQK)
    assert torch.allclose(none, true, atol=1e-5)
    assert torch.allclose(full, own, atol=1e-5)
    assert float((half - true).abs().sum()) < float((full - true).abs().sum())


def test_every_bound_holds() -> None:
    both = Bounds(0.1, 0.01)
    assert Cost(0.1, 0.01).within(both)
    assert not Cost(0.11, 0.001).within(both) and not Cost(0.01, 0.011).within(both)
    assert Cost(9.0, 0.001).within(Bounds(None, 0.01)) and Cost(0.05).within(Bounds(0.1))
    said = Cost(0.05, 0.02).said(both)
    assert said.startswith("validation KL 0.0500, under the bound of 0.1; ")
    assert said.endswith("cross-entropy increase 0.0200, NOT under the bound of 0.01")


def test_where_bounds_come_from() -> None:
    def config(**values: Any) -> RunConfig:
        return RunConfig.model_validate(values)

    assert bounds_of(config()) is None
    assert bounds_of(config(pairs={"max_kl": 0.2})) == Bounds(0.2)
    assert bounds_of(config(target={"max_ce": 0.02})) == Bounds(None, 0.02)


@pytest.mark.parametrize(("kl", "ce", "reached"), [(0.05, 0.001, True), (0.05, 0.02, False), (0.2, 0.001, False)])
def test_a_report_says_whether_heldout_text_agrees(kl: float, ce: float, reached: bool) -> None:
    report = {"pattern_kl": {"map_pruned": {"mean": kl}}, "ce_increase": {"map_pruned": {"mean": ce}}}
    found = outcome(TargetConfig(max_kl=0.1, max_ce=0.01), report)
    assert found == {"max_kl": 0.1, "max_ce": 0.01, "share": 0.6, "reached": reached}
