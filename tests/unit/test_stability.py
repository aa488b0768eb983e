"""What of one decomposition recurs in another: itself, permuted, in part, not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import some_decomposition
from tiny import VOCABULARY, tiny_model

from qkscope.attention import AttentionSite, harvest
from qkscope.data.sequences import Batch
from qkscope.decomposition import Decomposition
from qkscope.evaluate.stability import recurrence
from qkscope.pairs.pair_map import Pairs
from qkscope.pattern import AttentionInputs


@pytest.fixture(scope="module")
def layer() -> tuple[AttentionSite, Batch, list[AttentionInputs]]:
    site = AttentionSite(tiny_model("gpt2"), None, layer=1)
    tokens = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens > 0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    return site, batch, [harvest([site], tokens, tokens > 0)[0]]


def of(dec: Decomposition, query: torch.Tensor, key: torch.Tensor) -> Decomposition:
    """The same with its features in another order, or fewer of them, and the pairs that are left."""
    sides = []
    for side, order in ((dec.query, query), (dec.key, key)):
        other = type(side)(side.W_enc.shape[0], side.width, side.W_dec.shape[1], side.activation, side.k)
        other.load_state_dict(side.state_dict())
        other.eval().keep(order)
        sides.append(other)
    places = []
    for width, order in ((dec.query.width, query), (dec.key.width, key)):
        place = torch.full((width + 1,), -1)
        place[order] = torch.arange(len(order))
        place[width] = len(order)
        places.append(place)
    a, b = places[0][dec.pairs.query_P], places[1][dec.pairs.key_P]
    left = (a >= 0) & (b >= 0)
    pairs, order = Pairs.sorted(a[left], b[left], dec.pairs.head_P[left], len(query), len(key), dec.shape.N)
    values = [v[left][order] for v in (dec.strength_P, dec.weight_strength_P, dec.importance_P)]
    return replace(
        dec, query=sides[0], key=sides[1], pairs=pairs,
        strength_P=values[0], weight_strength_P=values[1], importance_P=values[2],
    )  # fmt: skip


def test_a_permuted_run_recurs_whole(layer: tuple[AttentionSite, Batch, list[AttentionInputs]]) -> None:
    site, batch, sample = layer
    dec = some_decomposition(sample[0])
    g = torch.Generator().manual_seed(1)
    other = of(dec, torch.randperm(9, generator=g), torch.randperm(8, generator=g))
    found = recurrence(dec, other, site, [batch], sample)
    for side in ("query", "key"):
        assert found[side]["recur"] == 1 and found[side]["cosine"] == pytest.approx(1, abs=1e-5)
        assert found[side]["chance"] < 1
    assert found["pairs"]["recur"] == pytest.approx(1)
    assert found["pairs"]["chance"] < 0.9


def test_what_is_left_out_does_not_recur(layer: tuple[AttentionSite, Batch, list[AttentionInputs]]) -> None:
    site, batch, sample = layer
    dec = some_decomposition(sample[0])
    half = of(dec, torch.arange(4), torch.arange(8))
    x = sample[0].x_BTD[batch.real_BT]
    acts = dec.query.encode(x).double()
    live = (acts > 0).any(0)
    cosines = (acts.T @ acts) / (acts.norm(dim=0)[:, None] * acts.norm(dim=0)).clamp(min=1e-12)
    recurs = (cosines[:, :4].amax(1) >= 0.7) & live
    found = recurrence(dec, half, site, [batch], sample)
    assert found["query"]["recur"] == pytest.approx(float(recurs.sum() / live.sum()))
    assert 0 < found["query"]["recur"] < 1 and found["key"]["recur"] == 1

    def triples(one: Decomposition) -> list[tuple[int, int, int]]:
        p = one.pairs
        return list(zip(p.query_P.tolist(), p.key_P.tolist(), p.head_P.tolist(), strict=True))

    match = {a: int(cosines[a, :4].argmax()) for a in range(9) if recurs[a]} | {9: 4}
    there = set(triples(half))
    worth = dec.importance_P.double()
    own = torch.tensor([a in match and (match[a], b, h) in there for a, b, h in triples(dec)])
    assert 0 < own.sum() < len(own)
    assert found["pairs"]["recur"] == pytest.approx(float(worth[own].sum() / worth.sum()), abs=1e-6)
    assert recurrence(half, dec, site, [batch], sample)["pairs"]["recur"] == pytest.approx(1)
