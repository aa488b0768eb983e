"""The controls: what they are made of, and that each is what it claims to be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    LAYERS,
    all_pairs,
    close,
    map_scores,
    pairs_of,
    slow_map,
    slow_scores,
    some_decomposition,
    some_inputs,
    some_of,
    strengths_of,
)
from torch import Tensor

from qkscope.evaluate.controls import explicit_scores, shuffled_pairs, svd_dictionaries, untrained
from qkscope.pairs.pair_map import Pairs
from qkscope.training.start import side_statistics

# Every pair, one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_explicit_scores_are_pair_scores_with_all_pairs(name: str) -> None:
    inputs = some_inputs(91, length=5, **LAYERS[name])
    dec = some_decomposition(inputs, widths=(4, 3))
    sides = dec.query, dec.key
    found = torch.stack([inputs.rule.cap(explicit_scores(dec, inputs, head)) for head in range(dec.shape.N)], 1)
    pairs = pairs_of(inputs, sides)
    close(found, map_scores(inputs, sides, pairs), 1e-5)
    close(found, slow_map(inputs, sides, pairs, strengths_of(inputs, sides, pairs)), 1e-5)
    q, k = dec.query(inputs.x_BTD).view_as(inputs.q_BTNH), dec.key(inputs.x_BTD).view_as(inputs.k_BTGH)
    close(found, slow_scores(inputs.rule, q, k).detach(), 1e-5)


# Shuffled pairs --------------------------------------------------------------------------------------


def spread(pairs: Pairs, values: Tensor, *names: str) -> dict[tuple[int, ...], float]:
    """Sum of the values by (head, …)."""
    out: dict[tuple[int, ...], float] = {}
    places = [pairs.head_P, *(getattr(pairs, name) for name in names)]
    for *place, value in zip(*(p.tolist() for p in places), values.tolist(), strict=True):
        out[tuple(place)] = out.get(tuple(place), 0.0) + value
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 500), share=st.sampled_from([0.02, 0.1, 0.5]))
def test_shuffling_keeps_strengths_and_the_multiset_of_keys_in_each_head(seed: int, share: float) -> None:
    dec = some_decomposition(some_inputs(92), share, seed=seed)
    dec.pairs = some_of(all_pairs(9, 8, 4), share, seed)
    dec.strength_P = torch.randn(len(dec.pairs), generator=torch.Generator().manual_seed(seed))
    pairs, strength = shuffled_pairs(dec)
    assert spread(pairs, strength, "query_P") == pytest.approx(spread(dec.pairs, dec.strength_P, "query_P"), abs=1e-5)
    code = (pairs.head_P * 10 + pairs.query_P) * 9 + pairs.key_P
    assert torch.equal(code, code.sort().values) and len(code.unique()) == len(code)  # sorted, no pair twice
    keys_before, keys_after = (
        Counter(zip(p.head_P.tolist(), p.key_P.tolist(), strict=True)) for p in (dec.pairs, pairs)
    )
    assert set(keys_after) == set(keys_before)
    if len(pairs) == len(dec.pairs):  # nothing came together at one place
        assert keys_after == keys_before
        assert sorted(strength.tolist()) == sorted(dec.strength_P.tolist())
    else:
        assert len(pairs) < len(dec.pairs) and not keys_after - keys_before


def test_shuffling_moves_pairs_and_is_the_same_every_time() -> None:
    inputs = some_inputs(93)
    dec = some_decomposition(inputs, 0.2)
    before = dec.pairs.key_P.clone()
    pairs, strength = shuffled_pairs(dec)
    again = shuffled_pairs(dec)
    assert torch.equal(pairs.key_P, again[0].key_P) and torch.equal(strength, again[1])
    assert torch.equal(dec.pairs.key_P, before)  # the decomposition is left as it is
    there = {*zip(*(x.tolist() for x in (dec.pairs.head_P, dec.pairs.query_P, before)), strict=True)}
    here = {*zip(*(x.tolist() for x in (pairs.head_P, pairs.query_P, pairs.key_P)), strict=True)}
    assert len(here & there) < 0.5 * len(there)
    assert not torch.allclose(dec.scores(inputs, pairs, strength), dec.scores(inputs), atol=0.05)


# Directions without training -------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_svd_at_full_k_is_exact_on_a_linear_layer(groups: int) -> None:
    """Queries and keys are linear in x here, so all singular directions together reproduce every score."""
    inputs = some_inputs(94, batch=4, length=40, d=12, groups=groups)
    dec = some_decomposition(inputs)
    full = {"query": 1000.0, "key": 1000.0}
    sides = svd_dictionaries(dec, side_statistics([inputs]), full)
    q = sides["query"].eval()(inputs.x_BTD).view_as(inputs.q_BTNH)
    k = sides["key"].eval()(inputs.x_BTD).view_as(inputs.k_BTGH)
    close(inputs.rule.scores(q, k).detach(), inputs.rule.scores(inputs.q_BTNH, inputs.k_BTGH), 1e-2)
    if groups == 4:
        close(q.detach(), inputs.q_BTNH, 1e-2)
    close(k.detach(), inputs.k_BTGH, 1e-2)


def test_svd_features_are_signed_directions_of_one_head() -> None:
    inputs = some_inputs(95, batch=4, length=40, d=12)
    t = svd_dictionaries(some_decomposition(inputs), side_statistics([inputs]), {"query": 5.0, "key": 5.0})["query"]
    assert t.width == 4 * 2 * 4 and t.k == 5
    for f in range(t.width):
        head, at = divmod(f, 8)
        row = t.W_dec.detach()[f].view(4, 4)
        assert row[head].norm() > 0 and row.norm() == row[head].norm()
        opposite = f + 4 if at < 4 else f - 4
        close(t.W_enc.detach()[:, f], -t.W_enc.detach()[:, opposite], 1e-6)
        close(t.W_dec.detach()[f], -t.W_dec.detach()[opposite], 1e-6)


@pytest.mark.parametrize("kind", ["random", "svd"])
def test_untrained_controls_have_the_wanted_l0_and_no_pairs(kind: str) -> None:
    inputs = some_inputs(96, batch=6, length=60, d=12)
    dec = some_decomposition(inputs, widths=(30, 24))
    found = untrained(dec, [inputs], {"query": 3.3, "key": 2.5})[kind]
    fresh = some_inputs(96, batch=6, length=60, d=12).x_BTD
    for side, wanted in ((found.query, 3.3), (found.key, 2.5)):
        assert float((side.encode(fresh) > 0).sum(-1).float().mean()) == pytest.approx(wanted, rel=0.02)
        assert not side.training and not any(p.requires_grad for p in side.parameters())
    assert len(found.pairs) == 0
    if kind == "random":
        assert (found.query.width, found.key.width) == (30, 24)
    pattern = found.log_pattern_all(inputs).exp()
    close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), 1e-5)


def test_random_control_is_not_the_trained_start() -> None:
    """Its label is its own, so it shares no direction with the dictionaries that were trained."""
    inputs = some_inputs(97, batch=6, length=60, d=12)
    dec = some_decomposition(inputs, widths=(30, 24))
    found: Any = [untrained(dec, [inputs], {"query": 3.0, "key": 3.0})["random"].query.W_enc for _ in range(2)]
    assert torch.equal(found[0], found[1])
    dec.layer = 4
    other = untrained(dec, [inputs], {"query": 3.0, "key": 3.0})["random"].query.W_enc
    assert not torch.allclose(found[0], other, atol=0.1)
