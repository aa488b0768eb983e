"""Keep-only and remove-only curves over the kept pairs, by importance and at random."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import by_head, close, some_decomposition
from tiny import VOCABULARY, tiny_model

from qkscope.attention import AttentionSite, harvest
from qkscope.data.sequences import Batch
from qkscope.decomposition import Decomposition
from qkscope.evaluate import faithful
from qkscope.evaluate.adversary import adversary
from qkscope.evaluate.faithful import CUTS, against_adversary, curve, first_of
from qkscope.evaluate.patterns import KLScore


def a_layer(name: str = "gpt2") -> tuple[AttentionSite, list[Batch], Decomposition]:
    site = AttentionSite(tiny_model(name), None, layer=1)
    batches = []
    for seed in (0, 1):
        tokens = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(seed))
        real = torch.ones_like(tokens, dtype=torch.bool)
        real[2, 6:] = False
        batches.append(Batch(tokens, real, torch.arange(3), torch.zeros(3, dtype=torch.int64)))
    dec = some_decomposition(harvest([site], batches[0].tokens_BT, batches[0].real_BT)[0], share=0.6)
    return site, batches, dec


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cut_is_the_map_of_those_pairs_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, batches, dec = a_layer(name)
    monkeypatch.setattr(faithful, "SHARES", (0.5,))
    (found,) = curve(dec, site, batches, seed=0)
    n = found["pairs"]
    assert n == round(0.5 * len(dec.pairs))
    strongest = set(dec.importance_P.topk(n).indices.tolist())
    for cut, chosen in (("keep", strongest), ("remove", set(range(len(dec.pairs))) - strongest)):
        index = torch.tensor(sorted(chosen))
        strength = dec.strength_P[index]
        alone = replace(dec, pairs=dec.pairs.take(index), strength_P=strength)
        score = KLScore()
        for batch in batches:
            inputs = harvest([site], batch.tokens_BT, batch.real_BT)[0]
            score.add(inputs, by_head(alone.log_pattern_kept(inputs)))
        close(torch.tensor(found[cut]["pattern_kl"]["mean"]), torch.tensor(score.kl.mean))
        assert found[cut]["logit_kl"]["mean"] > 0
    figures = [found[cut]["pattern_kl"]["mean"] for cut in CUTS]
    assert len(set(figures)) == 3


def test_the_adversary_says_how_long_and_on_how_much() -> None:
    site, batches, dec = a_layer()
    found = against_adversary(dec, site, batches, steps=4, seed=0)
    assert found["adversary"]["steps"] == 4
    assert found["adversary_tokens"] == sum(batch.n_tokens for batch in batches)


def test_of_a_long_sequence_the_adversary_gets_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    site, batches, dec = a_layer()
    monkeypatch.setattr(faithful, "ADVERSARY_TOKENS", 7)
    found = against_adversary(dec, site, batches, steps=4, seed=0)
    one = batches[0]
    batch = Batch(one.tokens_BT[:1, :7], one.real_BT[:1, :7], one.document_B[:1], one.offset_B[:1])
    assert found["adversary_tokens"] == 7
    assert found["adversary"] == adversary(dec, site, [batch], steps=4, seed=0)


def test_a_budget_of_tokens_is_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    _, batches, _ = a_layer()
    assert [len(b.tokens_BT) for b in first_of(batches, 20)] == [2]
    assert [len(b.tokens_BT) for b in first_of(batches, 31)] == [3, 1]
    assert [len(b.tokens_BT) for b in first_of(batches, 1)] == [1]
    assert [b.n_tokens for b in first_of(batches, 10**6)] == [26, 26]
