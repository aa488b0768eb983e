"""Pair examples against derivatives of a slow map: one pair, one sequence, one place at a time, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import LAYERS, close, slow_map, slow_pattern_of, some_decomposition, some_inputs
from torch import Tensor

from qkscope.data.sequences import Batch
from qkscope.decomposition import Decomposition
from qkscope.pairs.pair_map import with_bias
from qkscope.pattern import AttentionInputs
from qkscope.tables import pair_examples
from qkscope.tables.examples import Examples

STEP = 1e-4  # of a strength's logarithm, for a central difference
WINDOW = 2


def a_batch(inputs: AttentionInputs, seed: int = 0, opened: bool = True) -> Batch:
    """Tokens and documents for what an attention was handed."""
    g = torch.Generator().manual_seed(seed)
    size = inputs.real_BT.shape
    documents, offsets = torch.randperm(50, generator=g)[: size[0]], torch.randint(0, 90, (size[0],), generator=g)
    return Batch(torch.randint(1, 27, size, generator=g), inputs.real_BT, documents, offsets, opened)


def acts_of(dec: Decomposition, inputs: AttentionInputs) -> dict[str, Tensor]:
    return {"query": dec.query.encode(inputs.x_BTD), "key": dec.key.encode(inputs.x_BTD)}


def slow_effects(dec: Decomposition, inputs: AttentionInputs) -> Tensor:
    """∂P/∂log strength of each pair, [P, B, N, Q, K], where both features fire; 0 elsewhere."""
    sides, length = (dec.query, dec.key), inputs.x_BTD.shape[1]
    on_q, on_k = (with_bias(a) > 0 for a in acts_of(dec, inputs).values())
    out = []
    for p in range(len(dec.pairs)):
        patterns = []
        for sign in (1, -1):
            strength = dec.strength_P.double().clone()
            strength[p] *= 1 + sign * STEP
            patterns.append(slow_pattern_of(inputs.rule, slow_map(inputs, sides, dec.pairs, strength))[..., :length])
        both = on_q[..., dec.pairs.query_P[p], None] & on_k[..., dec.pairs.key_P[p]][:, None]
        both = both & inputs.real_BT[..., None] & inputs.real_BT[:, None]
        out.append((patterns[0] - patterns[1]) / (2 * STEP) * both[:, None])
    return torch.stack(out)


@pytest.mark.parametrize("name", LAYERS)
def test_the_largest_effects_are_found(name: str) -> None:
    inputs = some_inputs(seed=3, **{"batch": 3, **LAYERS[name]})
    dec = some_decomposition(inputs, share=0.08)
    batch = a_batch(inputs)
    examples = Examples(dec, 0, pairs=2, pair_window=WINDOW)
    examples.add(batch, acts_of(dec, inputs), inputs)
    texts = {token: chr(96 + token) for token in range(1, 27)}
    rows: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in examples.pairs.table(texts).to_pylist():
        rows.setdefault((row["query_feature"], row["key_feature"], row["head"]), []).append(row)
    effects, pattern = slow_effects(dec, inputs), slow_pattern_of(inputs.rule, slow_map_of(dec, inputs))
    signs = set()
    for p in range(len(dec.pairs)):
        a, b, head = int(dec.pairs.query_P[p]), int(dec.pairs.key_P[p]), int(dec.pairs.head_P[p])
        here = effects[p, :, head]
        largest = here.abs().flatten(1).amax(1)
        ranked = [s for s in largest.argsort(descending=True).tolist() if largest[s] > 1e-6][:2]
        got = rows.pop((a if a < 9 else -1, b if b < 8 else -1, head), [])
        assert [row["rank"] for row in got] == list(range(len(ranked)))
        for sequence, row in zip(ranked, got, strict=True):
            i, j = (place_of(row[f"{side}_position"], batch, sequence) for side in ("query", "key"))
            # Where a query sees two keys, what one wins the other loses: either of equal places may be shown.
            assert abs(float(here[sequence, i, j])) == pytest.approx(float(largest[sequence]), rel=1e-4)
            assert row["effect"] == pytest.approx(float(here[sequence, i, j]), rel=1e-3, abs=1e-6)
            assert row["pattern"] == pytest.approx(float(pattern[sequence, head, i, j]), rel=1e-4)
            assert row["document"] == int(batch.document_B[sequence])
            signs.add(row["effect"] > 0)
            for side, at in (("query", i), ("key", j)):
                span = range(max(at - WINDOW, 0), min(at + WINDOW + 1, inputs.x_BTD.shape[1]))
                near = [t for t in span if inputs.real_BT[sequence, t]]
                assert row[f"{side}_tokens"] == [texts[int(batch.tokens_BT[sequence, t])] for t in near]
                assert row[f"{side}_center"] == near.index(at)
    assert not rows and signs == {True, False}


def place_of(position: int, batch: Batch, sequence: int) -> int:
    """Where in its sequence a token of this position in the document stands."""
    return 0 if position == -1 else position - int(batch.offset_B[sequence]) + 1


def slow_map_of(dec: Decomposition, inputs: AttentionInputs) -> Tensor:
    return slow_map(inputs, (dec.query, dec.key), dec.pairs, dec.strength_P.double())


@pytest.mark.parametrize("name", ["causal", "padded", "all"])
def test_blocks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some_inputs(seed=5, **{"batch": 3, **LAYERS[name]})
    dec = some_decomposition(inputs)
    found = []
    for n_terms, n_rows in ((1 << 17, 1 << 18), (1, 1), (300, 40)):
        monkeypatch.setattr(pair_examples, "BLOCK_TERMS", n_terms)
        monkeypatch.setattr(pair_examples, "BLOCK_ROWS", n_rows)
        examples = Examples(dec, 0, pairs=2)
        examples.add(a_batch(inputs), acts_of(dec, inputs), inputs)
        found.append(examples.pairs.best)
    for other in found[1:]:
        close(other.payload["effect"], found[0].payload["effect"], 1e-6)
        assert torch.equal(other.payload["query_position"], found[0].payload["query_position"])
        assert torch.equal(other.payload["key_position"], found[0].payload["key_position"])


@pytest.mark.parametrize("name", LAYERS)
def test_no_effect_exceeds_its_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_examples, "WORTH", 1 << 40)
    for seed in range(4):
        inputs = some_inputs(seed=seed, size=4.0**seed / 4, **{"batch": 3, **LAYERS[name]})
        dec = some_decomposition(inputs)
        examples = Examples(dec, 0, pairs=1)
        terms = terms_of(examples, inputs, a_batch(inputs))
        for block in terms.blocks(torch.zeros(len(dec.pairs))):
            assert block.bound_R is not None
            assert (terms.sizes(block) <= block.bound_R).all()


def terms_of(examples: Examples, inputs: AttentionInputs, batch: Batch) -> pair_examples.Terms:
    """The terms of one batch, as the examples' `add` makes them."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_examples.Terms, "blocks", lambda terms, least_P: made.append(terms) or iter(()))
        examples.add(batch, acts_of(examples.dec, inputs), inputs)
    return made[0]


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_left_out_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [some_inputs(seed=seed, **{"batch": 3, **LAYERS[name]}) for seed in range(6)]
    dec = some_decomposition(given[0])
    sizes, made, found = pair_examples.Terms.sizes, [], []

    def counted(terms: pair_examples.Terms, chosen: pair_examples.Rows) -> Tensor:
        made[-1] += len(chosen.cell_R)
        return sizes(terms, chosen)

    monkeypatch.setattr(pair_examples.Terms, "sizes", counted)
    for worth in (0, 1 << 40):
        monkeypatch.setattr(pair_examples, "WORTH", worth)
        made.append(0)
        examples = Examples(dec, 0, pairs=2)
        for seed, inputs in enumerate(given):
            examples.add(a_batch(inputs, seed), acts_of(dec, inputs), inputs)
        found.append(examples.pairs.best)
    for column, values in found[0].payload.items():
        assert torch.equal(values, found[1].payload[column])
    assert made[1] < 0.8 * made[0]


def test_a_bias_of_the_key_says_nothing_where_it_cancels() -> None:
    inputs = some_inputs(size=4.0)
    dec = some_decomposition(inputs, share=1.0)
    dec.strength_P *= 100
    examples = Examples(dec, 0, pairs=1)
    examples.add(a_batch(inputs), acts_of(dec, inputs), inputs)
    shown = examples.pairs.best.score_GM[:, 0] > 0
    assert not shown[dec.pairs.key_P == dec.pairs.n_key].any() and shown.any()


def test_none_wanted_and_none_given() -> None:
    inputs = some_inputs()
    dec = some_decomposition(inputs)
    for pairs, given in ((0, inputs), (2, None)):
        examples = Examples(dec, 1, pairs=pairs)
        examples.add(a_batch(inputs), acts_of(dec, inputs), given)
        assert len(examples.pairs.table({})) == 0


def test_no_pairs_kept() -> None:
    inputs = some_inputs()
    dec = some_decomposition(inputs, share=0.0)
    examples = Examples(dec, 1, pairs=2)
    examples.add(a_batch(inputs), acts_of(dec, inputs), inputs)
    assert len(dec.pairs) == len(examples.pairs.table({})) == 0
