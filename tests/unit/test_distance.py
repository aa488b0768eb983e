"""Distance profiles against rotations as matrices and loops over positions, in every variant of a rotary layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import LAYERS, rows_of, some_decomposition, some_inputs, turn_matrix
from tiny import VOCABULARY, tiny_model
from torch import Tensor

from qkscope.attention import AttentionSite, harvest
from qkscope.decomposition import Decomposition
from qkscope.errors import UserError
from qkscope.pairs.pair_map import with_bias
from qkscope.pattern import AttentionInputs
from qkscope.rotary import Rotary
from qkscope.tables.distance import distance_profiles, rotation_by_distance

ROTARY = {name: options for name, options in LAYERS.items() if "rotary" in options}


def layer(options: dict[str, Any]) -> tuple[AttentionInputs, Decomposition]:
    inputs = some_inputs(**options)
    return inputs, some_decomposition(inputs)


def slow_terms(inputs: AttentionInputs, dec: Decomposition, p: int) -> list[tuple[int, float, float]]:
    """(distance, M, a_q·a_k) of one pair at every visible query and key at which both of its features are active."""
    rule, pairs = inputs.rule, dec.pairs
    a, c, n = int(pairs.query_P[p]), int(pairs.key_P[p]), int(pairs.head_P[p])
    left, right = (r.detach().double() for r in rows_of(inputs, (dec.query, dec.key)))
    q, k = left[a, n], right[c, n * dec.shape.G // dec.shape.N]
    acts_q, acts_k = (with_bias(side.encode(inputs.x_BTD)).detach().double() for side in (dec.query, dec.key))
    out = []
    for b in range(len(inputs.real_BT)):
        turns = [turn_matrix(rule.rotary, b, t, len(q)) for t in range(inputs.real_BT.shape[1])]
        visible = rule.visible_BQK[b if len(rule.visible_BQK) > 1 else 0]
        for i in range(len(turns)):
            for j in range(len(turns)):
                if visible[i, j] and inputs.real_BT[b, i] and inputs.real_BT[b, j]:
                    both = float(acts_q[b, i, a] * acts_k[b, j, c])
                    if both:
                        out.append((i - j, float(dec.strength_P[p]) * float((turns[i] @ q) @ (turns[j] @ k)), both))
    return out


@pytest.mark.parametrize("name", ROTARY)
def test_profiles_and_shares_are_those_of_the_slow_reference(name: str) -> None:
    inputs, dec = layer(ROTARY[name])
    found = distance_profiles(dec, [inputs])
    shift_free = inputs.rule.shift_free
    seen = set()
    for p in range(0, len(dec.pairs), 3):
        terms = slow_terms(inputs, dec, p)
        bias_k = bool(dec.pairs.key_P[p] == dec.pairs.n_key)
        assert bool(found.key_bias_P[p]) == bias_k
        if not terms:
            assert float(found.use_PT[p].sum()) == 0 and bool(found.position_share_P[p].isnan())
            seen.add("unused")
            continue
        use = torch.zeros(found.use_PT.shape[1], dtype=torch.float64)
        for d, m, both in terms:
            assert float(found.profile_PT[p, d]) == pytest.approx(m, abs=1e-5)
            use[d] += both**2
        torch.testing.assert_close(found.use_PT[p], use / use.sum(), rtol=1e-5, atol=1e-9)
        # The content is the least-squares fit of the score M·a by c·a; the position is what it leaves.
        c = sum(m * both**2 for _, m, both in terms) / sum(both**2 for _, _, both in terms)
        left = sum((m - c) ** 2 * both**2 for _, m, both in terms)
        whole = sum((m * both) ** 2 for _, m, both in terms)
        if bias_k and shift_free:
            assert float(found.content_P[p]) == 0
            assert float(found.position_share_P[p]) == pytest.approx(1) or left < 1e-8 * whole
            seen.add("cancels")
        else:
            assert float(found.content_P[p]) == pytest.approx(c, abs=1e-5)
            assert float(found.position_share_P[p]) == pytest.approx(left / whole, rel=1e-3, abs=1e-6)
            seen.add("both")
        used = {d: abs(m) for d, m, _ in terms}
        assert used[int(found.peak_P[p])] == pytest.approx(max(used.values()), rel=1e-4)
    assert "both" in seen and ("cancels" in seen or not shift_free)


def test_uniform_use_counts_what_the_mask_shows() -> None:
    for name, wanted in (("half-split", [14, 12, 10, 8, 6, 4, 2]), ("all", None)):
        inputs, dec = layer(ROTARY[name])
        found = distance_profiles(dec, [inputs], weighted=False)
        if wanted is None:
            both = inputs.rule.visible_BQK & inputs.real_BT[:, None] & inputs.real_BT[..., None]
            wanted = [sum(int(m.diagonal(-d).sum()) for m in both) for d in range(7)]
            assert wanted[3:] == [0] * 4  # the window
        weights = torch.tensor(wanted).double() / sum(wanted)
        torch.testing.assert_close(found.use_PT, weights.expand_as(found.use_PT))


def test_batches_of_different_length_add_up() -> None:
    inputs, dec = layer(ROTARY["half-split"])

    def crop(length: int) -> AttentionInputs:
        rule = inputs.rule.crop(length)
        return AttentionInputs(
            inputs.x_BTD[:1, :length], inputs.q_BTNH[:1, :length], inputs.k_BTGH[:1, :length], rule,
            inputs.real_BT[:1, :length],
        )  # fmt: skip

    long, short = (distance_profiles(dec, [crop(n)]) for n in (7, 4))
    for order in ((7, 4), (4, 7)):
        both = distance_profiles(dec, map(crop, order))
        torch.testing.assert_close(both.profile_PT, long.profile_PT)
        p = next(p for p in range(len(dec.pairs)) if slow_terms(crop(4), dec, p))
        parts = [[(d, a**2) for d, _, a in slow_terms(crop(n), dec, p)] for n in (7, 4)]
        use = torch.zeros(7, dtype=torch.float64)
        for d, square in parts[0] + parts[1]:
            use[d] += square
        torch.testing.assert_close(both.use_PT[p], use / use.sum())
    assert short.profile_PT.shape[1] == 4


def test_by_head_weighs_with_importance() -> None:
    inputs, dec = layer(ROTARY["partial"])
    found = distance_profiles(dec, [inputs])
    p = dec.pairs
    for row in found.by_head(dec):
        for name, member in (
            ("two_features", lambda q, k: q < p.n_query and k < p.n_key),
            ("query_bias", lambda q, k: q == p.n_query and k < p.n_key),
            ("key_bias", lambda q, k: k == p.n_key),
            ("all", lambda q, k: True),
        ):
            share = worth = 0.0
            for i in range(len(p)):
                known = not bool(found.position_share_P[i].isnan())
                if int(p.head_P[i]) == row["head"] and known and member(int(p.query_P[i]), int(p.key_P[i])):
                    worth += float(dec.importance_P[i])
                    share += float(dec.importance_P[i]) * float(found.position_share_P[i])
            assert row[name]["importance"] == pytest.approx(worth)
            assert row[name]["position"] == (pytest.approx(share / worth) if worth else None)


@pytest.mark.parametrize("name", ["llama", "llama:yarn", "gpt_neox", "phi", "gemma3_text", "deepseek_v3"])
def test_the_tables_of_real_models_are_rotations_by_the_distance(name: str) -> None:
    site = AttentionSite(tiny_model(name), None, layer=1)
    tokens = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    inputs = harvest([site], tokens, torch.ones_like(tokens, dtype=torch.bool))[0]
    assert inputs.rule.rotary is not None
    order, phase = rotation_by_distance(inputs.rule.rotary, 30)
    g = torch.Generator().manual_seed(1)
    n, width = inputs.q_BTNH.shape[2], inputs.q_BTNH.shape[3]
    q, k = (torch.randn(n, width, generator=g) for _ in range(2))
    plain = replace(inputs.rule, softcap=None, scaling=1.0)
    scores = plain.scores(q.expand(1, 30, -1, -1), k.expand(1, 30, -1, -1))[0]
    z_q, z_k = (torch.view_as_complex(z[:, order].double().unflatten(1, (-1, 2))) for z in (q, k))
    profile = ((z_q * z_k.conj()) @ phase.T).real
    for i in range(30):
        for j in range(i + 1):
            torch.testing.assert_close(scores[:, i, j].double(), profile[:, i - j], rtol=1e-4, atol=1e-3)


# Refusals


def rotary_with(inputs: AttentionInputs, change: Any) -> AttentionInputs:
    table = inputs.rule.rotary
    assert table is not None
    cos, sin = change(table.cos_BTH.clone(), table.sin_BTH.clone())
    return replace(inputs, rule=replace(inputs.rule, rotary=Rotary(cos, sin, table.partner_H)))


def test_tables_that_are_no_rotation_by_distance() -> None:
    inputs, dec = layer(ROTARY["half-split"])

    def from_four_on(size: float) -> Any:
        def change(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            cos[:, 4:] *= size
            sin[:, 4:] *= size
            return cos, sin

        return change

    distance_profiles(dec, [rotary_with(inputs, from_four_on(1.005))])  # as a coarse table is off
    with pytest.raises(UserError, match="no rotation by the distance alone"):
        distance_profiles(dec, [rotary_with(inputs, from_four_on(1.1))])
    with pytest.raises(UserError, match="no rotation by the distance alone"):  # positions that start again
        distance_profiles(
            dec, [rotary_with(inputs, lambda c, s: (c[:, [0, 1, 2, 3, 0, 1, 2]], s[:, [0, 1, 2, 3, 0, 1, 2]]))]
        )
    whole = rotary_with(inputs, lambda c, s: (1.3 * c, 1.3 * s))  # a scale is none of position's
    torch.testing.assert_close(
        distance_profiles(dec, [whole]).profile_PT,
        1.69 * distance_profiles(dec, [inputs]).profile_PT,
        rtol=1e-4,
        atol=1e-6,
    )
    with pytest.raises(UserError, match="differ between texts"):
        distance_profiles(dec, [inputs, whole])


def test_layers_without_a_profile() -> None:
    inputs, dec = layer({})
    with pytest.raises(UserError, match=r"layer 3 has no rotary embedding.*by_position in features\.parquet"):
        distance_profiles(dec, [inputs])
    inputs, dec = layer({"rotary": "half", "mask": "bidirectional"})
    with pytest.raises(UserError, match="keys behind them"):
        distance_profiles(dec, [inputs])
    inputs, dec = layer({"rotary": "half"})
    visible = inputs.rule.visible_BQK.clone()
    visible[:, 5, 2] = False
    with pytest.raises(UserError, match="no function of the distance"):
        distance_profiles(dec, [replace(inputs, rule=replace(inputs.rule, visible_BQK=visible))])
    with pytest.raises(UserError, match="at least one batch"):
        distance_profiles(dec, [])
