"""One side's dictionary: what fires, what it learns from, and what leaves it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import close, some_dictionary, some_inputs
from torch import Tensor

from qkscope.config import Activation, RunConfig
from qkscope.decomposition import SiteShape, load_transcoders, save_transcoders
from qkscope.dictionary import CALIBRATION_TOKENS, JUMP_BANDWIDTH, SparseTranscoder
from qkscope.training.objective import PatternTarget

ACTIVATIONS = get_args(Activation)


def some_x(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def some_metric(n: int, h: int, seed: int = 0, rank: int | None = None) -> Tensor:
    root = torch.randn(n, h, rank or h, generator=torch.Generator().manual_seed(seed))
    return root @ root.transpose(1, 2)


def slow_sizes(t: SparseTranscoder, x: Tensor) -> Tensor:
    """relu(pre) times the norm of each decoder row (in the metric, where there is one), float64, row by row."""
    pre = (x.double() - t.b_in.detach().double()) @ t.W_enc.detach().double() + t.b_enc.detach().double()
    out = torch.zeros(len(x), t.width, dtype=torch.float64)
    for f in range(t.width):
        row = t.W_dec[f].detach().double()
        if t.metric is None:
            norm = float((row * row).sum()) ** 0.5
        else:
            heads, width, _ = t.metric.shape
            parts = [row[n * width : (n + 1) * width] for n in range(heads)]
            norm = sum(float(p @ t.metric[n].double() @ p) for n, p in enumerate(parts)) ** 0.5
        out[:, f] = pre[:, f].clamp(min=0) * norm
    return out


# What fires ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("metric", [None, 0])
def test_encode_and_decode_are_the_formula(activation: Activation, metric: int | None) -> None:
    t = some_dictionary(6, 9, 8, 1, activation)
    t.set_metric(None if metric is None else some_metric(2, 4))
    x = some_x(20)
    acts = t.encode(x).detach()
    pre = ((x - t.b_in) @ t.W_enc + t.b_enc).detach()
    if activation == "topk":
        t.set_metric(None)  # a reader has no metric, and TopK no threshold to fold one into
    sizes = slow_sizes(t, x)
    if activation == "relu":
        fires = pre > 0
    elif activation == "topk":
        fires = (sizes >= sizes.topk(3, dim=1).values[:, -1:]) & (sizes > 0)
    else:
        fires = sizes > t.threshold.detach()
    assert 0.05 < fires.double().mean() < 0.8
    close(acts, pre * fires, 1e-5)
    close(t(x).detach(), (pre * fires) @ t.W_dec.detach() + t.b_out.detach(), 1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 60), k=st.sampled_from([0.5, 1.0, 2.3, 4.0]), metric=st.booleans())
def test_batchtopk_takes_exactly_k_times_tokens_the_largest(seed: int, n: int, k: float, metric: bool) -> None:
    t = some_dictionary(6, 12, 8, seed, "batchtopk", k).train()
    t.set_metric(some_metric(2, 4, seed) if metric else None)
    x = some_x(n, seed=seed)
    positive = int((t.pre(x) > 0).sum())
    acts = t.encode(x).detach()
    count = min(max(round(k * n), 1), positive)
    assert int((acts > 0).sum()) == count
    sizes = slow_sizes(t, x)
    inside, outside = sizes[acts > 0], sizes[acts == 0]
    assert not len(inside) or not len(outside) or inside.min() >= outside.max() - 1e-5
    close(acts[acts > 0], t.pre(x).detach()[acts > 0], 1e-6)  # what is chosen is not changed


@pytest.mark.parametrize("metric", [False, True])
def test_batchtopk_threshold_gives_about_the_same_l0_at_inference(metric: bool) -> None:
    t = some_dictionary(6, 40, 8, 3, "batchtopk", 5.0).train()
    t.set_metric(some_metric(2, 4, 1) if metric else None)
    t.threshold.data.zero_()
    for step in range(150):
        t.encode(some_x(256, seed=step))
    fresh = some_x(20_000, seed=999)
    t.eval()
    before = t.threshold.clone()
    assert float((t.encode(fresh) > 0).sum(1).double().mean()) == pytest.approx(5.0, rel=0.02)
    assert torch.equal(t.threshold, before)  # inference does not move it
    t.threshold.data.fill_(7.0)
    t.calibrate(fresh[: 3 * CALIBRATION_TOKENS + 100])
    assert float((t.encode(fresh) > 0).sum(1).double().mean()) == pytest.approx(5.0, rel=0.02)


def test_a_calibrated_threshold_is_no_tokens_size() -> None:
    """Tokens that come again would else be active or not by rounding; as many are active as were chosen."""
    t = some_dictionary(6, 9, 8, 3, activation="batchtopk", k=2.5)
    x = some_x(40)
    t.calibrate(x)
    near = (slow_sizes(t, x).flatten() - t.threshold[0]).detach().abs().min()
    assert int((t.encode(x) > 0).sum()) == 100 and float(near) > 1e-5


def test_the_first_batch_sets_the_threshold_and_later_ones_move_it() -> None:
    t = some_dictionary(6, 12, 8, 5, "batchtopk", 2.0).train()
    t.threshold.data.zero_()
    cuts = []
    for step in range(3):
        x = some_x(30, seed=step)
        acts = t.encode(x)
        cuts.append(float(slow_sizes(t, x)[acts.detach() > 0].min()))
    wanted = 0.98 * (0.98 * cuts[0] + 0.02 * cuts[1]) + 0.02 * cuts[2]
    close(t.threshold.detach(), torch.full((12,), wanted), 1e-5)


def test_calibrate_is_for_batchtopk_alone() -> None:
    t = some_dictionary(6, 12, 8, 5, "jumprelu")
    before = t.threshold.clone()
    t.calibrate(some_x(50))
    assert torch.equal(t.threshold, before)


# What it learns from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_gradients_pass_where_a_feature_fires_and_nowhere_else(activation: Activation) -> None:
    t = some_dictionary(6, 9, 8, 6, activation).train()
    pre = t.pre(some_x(20)).detach().requires_grad_()
    acts = t.activate(pre)
    cotangent = some_x(20, 9, seed=3)
    acts.backward(cotangent)
    close(pre.grad, cotangent * (acts > 0), 1e-6)  # type: ignore[arg-type]


def jump_at(offsets: list[float]) -> tuple[SparseTranscoder, Tensor, float]:
    """One JumpReLU feature of row norm 2 and threshold 0.6, and activations whose sizes are at these places from it."""
    t = SparseTranscoder(1, 1, 4, "jumprelu", 1.0)
    t.W_dec.data.fill_(1.0)
    t.threshold.data.fill_(0.6)
    width = JUMP_BANDWIDTH * 0.6
    acts = torch.tensor([[(0.6 + o * width) / 2] for o in offsets])
    return t, acts.requires_grad_(), width


def test_jumprelu_gradient_is_the_rectangle_estimate() -> None:
    t, acts, width = jump_at([-3.0, -0.6, -0.4, 0.4, 0.6, 20.0])
    out = t.activate(acts)
    assert (out > 0).flatten().tolist() == [False, False, False, True, True, True]
    cotangent = torch.tensor([[1.0], [2.0], [3.0], [5.0], [7.0], [11.0]])
    out.backward(cotangent)
    assert acts.grad is not None and t.threshold.grad is not None
    assert acts.grad.flatten().tolist() == [0, 0, 0, 5, 7, 11]
    near = acts.detach()[2:4, 0]  # those within half a width of the threshold
    assert float(t.threshold.grad) == pytest.approx(float(-(near[0] * 3 + near[1] * 5) / width), rel=1e-5)


def test_l0_gap_and_its_gradient() -> None:
    t, acts, width = jump_at([-3.0, -0.4, 0.4, 20.0])
    t.k = 0.8
    gap = t.l0_gap(acts)
    assert float(gap.detach()) == pytest.approx((0.5 / 0.8 - 1) ** 2)
    gap.backward()
    slope = -(2 / width) / 4  # d L0 / d threshold: two of four tokens stand within the rectangle
    assert t.threshold.grad is not None
    assert float(t.threshold.grad) == pytest.approx(2 * (0.5 / 0.8 - 1) / 0.8 * slope, rel=1e-5)
    assert acts.grad is None  # in the thresholds only
    t.k = 0.5
    assert float(t.l0_gap(acts).detach()) == 0


def test_only_jumprelu_learns_its_threshold() -> None:
    learned = {a: some_dictionary(2, 3, 4, 0, a).threshold.requires_grad for a in ACTIVATIONS}
    assert learned == {"relu": False, "topk": False, "batchtopk": False, "jumprelu": True}


# What leaves it as it is -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 500), metric=st.booleans(), training=st.booleans())
def test_rescaling_a_row_and_its_encoder_inversely_changes_nothing(
    activation: Activation, seed: int, metric: bool, training: bool
) -> None:
    one, other = (some_dictionary(6, 9, 8, seed, activation).train(training) for _ in range(2))
    if metric:
        for t in (one, other):
            t.set_metric(some_metric(2, 4, seed))
    factor = 2.0 ** torch.randint(-4, 5, (9,), generator=torch.Generator().manual_seed(seed))  # exact in binary
    with torch.no_grad():
        other.W_enc.mul_(factor)
        other.b_enc.mul_(factor)
        other.W_dec.div_(factor[:, None])
    x = some_x(25, seed=seed)
    a, b = one.encode(x), other.encode(x)
    assert torch.equal(a > 0, b > 0)
    close((b / factor).detach(), a.detach(), 1e-6)
    close(other.decode(b).detach(), one.decode(a).detach(), 1e-5)
    close(other.threshold.detach(), one.threshold.detach(), 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
def test_permuting_features_changes_nothing(activation: Activation, training: bool) -> None:
    one, other = (some_dictionary(6, 9, 8, 2, activation).train(training) for _ in range(2))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.W_enc.copy_(one.W_enc[:, order])
        other.b_enc.copy_(one.b_enc[order])
        other.W_dec.copy_(one.W_dec[order])
        other.threshold.copy_(one.threshold[order])
    x = some_x(25)
    assert torch.equal(other.encode(x) > 0, one.encode(x)[:, order] > 0)
    close(other(x).detach(), one(x).detach(), 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_never_affects_the_choice(activation: Activation) -> None:
    """Whatever stands at padding, the packed tokens and so the choice of a batch are the same."""
    inputs = some_inputs(3, padding=True)
    found = []
    for filler in (0.0, 1e6, -1e6):
        inputs.x_BTD[~inputs.real_BT] = filler
        t = some_dictionary(6, 9, 8, 2, activation).train()
        target = PatternTarget(inputs)
        acts = target.unpack(t.encode(target.x_nD))
        assert target.n_tokens == int(inputs.real_BT.sum()) < inputs.real_BT.numel()
        assert torch.all(acts[~inputs.real_BT] == 0)
        close(target.x_nD, inputs.x_BTD[inputs.real_BT], 0)
        found.append((acts, t.threshold.detach()))
    assert all(torch.equal(a, found[0][0]) and torch.equal(th, found[0][1]) for a, th in found)


# What is stored --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 300), activation=st.sampled_from(["batchtopk", "jumprelu"]))
def test_plain_threshold_stands_for_the_metric(seed: int, activation: Activation) -> None:
    t = some_dictionary(6, 30, 8, seed, activation)
    t.set_metric(some_metric(2, 4, seed, rank=2))
    t.W_dec.data[3] = 0  # a row without effect on any score never fires
    t.threshold.data.fill_(0.5 * float(t.norms().mean()))
    reader = some_dictionary(6, 30, 8, seed, activation)
    reader.W_dec.data[3] = 0
    reader.threshold.data.copy_(t.plain_threshold())
    x = some_x(400, seed=seed)
    a, b = t.encode(x), reader.encode(x)
    sizes = slow_sizes(t, x)
    threshold = t.threshold.detach()
    close_call = (sizes - threshold).abs() < 1e-5 * threshold  # decided by rounding
    assert close_call.sum() < 5
    assert torch.equal((a > 0) | close_call, (b > 0) | close_call) and torch.equal(a[~close_call], b[~close_call])
    assert 0.02 < float((a > 0).double().mean()) < 0.9 and not (a[:, 3] > 0).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_read_fires_as_what_was_trained(tmp_path: Path, activation: Activation) -> None:
    """Through the file, for every activation and with the norm that `default` trains with."""
    sides = [some_dictionary(6, 30, 8, seed, activation, k=4) for seed in (0, 1)]
    for t in sides:
        t.set_metric(some_metric(2, 4, 5, rank=1))
        t.threshold.data.fill_(0.4 * float(t.norms().mean()) if activation in ("batchtopk", "jumprelu") else 0.0)
    save_transcoders(tmp_path / "d.safetensors", sides[0], sides[1])
    config = RunConfig.model_validate({"dictionary": {"width": 30, "k": 4, "activation": activation}})
    read = load_transcoders(tmp_path / "d.safetensors", config, SiteShape(6, 2, 2, 4, False))
    x = some_x(300)
    for before, after in zip(sides, read, strict=True):
        assert after.metric is None and not after.training
        assert torch.equal(after(x), before(x)) and torch.equal(after.encode(x), before.encode(x))
