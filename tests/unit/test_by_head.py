"""Some heads at a time: the same patterns as of all at once, and no more of them held than that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, close, pairs_of, rows_of, some_decomposition, some_inputs, some_of, some_sides
from test_attention import batch, run, sites
from test_faithful import a_layer
from tiny import NAMES
from torch import Tensor

from qkscope import pattern
from qkscope.attention import harvest
from qkscope.evaluate import measure as room
from qkscope.evaluate.faithful import curve
from qkscope.evaluate.measure import Sources, measure
from qkscope.kernels.row_kl import exp
from qkscope.pairs import pair_map
from qkscope.pairs.active import Active
from qkscope.pairs.pair_map import active_scores, active_scores_by_head, with_bias
from qkscope.pattern import AttentionInputs, PatternRule, head_blocks, patterns_of
from qkscope.tables.examples import Examples


@given(n_key=st.integers(1, 6), group=st.integers(1, 6), most=st.integers(1, 40))
def test_blocks_are_whole_groups_or_equal_parts_of_one(n_key: int, group: int, most: int) -> None:
    q, k = torch.zeros(2, 3, n_key * group, 1), torch.zeros(2, 3, n_key, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pattern, "BLOCK_CPU", most * 2 * 3 * 3)
        blocks = list(head_blocks(q, k))
    assert [head for here in blocks for head in range(here.start, here.stop)] == list(range(n_key * group))
    for here in blocks:
        size = here.stop - here.start
        assert 1 <= size <= most
        first, last = here.start // group, (here.stop - 1) // group
        assert first == last or (here.start % group == 0 and here.stop % group == 0)
    allowed = [n for n in range(1, group + 1) if group % n == 0] + [group * n for n in range(1, n_key + 1)]
    assert blocks[0].stop == max(n for n in allowed if n <= most)


def by_blocks(inputs: AttentionInputs, patterns: pattern.HeadPatterns) -> Tensor:
    found = [patterns(heads) for heads in inputs.head_blocks()]
    assert len(found) > 1
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_patterns_are_those_of_all_heads_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some_inputs(91, **LAYERS[name])
    dec = some_decomposition(inputs)
    whole = inputs.log_pattern_BNQK, dec.log_pattern_all(inputs), dec.log_pattern_kept(inputs)
    monkeypatch.setattr(pattern, "BLOCK_CPU", 1)
    for wanted, by_head in zip(
        whole, (inputs.log_pattern_by_head, dec.all_by_head(inputs), dec.kept_by_head(inputs)), strict=True
    ):
        close(exp(by_blocks(inputs, by_head)), exp(wanted), 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_scores_of_a_map_are_those_of_all_heads_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = some_inputs(92, **LAYERS[name])
    sides = some_sides(inputs)
    pairs = some_of(pairs_of(inputs, sides), 0.5)
    strength = torch.randn(len(pairs), generator=torch.Generator().manual_seed(0))
    queries, keys = (Active.of(with_bias(side.encode(inputs.x_BTD)).detach()) for side in sides)
    options = (pairs, strength, queries, keys, lambda: rows_of(inputs, sides), inputs.rule)
    monkeypatch.setattr(pattern, "BLOCK_CPU", 1)
    close(by_blocks(inputs, active_scores_by_head(*options)).detach(), active_scores(*options).detach(), 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_source_by_head_acts_as_a_whole_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the layers that nothing replaces, where these have a soft cap or sinks."""
    site = sites(name)[0]

    def flat(inputs: AttentionInputs) -> pattern.HeadPatterns:
        return patterns_of(inputs.rule.log_pattern_by_head(0.3 * inputs.q_BTNH, inputs.k_BTGH))

    with site.replace_pattern(lambda inputs: flat(inputs)(slice(0, inputs.q_BTNH.shape[2]))):
        wanted = run(site.model, *batch())
    plain = run(site.model, *batch())
    monkeypatch.setattr(pattern, "BLOCK_CPU", 1)
    with site.replace_pattern(flat):
        found = run(site.model, *batch())
    real = batch()[1]
    close(found[real], wanted[real], 1e-5)
    assert (found - plain)[real].abs().max() > 1e-3 * plain[real].abs().max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_evaluation_holds_one_heads_patterns_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, batches, dec = a_layer(name)
    sample = [harvest([site], b.tokens_BT, b.real_BT)[0] for b in batches]
    heads: list[int] = []
    masked = PatternRule.masked

    def watched(rule: PatternRule, scores: Tensor) -> Tensor:
        heads.append(scores.shape[1])
        return masked(rule, scores)

    monkeypatch.setattr(PatternRule, "masked", watched)
    monkeypatch.setattr(pattern, "BLOCK_CPU", 1)
    monkeypatch.setattr(pair_map, "plain_scores", lambda *_: pytest.fail("scores of all heads at once"))
    monkeypatch.setattr(room, "_check_map", lambda *_: 0.0)  # of a few tokens, and of all heads
    sources = Sources.of(dec, sample)
    measure(dec, site, batches, sources, Examples(dec, 2, drawn=1, pairs=2))
    curve(dec, site, batches, seed=0)
    assert len(heads) > 100 and set(heads) == {1}
