"""What is active on a batch: the same as a whole dictionary's activations, whatever is encoded of them and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import some_dictionary, some_inputs

from qkscope.kernels.mostly_zero import MostlyZero
from qkscope.pairs import active as room
from qkscope.pairs.active import Active
from qkscope.pairs.pair_map import with_bias

ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu"]


def by_token_then_feature(active: Active) -> bool:
    code = active.events.token_L * active.n_features + active.events.feature_L
    return torch.equal(code, code.unique())


@pytest.mark.parametrize("chunk", [1, 40, 1 << 23])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("padding", [False, True])
def test_reading_is_encoding(monkeypatch: pytest.MonkeyPatch, activation: Any, chunk: int, padding: bool) -> None:
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", chunk)
    inputs = some_inputs(1, batch=3, padding=padding)
    side = some_dictionary(6, 11, 8, 2, activation)
    real = inputs.real_BT
    wanted = with_bias(side.encode(inputs.x_BTD)).detach() * real[..., None]
    found = Active.read(side, inputs.x_BTD[real], real)
    assert by_token_then_feature(found) and not found.act_L.requires_grad
    torch.testing.assert_close(found.dense(), wanted)
    assert found.fired.tolist() == (wanted > 0).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    l0 = float((wanted[..., :-1] > 0).sum() / real.sum())
    assert float(found.l0) == pytest.approx(l0)
    some = torch.tensor([1, 4, 5, 9])
    part = Active.read(side, inputs.x_BTD[real], real, some).dense()
    assert part.shape == wanted.shape and side.width == 11
    torch.testing.assert_close(part[..., [*some.tolist(), 11]], wanted[..., [*some.tolist(), 11]])
    others = torch.ones(12, dtype=torch.bool)
    others[[*some.tolist(), 11]] = False
    if activation != "topk":  # which chooses among all, so that all are there
        assert not part[..., others].any()


def test_a_dictionary_in_training_is_read_as_at_inference() -> None:
    inputs = some_inputs(1)
    side = some_dictionary(6, 11, 8, 2, "batchtopk").train()
    before = side.threshold.clone()
    found = Active.read(side, inputs.x_BTD.flatten(0, 1), inputs.real_BT)
    torch.testing.assert_close(found.dense(), with_bias(side.eval().encode(inputs.x_BTD)).detach())
    assert torch.equal(side.threshold, before)


def test_nothing_is_active_but_the_bias() -> None:
    inputs = some_inputs(1, padding=True)
    side = some_dictionary(6, 11, 8, 2)
    side.b_enc.data.fill_(-1e6)
    found = Active.read(side, inputs.x_BTD[inputs.real_BT], inputs.real_BT)
    assert found.fired.tolist() == [11] and float(found.l0) == 0
    assert torch.equal(found.dense()[..., -1], inputs.real_BT.float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_tokens_and_no_features(activation: Any) -> None:
    inputs = some_inputs(1)
    side = some_dictionary(6, 11, 8, 2, activation)
    none = torch.zeros_like(inputs.real_BT)
    found = Active.read(side, inputs.x_BTD[none], none)
    assert found.dense().shape == (2, 7, 12) and not found.dense().any()
    x_nD = inputs.x_BTD.flatten(0, 1)
    bias = Active.read(side, x_nD, inputs.real_BT, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(bias.dense()[..., -1], torch.ones(2, 7))
    assert activation == "topk" or not bias.dense()[..., :-1].any()


def test_gradients_reach_what_is_said_to_be_on() -> None:
    g = torch.Generator().manual_seed(0)
    acts = torch.randn(2 * 3, 4, generator=g).relu()
    on = torch.rand(6, 4, generator=g) < 0.5
    real = torch.tensor([[True, True, False], [True, True, True]])
    packed, here = acts[real.flatten()].requires_grad_(), on[real.flatten()]
    found = Active.on_tokens(MostlyZero.of(packed, here), real)
    assert by_token_then_feature(found)
    weight = torch.rand(2, 3, 5, generator=g)
    (found.dense() * weight).sum().backward()
    assert packed.grad is not None
    assert torch.equal(packed.grad, weight[real][:, :4] * here)
    dense = with_bias(acts.view(2, 3, 4)).requires_grad_()
    again = Active.of(dense)
    assert torch.equal(again.dense(), dense) and len(again.act_L) == int((dense != 0).sum())
    assert len(Active.of(dense, torch.ones_like(dense, dtype=torch.bool)).act_L) == 30


def test_the_order_by_features_keeps_tokens_in_order() -> None:
    inputs = some_inputs(1, batch=3)
    found = Active.read(some_dictionary(6, 11, 8, 2), inputs.x_BTD.flatten(0, 1), inputs.real_BT)
    again = found.by_feature()
    code = again.events.feature_L * 1000 + again.events.token_L
    assert torch.equal(code, code.sort().values)
    assert torch.equal(again.dense(), found.dense())
