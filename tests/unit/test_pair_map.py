"""The pair map against step 1's scores and against a triple loop over positions and pairs."""

from __future__ import annotations

from dataclasses import replace
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
    rotation,
    rows_of,
    slow_map,
    slow_pattern_of,
    slow_scores,
    some_inputs,
    some_of,
    some_sides,
    turn_matrix,
)
from torch import Tensor

from qkscope.pairs.pair_map import Pairs, pair_scores, rows, turn, weight_strength, with_bias
from qkscope.pattern import PatternRule

# Nothing is left out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_pair_kept_gives_step_ones_scores(name: str, activation: Any) -> None:
    inputs = some_inputs(31, **LAYERS[name])
    sides = some_sides(inputs, activation=activation)
    q, k = sides[0](inputs.x_BTD).view_as(inputs.q_BTNH), sides[1](inputs.x_BTD).view_as(inputs.k_BTGH)
    found = map_scores(inputs, sides, pairs_of(inputs, sides))
    close(found, slow_scores(inputs.rule, q, k).detach(), 1e-5)
    close(found, inputs.rule.scores(q, k).detach(), 1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 3), (4, 1)]),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    rotary=st.sampled_from([None, "half", "interleaved", "partial"]),
    softcap=st.sampled_from([None, 1.1]),
    batch=st.integers(1, 3),
)
def test_every_pair_of_any_layer(seed: int, heads: tuple[int, int], widths: tuple[int, int], **options: Any) -> None:
    inputs = some_inputs(seed, heads=heads[0], groups=heads[1], length=4, **options)
    sides = some_sides(inputs, seed, widths)
    q, k = sides[0](inputs.x_BTD).view_as(inputs.q_BTNH), sides[1](inputs.x_BTD).view_as(inputs.k_BTGH)
    close(map_scores(inputs, sides, pairs_of(inputs, sides)), inputs.rule.scores(q, k).detach(), 2e-5, floor=0.2)


@pytest.mark.parametrize("name", LAYERS)
def test_a_random_part_of_the_pairs_is_the_triple_loop(name: str) -> None:
    inputs = some_inputs(32, length=5, **LAYERS[name])
    sides = some_sides(inputs, widths=(5, 4))
    pairs = some_of(pairs_of(inputs, sides), 0.3)
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1))
    close(map_scores(inputs, sides, pairs, strength), slow_map(inputs, sides, pairs, strength), 1e-5)


def test_scaled_rotary_tables() -> None:
    """YaRN's tables carry a factor; it belongs to the scores."""
    inputs = some_inputs(33, length=5)
    inputs = replace(inputs, rule=replace(inputs.rule, rotary=rotation("half", 5, 4, scale=1.3)))
    sides = some_sides(inputs, widths=(3, 3))
    pairs = pairs_of(inputs, sides)
    close(map_scores(inputs, sides, pairs), slow_map(inputs, sides, pairs, torch.ones(len(pairs))), 1e-5)


@pytest.mark.parametrize("kind", ["half", "interleaved", "partial"])
def test_phases_are_the_rotation(kind: str) -> None:
    rotary = rotation(kind, 6, 8, batch=2, scale=1.2)
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    order, phase = rotary.phases()
    assert sorted(order.tolist()) == list(range(8))
    close(turn(x[..., order], phase), rotary.rotate(x)[..., order], 1e-6)


# What changes nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "half-split", "all"])
def test_the_order_of_pairs_changes_nothing(name: str) -> None:
    inputs = some_inputs(34, **LAYERS[name])
    sides = some_sides(inputs)
    pairs = some_of(pairs_of(inputs, sides), 0.4)
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1))
    mixed = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2))
    again, order = Pairs.sorted(
        pairs.query_P[mixed], pairs.key_P[mixed], pairs.head_P[mixed], pairs.n_query, pairs.n_key, pairs.n_heads
    )
    assert torch.equal(again.query_P, pairs.query_P) and torch.equal(again.head_P, pairs.head_P)
    assert torch.equal(
        map_scores(inputs, sides, again, strength[mixed][order]), map_scores(inputs, sides, pairs, strength)
    )


@pytest.mark.parametrize("name", ["causal", "half-split", "all"])
def test_permuting_features_changes_nothing(name: str) -> None:
    inputs = some_inputs(35, **LAYERS[name])
    sides = some_sides(inputs)
    pairs = some_of(pairs_of(inputs, sides), 0.4)
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1))
    wanted = map_scores(inputs, sides, pairs, strength)
    moved: list[Tensor] = []
    for side in sides:
        order = torch.randperm(side.width, generator=torch.Generator().manual_seed(side.width))
        with torch.no_grad():
            side.W_enc.copy_(side.W_enc[:, order].clone())
            side.b_enc.copy_(side.b_enc[order].clone())
            side.W_dec.copy_(side.W_dec[order].clone())
        moved.append(torch.cat([order.argsort(), torch.tensor([side.width])]))  # the bias stays last
    again, order = Pairs.sorted(
        moved[0][pairs.query_P], moved[1][pairs.key_P], pairs.head_P, pairs.n_query, pairs.n_key, pairs.n_heads
    )
    close(map_scores(inputs, sides, again, strength[order]), wanted, 1e-5)


@pytest.mark.parametrize("name", ["causal", "half-split", "all"])
def test_dropping_dead_features_is_exact(name: str) -> None:
    inputs = some_inputs(36, **LAYERS[name])
    sides = some_sides(inputs)
    for side in sides:
        side.b_enc.data[[1, 4]] = -1e6
    pairs = pairs_of(inputs, sides)
    dead = torch.tensor([1, 4])
    live = ~(torch.isin(pairs.query_P, dead) | torch.isin(pairs.key_P, dead))
    assert 100 < int(live.sum()) < len(pairs) - 100
    close(map_scores(inputs, sides, pairs.take(live.nonzero()[:, 0])), map_scores(inputs, sides, pairs), 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_pairs_with_the_key_bias_cancel_where_the_rule_is_shift_free(name: str) -> None:
    """Without a rotary embedding they add a constant to a score row: nothing to a softmax without cap and sink."""
    inputs = some_inputs(37, **LAYERS[name])
    sides = some_sides(inputs)
    sides[1].b_out.data.mul_(3)
    pairs = pairs_of(inputs, sides)
    without = pairs.take((pairs.key_P < pairs.n_key).nonzero()[:, 0])

    def pattern(kept: Pairs) -> Tensor:
        return inputs.rule.masked(map_scores(inputs, sides, kept)).softmax(-1)

    change = float((pattern(pairs) - pattern(without)).abs().max())
    free = inputs.rule.shift_free and inputs.rule.rotary is None
    assert free is (name in ("causal", "sliding", "bidirectional", "padded", "bidirectional-padded"))
    assert change < 1e-5 if free else change > 1e-2


@pytest.mark.parametrize("rotary", [None, "half"])
def test_a_head_without_pairs_is_uniform_over_the_visible_keys(rotary: str | None) -> None:
    inputs = some_inputs(38, mask="sliding", rotary=rotary)
    sides = some_sides(inputs)
    pairs = pairs_of(inputs, sides)
    pairs = pairs.take((pairs.head_P != 2).nonzero()[:, 0])
    scores = map_scores(inputs, sides, pairs)
    found = inputs.rule.masked(scores).softmax(-1)[:, 2]
    visible = inputs.rule.visible_BQK.float().expand(2, -1, -1)
    close(found, visible / visible.sum(-1, keepdim=True), 1e-6)
    assert scores[:, [0, 1, 3]].abs().amax((0, 2, 3)).min() > 0.1
    nothing = map_scores(inputs, sides, pairs.take(torch.zeros(0, dtype=torch.int64)))
    assert nothing.shape == scores.shape and not nothing.any()


# Pairs -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), max_size=60), st.integers(0, 99))
def test_pairs_are_sorted_by_head_query_key(triples: set[tuple[int, int, int]], seed: int) -> None:
    """(head, query, key), with 4 query and 5 key features and a head 3 that may have none."""
    wanted = sorted(triples)
    mixed = torch.tensor(wanted or torch.zeros(0, 3).tolist(), dtype=torch.int64).view(-1, 3)
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))
    head, query, key = mixed[order].T
    pairs, back = Pairs.sorted(query, key, head, 4, 5, 4)
    assert list(zip(pairs.head_P.tolist(), pairs.query_P.tolist(), pairs.key_P.tolist(), strict=True)) == wanted
    assert torch.equal(mixed[order][back], mixed)
    assert len(pairs) == len(wanted)
    for n in range(4):
        here = pairs.of_head(n)
        assert pairs.head_P[here].tolist() == [n] * sum(h == n for h, _, _ in wanted)
        assert pairs.plain_layout.heads[n].key_C.tolist() == sorted({k for h, _, k in wanted if h == n})
    assert pairs.queries.tolist() == sorted({q for _, q, _ in wanted if q < 4})
    assert pairs.keys.tolist() == sorted({k for _, _, k in wanted if k < 5})


def test_weight_strength_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    rows_q, rows_k = torch.randn(4, 6, 5, generator=g), torch.randn(3, 2, 5, generator=g)
    pairs = all_pairs(3, 2, 6)
    found = weight_strength(pairs, rows_q, rows_k)
    for p in range(len(pairs)):
        a, b, n = int(pairs.query_P[p]), int(pairs.key_P[p]), int(pairs.head_P[p])
        assert float(found[p]) == pytest.approx(float(rows_q[a, n] @ rows_k[b, n // 3]), abs=1e-5)


def test_bias_rows_are_b_out() -> None:
    sides = some_sides(some_inputs(0))
    found = rows(sides[0], 4)
    assert found.shape == (10, 4, 4)
    assert torch.equal(found[-1].flatten(), sides[0].b_out) and torch.equal(found[:-1].flatten(1), sides[0].W_dec)
    assert with_bias(torch.zeros(2, 3, 4)).sum((0, 1)).tolist() == [0, 0, 0, 0, 6]


@pytest.mark.parametrize("name", LAYERS)
def test_every_gradient_reaches_its_source(name: str) -> None:
    """Strengths, activations and (with a rotary embedding) decoder rows learn as through a dense float64 map."""
    inputs = some_inputs(39, length=5, **LAYERS[name])
    sides = some_sides(inputs, widths=(4, 3))
    pairs = some_of(pairs_of(inputs, sides), 0.6)
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1))
    acts = [with_bias(side.encode(inputs.x_BTD)).detach() for side in sides]
    leaves = [t.clone().requires_grad_() for t in (strength, *acts, *rows_of(inputs, sides))]
    slow = [t.detach().double().requires_grad_() for t in leaves]
    wanted = dense_map(pairs, slow, inputs.rule)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    used = 5 if inputs.rule.rotary is not None else 3
    wanted_grads = torch.autograd.grad(wanted, slow[:used], cotangent.double())
    everywhere = (torch.ones_like(acts[0], dtype=torch.bool), torch.ones_like(acts[1], dtype=torch.bool))
    for reach in (None, everywhere):
        found = pair_scores(pairs, leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], inputs.rule, reach)
        close(found.detach(), wanted.detach(), 1e-5)
        for place, (one, two) in enumerate(
            zip(torch.autograd.grad(found, leaves[:used], cotangent), wanted_grads, strict=True)
        ):
            assert (two.abs() > 0).any()
            if reach is None and place in (1, 2):  # zero activations let no gradient pass
                assert (acts[place - 1] == 0).any() and (one[acts[place - 1] == 0] == 0).all()
                two = two * (acts[place - 1] != 0)
            close(one, two, 1e-4)


def dense_map(pairs: Pairs, leaves: list[Tensor], rule: PatternRule) -> Tensor:
    """The map through dense [Fq, Fk, N] strengths and rotation matrices, differentiable."""
    strength, acts_q, acts_k, left, right = leaves
    length, width = acts_q.shape[1], left.shape[2]
    right = right.repeat_interleave(pairs.n_heads // right.shape[1], dim=1)
    dense = strength.new_zeros(pairs.n_heads, left.shape[0], right.shape[0])
    dense = dense.index_put((pairs.head_P, pairs.query_P, pairs.key_P), strength)
    if rule.rotary is None:
        scores = torch.einsum("bia,nac,bjc->bnij", acts_q, dense, acts_k)
    else:
        turns = torch.stack(
            [torch.stack([turn_matrix(rule.rotary, b, t, width) for t in range(length)]) for b in range(len(acts_q))]
        )
        m = torch.einsum("bide,ane,bjdf,cnf->bnijac", turns, left, turns, right)
        scores = torch.einsum("bia,nac,bnijac,bjc->bnij", acts_q, dense, m, acts_k)
    return rule.cap(scores * rule.scaling)


def test_the_dense_map_is_the_slow_loop() -> None:
    inputs = some_inputs(40, rotary="partial", length=4)
    sides = some_sides(inputs, widths=(3, 3))
    pairs = some_of(pairs_of(inputs, sides), 0.5)
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1))
    acts = [with_bias(side.encode(inputs.x_BTD)).detach().double() for side in sides]
    dense = dense_map(pairs, [strength.double(), *acts, *(r.double() for r in rows_of(inputs, sides))], inputs.rule)
    close(dense, slow_map(inputs, sides, pairs, strength), 1e-6)
    assert torch.isfinite(slow_pattern_of(inputs.rule, dense)).all()
