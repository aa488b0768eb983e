"""The published trained mask: dense, for comparison."""

from __future__ import annotations

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
    some_sides,
    strengths_of,
)
from torch import Tensor

from qkscope.errors import UserError
from qkscope.pairs import mask as room
from qkscope.pairs.mask import EPSILON, MaskJob, require_memory
from qkscope.pattern import AttentionInputs
from qkscope.training.objective import PatternTarget


def some_job(
    inputs: AttentionInputs, live: tuple[list[int], list[int]] | None = None, sparsity: float = 0.0
) -> MaskJob:
    """By default all five query and four key features are live; the bias stands last."""
    sides = some_sides(inputs, widths=(5, 4))
    chosen = [torch.tensor(side) for side in live or ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4])]
    n_heads = inputs.q_BTNH.shape[2]
    return MaskJob(0, "", *sides, (chosen[0], chosen[1]), n_heads, sparsity=sparsity, rate=0.1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_mask_of_ones_is_step_one(name: str) -> None:
    inputs = some_inputs(61, **LAYERS[name])
    job = some_job(inputs)
    q, k = job.query(inputs.x_BTD).view_as(inputs.q_BTNH), job.key(inputs.x_BTD).view_as(inputs.k_BTGH)
    loss, log = job.loss(PatternTarget(inputs), OFF)
    close(loss.detach(), slow_kl(inputs, q, k).detach())
    assert float(log["pairs"]) == 4 * 6 * 5


@pytest.mark.parametrize("name", ["causal", "half-split", "all"])
def test_any_mask_is_the_slow_map_with_its_values_as_factors(name: str) -> None:
    inputs = some_inputs(62, length=5, **LAYERS[name])
    live = [0, 2, 3, 5], [1, 3, 4]
    job = some_job(inputs, live)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        job.mask.copy_(torch.rand(4, 4, 3, generator=g) - 0.3).clamp_(0, 1)
    pairs, factor = job.kept()
    wanted = [(n, live[0][a], live[1][b]) for n, a, b in (job.mask > 0).nonzero().tolist()]
    assert 0 < len(wanted) < 48
    assert list(zip(pairs.head_P.tolist(), pairs.query_P.tolist(), pairs.key_P.tolist(), strict=True)) == wanted
    for value, (n, a, b) in zip(factor.tolist(), wanted, strict=True):
        assert value == float(job.mask[n, live[0].index(a), live[1].index(b)].detach())
    assert (pairs.n_query, pairs.n_key, pairs.n_heads) == (5, 4, 4)
    sides = job.query, job.key
    strength = strengths_of(inputs, sides, pairs) * factor
    true = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))
    hat = slow_pattern_of(inputs.rule, slow_map(inputs, sides, pairs, strength))
    loss = job.loss(PatternTarget(inputs), OFF)[0].detach()
    close(loss, slow_mean(slow_kl_rows(true, hat), inputs.real_BT))
    sparse = PatternTarget(inputs).kl_rows(map_scores(inputs, sides, pairs, strength))
    real = inputs.real_BT
    close(job.kl_rows(PatternTarget(inputs)).detach().transpose(1, 2)[real], sparse.transpose(1, 2)[real])


def test_penalty_is_the_root_of_each_entry_summed() -> None:
    inputs = some_inputs(63)
    plain, priced = some_job(inputs), some_job(inputs, sparsity=0.01)
    for job in (plain, priced):
        with torch.no_grad():
            job.mask[0] = 0.25
            job.mask[1] = 0
    found = priced.loss(PatternTarget(inputs), OFF)[0] - plain.loss(PatternTarget(inputs), OFF)[0]
    wanted = 0.01 * 30 * ((0.25 + EPSILON) ** 0.5 + EPSILON**0.5 + 2 * (1 + EPSILON) ** 0.5)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)


def test_steps_clamp_to_the_unit_interval_and_train_nothing_else() -> None:
    inputs = some_inputs(64)
    job = some_job(inputs, sparsity=1e-4).train()
    assert not job.query.training and not job.key.training
    before = [p.detach().clone() for p in [*job.query.parameters(), *job.key.parameters()]]
    assert [len(g["params"]) for g in job.parameter_groups()] == [1]
    optimizer = torch.optim.Adam(job.parameter_groups())
    seen: list[Tensor] = []
    for _ in range(12):
        optimizer.zero_grad()
        job.loss(PatternTarget(inputs), OFF)[0].backward()
        optimizer.step()
        seen.append(job.mask.detach().clone())
        job.after_step()
        assert job.mask.min() >= 0 and job.mask.max() <= 1
    assert min(m.min() for m in seen) < 0 and max(m.max() for m in seen) > 1  # there was something to clamp
    assert all(torch.equal(a, b) for a, b in zip(before, [*job.query.parameters(), *job.key.parameters()], strict=True))
    pairs, factor = job.kept()
    assert 0 < len(pairs) < len(pairs_of(inputs, (job.query, job.key))) and factor.min() > 0


def test_a_mask_that_cannot_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 10 << 30)
    cpu = torch.device("cpu")
    require_memory([(1000, 1000, 12)], cpu)
    with pytest.raises(UserError) as error:
        require_memory([(24_001, 24_001, 32)], cpu)
    said = str(error.value)
    assert "\n" not in said and "24001" in said and "32" in said and "10.0 GiB" in said and "tune" in said
    with pytest.raises(UserError):  # the mask alone takes 5 GiB; training takes several copies
        require_memory([(10_000, 11_000, 12)], cpu)


def test_masks_of_one_run_must_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are trained side by side, so all but what one step needs for itself adds up."""
    one = (1000, 1000, 10)  # 40 MB
    cpu = torch.device("cpu")
    for count, megabytes in ((1, 280), (2, 440), (5, 920)):
        monkeypatch.setattr(room, "free_memory", lambda device, free=megabytes * 10**6: free)
        require_memory([one] * count, cpu)
        monkeypatch.setattr(room, "free_memory", lambda device, free=megabytes * 10**6 - 1: free)
        with pytest.raises(UserError, match="1000 x 1000 x 10"):
            require_memory([one] * count, cpu)
