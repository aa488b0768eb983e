"""Training through the sparse map: what learns, what stands still, and what pruning keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import (
    LAYERS,
    OFF,
    close,
    map_scores,
    pairs_of,
    slow_kl,
    slow_kl_rows,
    slow_map,
    slow_mean,
    slow_pattern_of,
    slow_scores,
    some_inputs,
    some_of,
    some_sides,
    strengths_of,
)
from torch import Tensor

from qkscope import dictionary
from qkscope.dictionary import SparseTranscoder
from qkscope.kernels.mostly_zero import MostlyZero
from qkscope.pairs.pair_map import with_bias
from qkscope.pairs.tune import MapJob
from qkscope.pattern import AttentionInputs
from qkscope.training.objective import PatternTarget


def some_job(inputs: AttentionInputs, share: float = 1.0, tuned: bool = False, activation: Any = "batchtopk") -> MapJob:
    sides = some_sides(inputs, widths=(5, 4), activation=activation)
    pairs = some_of(pairs_of(inputs, sides), share)
    return MapJob(0, "", *sides, pairs, dictionary_rate=1e-3 if tuned else 0.0, strength_rate=1e-2)


def trained(job: MapJob, inputs: AttentionInputs, steps: int = 1) -> list[float]:
    optimizer = torch.optim.Adam(job.parameter_groups())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = job.loss(PatternTarget(inputs), OFF)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", LAYERS)
def test_loss_is_the_kl_of_the_slow_map(name: str) -> None:
    inputs = some_inputs(51, length=5, **LAYERS[name])
    job = some_job(inputs, 0.5)
    with torch.no_grad():
        job.factor_P.copy_(torch.rand(len(job.factor_P), generator=torch.Generator().manual_seed(0)) * 2)
    sides = job.query, job.key
    strength = job.factor_P.detach() * strengths_of(inputs, sides, job.pairs)
    close(job.strengths(inputs.rule).detach(), strength, 1e-6)
    scores = slow_map(inputs, sides, job.pairs, strength)
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
    wanted = slow_mean(slow_kl_rows(true, slow_pattern_of(inputs.rule, scores)), inputs.real_BT)
    found, log = job.loss(PatternTarget(inputs), OFF)
    close(found.detach(), wanted)
    close(log["pattern_kl"], wanted)
    assert float(log["pairs"]) == len(job.pairs)


@pytest.mark.parametrize("rotary", [None, "half"])
def test_all_pairs_give_the_transcoders_kl(rotary: str | None) -> None:
    inputs = some_inputs(52, rotary=rotary)
    job = some_job(inputs)
    q, k = job.query(inputs.x_BTD).view_as(inputs.q_BTNH), job.key(inputs.x_BTD).view_as(inputs.k_BTGH)
    close(job.loss(PatternTarget(inputs), OFF)[0].detach(), slow_kl(inputs, q, k).detach())


@pytest.mark.parametrize("rotary", [None, "half"])
@pytest.mark.parametrize("tuned", [False, True])
def test_gradients_reach_factors_always_and_dictionaries_only_when_tuned(rotary: str | None, tuned: bool) -> None:
    inputs = some_inputs(53, rotary=rotary)
    job = some_job(inputs, 0.5, tuned)
    before = {name: p.detach().clone() for name, p in job.named_parameters()}
    trained(job, inputs)
    changed = {name for name, p in job.named_parameters() if not torch.equal(p, before[name])}
    learned = {"W_enc", "b_enc", "b_in", "W_dec", "b_out"}
    dictionaries = {f"{side}.{name}" for side in ("query", "key") for name in learned}
    thresholds = {"query.threshold", "key.threshold"}  # BatchTopK's follow what they choose while they are tuned
    assert changed == {"factor_P"} | (dictionaries | thresholds if tuned else set())
    for name, p in job.named_parameters():
        wanted = name == "factor_P" or (tuned and name in dictionaries)
        assert (p.grad is not None and bool(p.grad.any())) is wanted, name


def test_factor_gradients_are_the_finite_difference() -> None:
    inputs = some_inputs(54, length=5, softcap=2.0, rotary="partial")
    job = some_job(inputs, 0.3, activation="relu")
    loss, _ = job.loss(PatternTarget(inputs), OFF)
    loss.backward()
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))

    def kl(factor: Tensor) -> float:
        scores = slow_map(inputs, (job.query, job.key), job.pairs, factor)
        return float(slow_mean(slow_kl_rows(true, slow_pattern_of(inputs.rule, scores)), inputs.real_BT))

    assert job.factor_P.grad is not None
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(len(job.factor_P), generator=g).double()
        ones = torch.ones_like(direction)
        slope = (kl(ones + 1e-4 * direction) - kl(ones - 1e-4 * direction)) / 2e-4
        assert float(job.factor_P.grad.double() @ direction) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_jumprelu_thresholds_learn_only_when_tuned() -> None:
    inputs = some_inputs(55)
    for tuned in (False, True):
        job = some_job(inputs, 0.5, tuned, "jumprelu")
        job.parameter_groups()
        assert job.query.threshold.requires_grad is tuned and job.key.threshold.requires_grad is tuned


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("name", ["half-split", "partial", "all"])
def test_dictionaries_learn_as_with_gradients_of_all_activations(
    name: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotary map makes gradients of some activations only: of all that have one to pass on."""
    inputs = some_inputs(60, length=6, **LAYERS[name])
    job = some_job(inputs, 0.6, True, activation)
    if activation == "jumprelu":  # wide enough that some activations fall just short of it
        monkeypatch.setattr(dictionary, "JUMP_BANDWIDTH", 0.8)
        side, x = job.query, inputs.x_BTD[inputs.real_BT]
        assert (side.reach(side.encode(x), side.pre(x)).value_L == 0).any()
    parameters = [p for group in job.parameter_groups() for p in group["params"]]
    learned = []
    for everywhere in (False, True):
        if everywhere:
            monkeypatch.setattr(
                SparseTranscoder, "reach", lambda self, acts, pre: MostlyZero.of(acts, torch.ones_like(acts).bool())
            )
        loss, _ = job.loss(PatternTarget(inputs), OFF)
        learned.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    reached = 0
    for one, two in zip(*learned, strict=True):
        if two is None:
            assert one is None
            continue
        reached += bool(two.abs().max() > 1e-6)
        close(one, two, 1e-5)
    assert reached >= (11 if activation == "jumprelu" else 9)


def test_frozen_dictionaries_choose_as_a_reader_would() -> None:
    """In refit the batch does not choose: the threshold does, and it does not move."""
    inputs = some_inputs(56)
    job = some_job(inputs)
    thresholds = job.query.threshold.clone(), job.key.threshold.clone()
    job.train()
    assert job.training and not job.query.training and not job.key.training
    _, active = job.kl_rows(PatternTarget(inputs))
    for side, transcoder in (("query", job.query), ("key", job.key)):
        assert torch.equal(active[side].dense(), with_bias(transcoder.encode(inputs.x_BTD)))
    trained(job, inputs, 3)
    assert torch.equal(job.query.threshold, thresholds[0]) and torch.equal(job.key.threshold, thresholds[1])
    tuned = some_job(inputs, tuned=True)
    assert tuned.query.training and tuned.key.training
    tuned.eval()
    assert not tuned.query.training and not tuned.key.training


@pytest.mark.parametrize("tuned", [False, True])
def test_training_lowers_the_kl(tuned: bool) -> None:
    inputs = some_inputs(57, batch=4, length=10)
    losses = trained(some_job(inputs, 0.3, tuned, "relu"), inputs, 60)
    assert losses[-1] < (0.9 if tuned else 0.97) * losses[0]


@pytest.mark.parametrize("rotary", [None, "half"])
def test_pruning_keeps_pairs_and_their_factors(rotary: str | None) -> None:
    inputs = some_inputs(58, rotary=rotary)
    job = some_job(inputs)
    trained(job, inputs, 2)
    whole, factor, strength = job.pairs, job.factor_P.detach().clone(), job.strengths(inputs.rule).detach()
    index = torch.tensor([40, 3, 17, 90, 4])
    job.keep(index)
    wanted = whole.take(index)
    for name in ("query_P", "key_P", "head_P"):
        assert torch.equal(getattr(job.pairs, name), getattr(wanted, name))
        assert torch.equal(getattr(job, name), getattr(wanted, name))
    assert torch.equal(job.factor_P, factor[index.sort().values])
    close(job.strengths(inputs.rule).detach(), strength[index.sort().values], 1e-6)
    rows, _ = job.kl_rows(PatternTarget(inputs))
    scores = map_scores(inputs, (job.query, job.key), wanted, strength[index.sort().values])
    close(rows.detach(), PatternTarget(inputs).kl_rows(scores), 1e-5)
    trained(job, inputs)  # a new optimiser takes up the shorter parameter


@pytest.mark.parametrize("rotary", [None, "half"])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_tune_drops_features_with_their_last_pair(rotary: str | None, activation: str) -> None:
    """Bias pairs and numbering included: the map is the same one, and every feature left is in a pair."""
    inputs = some_inputs(59, rotary=rotary)
    job = some_job(inputs, tuned=True, activation=activation)
    gone_q, gone_k = 1, 0
    pairs = job.pairs
    index = ((pairs.query_P != gone_q) & (pairs.key_P != gone_k)).nonzero()[:, 0]
    frozen = some_job(inputs, activation=activation)
    frozen.keep(index)
    job.eval()
    job.keep(index)
    assert (job.query.width, job.key.width) == (4, 3) and (frozen.query.width, frozen.key.width) == (5, 4)
    assert job.pairs.query_P.unique().tolist() == [0, 1, 2, 3, 4] and job.pairs.key_P.unique().tolist() == [0, 1, 2, 3]
    if activation != "topk":  # there the features that are left take the places of the ones that went
        found, wanted = (j.kl_rows(PatternTarget(inputs))[0].detach() for j in (job, frozen.eval()))
        close(found, wanted, 1e-6)
    close(job.strengths(inputs.rule).detach(), frozen.strengths(inputs.rule).detach(), 1e-6)
    job.train()
    trained(job, inputs, 2)
    assert all(p.grad is not None for name, p in job.named_parameters() if name.endswith(("W_enc", "W_dec")))


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_a_side_of_which_only_the_bias_is_named_keeps_a_feature(activation: str) -> None:
    """Few pairs can all have the query's bias: training goes on, and the map is the same."""
    inputs = some_inputs(60)
    job, frozen = (some_job(inputs, tuned=tuned, activation=activation) for tuned in (True, False))
    index = ((job.query_P == 5) & (job.key_P < 4)).nonzero()[:, 0]
    for one in (job, frozen):
        one.keep(index)
    assert (job.query.width, job.key.width) == (1, 4) and job.pairs.query_P.unique().tolist() == [1]
    found, wanted = (one.eval().kl_rows(PatternTarget(inputs))[0].detach() for one in (job, frozen))
    close(found, wanted, 1e-6)
    job.train()
    trained(job, inputs, 2)
    job.query.calibrate(inputs.x_BTD.flatten(0, 1))


def mean_l0(job: MapJob, inputs: AttentionInputs) -> float:
    return float((job.query.encode(inputs.x_BTD.flatten(0, 1)) > 0).sum(-1).float().mean())


def test_tune_keeps_relu_dictionaries_as_dense_as_they_were() -> None:
    """A penalty that alone would end every feature holds L0 where it was, and does not go on to lower it."""
    inputs = some_inputs(60, batch=4, length=10)
    job = some_job(inputs, 0.5, tuned=True, activation="relu")
    job.sparsity = 5.0
    before = mean_l0(job, inputs)
    trained(job, inputs, 300)
    assert float(job.get_buffer("l0_query")) == pytest.approx(before)
    assert 0.6 * before < mean_l0(job, inputs) < 1.4 * before
    frozen = some_job(inputs, 0.5, activation="relu")
    frozen.sparsity = 5.0
    assert float(frozen.loss(PatternTarget(inputs), OFF)[0].detach()) == pytest.approx(
        float(PatternTarget(inputs).mean(frozen.kl_rows(PatternTarget(inputs))[0]).detach())
    )
