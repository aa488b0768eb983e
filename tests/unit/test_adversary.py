"""The adversary that switches dropped pairs on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import close, pairs_of, some_decomposition, strengths_of
from tiny import VOCABULARY, tiny_model

from qkscope.attention import AttentionSite, harvest
from qkscope.data.sequences import Batch
from qkscope.decomposition import Decomposition
from qkscope.evaluate.adversary import Dropped, adversary

MODELS = ["gpt2", "llama", "gemma2", "gpt_oss"]


def layer_of(name: str, share: float = 0.5) -> tuple[AttentionSite, Batch, Decomposition]:
    """A layer of a tiny model, a padded batch, and random dictionaries of it with some pairs at their own strengths."""
    site = AttentionSite(tiny_model(name), None, layer=1)
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 9:] = False
    batch = Batch(tokens, real, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    inputs = harvest([site], tokens, real)[0]
    dec = some_decomposition(inputs, share)
    sides = (dec.query, dec.key)
    return site, batch, replace(dec, strength_P=strengths_of(inputs, sides, dec.pairs).detach())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_switched_on_is_the_map_and_everything_is_step_one(name: str) -> None:
    site, batch, dec = layer_of(name)
    inputs = harvest([site], batch.tokens_BT, batch.real_BT)[0]
    dropped = Dropped(dec, inputs)
    rows = batch.real_BT[:, None].expand(-1, dec.shape.N, -1)
    none, everything = dropped.pattern(0 * dropped.dropped_NQK), dropped.pattern(dropped.dropped_NQK)
    close(none[rows], dec.log_pattern_kept(inputs).exp()[rows])
    close(everything[rows], dec.log_pattern_all(inputs).exp()[rows], 1e-3)
    assert (none - everything)[rows].abs().max() > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_it_does_more_harm_than_chance_and_more_with_more_steps(name: str) -> None:
    site, batch, dec = layer_of(name)
    found: dict[int, Any] = {steps: adversary(dec, site, [batch], steps=steps) for steps in (0, 30)}
    kl = {steps: {n: figure["mean"] for n, figure in f["logit_kl"].items()} for steps, f in found.items()}
    assert kl[30]["adversary"] > max(kl[30]["random"], kl[30]["kept"], kl[30]["all"], kl[0]["adversary"])
    inputs = harvest([site], batch.tokens_BT, batch.real_BT)[0]
    plain = site._forward(batch.tokens_BT, batch.real_BT).logits.detach().double().log_softmax(-1)
    with site.replace_pattern(lambda inputs: dec.log_pattern_kept(inputs).exp()), torch.no_grad():
        patched = site._forward(batch.tokens_BT, batch.real_BT).logits.double().log_softmax(-1)
    wanted = (plain.exp() * (plain - patched)).sum(-1)[batch.real_BT].mean()
    close(torch.tensor(kl[30]["kept"]), wanted, 1e-3)
    assert inputs.real_BT.equal(batch.real_BT)


def test_there_is_nothing_to_switch_on_where_every_pair_is_kept() -> None:
    site, batch, dec = layer_of("llama")
    inputs = harvest([site], batch.tokens_BT, batch.real_BT)[0]
    sides = (dec.query, dec.key)
    pairs = pairs_of(inputs, sides)
    strength = strengths_of(inputs, sides, pairs).detach()
    dec = replace(dec, pairs=pairs, strength_P=strength, weight_strength_P=strength, importance_P=strength)
    found = adversary(dec, site, [batch], steps=3)
    assert found is not None
    close(torch.tensor(found["logit_kl"]["adversary"]["mean"]), torch.tensor(found["logit_kl"]["kept"]["mean"]))


def test_a_map_too_large_for_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    site, batch, dec = layer_of("gpt2")
    monkeypatch.setattr("qkscope.evaluate.adversary.LARGEST", 10)
    assert adversary(dec, site, [batch], steps=3) is None
