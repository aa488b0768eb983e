"""Products without zeros against dense ones in float64, and step 1's loss curve as it was with dense products."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, OFF, close, some_dictionary, some_inputs
from torch import Tensor

from qkscope import parallel
from qkscope.config import Activation, DictionaryConfig, TrainingConfig
from qkscope.dictionary import SparseTranscoder
from qkscope.kernels import mostly_zero
from qkscope.kernels.mostly_zero import (
    SHARE,
    MostlyZero,
    acts_product,
    count,
    fires,
    large_entries,
    pre_product,
    with_gradient,
)  # fmt: skip
from qkscope.training.objective import PatternTarget
from qkscope.training.recipes import resolved
from qkscope.training.start import side_statistics, start
from qkscope.training.step1 import Step1Job

ACTIVATIONS = get_args(Activation)


def some_acts(n: int, width: int, share: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, width, generator=g) * (torch.rand(n, width, generator=g) < share)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999), n=st.integers(1, 40), width=st.integers(1, 60), out=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.01, 0.03, 0.3, 1.0]),
)  # fmt: skip
def test_products_and_gradients_are_the_dense_ones(seed: int, n: int, width: int, out: int, share: float) -> None:
    acts, right, cotangent = (
        some_acts(n, width, share, seed), drawn(width, out, seed=seed + 1), drawn(n, out, seed=seed + 2)
    )  # fmt: skip
    acts.requires_grad_()
    right.requires_grad_()
    found = acts_product(acts, right)
    to_acts, to_right = torch.autograd.grad(found, (acts, right), cotangent)
    close(found.detach(), acts.detach().double() @ right.detach().double(), 1e-5)
    close(to_right, acts.detach().T.double() @ cotangent.double(), 1e-5)
    here = acts.detach() > 0
    close(to_acts[here], (cotangent.double() @ right.detach().T.double())[here], 1e-5)

    x, weight = drawn(n, out, seed=seed + 3).requires_grad_(), drawn(out, width, seed=seed + 4).requires_grad_()
    pre = pre_product(x, weight)
    to_x, to_weight = torch.autograd.grad(pre, (x, weight), acts.detach())
    close(pre.detach(), x.detach().double() @ weight.detach().double(), 1e-5)
    close(to_x, acts.detach().double() @ weight.detach().T.double(), 1e-5)
    close(to_weight, x.detach().T.double() @ acts.detach().double(), 1e-5)


def test_few_entries_take_the_short_way_and_many_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    of = MostlyZero.of

    def noted(matrix: Tensor) -> MostlyZero:
        taken.append(float((matrix != 0).double().mean()))
        return of(matrix)

    monkeypatch.setattr(MostlyZero, "of", noted)
    for share in (0.5 * SHARE, 0.9 * SHARE, 1.3 * SHARE, 0.5):
        acts_product(some_acts(100, 200, share, 0), torch.ones(200, 3))
    assert len(taken) == 2 and max(taken) <= SHARE


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(0, 30), width=st.integers(1, 20), block=st.sampled_from([1, 7, 1 << 20]))
def test_large_entries_and_their_gradients(seed: int, n: int, width: int, block: int) -> None:
    x, weight, bias = (
        drawn(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate([(n, 5), (5, width), (width,)])
    )
    least = drawn(width, seed=seed + 3).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mostly_zero, "BLOCK", block)
        found = with_gradient(large_entries(x, weight, bias, least), x, weight, bias)
    dense = x.double() @ weight.double() + bias.double()
    wanted = dense * (dense > least)
    close(found.dense().detach(), wanted.detach(), 1e-5)
    if n:
        centre = drawn(width, seed=seed + 5)
        close(found.column_means().detach(), wanted.mean(0).detach(), 1e-5)
        close(found.square_distances(centre).detach(), (wanted - centre).square().mean(0).detach(), 1e-5)
        assert torch.equal(fires(found), fires(wanted))
    assert int(count(found)) == int(count(wanted))
    cotangent = drawn(n, width, seed=seed + 4)
    for to_found, to_wanted in zip(
        torch.autograd.grad(found.dense(), (x, weight, bias), cotangent),
        torch.autograd.grad(wanted, (x, weight, bias), cotangent.double()), strict=True,
    ):  # fmt: skip
        close(to_found, to_wanted, 1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.0, 100.0])
def test_few_chosen_features_are_those_chosen_of_all(threshold: float) -> None:
    """Whatever the running threshold says they may be."""
    x = drawn(40, 12, seed=1)
    found = []
    for few in (True, False):
        t = some_dictionary(12, 300, 8, 2, "batchtopk")
        t.threshold.data.fill_(threshold)
        t.k = 5.0
        acts, pre = t.train().fire(x) if few else (t.train().encode(x), t.pre(x))
        assert isinstance(acts, MostlyZero) == (pre is None) == few
        out = t.decode(acts)
        out.square().sum().backward()
        dense = acts.dense() if isinstance(acts, MostlyZero) else acts
        found.append([dense.detach(), out.detach(), t.threshold.detach(), *(p.grad for p in t.parameters())])
    assert (found[0][0] > 0).sum() == 5 * 40
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, 1e-5)


def test_in_bfloat16_only_the_encoder_rounds() -> None:
    x = drawn(60, 12, seed=1)
    t = some_dictionary(12, 300, 8, 2, "batchtopk").train()
    t.k = 5.0
    exact, _ = t.fire(x)
    with torch.autocast("cpu", torch.bfloat16):
        acts, _ = t.fire(x)
        out = t.decode(acts)
    assert isinstance(acts, MostlyZero) and isinstance(exact, MostlyZero)
    both = (acts.dense() > 0) & (exact.dense() > 0)
    assert int(both.sum()) > 0.95 * len(exact.value_L)
    error = (acts.dense() - exact.dense()).detach()[both].abs()
    assert 1e-5 < float(error.max()) < 0.05
    assert out.dtype == torch.float32
    close(out.detach(), acts.dense().detach().double() @ t.W_dec.detach().double() + t.b_out.detach(), 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999), n=st.integers(1, 300), data=st.data(),
    guess=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 9.0]),
)  # fmt: skip
def test_the_kth_largest_is_that_whatever_the_guess(seed: int, n: int, data: st.DataObject, guess: float) -> None:
    sizes = drawn(1, n, seed=seed).relu()
    count = data.draw(st.integers(1, n))
    found = parallel.kth_largest(sizes, count, torch.tensor(guess))
    assert float(found) == sorted(sizes[0].tolist(), reverse=True)[count - 1]


# The loss curve --------------------------------------------------------------------------------------


def former_pre(self: SparseTranscoder, x_nD: Tensor) -> Tensor:
    return (x_nD - self.b_in) @ self.W_enc + self.b_enc


def former_activate(self: SparseTranscoder, pre_nF: Tensor) -> Tensor:
    """BatchTopK as it was: by sorting everything; a product with a mask."""
    if self.activation != "batchtopk":
        return PRESENT_ACTIVATE(self, pre_nF)
    acts = pre_nF.relu()
    sizes = acts.detach() * self.norms()
    cut = sizes.flatten().kthvalue(sizes.numel() - max(round(self.k * len(sizes)), 1) + 1).values
    self._follow(cut)
    return acts * ((sizes >= cut) & (sizes > 0))


PRESENT_ACTIVATE = SparseTranscoder.activate


def curve(activation: Activation, layer: str, steps: int = 25) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a short training in which features die, and its parameters."""
    options = {"batch": 3, "length": 20, "d": 12, "heads": 2, "groups": 1, **LAYERS[layer]}
    options["groups"] = min(options["groups"], 2)
    batches = [some_inputs(seed, **options) for seed in range(5)]
    config = resolved(
        DictionaryConfig(
            width=150, width_key=120, k=2, activation=activation, aux=1 / 32, dead_after=200, start="random"
        ),
        TrainingConfig(),
    )
    statistics = side_statistics(batches)
    query, key = (start(config, side, statistics[side], "a", 0) for side in ("query", "key"))
    job = Step1Job(0, "", config, query, key)
    # With Adam's own 1e-8, entries whose gradient is nothing but rounding move as far as any other.
    optimizer = torch.optim.Adam(job.parameter_groups(), eps=1e-3)
    losses = []
    for step in range(steps):
        job.before_step(step / steps)
        optimizer.zero_grad()
        loss, log = job.loss(PatternTarget(batches[step % 5]), OFF)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert activation in ("relu", "jumprelu") or float(log["dead_query"]) > 0.1
    return losses, {name: p.detach().clone() for name, p in job.named_parameters()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", ["causal", "all"])
def test_step_one_learns_what_it_did_with_dense_products(
    activation: Activation, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    times = mostly_zero.MostlyZero.times
    monkeypatch.setattr(mostly_zero.MostlyZero, "times", lambda *a: (taken.append(1), times(*a))[1])
    now, parameters = curve(activation, layer)
    assert len(taken) > 25 or activation in ("relu", "jumprelu")
    monkeypatch.setattr(SparseTranscoder, "pre", former_pre)
    monkeypatch.setattr(SparseTranscoder, "activate", former_activate)
    monkeypatch.setattr(SparseTranscoder, "_chooses_few", lambda *a: False)
    monkeypatch.setattr(mostly_zero, "_entries", lambda matrix: None)
    former, formerly = curve(activation, layer)
    assert former[20] < 0.99 * former[0]  # on the same batch
    assert now == pytest.approx(former, rel=2e-5)
    if activation != "relu":  # whose root penalty has a slope of up to 1,600 where an activation vanishes
        for name, value in parameters.items():
            close(value, formerly[name], 1e-3)
