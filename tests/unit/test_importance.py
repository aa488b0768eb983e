"""Importance against a brute-force loop, against the KL it stands for, and the ranking it gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import (
    LAYERS,
    Sides,
    all_pairs,
    close,
    map_scores,
    pairs_of,
    rows_of,
    slow_kl_rows,
    slow_mean,
    slow_pattern_of,
    slow_scores,
    some_inputs,
    some_of,
    some_sides,
    strengths_of,
    turn_matrix,
)
from torch import Tensor

from qkscope.pairs import importance as room
from qkscope.pairs.importance import firing_features, importance_blocks, pair_importance, rank_pairs
from qkscope.pairs.pair_map import with_bias
from qkscope.pattern import AttentionInputs


def slow_importance(sample: list[AttentionInputs], sides: Sides, stride: int = 1) -> Tensor:
    """½ E_i Var_j(δ_ij) of every pair, [N, Fq + 1, Fk + 1] in float64; the sink is an outcome with δ = 0.

    `stride`: over one row i in so many, a place further on in each sequence.
    """
    heads, groups = sample[0].q_BTNH.shape[2], sample[0].k_BTGH.shape[2]
    left, right = (r.double() for r in rows_of(sample[0], sides))
    out = torch.zeros(heads, len(left), len(right), dtype=torch.float64)
    tokens = sequences = 0
    for inputs in sample:
        rule, (batch, length, _, width) = inputs.rule, inputs.q_BTNH.shape
        scores = slow_scores(rule, inputs.q_BTNH, inputs.k_BTGH)
        pattern = slow_pattern_of(rule, scores)
        acts_q, acts_k = (with_bias(side.encode(inputs.x_BTD)).detach().double() for side in sides)
        for b in range(batch):
            turns = torch.stack([turn_matrix(rule.rotary, b, t, width) for t in range(length)])
            for i in range(length):
                if not inputs.real_BT[b, i] or (sequences + b + i) % stride:
                    continue
                tokens += 1
                for n in range(heads):
                    keys = torch.einsum("jde,ce->jcd", turns, right[:, n // (heads // groups)])
                    m = torch.einsum("ad,jcd->acj", left[:, n] @ turns[i].T, keys)
                    delta = rule.scaling * acts_q[b, i][:, None, None] * m * acts_k[b].T[None]
                    if rule.softcap is not None:
                        delta = delta * (1 - (scores[b, n, i] / rule.softcap) ** 2)
                    p = pattern[b, n, i, :length]
                    out[n] += 0.5 * ((delta**2) @ p - (delta @ p) ** 2)
        sequences += batch
    return out / tokens


def dense_importance(sample: list[AttentionInputs], sides: Sides, *, rough: bool = False) -> Tensor:
    """`importance_blocks` put together, [N, Fq + 1, Fk + 1]; zero where a feature never fires."""
    out = torch.zeros(sample[0].q_BTNH.shape[2], sides[0].width + 1, sides[1].width + 1)
    for head, queries, keys, worth in importance_blocks(sample, *sides, rough=rough):
        assert worth.shape == (len(queries), len(keys))
        assert not out[head, queries[:, None], keys].any()  # no block comes twice
        out[head, queries[:, None], keys] = worth.detach()
    return out


def some_sample(name: str, seed: int = 41, **options: Any) -> tuple[list[AttentionInputs], Sides]:
    """Two batches of unequal size of one layer, and dictionaries of which some features never fire."""
    values = {"length": 6, **LAYERS[name], **options}
    shorter = {**values, "batch": 1, "length": values["length"] - 1}
    sample = [some_inputs(seed, **values), some_inputs(seed + 1, **shorter)]
    sample[1] = replace(sample[1], rule=replace(sample[1].rule, sink_N=sample[0].rule.sink_N))
    sides = some_sides(sample[0], seed, widths=(6, 5), size=3.0)
    sides[0].b_enc.data[2] = sides[1].b_enc.data[0] = -1e6
    return sample, sides


@pytest.mark.parametrize("name", LAYERS)
def test_importance_is_the_brute_force_loop(name: str) -> None:
    sample, sides = some_sample(name)
    found, wanted = dense_importance(sample, sides), slow_importance(sample, sides)
    assert (wanted > 1e-4).float().mean() > 0.2
    close(found, wanted)
    if name == "causal":
        assert not found[:, :, -1].any()  # the key bias shifts a whole row
    if "rotary" in LAYERS[name] or "sink" in LAYERS[name] or "softcap" in LAYERS[name]:
        assert found[:, :-1, -1].max() > 1e-4


@pytest.mark.parametrize("name", ["causal", "half-split", "all"])
def test_rough_importance_takes_one_row_in_four_of_a_rotary_layer(name: str) -> None:
    sample, sides = some_sample(name, length=9)
    stride = 4 if "rotary" in LAYERS[name] else 1  # elsewhere the whole answer costs next to nothing
    found, wanted = dense_importance(sample, sides, rough=True), slow_importance(sample, sides, stride)
    assert (wanted > 1e-4).float().mean() > 0.15
    close(found, wanted)


@pytest.mark.parametrize("kept", [0, 1 << 27])
@pytest.mark.parametrize("name", ["causal", "sink-softcap-padded", "half-split", "partial", "all"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, kept: int) -> None:
    sample, sides = some_sample(name)
    whole = dense_importance(sample, sides)
    monkeypatch.setattr(room, "MEETING_ELEMENTS", 40)  # a few key events at a time
    monkeypatch.setattr(room, "CPU_BLOCK", 13)  # two key features at a time
    monkeypatch.setattr(room, "QUERIES", 2)  # two positions at a time, and the keys that one of them sees
    monkeypatch.setattr(room, "KEPT_ELEMENTS", kept)  # 0: patterns are made anew for each block
    close(dense_importance(sample, sides), whole, 1e-5)


def test_rotary_ranking_of_wide_heads_is_the_dense_answer() -> None:
    sample = [some_inputs(s, rotary="half", length=24, batch=4, d=12, width=20) for s in (1, 2)]
    sides = some_sides(sample[0], widths=(40, 36), activation="batchtopk", k=5)
    dense = slow_importance_by_product(sample, sides).flatten()
    for n in (100, 1000):
        pairs, worth = rank_pairs(sample, *sides, n)
        code = (pairs.head_P * 41 + pairs.query_P) * 37 + pairs.key_P
        close(worth, dense[code])
        assert len(code) == n and float(worth.min()) >= 0.9999 * float(dense.topk(n).values[-1])


def slow_importance_by_product(sample: list[AttentionInputs], sides: Sides) -> Tensor:
    """`slow_importance` for a layer without padding, cap and sink, by einsum over all positions at once."""
    left, right = (r.double() for r in rows_of(sample[0], sides))
    total, tokens = torch.zeros(left.shape[1], len(left), len(right), dtype=torch.float64), 0
    for inputs in sample:
        batch, length, heads, width = inputs.q_BTNH.shape
        acts_q, acts_k = (with_bias(side.encode(inputs.x_BTD)).detach().double() for side in sides)
        pattern = inputs.log_pattern_BNQK.exp().double()
        for b in range(batch):
            turns = torch.stack([turn_matrix(inputs.rule.rotary, b, t, width) for t in range(length)])
            for n in range(heads):
                q = torch.einsum("ide,ae->iad", turns, left[:, n]) * acts_q[b, :, :, None]
                k = torch.einsum("jde,ce->jcd", turns, right[:, n * right.shape[1] // heads]) * acts_k[b, :, :, None]
                for i in range(length):
                    delta = inputs.rule.scaling * torch.einsum("ad,jcd->acj", q[i], k)
                    total[n] += 0.5 * ((delta**2) @ pattern[b, n, i] - (delta @ pattern[b, n, i]) ** 2)
        tokens += batch * length
    return total / tokens


# What it stands for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_importance_is_the_kl_of_taking_a_weak_pair_out(name: str) -> None:
    """Take ε of a pair's part out of the true scores: the pattern's KL is ε² of its importance, to second order."""
    inputs = some_inputs(43, length=5, **LAYERS[name])
    sides = some_sides(inputs, widths=(4, 3), size=3.0)
    rule, bare = inputs.rule, replace(inputs.rule, softcap=None)
    scores = slow_scores(bare, inputs.q_BTNH, inputs.k_BTGH)
    true = slow_pattern_of(rule, rule.cap(scores))
    worth = dense_importance([inputs], sides)
    pairs = pairs_of(inputs, sides)
    step, checked = 1e-4, 0
    one_by_one = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:25]
    for p in one_by_one.tolist():
        one = pairs.take(torch.tensor([p]))
        part = map_scores(replace(inputs, rule=bare), sides, one, strengths_of(inputs, sides, one)).double()
        hat = slow_pattern_of(rule, rule.cap(scores - step * part))
        heads = rule.sink_N.shape[0] if rule.sink_N is not None else true.shape[1]
        kl = float(slow_mean(slow_kl_rows(true, hat), inputs.real_BT)) * heads / step**2  # mean over rows of its head
        wanted = float(worth[int(one.head_P), int(one.query_P), int(one.key_P)])
        assert kl == pytest.approx(wanted, rel=1e-2, abs=1e-5)
        checked += wanted > 1e-3
    assert checked > 5


def test_importance_of_kept_pairs() -> None:
    for name in ("causal", "padded", "half-split", "sink"):
        sample, sides = some_sample(name)
        pairs = some_of(pairs_of(sample[0], sides), 0.4, seed=2)
        wanted = slow_importance(sample, sides)[pairs.head_P, pairs.query_P, pairs.key_P]
        found = pair_importance(pairs, sample, *sides)
        close(found, wanted)
        dead = (pairs.query_P == 2) | (pairs.key_P == 0)
        assert dead.any() and not found[dead].any()


def test_rescaling_features_changes_no_importance() -> None:
    sample, sides = some_sample("half-split")
    before = dense_importance(sample, sides)
    with torch.no_grad():
        for side in sides:
            factor = 2.0 ** torch.arange(-2, side.width - 2)
            side.W_enc.mul_(factor)
            side.b_enc.mul_(factor)
            side.W_dec.div_(factor[:, None])
    close(dense_importance(sample, sides), before, 1e-5)


# The ranking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 26, 7, 20])
@pytest.mark.parametrize("name", ["causal", "padded", "half-split", "all"])
def test_ranking_is_the_dense_argsort(monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    sample, sides = some_sample(name)
    dense = slow_importance(sample, sides)
    monkeypatch.setattr(room, "CPU_BLOCK", block)
    for most in (1, 17, 60, 10_000):
        pairs, worth = rank_pairs(sample, *sides, most)
        order = dense.flatten().argsort(descending=True)
        wanted = order[dense.flatten()[order] > 1e-9][:most]
        code = (pairs.head_P * (pairs.n_query + 1) + pairs.query_P) * (pairs.n_key + 1) + pairs.key_P
        assert torch.equal(code, code.sort().values) and len(code.unique()) == len(code)
        assert {*wanted.tolist()} <= {*code.tolist()} if most > 60 else sorted(wanted.tolist()) == code.tolist()
        close(worth, dense.flatten()[code])
        assert len(code) <= most


def test_features_that_never_fire_are_left_out() -> None:
    sample, sides = some_sample("padded")
    hidden = ~sample[0].real_BT
    sample[0].x_BTD[hidden] = 1e4  # what stands at padding makes no feature live
    queries, keys = firing_features(sample, *sides)
    on_q, on_k = (
        torch.cat([side.encode(i.x_BTD[i.real_BT]) for i in sample]).gt(0).any(0).nonzero()[:, 0].tolist()
        for side in sides
    )
    assert queries.tolist() == [*on_q, 6] and keys.tolist() == [*on_k, 5]
    assert 2 not in on_q and 0 not in on_k
    pairs, _ = rank_pairs(sample, *sides, 10_000)
    assert not torch.isin(pairs.query_P, torch.tensor([2])).any() and not (pairs.key_P == 0).any()
    assert len(pairs) < len(all_pairs(6, 5, 4))
