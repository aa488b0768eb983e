"""The Triton kernels against the blocks that stand for them on a CPU: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layers import LAYERS, close, some_inputs

from qkscope.kernels.pattern_kl import Parts, blocked, solver
from qkscope.pattern import AttentionInputs
from qkscope.training.objective import PatternTarget

pytest.importorskip("triton")
from qkscope.kernels.pattern_kl_triton import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(inputs: AttentionInputs, seed: int, parts: Parts = (3.0, 1.0, 1.0), floor: float = 1e-6) -> None:
    """KLs and gradients are the blocks', up to a share of their largest or of `floor`."""
    g = torch.Generator().manual_seed(seed)
    target, rule = PatternTarget(inputs), inputs.rule
    q, k = target.rotated
    hat = [y + 0.5 * torch.randn(y.shape, generator=g) for y in (q, k)]
    weight = torch.rand(target.weight_BQ.shape, generator=g) * target.weight_BQ
    case = [q, k, *hat, rule.visible_BQK, weight, rule.sink_N]
    there = [None if y is None else y.to(DEVICE) for y in case]
    wanted = blocked(*case, rule.softcap, parts, gradients=True)  # type: ignore[arg-type]
    found = fused(*there, rule.softcap, parts, gradients=True)  # type: ignore[arg-type]
    for one, two in zip(found, wanted, strict=True):
        assert one is not None and two is not None and (two.abs().max() > 1e-3 or floor > 1e-3)
        close(one.cpu(), two, 2e-5, floor)
    without = fused(*there, rule.softcap, parts, gradients=False)  # type: ignore[arg-type]
    assert torch.equal(without[0], found[0]) and without[1:] == (None, None)


@pytest.mark.parametrize("name", LAYERS)
def test_the_kernels_are_the_blocks(name: str) -> None:
    check(some_inputs(31, **LAYERS[name]), 1, parts=(0.7, 2.0, 3.0))


@pytest.mark.parametrize("mask", ["causal", "sliding", "bidirectional"])
def test_more_than_one_block(mask: str) -> None:
    """Blocks of 32 positions: the ends of the range that a mask leaves, and a rest."""
    inputs = some_inputs(
        32, batch=1, length=50, heads=2, groups=1, width=12, mask=mask, padding=mask == "bidirectional"
    )
    check(inputs, 2)


@example(seed=0, length=6, heads=(1, 1), width=20, mask="causal", softcap=0.7, sink=False)  # far beyond the cap
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    width=st.sampled_from([2, 6, 16, 20]),
    mask=st.sampled_from(["causal", "sliding", "bidirectional"]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    sink=st.booleans(),
)
def test_any_layer(seed: int, heads: tuple[int, int], **options: Any) -> None:
    check(some_inputs(seed, batch=1, heads=heads[0], groups=heads[1], **options), seed, floor=0.02)


def test_the_device_chooses() -> None:
    assert solver(torch.device("cuda")) is fused
    assert solver(torch.device("cpu")) is blocked
