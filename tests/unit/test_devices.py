"""What a person is told of a device, and copies to it."""

from __future__ import annotations

import pytest
import torch
from pretended import DEVICE, PretendedDevice

from qkscope import pipeline
from qkscope.devices import product_seconds, sent

CPU = torch.device("cpu")


def test_a_type_whose_products_are_slow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"float32": 2.0, "bfloat16": 3.0}
    monkeypatch.setattr(pipeline, "product_seconds", seconds.__getitem__)
    said = pipeline._slow(CPU, "bfloat16")
    assert "bfloat16 take 1.5 times" in said and "--training.dtype float32" in said
    assert pipeline._slow(CPU, "float32") == pipeline._slow(torch.device("cuda"), "bfloat16") == ""
    seconds["bfloat16"] = 1.0
    assert pipeline._slow(CPU, "bfloat16") == ""


def test_products_are_timed_of_the_type_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    types: list[torch.dtype] = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda one, other: types.append(one.dtype) or product(one, other))
    assert product_seconds("bfloat16") > 0 and set(types) == {torch.bfloat16}


def test_what_is_sent_arrives_without_being_waited_for() -> None:
    values = torch.arange(4)
    assert torch.equal(sent(values, "cpu"), values)
    with PretendedDevice() as device:
        there = sent(values, DEVICE)
        assert there.device == DEVICE and not device.waits
        assert torch.equal(there.cpu(), values)
