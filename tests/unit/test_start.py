"""Where a dictionary starts: the norm in which errors move the pattern, the projection, and the first weights."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from layers import LAYERS, close, slow_kl_rows, slow_pattern_of, slow_scores, some_inputs, turn_matrix
from torch import Tensor

from qkscope.config import Activation, DictionaryConfig, TrainingConfig
from qkscope.dictionary import SparseTranscoder
from qkscope.pattern import AttentionInputs
from qkscope.training.recipes import resolved
from qkscope.training.start import label_seed, score_metrics, side_statistics, slopes, start

# The metric ------------------------------------------------------------------------------------------


def slow_metrics(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Σ over rows of Var_{j∼P}(cap' scale R_iᵀ R_j k_j) and Σ P(1-P) (…)(…)ᵀ a token, float64, one entry at a time."""
    rule = inputs.rule
    batch, length, heads, width = inputs.q_BTNH.shape
    groups = inputs.k_BTGH.shape[2]
    scores = slow_scores(rule, inputs.q_BTNH, inputs.k_BTGH)
    pattern = slow_pattern_of(rule, scores)
    metric_q = torch.zeros(heads, width, width, dtype=torch.float64)
    metric_k = torch.zeros(groups, width, width, dtype=torch.float64)
    tokens = 0
    for b in range(batch):
        turns = [turn_matrix(rule.rotary, b, t, width) for t in range(length)]
        for i in range(length):
            if not inputs.real_BT[b, i]:
                continue
            tokens += 1
            for n in range(heads):
                g = n // (heads // groups)
                mean, square = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
                for j in range(length):
                    p = pattern[b, n, i, j]
                    slope = 1.0 if rule.softcap is None else 1 - (scores[b, n, i, j] / rule.softcap) ** 2
                    seen = slope * rule.scaling * turns[i].T @ turns[j] @ inputs.k_BTGH[b, j, g].double()
                    mean += p * seen
                    square += p * torch.outer(seen, seen)
                    asked = slope * rule.scaling * turns[j].T @ turns[i] @ inputs.q_BTNH[b, i, n].double()
                    metric_k[g] += p * (1 - p) * torch.outer(asked, asked)
                metric_q[n] += square - torch.outer(mean, mean)
    return metric_q / tokens, metric_k / tokens


@pytest.mark.parametrize("name", LAYERS)
def test_metrics_are_the_slow_loops(name: str) -> None:
    inputs = some_inputs(21, **LAYERS[name])
    for found, wanted in zip(score_metrics(inputs), slow_metrics(inputs), strict=True):
        assert wanted.diagonal(dim1=1, dim2=2).min() > 1e-4
        close(found, wanted)
        close(found, found.transpose(1, 2), 1e-5)


STEP = 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_the_query_metric_is_the_kl_of_a_small_error(name: str) -> None:
    """½ eᵀ C e = KL a token of the error e in every query of one head, by a finite step in float64."""
    inputs = some_inputs(22, length=5, **LAYERS[name])
    metric = score_metrics(inputs)[0]
    q = inputs.q_BTNH.double()
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, q, inputs.k_BTGH))
    g = torch.Generator().manual_seed(3)
    for head in range(q.shape[2]):
        e = torch.randn(q.shape[3], generator=g).double()
        moved = q.clone()
        moved[:, :, head] += STEP * e
        hat = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, moved, inputs.k_BTGH))
        rows = slow_kl_rows(true, hat).sum(1)[inputs.real_BT]
        assert float(0.5 * e @ metric[head].double() @ e) == pytest.approx(float(rows.mean()) / STEP**2, rel=5e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_the_key_metric_is_the_kl_of_a_small_error(name: str) -> None:
    """½ eᵀ C e = KL a token of the error e in one key after another."""
    inputs = some_inputs(23, length=5, **LAYERS[name])
    metric = score_metrics(inputs)[1]
    k = inputs.k_BTGH.double()
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, k))
    g = torch.Generator().manual_seed(4)
    group = k.shape[2] - 1
    e = torch.randn(k.shape[3], generator=g).double()
    cost = 0.0
    for j in range(k.shape[1]):
        moved = k.clone()
        moved[:, j, group] += STEP * e
        hat = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, moved))
        cost += float(slow_kl_rows(true, hat).sum(1)[inputs.real_BT].sum())
    cost /= int(inputs.real_BT.sum())
    assert float(0.5 * e @ metric[group].double() @ e) == pytest.approx(cost / STEP**2, rel=5e-3)


def test_slopes_are_the_derivative_of_the_cap() -> None:
    inputs = some_inputs(24, softcap=1.3)
    plain = inputs.rule.scaling * torch.einsum(
        "bind,bjnd->bnij", inputs.q_BTNH, inputs.k_BTGH.repeat_interleave(2, dim=2)
    )
    wanted = torch.func.vmap(torch.func.grad(inputs.rule.cap))(plain.flatten()).view_as(plain)
    found = slopes(inputs.rule, inputs)
    assert found is not None
    close(found, wanted)
    assert slopes(some_inputs(24).rule, inputs) is None


# The statistics --------------------------------------------------------------------------------------


def test_the_projection_is_the_layers_own() -> None:
    inputs = [some_inputs(25, length=40, padding=True)]
    statistics = side_statistics(inputs)
    real = inputs[0].real_BT
    for side, true in (("query", inputs[0].q_BTNH), ("key", inputs[0].k_BTGH)):
        s = statistics[side]
        close(s.x_nD, inputs[0].x_BTD[real], 0)
        close(s.out_nM, true.flatten(2)[real], 0)
        close((s.x_nD - s.x_nD.mean(0)) @ s.projection_DM, s.out_nM - s.out_nM.mean(0), 1e-3)


def test_statistics_are_means_over_batches() -> None:
    batches = [some_inputs(seed) for seed in (1, 2, 3)]
    found = side_statistics(batches)
    wanted = torch.stack([score_metrics(b)[1] for b in batches]).mean(0)
    metric = found["key"].metric_NHH
    assert metric is not None
    close(metric, wanted, 1e-6)
    assert len(found["query"].x_nD) == 3 * 14


# The first weights -----------------------------------------------------------------------------------


def some_start(side: str = "query", **values: Any) -> tuple[Any, Any]:
    statistics = side_statistics([some_inputs(26, batch=6, length=60)])
    config = resolved(DictionaryConfig(**{"width": 64, "k": 8, **values}), TrainingConfig())
    return start(config, side, statistics[side], "layer 3", 0), statistics[side]


@pytest.mark.parametrize("side", ["query", "key"])
def test_the_projection_start_nearly_reproduces_at_full_k(side: str) -> None:
    t, s = some_start(side, width=3000, k=3000)
    error = (t(s.x_nD) - s.out_nM).square().sum() / (s.out_nM - s.out_nM.mean(0)).square().sum()
    assert float(error.detach()) < 0.02


def test_the_projection_start_is_better_than_nothing_at_small_k() -> None:
    t, s = some_start()
    error = (t(s.x_nD) - s.out_nM).square().sum() / (s.out_nM - s.out_nM.mean(0)).square().sum()
    assert float(error.detach()) < 0.7
    larger = t.b_out + 1.1 * (t(s.x_nD) - t.b_out), t.b_out + 0.9 * (t(s.x_nD) - t.b_out)
    assert all((y - s.out_nM).square().sum() >= (t(s.x_nD) - s.out_nM).square().sum() for y in larger)  # best gain


@pytest.mark.parametrize("side", ["query", "key"])
def test_input_bias_is_the_mean_of_x_and_output_bias_that_of_the_outputs(side: str) -> None:
    t, s = some_start(side)
    close(t.b_in.detach(), s.x_nD.mean(0), 1e-6)
    close(t.b_out.detach(), s.out_nM.mean(0), 1e-6)
    assert torch.all(t.b_enc == 0)


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_decoder_row_is_its_encoder_direction_through_the_projection(side: str) -> None:
    t, s = some_start(side)
    close(t.W_enc.detach().norm(dim=0), torch.ones(64), 1e-5)
    wanted = (t.W_enc.T @ s.projection_DM).detach()
    gain = t.W_dec.detach() / wanted
    close(gain, gain.median().expand_as(gain), 1e-3)
    assert float(gain.median()) > 0


@pytest.mark.parametrize("choice", ["projection", "random"])
def test_directions_are_those_of_inputs_or_random(choice: str) -> None:
    t, s = some_start(start=choice, width=300)
    x = s.x_nD - s.x_nD.mean(0)
    cosines = torch.nn.functional.normalize(x, dim=1) @ t.W_enc.detach()
    close(t.W_enc.detach().norm(dim=0), torch.ones(300), 1e-6)
    nearest = cosines.amax(0)
    assert (nearest > 0.95).all() if choice == "projection" else nearest.median() < 0.95
    same = t.W_enc.detach().T @ t.W_enc.detach() - torch.eye(300)
    assert same.max() < 0.9999  # no two alike, though inputs may be


def test_kaiming_start_is_uniform_without_biases() -> None:
    t, s = some_start(recipe="seed", width=500)
    d = s.x_nD.shape[1]
    for weights, fan_in in ((t.W_enc, d), (t.W_dec, 500)):
        bound = (6 / fan_in) ** 0.5
        values = weights.detach().flatten() / bound
        assert 0.99 < float(values.max()) <= 1 and -1 <= float(values.min()) < -0.99
        assert abs(float(values.mean())) < 0.05 and float(values.square().mean()) == pytest.approx(1 / 3, rel=0.05)
    assert all(torch.all(b == 0) for b in (t.b_in, t.b_enc, t.b_out))
    assert t.metric is None


@pytest.mark.parametrize("activation", get_args(Activation))
def test_what_each_activation_starts_with(activation: Activation) -> None:
    t, s = some_start(activation=activation)
    assert t.training and t.metric is not None
    if activation == "jumprelu":
        l0 = float((t.encode(s.x_nD) > 0).sum(1).float().mean())
        assert l0 == pytest.approx(8, rel=0.02)  # its thresholds start where L0 is k
    else:
        assert torch.all(t.threshold == 0)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_a_wide_dictionary_is_fitted_to_fewer_tokens(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, ...]] = []
    pre = SparseTranscoder.pre
    monkeypatch.setattr(SparseTranscoder, "pre", lambda t, x: (written.append((len(x), t.width)), pre(t, x))[1])
    whole = some_start(activation=activation, width=20)[0]
    assert written and set(written) == {(360, 20)}  # all there are
    written.clear()
    monkeypatch.setattr("qkscope.training.start.FIT_ELEMENTS", 2000)
    few = some_start(activation=activation, width=20)[0]
    assert written and set(written) == {(100, 20)}
    assert not torch.equal(few.W_dec, whole.W_dec)
    torch.testing.assert_close(few.W_dec, whole.W_dec, rtol=0.3, atol=1e-6)  # the same up to a gain that is near


def test_a_start_depends_on_its_label_and_seed_alone() -> None:
    statistics = side_statistics([some_inputs(26, batch=6, length=60)])
    config = resolved(DictionaryConfig(width=20, k=4), TrainingConfig())

    def weights(label: str, seed: int, side: str = "query") -> Tensor:
        torch.rand(3)  # whatever else draws from the global generator
        return start(config, side, statistics[side], label, seed).W_enc.detach()

    first = weights("layer 3", 0)
    assert torch.equal(first, weights("layer 3", 0))
    others = [weights("layer 4", 0), weights("layer 3", 1), weights("layer 3", 0, "key")]
    assert not any(torch.allclose(first, other, atol=0.1) for other in others)
    assert label_seed("a", 1) != label_seed("1/a", 0) and 0 <= label_seed("a", 1) < 2**63
