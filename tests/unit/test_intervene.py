"""Interventions: scores under an edit against loops, and what happens in a running model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import LAYERS, close, slow_map, slow_pattern_of, slow_scores, some_decomposition, some_inputs
from test_trace import slow_term
from tiny import tiny_model
from torch import Tensor

import qkscope as qk
from qkscope.attention import AttentionSite, harvest
from qkscope.decomposition import Decomposition
from qkscope.errors import UserError
from qkscope.explain.intervene import Edit, Feature, Pair, intervene
from qkscope.pairs.pair_map import with_bias
from qkscope.pattern import AttentionInputs

KINDS = ["causal", "softcap", "sink-softcap-padded", "half-split", "interleaved", "all"]

FEATURES = [Feature("query", 2)], {Feature("key", 3, head=1): 2.0}, {Feature("query", 4, head=2): 0.5}


def bare(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, rule=replace(inputs.rule, softcap=None))


def pattern_of(inputs: AttentionInputs, uncapped: Tensor) -> Tensor:
    """The slow pattern of uncapped scores."""
    cap = inputs.rule.softcap
    return slow_pattern_of(inputs.rule, uncapped if cap is None else cap * (uncapped / cap).tanh())


def some_pairs(dec: Decomposition, count: int) -> tuple[list[int], list[Pair]]:
    """Kept pairs of several heads, as places and as parts."""
    places = list(range(0, len(dec.pairs), max(len(dec.pairs) // count, 1)))[:count]
    p = dec.pairs
    named = [
        Pair(*(f if f < n else -1 for f, n in ((int(p.query_P[i]), p.n_query), (int(p.key_P[i]), p.n_key))), head)  # type: ignore[arg-type]
        for i, head in zip(places, p.head_P[places].tolist(), strict=True)
    ]
    return places, named


def case(kind: str) -> tuple[AttentionInputs, Decomposition]:
    inputs = some_inputs(**LAYERS[kind])
    return inputs, some_decomposition(inputs)


@pytest.mark.parametrize("base", ["kept", "model", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind: str, base: Any) -> None:
    inputs, dec = case(kind)
    places, named = some_pairs(dec, 6)
    found = Edit.of(dec, named[:3], {named[3]: 2.5, named[4]: -1.0}, {named[5]: 0.7}, base).log_pattern(inputs).exp()
    changed = dec.strength_P.clone()
    for place, factor in zip(places[:5], (0, 0, 0, 2.5, -1.0), strict=True):
        changed[place] *= factor
    sides = dec.query, dec.key
    changed[places[5]] += 0.7
    kept = slow_map(bare(inputs), sides, dec.pairs, changed)
    if base != "kept":
        before = {
            "model": slow_scores(bare(inputs).rule, inputs.q_BTNH, inputs.k_BTGH),
            "all": slow_scores(bare(inputs).rule, *hats(dec, inputs)),
        }[base]
        kept = before + kept - slow_map(bare(inputs), sides, dec.pairs, dec.strength_P)
    close(found, pattern_of(inputs, kept))


def hats(dec: Decomposition, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    q, k = (t(inputs.x_BTD).detach() for t in (dec.query, dec.key))
    return q.view(inputs.q_BTNH.shape), k.view(inputs.k_BTGH.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_the_map(kind: str) -> None:
    """Heads that are edited differ from those that are not, also where the edit is the same feature on both sides."""
    inputs, dec = case(kind)
    edit = Edit.of(
        dec, [Feature("query", 2)], {Feature("key", 3, head=1): 2.0}, {Feature("query", 4, head=2): 0.5}, "kept"
    )
    acts = [with_bias(t.encode(inputs.x_BTD)).detach().double() for t in (dec.query, dec.key)]
    whole = []
    for head in range(dec.shape.N):
        q, k = (a.clone() for a in acts)
        q[..., 2] = 0
        if head == 1:
            k[..., 3] *= 2
        if head == 2:
            q[..., 4] += 0.5
        whole.append(slow_map(bare(inputs), (dec.query, dec.key), dec.pairs, dec.strength_P, [q, k])[:, head])
    close(edit.log_pattern(inputs).exp(), pattern_of(inputs, torch.stack(whole, 1)))


@pytest.mark.parametrize("base", ["model", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_vectors(kind: str, base: Any) -> None:
    """A feature's row goes off the queries or keys of its heads alone, also where heads share a key."""
    inputs, dec = case(kind)
    edit = Edit.of(
        dec, [Feature("query", 2)], {Feature("key", 3, head=1): 2.0}, {Feature("query", 4, head=2): 0.5}, base
    )
    q, k = (inputs.q_BTNH, inputs.k_BTGH) if base == "model" else hats(dec, inputs)
    n, g, h = dec.shape.N, dec.shape.G, dec.shape.H
    q, k = q.clone(), k.repeat_interleave(n // g, 2).clone()
    acts_q, acts_k = (t.encode(inputs.x_BTD).detach() for t in (dec.query, dec.key))
    rows_q, rows_k = dec.query.W_dec.detach().view(-1, n, h), dec.key.W_dec.detach().view(-1, g, h)
    for head in range(n):
        q[:, :, head] -= acts_q[..., 2, None] * rows_q[2, head]
        if head == 1:
            k[:, :, head] += acts_k[..., 3, None] * rows_k[3, head * g // n]
        if head == 2:
            q[:, :, head] += 0.5 * rows_q[4, head]
    close(edit.log_pattern(inputs).exp(), pattern_of(inputs, slow_scores(bare(inputs).rule, q, k)))


def test_a_new_pair_adds_what_its_features_come_to() -> None:
    inputs, dec = case("half-split")
    before = Edit.of(dec).log_pattern(inputs)
    close(before.exp(), inputs.log_pattern_BNQK.exp())
    after = Edit.of(dec, add={Pair(1, 2, head=3): 1.5}).log_pattern(inputs)
    i, j = 5, 2
    wanted = before[0, 3, i] - before[0, 3, i, j]  # differences within a row are differences of scores
    for key in range(i + 1):
        wanted[key] += 1.5 * (slow_term(dec, inputs, 1, 2, 3, i, key) - slow_term(dec, inputs, 1, 2, 3, i, j))
    close((after[0, 3, i] - after[0, 3, i, j])[: i + 1], wanted[: i + 1])
    assert torch.equal(after[:, :3], before[:, :3])


def test_a_pair_without_a_head_is_ablated_in_all() -> None:
    inputs, dec = case("causal")
    p = dec.pairs
    code = p.query_P * 1000 + p.key_P
    several = next(int(c) for c in code.unique() if int((code == c).sum()) > 1 and int(c) // 1000 < p.n_query)
    here = (code == several).nonzero()[:, 0]
    a, b = several // 1000, several % 1000
    b = -1 if b == p.n_key else b
    one_by_one = [Pair(a, b, int(h)) for h in p.head_P[here]]
    close(Edit.of(dec, [Pair(a, b)]).log_pattern(inputs).exp(), Edit.of(dec, one_by_one).log_pattern(inputs).exp())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda dec: Edit.of(dec, [Feature("query", 9)]), "query side has features 0 to 8"),
        (lambda dec: Edit.of(dec, [Feature("key", -1)]), "key side has features 0 to 7"),
        (lambda dec: Edit.of(dec, [Feature("value", 1)]), "choose the side 'query' or 'key'"),  # type: ignore[arg-type]
        (lambda dec: Edit.of(dec, [Pair(0, 8)]), "key side has features -1 to 7"),
        (lambda dec: Edit.of(dec, add={Pair(0, 1, head=4): 1.0}), "heads 0 to 3"),
        (lambda dec: Edit.of(dec, [unkept(dec)]), "does not keep this pair"),
        (lambda dec: Edit.of(dec, [Feature("key", 1)], {Feature("key", 1): 2.0}), "named twice"),
        (lambda dec: Edit.of(dec, [Feature("key", 1), Feature("key", 1)]), "named twice"),
        (lambda dec: Edit.of(dec, base="true"), "choose 'model', 'kept' or 'all'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_edited_is_said_in_a_line(make: Callable[[Decomposition], Edit], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make(case("causal")[1])
    assert "\n" not in str(error.value)


def unkept(dec: Decomposition) -> Pair:
    kept = set(zip(dec.pairs.query_P.tolist(), dec.pairs.key_P.tolist(), dec.pairs.head_P.tolist(), strict=True))
    return next(Pair(a, b, 0) for a in range(9) for b in range(8) if (a, b, 0) not in kept)


# In a running model ------------------------------------------------------------------------------------


def running(name: str, layer: int) -> tuple[AttentionSite, Decomposition, Tensor]:
    site = AttentionSite(tiny_model(name), layer=layer)
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = harvest([site], tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
    dec = some_decomposition(inputs)
    dec.layer = layer
    return site, dec, tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_running_model_has_the_edited_pattern_while_it_is_open(name: str) -> None:
    site, dec, tokens = running(name, 1)
    plain = site.model(tokens).logits
    _, named = some_pairs(dec, 4)
    with site.intervene(dec, named) as watched:
        changed = site.model(tokens).logits
    inputs = harvest([site], tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
    assert watched.pattern_BNQK is not None and watched.before_BNQK is not None
    close(watched.before_BNQK, inputs.log_pattern_BNQK.exp())
    close(watched.pattern_BNQK, Edit.of(dec, named).log_pattern(inputs).exp())
    assert float((changed - plain).abs().max()) > 1e-3
    assert torch.equal(site.model(tokens).logits, plain)


def test_values_stay_as_they_are() -> None:
    """An edit that gives the model's own pattern gives its own output."""
    site, dec, tokens = running("gpt2", 0)
    plain = site.model(tokens).logits
    with site.intervene(dec):
        close(site.model(tokens).logits, plain)


def test_layers_are_edited_together() -> None:
    first, one, tokens = running("llama", 0)
    second = AttentionSite(first.model, layer=1)
    inputs = harvest([second], tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
    two = some_decomposition(inputs)
    two.layer = 1
    outcomes = []
    for parts in ((True, False), (False, True), (True, True)):
        edits = [Feature("query", 1)] if parts[0] else [], [Feature("key", 1)] if parts[1] else []
        with intervene(first, one, edits[0]), intervene(second, two, edits[1]):
            outcomes.append(first.model(tokens).logits)
    assert all(float((outcomes[2] - other).abs().max()) > 1e-4 for other in outcomes[:2])


def test_generation_goes_on_from_the_edited_logits() -> None:
    site, dec, tokens = running("gpt2", 1)
    with site.intervene(dec, add={Feature("query", 1): 30.0}) as watched:
        first = site.model(tokens).logits[:, -1].argmax(-1)
        out = watched.generate(tokens, 3, eos_token_id=None, pad_token_id=0)
        second = site.model(out[:, :10]).logits[:, -1].argmax(-1)
    assert torch.equal(out[:, :9], tokens) and out.shape == (2, 12)
    assert torch.equal(out[:, 9], first) and torch.equal(out[:, 10], second)


def test_cached_keys_are_refused() -> None:
    site, dec, tokens = running("llama", 1)
    model: Any = site.model
    with pytest.raises(UserError, match="use_cache=False"), site.intervene(dec):
        model.generate(tokens, max_new_tokens=2, use_cache=True, eos_token_id=None, pad_token_id=0)


def test_a_decomposition_of_another_layer_is_refused() -> None:
    site, dec, _ = running("gpt2", 1)
    dec.layer = 0
    with pytest.raises(UserError, match="layer 0, the site of layer 1"), site.intervene(dec):
        raise AssertionError("it is open")
    with pytest.raises(UserError, match="layer 0, the site of layer 1"):
        dec.trace(site, "text")


def test_parts_are_public_names() -> None:
    assert qk.Pair(1, 2, head=0) == Pair(1, 2, 0) and qk.Feature("key", 3) == Feature("key", 3)
