"""Traces: every account adds up, term by term, to what slow loops say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import (
    LAYERS,
    close,
    pairs_of,
    rows_of,
    slow_map,
    slow_pattern_of,
    slow_scores,
    some_decomposition,
    some_inputs,
    turn_matrix,
)
from torch import Tensor

from qkscope.decomposition import Decomposition
from qkscope.errors import UserError
from qkscope.explain.account import Account
from qkscope.explain.trace import KINDS, Trace
from qkscope.pairs.pair_map import with_bias
from qkscope.pattern import AttentionInputs

B = 0  # the sequence of the batch that is traced: padded on the right where anything is


def traced(kind: str, head: int = 1) -> tuple[Decomposition, AttentionInputs, Trace]:
    inputs = some_inputs(**LAYERS[kind])
    dec = some_decomposition(inputs)
    return dec, inputs, Trace.of_batch(dec, inputs, B, int(inputs.real_BT[B].sum()) or 7, head)


def visible_edges(inputs: AttentionInputs, length: int) -> list[tuple[int, int]]:
    seen = inputs.rule.visible_BQK[B if len(inputs.rule.visible_BQK) > 1 else 0]
    return [(i, j) for i in range(length) for j in range(length) if seen[i, j]]


def slow_term(dec: Decomposition, inputs: AttentionInputs, a: int, b: int, head: int, i: int, j: int) -> float:
    """What features a and b add to one uncapped score, at strength 1 of M(i-j)."""
    acts_q, acts_k = (with_bias(s.encode(inputs.x_BTD)).double() for s in (dec.query, dec.key))
    left, right = (r.double() for r in rows_of(inputs, (dec.query, dec.key)))
    width, group = left.shape[2], head // (dec.shape.N // dec.shape.G)
    turns = [turn_matrix(inputs.rule.rotary, B, t, width) for t in (i, j)]
    m = (turns[0] @ left[a, head]) @ (turns[1] @ right[b, group])
    return (inputs.rule.scaling * acts_q[B, i, a] * m * acts_k[B, j, b]).item()


@pytest.mark.parametrize("kind", LAYERS)
def test_scores_and_patterns_are_the_layers(kind: str) -> None:
    dec, inputs, one = traced(kind)
    length = len(one.tokens)
    rule = replace(inputs.rule, softcap=None)
    bare = replace(inputs, rule=rule)
    wanted = {
        "true": slow_scores(rule, inputs.q_BTNH, inputs.k_BTGH),
        "pruned": slow_map(bare, (dec.query, dec.key), dec.pairs, dec.strength_P),
    }
    for name, scores in wanted.items():
        close(one.scores[name], scores[B, 1, :length, :length])
    for name, log in zip(
        KINDS, (inputs.log_pattern_BNQK, dec.log_pattern_all(inputs), dec.log_pattern_kept(inputs)), strict=True
    ):
        whole = log.exp()[B, 1, :length]
        sink = whole[:, inputs.x_BTD.shape[1] :]
        close(one.pattern[name], torch.cat([whole[:, :length], sink], 1))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_score_is_the_sum_of_its_terms(kind: str) -> None:
    dec, inputs, one = traced(kind)
    strength = {
        (int(q), int(k)): float(s)
        for q, k, h, s in zip(dec.pairs.query_P, dec.pairs.key_P, dec.pairs.head_P, dec.strength_P, strict=True)
        if int(h) == 1
    }
    rotary = inputs.rule.rotary is not None
    for i, j in visible_edges(inputs, len(one.tokens))[::3]:
        account = one.terms(i, j)
        found = {(a % (dec.query.width + 1), b % (dec.key.width + 1)): v for a, b, v in account.top(len(account))}
        for (a, b), s in strength.items():
            term = slow_term(dec, inputs, a, b, 1, i, j)
            if not rotary:  # a strength stands in the place of the weights' product
                acts_q, acts_k = (with_bias(t.encode(inputs.x_BTD)).double() for t in (dec.query, dec.key))
                term = (inputs.rule.scaling * acts_q[B, i, a] * acts_k[B, j, b]).item()
            close(torch.tensor(found.get((a, b), 0.0)), torch.tensor(s * term))
        whole = account.pairs + sum(account.rest.values())
        close(torch.tensor(whole), torch.tensor(account.total))
        close(torch.tensor(account.total), one.scores["true"][i, j].detach())


@pytest.mark.parametrize("kind", ["causal", "half-split", "all"])
def test_all_pairs_add_up_to_the_transcoders_score(kind: str) -> None:
    dec, inputs, one = traced(kind)
    for i, j in visible_edges(inputs, len(one.tokens))[::4]:
        account = one.terms(i, j, pairs="all")
        close(torch.tensor(account.pairs), one.scores["reconstructed"][i, j].detach())
        for a, b, value in account.top(4):
            term = slow_term(dec, inputs, a % (dec.query.width + 1), b % (dec.key.width + 1), 1, i, j)
            close(torch.tensor(value), torch.tensor(term))


@pytest.mark.parametrize("kind", LAYERS)
def test_why_is_the_log_odds_of_the_models_pattern(kind: str) -> None:
    _, inputs, one = traced(kind)
    pattern = slow_pattern_of(inputs.rule, slow_scores(inputs.rule, inputs.q_BTNH, inputs.k_BTGH))[B, 1]
    length, whole = len(one.tokens), inputs.x_BTD.shape[1]
    checked = 0
    for i in range(1, length):
        if len([1 for e in visible_edges(inputs, length) if e[0] == i]) < 2:
            continue
        why = one.why(i)
        row = torch.cat([pattern[i, :length], pattern[i, whole:]])
        assert why.key == int(row[:length].argmax())
        weights = torch.tensor([float(row[c]) for c in why.against])
        close(torch.tensor(why.weights), weights / weights.sum())
        assert why.weights == sorted(why.weights, reverse=True)
        log_odds = sum(
            w * math.log(float(row[why.key] / row[c])) for w, c in zip(why.weights, why.against, strict=True)
        )
        close(torch.tensor(why.account.total), torch.tensor(log_odds), 1e-3)
        close(torch.tensor(why.account.pairs + sum(why.account.rest.values())), torch.tensor(log_odds), 1e-3)
        checked += 1
    assert checked > 1


def test_a_constant_along_the_row_explains_nothing() -> None:
    """With learned positions a pair with the keys' bias moves every key of a row alike."""
    dec, _, one = traced("causal")
    bias = dec.pairs.key_P == dec.key.width
    assert bool((bias & (dec.pairs.head_P == 1)).any())
    account = one.why(5).account
    shares = dict(zip(zip(account.query_S.tolist(), account.key_S.tolist(), strict=True), account.value_S, strict=True))
    assert all(abs(float(v)) < 1e-5 for (_, b), v in shares.items() if b == -1)
    kept = Trace(replace_pairs(dec, ~bias), one.inputs, one.tokens, 1).why(5).account
    close(torch.tensor(kept.pairs), torch.tensor(account.pairs))


def replace_pairs(dec: Decomposition, keep_P: Tensor) -> Decomposition:
    index = keep_P.nonzero()[:, 0]
    strength, weight, worth = (t[index] for t in (dec.strength_P, dec.weight_strength_P, dec.importance_P))
    return replace(dec, pairs=dec.pairs.take(index), strength_P=strength, weight_strength_P=weight, importance_P=worth)


def test_with_every_pair_at_its_weight_nothing_is_dropped() -> None:
    inputs = some_inputs(**LAYERS["half-split"])
    dec = some_decomposition(inputs)
    pairs = pairs_of(inputs, (dec.query, dec.key))
    ones = torch.ones(len(pairs))
    whole = replace(dec, pairs=pairs, strength_P=ones, weight_strength_P=ones, importance_P=ones)
    account = Trace.of_batch(whole, inputs, B, 7, 2).terms(4, 2)
    assert abs(account.rest["dropped"]) < 1e-4
    close(torch.tensor(account.pairs + account.rest["error"]), torch.tensor(account.total))


def test_competitors_can_be_named() -> None:
    _, inputs, one = traced("causal")
    pattern = inputs.log_pattern_BNQK[B, 1].detach()
    why = one.why(6, 2, [4])
    close(torch.tensor(why.account.total), pattern[6, 2] - pattern[6, 4])
    assert (why.key, why.against, why.weights) == (2, [4], [1.0])
    assert one.why(-1, -5, [-3]).account.total == why.account.total


def test_another_head_is_the_same_prompt() -> None:
    dec, inputs, one = traced("partial", head=0)
    other = one.of_head(3)
    close(other.pattern["pruned"], Trace.of_batch(dec, inputs, B, len(one.tokens), 3).pattern["pruned"])
    assert other.of_head(0).terms(3, 1).total == one.terms(3, 1).total != other.terms(3, 1).total


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda one: one.terms(7, 0), "query 7: the prompt has positions 0 to 6"),
        (lambda one: one.terms(3, -9), "key -9"),
        (lambda one: one.terms(2, 3), "query 2 does not see key 3"),
        (lambda one: one.why(2, 1, [5]), "query 2 does not see key 5"),
        (lambda one: one.why(2, 1, [1]), "no other key"),
        (lambda one: one.why(0), "no other key"),
        (lambda one: one.of_head(4), "head 4: the layer has heads 0 to 3"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(ask, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        ask(traced("causal")[2])
    assert "\n" not in str(error.value)


terms = st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=8)


@given(terms, st.floats(-3, 3))
def test_the_fewest_are_the_first_that_are_enough(values: list[float], rest: float) -> None:
    number = torch.arange(len(values))
    total = sum(values) + rest
    account = Account.of(number, number, torch.tensor(values), {"error": rest}, total)
    sizes = account.value_S.abs().tolist()
    assert sizes == sorted(sizes, reverse=True) and 0 not in sizes
    running, wanted = 0.0, None
    for count, value in enumerate(account.value_S.tolist(), start=1):
        running += value
        if abs(running - total) <= (1 - 0.9) * abs(total):
            wanted = count
            break
    assert account.fewest() == wanted
    few = account.fewest(total=account.pairs)
    if account.pairs and account.value_S.numel():
        assert few is not None and few <= len(account)
