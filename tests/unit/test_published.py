"""The published procedure, plainly written, has the losses and takes the steps of ours."""

from __future__ import annotations

import pytest
import torch
from layers import LAYERS, OFF, close, job_for, some_inputs
from tiny import tiny_model
from torch import Tensor

from qkscope.attention import AttentionSite, harvest
from qkscope.evaluate.speed import published
from qkscope.evaluate.speed.published import Side, mask_loss, pair_map, read, step1_loss
from qkscope.pairs.mask import MaskJob
from qkscope.pattern import AttentionInputs
from qkscope.training.objective import PatternTarget

PLAIN = [name for name, options in LAYERS.items() if "rotary" not in options]


def sides_of(job: object, inputs: AttentionInputs) -> tuple[Side, Side]:
    n_heads, n_groups = inputs.q_BTNH.shape[2], inputs.k_BTGH.shape[2]
    return Side(job.query, n_heads), Side(job.key, n_groups)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LAYERS)
def test_step_one_has_our_loss_and_gradients(name: str) -> None:
    inputs = some_inputs(71, **LAYERS[name])
    job = job_for(inputs, sparsity=0.05)
    sides = sides_of(job, inputs)
    ours, _ = job.loss(PatternTarget(inputs), OFF)
    theirs = step1_loss(*sides, inputs, 0.05)
    close(theirs.detach(), ours.detach(), 1e-5)
    ours.backward()
    theirs.backward()
    for mine, side in zip((job.query, job.key), sides, strict=True):
        for key, parameter in side.named_parameters():
            wanted = getattr(mine, key).grad
            assert parameter.grad is not None
            cancels = mine is job.key and key == "b_out" and inputs.rule.rotary is None and inputs.rule.shift_free
            assert (float(wanted.abs().max()) < 1e-6) == cancels
            close(parameter.grad.flatten(), wanted.flatten(), 1e-3, floor=1e-3)


def some_mask(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 0.3).clamp(0, 1)


@pytest.mark.parametrize("name", PLAIN)
def test_the_mask_has_our_loss_and_gradient(name: str) -> None:
    inputs = some_inputs(72, **LAYERS[name])
    job = job_for(inputs)
    live = torch.arange(job.query.width + 1), torch.arange(job.key.width + 1)
    ours = MaskJob(0, "", job.query, job.key, live, 4, sparsity=1e-3, rate=0.1)
    mask = some_mask(4, 10, 9)
    ours.mask.data.copy_(mask)
    theirs = mask.permute(1, 2, 0).contiguous().requires_grad_()
    sides = sides_of(job, inputs)
    found = mask_loss(theirs, pair_map(*sides).detach(), *sides, inputs, 1e-3)
    wanted, _ = ours.loss(PatternTarget(inputs), OFF)
    close(found.detach(), wanted.detach(), 1e-5)
    found.backward()
    wanted.backward()
    assert theirs.grad is not None and ours.mask.grad is not None
    close(theirs.grad.permute(2, 0, 1), ours.mask.grad, 1e-3)


def test_a_mask_of_ones_is_step_one_and_a_rotary_embedding_is_refused() -> None:
    inputs = some_inputs(73)
    sides = sides_of(job_for(inputs), inputs)
    ones = torch.ones(10, 9, 4)
    true = published.log_pattern_of(inputs.q_BTNH, inputs.k_BTGH, inputs.rule)
    hat = published.log_pattern_of(
        sides[0].decode(sides[0].encode(inputs.x_BTD)), sides[1].decode(sides[1].encode(inputs.x_BTD)), inputs.rule
    )
    found = mask_loss(ones, pair_map(*sides).detach(), *sides, inputs, 0.0)
    close(found.detach(), published.kl(true, hat, inputs.real_BT).detach(), 1e-5)
    turning = some_inputs(73, rotary="half")
    with pytest.raises(ValueError, match="rotary"):
        mask_loss(ones, ones, *sides, turning, 0.0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_it_reads_what_we_harvest(kind: str) -> None:
    site = AttentionSite(tiny_model(kind), None, layer=1)
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = read(site, tokens)
    ours = harvest([site], tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
    for a, b in ((inputs.x_BTD, ours.x_BTD), (inputs.q_BTNH, ours.q_BTNH), (inputs.k_BTGH, ours.k_BTGH)):
        close(a, b, 1e-5)
    assert torch.equal(inputs.rule.visible_BQK.expand(2, 12, 12), ours.rule.visible_BQK.expand(2, 12, 12))


def test_steps_lower_both_losses_and_clamp_the_mask() -> None:
    site = AttentionSite(tiny_model("gpt2"), None, layer=1)
    tokens = torch.randint(5, 60, (4, 16), generator=torch.Generator().manual_seed(2))
    inputs = read(site, tokens)
    job = job_for(inputs, width=20, width_key=20)
    step1 = published.Step1(site, *sides_of(job, inputs), sparsity=1e-3, rate=1e-2)
    losses = [float(step1.step(tokens)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    mask = published.Mask(site, step1.query, step1.key, sparsity=1e-5, rate=5e-2)
    before = [p.detach().clone() for p in step1.query.parameters()]
    losses = [float(mask.step(tokens)) for _ in range(30)]
    assert losses[-1] < losses[0]
    found = mask.mask_FJN.detach()
    assert float(found.min()) == 0 and float(found.max()) == 1
    assert 0 < int((found == 0).sum()) < found.numel()
    assert all(torch.equal(a, b) for a, b in zip(before, step1.query.parameters(), strict=True))
