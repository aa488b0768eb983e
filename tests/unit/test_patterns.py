"""How well a pattern is reproduced, against loops over rows; and the two ablations that are patterns."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from layers import LAYERS, by_head, close, some_inputs, whole
from torch import Tensor

from qkscope import pattern
from qkscope.evaluate.patterns import KLScore, MeanPattern, PatternScores, uniform_log_pattern
from qkscope.pattern import AttentionInputs, HeadPatterns


@dataclass(frozen=True)
class Given(AttentionInputs):
    """Inputs whose pattern is this one."""

    @classmethod
    def of(cls, inputs: AttentionInputs, log_pattern: Tensor) -> Given:
        given = cls(*(getattr(inputs, field.name) for field in fields(inputs)))
        given.__dict__["log_pattern_BNQK"] = log_pattern
        return given

    @property
    def log_pattern_by_head(self) -> HeadPatterns:
        return by_head(self.log_pattern_BNQK)


def another(inputs: AttentionInputs, seed: int = 0) -> Tensor:
    """A log-pattern that is near the true one."""
    g = torch.Generator().manual_seed(seed)
    q, k = (y + 0.4 * torch.randn(y.shape, generator=g) for y in (inputs.q_BTNH, inputs.k_BTGH))
    return inputs.rule.log_pattern(q, k)


def report_of(inputs: AttentionInputs, log_hat: Tensor) -> dict[str, Any]:
    """The scores of one log-pattern on one batch."""
    scores = PatternScores()
    scores.add(inputs, {"it": by_head(log_hat)})
    return scores["it"].report()


def slow_rows(true: list[float], hat: list[float], without: bool) -> tuple[float, float, float] | None:
    """KL, top-1 agreement and mean absolute error of one row over what it can see; `without` key 0: conditioned."""
    kept = [j for j, p in enumerate(true) if p > 0 and not (without and j == 0)]
    if not kept:
        return None
    p, q = ([x[j] / sum(x[j] for j in kept) for j in kept] for x in (true, hat))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    top1 = float(max(range(len(p)), key=p.__getitem__) == max(range(len(q)), key=q.__getitem__))
    return kl, top1, sum(abs(a - b) for a, b in zip(p, q, strict=True)) / len(p)


def slow_report(batches: list[tuple[AttentionInputs, Tensor]], without: bool, head: int | None) -> list[float]:
    """The three means over heads (or of one head) and unpadded queries; without position 0 as a query too."""
    rows = []
    for inputs, log_hat in batches:
        true, hat = inputs.log_pattern_BNQK.double().exp(), log_hat.double().exp()
        for b in range(true.shape[0]):
            for n in range(true.shape[1]) if head is None else [head]:
                for i in range(1 if without else 0, true.shape[2]):
                    if inputs.real_BT[b, i]:
                        found = slow_rows(true[b, n, i].tolist(), hat[b, n, i].tolist(), without)
                        rows += [found] if found else []
    return [sum(row[m] for row in rows) / len(rows) for m in range(3)]


@pytest.mark.parametrize("name", ["causal", "sliding", "bidirectional", "padded", "sink", "all"])
def test_scores_are_the_loops(name: str) -> None:
    scores, alone, batches = PatternScores(), KLScore(), []
    for seed, batch in ((71, 2), (72, 3)):
        inputs = some_inputs(seed, **{**LAYERS[name], "batch": batch})
        batches.append((inputs, another(inputs)))
        scores.add(inputs, {"another": by_head(batches[-1][1]), "uniform": uniform_log_pattern(inputs)})
        alone.add(inputs, by_head(batches[-1][1]))
    report = scores["another"].report()
    whole, rest = slow_report(batches, False, None), slow_report(batches, True, None)
    for m, metric in enumerate(("pattern_kl", "top1", "absolute_error")):
        found = report[metric]
        assert found["mean"] == pytest.approx(whole[m], rel=1e-4)
        assert found["without_position_0"]["mean"] == pytest.approx(rest[m], rel=1e-4)
        assert found["ci95"][0] < found["mean"] < found["ci95"][1]
        for n in range(4):
            assert found["per_head"][n]["mean"] == pytest.approx(slow_report(batches, False, n)[m], rel=1e-4)
    assert abs(whole[0] - rest[0]) > 1e-3
    assert alone.kl.mean == pytest.approx(report["pattern_kl"]["mean"], rel=1e-6)


@pytest.mark.parametrize("name", ["causal", "padded", "all"])
def test_the_true_pattern_is_perfect(name: str) -> None:
    inputs = some_inputs(73, **LAYERS[name])
    report = report_of(inputs, inputs.log_pattern_BNQK.clone())
    for part in (lambda metric: metric, lambda metric: metric["without_position_0"]):
        assert part(report["pattern_kl"])["mean"] == pytest.approx(0, abs=1e-7)
        assert part(report["top1"])["mean"] == 1
        assert part(report["absolute_error"])["mean"] == pytest.approx(0, abs=1e-7)


def test_agreement_on_position_0_alone_is_seen_through() -> None:
    """Both put 90 % on the first key and disagree on the rest."""
    inputs = some_inputs(74, batch=1, heads=1, groups=1, length=6)
    scores = torch.zeros(1, 1, 6, 6)
    scores[..., 0] = 4.0
    true, hat = scores.clone(), scores.clone()
    for i in range(2, 6):
        true[0, 0, i, i], hat[0, 0, i, i - 1] = 2.0, 2.0
    report = report_of(
        Given.of(inputs, inputs.rule.masked(true).log_softmax(-1)), inputs.rule.masked(hat).log_softmax(-1)
    )
    assert report["top1"]["mean"] == 1 and report["top1"]["without_position_0"]["mean"] == pytest.approx(1 / 5)
    assert report["pattern_kl"]["mean"] < 0.2 < 0.5 < report["pattern_kl"]["without_position_0"]["mean"]


@pytest.mark.parametrize("size", [20.0, 95.0])
def test_what_position_0_leaves_is_compared_however_little_it_is(size: float) -> None:
    """At 95 nats what is left is nothing in float32."""
    inputs = some_inputs(77)
    inputs, hat = Given.of(inputs, inputs.log_pattern_BNQK), another(inputs)
    for log in (inputs.log_pattern_BNQK, hat):
        log[..., 1:] -= size
    found = report_of(inputs, hat)
    for m, metric in enumerate(("pattern_kl", "top1", "absolute_error")):
        rest = slow_report([(inputs, hat)], True, None)[m]
        assert found[metric]["without_position_0"]["mean"] == pytest.approx(rest, rel=1e-4)


def test_nothing_at_position_0_says_nothing_of_the_rest() -> None:
    inputs = some_inputs(79)
    hat = another(inputs)
    wanted = report_of(inputs, hat)
    hat[:, :, 1:, 0] = -torch.inf
    found = report_of(inputs, hat)
    for metric in ("pattern_kl", "top1", "absolute_error"):
        assert found[metric]["without_position_0"] == wanted[metric]["without_position_0"]
    assert found["pattern_kl"]["mean"] == torch.inf


@pytest.mark.parametrize("heads", [1, 3])
def test_how_many_heads_are_compared_at_once_does_not_matter(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some_inputs(78, **LAYERS["all"])
    wanted = report_of(inputs, another(inputs))
    monkeypatch.setattr(pattern, "BLOCK_CPU", heads * inputs.log_pattern_BNQK[:, 0].numel())
    assert report_of(inputs, another(inputs)) == wanted


@pytest.mark.parametrize("name", LAYERS)
def test_what_stands_in_padded_rows_does_not_count(name: str) -> None:
    inputs = some_inputs(75, **LAYERS[name])
    reports = []
    for size in (0.0, 5.0):
        hat = another(inputs)
        hat = hat + size * (~inputs.real_BT)[:, None, :, None] * torch.rand(hat.shape)
        reports.append(report_of(inputs, hat))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("name", ["causal", "sliding", "padded", "sink", "softcap"])
def test_uniform_pattern(name: str) -> None:
    inputs = some_inputs(76, **LAYERS[name])
    found = whole(uniform_log_pattern(inputs), inputs).exp()
    assert found.shape == inputs.log_pattern_BNQK.shape
    sees = inputs.log_pattern_BNQK > -torch.inf
    close(found, sees / sees.sum(-1, keepdim=True), 1e-6)


# The position-wise mean ------------------------------------------------------------------------------


def slow_mean_pattern(sample: list[AttentionInputs], n: int, i: int, j: int) -> float:
    """Mean true pattern of one head from position i to j over sequences in which i is a real token."""
    values = []
    for inputs in sample:
        length = inputs.x_BTD.shape[1]
        pattern = inputs.log_pattern_BNQK.exp()
        for b in range(len(pattern)):
            if i < length and inputs.real_BT[b, i]:
                column = -1 if j == -1 else j
                values.append(float(pattern[b, n, i, column]) if j < length else 0.0)
    return sum(values) / len(values)


def mean_sample(**options: Any) -> list[AttentionInputs]:
    """Two batches of unequal length, of which the first ends in padding."""
    return [some_inputs(77, length=6, padding=True, **options), some_inputs(78, length=4, batch=3, **options)]


@pytest.mark.parametrize("sink", [False, True])
def test_mean_pattern_is_the_loops(sink: bool) -> None:
    sample = mean_sample(sink=sink)
    mean = MeanPattern(sample)
    other = some_inputs(79, length=5, sink=sink)
    found = whole(mean(other), other)
    assert found.shape == other.log_pattern_BNQK.shape
    for b, n, i in ((0, 0, 0), (0, 1, 2), (1, 3, 4), (1, 2, 3)):
        for j in range(5):
            assert float(found[b, n, i, j]) == pytest.approx(slow_mean_pattern(sample, n, i, j), abs=1e-6)
        if sink:
            assert float(found[b, n, i, -1]) == pytest.approx(slow_mean_pattern(sample, n, i, -1), abs=1e-6)
    close(found.sum(-1), torch.ones_like(found.sum(-1)), 1e-5)


@pytest.mark.parametrize("sink", [False, True])
def test_mean_pattern_beyond_what_it_has_seen_is_uniform(sink: bool) -> None:
    mean = MeanPattern(mean_sample(sink=sink))
    longer = some_inputs(80, length=9, sink=sink)
    found, uniform = whole(mean(longer), longer), whole(uniform_log_pattern(longer), longer).exp()
    close(found[:, :, 6:], uniform[:, :, 6:], 1e-6)
    close(found.sum(-1), torch.ones_like(found.sum(-1)), 1e-5)
    assert not torch.allclose(found[:, :, 3], uniform[:, :, 3], atol=0.02)


def test_mean_pattern_does_not_depend_on_the_tokens() -> None:
    mean = MeanPattern(mean_sample())
    one, other = (whole(mean(inputs), inputs) for inputs in (some_inputs(81, length=5), some_inputs(82, length=5)))
    assert torch.equal(one, other) and torch.equal(one[0], one[1])
