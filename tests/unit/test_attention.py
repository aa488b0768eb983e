"""AttentionSite on a tiny model of every supported architecture.

The reference is always the model itself, on a copy that the site never touched: its own eager weights, or what a
recording function of the test's own was handed.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from functools import cache
from typing import Any

import pytest
import torch
from tiny import BIDIRECTIONAL, LEARNED_POSITIONS, NAMES, UNSUPPORTED, VOCABULARY, WINDOW, tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from qkscope import routing
from qkscope.attention import AttentionInputs, AttentionSite, PatternRule, harvest, open_sites
from qkscope.errors import UserError
from qkscope.models import blocks_through
from qkscope.rotary import Rotary

T = 19  # longer than every sliding window, and not the length that a site checks itself with
CASES = [pytest.param(name, layer, id=f"{name}-{layer}") for name in NAMES for layer in (0, 1)]
ROTARY = [name for name in NAMES if name not in LEARNED_POSITIONS]

_handed: list[tuple[nn.Module, Tensor, Tensor]] = []


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    _handed.append((module, query.transpose(1, 2), key.transpose(1, 2)))
    function = inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]
    return function(module, query, key, value, *args, **kwargs)


AttentionInterface.register("test_recorder", _record)
AttentionMaskInterface.register("test_recorder", eager_mask)


@cache
def sites(name: str) -> list[AttentionSite]:
    """Both layers of a tiny model, opened once; no test changes them."""
    return open_sites(tiny_model(name), None, [0, 1])


@cache
def reference(name: str, implementation: str = "eager") -> nn.Module:
    """The same model, untouched by any site."""
    model = tiny_model(name)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    return model


@cache
def batch() -> tuple[Tensor, Tensor]:
    """Four sequences of other tokens than a site checks itself with: whole, padded right, padded left, and both."""
    tokens = torch.randint(3, VOCABULARY, (4, T), generator=torch.Generator().manual_seed(7))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 12:] = False
    real[2, :6] = False
    real[3, :3], real[3, 15:] = False, False
    return tokens.where(real, 0), real


@cache
def harvested(name: str) -> list[AttentionInputs]:
    return harvest(sites(name), *batch())


@torch.no_grad()
def run(model: nn.Module, tokens: Tensor, real: Tensor, **named: Any) -> Tensor:
    output = model(input_ids=tokens, attention_mask=real.long(), **named)
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def inputs_of(site: AttentionSite, tokens: Tensor, **named: Any) -> AttentionInputs:
    """What a site sees when the model is called with other arguments than `harvest` calls it with."""
    seen: list[AttentionInputs] = []

    def take(inputs: AttentionInputs) -> Tensor:
        seen.append(inputs)
        return inputs.log_pattern_BNQK.exp()

    with site.replace_pattern(take):
        site.model(input_ids=tokens, **named)
    return seen[0]


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# The pattern is the model's own ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_pattern_is_the_models_own(name: str, layer: int) -> None:
    tokens, real = batch()
    with torch.no_grad():
        own = reference(name)(input_ids=tokens, attention_mask=real.long(), output_attentions=True).attentions[layer]
    mine = harvested(name)[layer].log_pattern_BNQK.exp()
    rows = real[:, None, :, None].expand_as(own)
    close(mine[..., :T][rows], own[rows])
    close(mine.sum(-1), torch.ones_like(mine.sum(-1)))
    visible = (own > 0).sum(-1).clamp(min=1)
    entropy = -(own * own.clamp(min=1e-30).log()).sum(-1)
    assert (visible.float().log() - entropy)[real[:, None].expand_as(entropy)].mean() > 0.1  # no uniform pattern


@pytest.mark.parametrize("name", NAMES)
def test_what_a_mask_hides_stays_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain causal masks are left to the fused kernel, also with padding on the right; with padding on the left, a
    window or both ways it is handed the mask."""
    whole = T * (T + 1) // 2
    plain = [inputs.rule.visible_BQK[0].sum() == whole and name not in BIDIRECTIONAL for inputs in harvested(name)]
    here, untouched = sites(name)[0].model, reference(name)
    masks: list[tuple[Tensor | None, bool]] = []
    fused = routing.sdpa_attention_forward

    def noted(*args: Any, **named: Any) -> Any:
        masks.append((args[4], named.get("is_causal", False)))
        return fused(*args, **named)

    monkeypatch.setattr(routing, "sdpa_attention_forward", noted)
    tokens, real = batch()
    for rows in (slice(0, 1), slice(0, 2), slice(0, 4)):
        masks.clear()
        found, wanted = (run(model, tokens[rows], real[rows]) for model in (here, untouched))
        scale = wanted[real[rows]].abs().max()
        assert (found - wanted)[real[rows]].abs().max() <= 2e-3 * scale
        assert not masks or [causal for _, causal in masks] == [rows.stop <= 2 and causal for causal in plain]
        assert all(mask is None for mask, causal in masks if causal)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3_text", "bert"])
def test_in_plain_batches_masks_are_looked_at_once_a_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, untouched = open_sites(tiny_model(name), None, [0])[0].model, reference(name)
    looked: list[int] = []
    visible = routing._visible

    def noted(mask: Tensor, *rest: Tensor) -> Tensor:
        looked.append(mask.shape[2])
        return visible(mask, *rest)

    monkeypatch.setattr(routing, "_visible", noted)
    tokens, real = (part[:2] for part in batch())
    lengths = [14, T, WINDOW - 1, WINDOW, 13, 14, T]
    with routing.plain_batches():
        for length in lengths:
            found, wanted = (run(model, tokens[:, :length], real[:, :length]) for model in (here, untouched))
            wanted = wanted[real[:, :length]]
            assert (found[real[:, :length]] - wanted).abs().max() <= 2e-3 * wanted.abs().max()
    # What was seen of a length says what shorter ones are, where it was causal, and longer ones, where it was not.
    # Without padding BERT makes no mask.
    window = [14, WINDOW - 1, WINDOW, 13]
    wanted = {"gpt2": [14, T], "mistral": window, "bert": [14, 13], "gemma3_text": [14, T, *window]}
    assert sorted(looked) == sorted(wanted[name])
    looked.clear()
    run(here, tokens, real)
    assert looked  # outside of them each is


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_no_mass_where_nothing_is_visible(name: str, layer: int) -> None:
    real = batch()[1]
    pattern = harvested(name)[layer].log_pattern_BNQK.exp()[..., :T]
    layer_types = getattr(sites(name)[0].model.config, "layer_types", None)
    sliding = name in ("mistral", "starcoder2") or (layer_types or [""])[layer % len(layer_types or [""])].startswith(
        "sliding"
    )
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    allowed = real[:, None, :].expand(-1, T, -1)
    if name not in BIDIRECTIONAL:
        allowed = allowed & (distance >= 0)
    if sliding:
        allowed = allowed & (distance < WINDOW)
    rows = real[:, None, :, None].expand_as(pattern)
    allowed = allowed[:, None].expand_as(pattern)
    assert torch.all(pattern[rows & ~allowed] == 0)  # exactly: a fill of -1e9 or less would leak
    assert torch.all(pattern[rows & allowed] > 0)


@pytest.mark.parametrize("name", NAMES)
def test_kind_of_model(name: str) -> None:
    for site in sites(name):
        assert site.bidirectional is (name in BIDIRECTIONAL)
        assert site.has_head is (name not in BIDIRECTIONAL)
        inputs = harvested(name)[site.layer]
        widths = {"D": 32, "N": 4, "G": inputs.k_BTGH.shape[2], "H": inputs.q_BTNH.shape[3]}
        assert site.shape == widths
        assert inputs.x_BTD.shape == (4, T, 32)
        assert inputs.q_BTNH.shape == (4, T, 4, widths["H"])
        assert torch.equal(inputs.real_BT, batch()[1])


# Queries and keys are those that enter the rotary embedding ------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_rotated_again_equal_what_attention_was_handed(name: str) -> None:
    tokens, real = batch()
    _handed.clear()
    run(reference(name, "test_recorder"), tokens, real)
    assert len(_handed) == 2
    for (_, q, k), inputs in zip(_handed, harvested(name), strict=True):
        rotary = inputs.rule.rotary
        if rotary is None:
            assert name in LEARNED_POSITIONS or name == "cohere2"
            close(inputs.q_BTNH[real], q[real])
            close(inputs.k_BTGH[real], k[real])
        else:
            close(rotary.rotate(inputs.q_BTNH)[real], q[real], 1e-4)
            close(rotary.rotate(inputs.k_BTGH)[real], k[real], 1e-4)
            assert not torch.allclose(inputs.q_BTNH[:, 1:], q[:, 1:], atol=0.1)


def test_layers_without_a_rotary_embedding_are_known() -> None:
    without = {name: [s.layer for s in sites(name) if s.layout is None] for name in NAMES}
    assert {n: layers for n, layers in without.items() if layers} == {
        **{name: [0, 1] for name in LEARNED_POSITIONS},
        "cohere2": [1],
    }


@pytest.mark.parametrize("name", ROTARY)
def test_a_token_has_the_same_query_and_key_at_every_position(name: str) -> None:
    tokens = torch.full((1, T), 9)
    inputs = harvest(sites(name)[:1], tokens, tokens > 0)[0]
    for y in (inputs.q_BTNH, inputs.k_BTGH):
        close(y, y[:, :1].expand_as(y))
        assert not torch.allclose(y[:, :, 0], y[:, :, -1]) or y.shape[2] == 1


@pytest.mark.parametrize("name", ROTARY)
def test_queries_and_keys_do_not_move_with_the_sequence(name: str) -> None:
    tokens = batch()[0][:1]
    for site in sites(name):
        here = inputs_of(site, tokens, position_ids=torch.arange(T)[None])
        there = inputs_of(site, tokens, position_ids=torch.arange(T)[None] + 11)
        close(there.q_BTNH, here.q_BTNH, 2e-4)
        close(there.k_BTGH, here.k_BTGH, 2e-4)
        close(there.log_pattern_BNQK.exp(), here.log_pattern_BNQK.exp(), 2e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_query_is_the_projection_of_x(name: str) -> None:
    for site, inputs in zip(sites(name), harvested(name), strict=True):
        module, x = site.module, inputs.x_BTD
        heads = {"q": 4, "k": 2}
        for side, found in (("q", inputs.q_BTNH), ("k", inputs.k_BTGH)):
            weight = getattr(module, f"{side}_proj").weight
            by_hand = (x @ weight.T).unflatten(-1, (heads[side], -1))
            if name == "qwen3":
                norm = getattr(module, f"{side}_norm")
                by_hand = by_hand * (by_hand.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
            close(found, by_hand)


# Replacing the pattern -------------------------------------------------------------------------------


def uniform(inputs: AttentionInputs) -> Tensor:
    visible = inputs.rule.visible_BQK[:, None].expand_as(inputs.log_pattern_BNQK[..., : inputs.x_BTD.shape[1]]).float()
    return visible / visible.sum(-1, keepdim=True)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_replacing_the_pattern(name: str, layer: int) -> None:
    tokens, real = batch()
    site = sites(name)[layer]
    own = run(reference(name), tokens, real)[real]
    close(run(site.model, tokens, real)[real], own, 1e-4)
    with site.replace_pattern(lambda inputs: inputs.log_pattern_BNQK.exp()):
        close(run(site.model, tokens, real)[real], own, 1e-4)
    with site.replace_pattern(uniform):
        assert (run(site.model, tokens, real)[real] - own).abs().max() > 0.05
    close(run(site.model, tokens, real)[real], own, 1e-4)  # nothing stays behind


def test_a_replaced_pattern_is_multiplied_with_the_values() -> None:
    """A pattern that copies the previous token gives the output that the values give by hand."""
    tokens, real = batch()
    site = sites("llama")[1]
    previous = torch.eye(T).roll(-1, 0)[:, (torch.arange(T) + 2) % T]  # any fixed permutation of positions
    seen: list[Tensor] = []
    x: list[Tensor] = []
    hook = site.module.register_forward_hook(lambda module, args, output: seen.append(output[0]))

    def source(inputs: AttentionInputs) -> Tensor:
        x.append(inputs.x_BTD)
        return previous.expand(*inputs.log_pattern_BNQK.shape)

    with site.replace_pattern(source):
        run(site.model, tokens, real)
    hook.remove()
    module: Any = site.module
    value = module.v_proj(x[0]).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
    close(seen[0], module.o_proj(torch.einsum("qk,bknh->bqnh", previous, value).flatten(2)))


@pytest.mark.parametrize("name", NAMES)
def test_layers_below_run_once_and_change_nothing(name: str) -> None:
    model = tiny_model(name)
    site = AttentionSite(model, None, layer=1)
    calls: list[nn.Module] = []
    below, block = blocks_through(model, site.module)

    def passes() -> list[Tensor]:
        calls.clear()
        with torch.no_grad():
            found = [run(model, *batch())]
            with site.replace_pattern(uniform):
                found.append(run(model, *batch()))
        return found

    for one in (below, block):

        def note(module: nn.Module, args: object, one: nn.Module = one) -> None:
            calls.append(one)

        next(one.children()).register_forward_pre_hook(note)
    wanted = passes()
    assert calls == [below, block] * 2
    with site.lower_layers_once():
        found = passes()
        assert calls == [below, block, block]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(*wanted)
    passes()
    assert calls == [below, block] * 2


def test_blocks_that_a_pass_goes_through_again_run_each_time() -> None:
    model: Any = tiny_model("llama")
    model.model.layers = nn.ModuleList([*model.model.layers, *model.model.layers])
    model.config.num_hidden_layers = 4
    model.config.layer_types = ["full_attention"] * 4
    site: Any = AttentionSite.__new__(AttentionSite)  # no site would open on it
    site.model, site.module = model, model.model.layers[1].self_attn
    with torch.no_grad():
        wanted = site._forward(*batch()).logits
        with site.lower_layers_once():
            assert all(torch.equal(site._forward(*batch()).logits, wanted) for _ in range(2))


def test_running_once_leaves_a_forward_of_ones_own_in_its_place() -> None:
    model: Any = tiny_model("llama")
    site = AttentionSite(model, None, layer=1)
    own = model.model.layers[0].forward
    model.model.layers[0].forward = own
    with pytest.raises(KeyboardInterrupt), site.lower_layers_once():
        raise KeyboardInterrupt
    assert vars(model.model.layers[0])["forward"] is own and "forward" not in vars(model.model.layers[1])


def test_a_site_cannot_be_replaced_twice_at_once() -> None:
    site = sites("llama")[0]
    with site.replace_pattern(uniform), pytest.raises(RuntimeError, match="layer 0 is already"):
        harvest([site], *batch())
    harvest([site], *batch())


def test_pairs_are_handed_to_a_decomposition() -> None:
    class Decomposition:
        def head_source(self, pairs: str) -> Any:
            asked.append(pairs)
            return uniform

    asked: list[str] = []
    with sites("llama")[0].replace_pattern(Decomposition(), pairs="all"):
        found = run(sites("llama")[0].model, *batch())
    with sites("llama")[0].replace_pattern(uniform):
        assert torch.equal(found, run(sites("llama")[0].model, *batch()))
    assert asked == ["all"]


# Batches and layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batches_keep_their_sequences(name: str) -> None:
    tokens, real = batch()
    for b in range(len(tokens)):
        alone = harvest(sites(name), tokens[b : b + 1], real[b : b + 1])
        for one, together in zip(alone, harvested(name), strict=True):
            here = real[b]
            close(one.x_BTD[0, here], together.x_BTD[b, here], 1e-4)
            close(one.q_BTNH[0, here], together.q_BTNH[b, here], 1e-4)
            close(one.k_BTGH[0, here], together.k_BTGH[b, here], 1e-4)
            close(one.log_pattern_BNQK.exp()[0][:, here], together.log_pattern_BNQK.exp()[b][:, here], 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_at_padding_does_not_matter(name: str) -> None:
    tokens, real = batch()
    other = harvest(sites(name), tokens.where(real, 5), real)
    for a, b in zip(harvested(name), other, strict=True):
        close(a.x_BTD[real], b.x_BTD[real], 1e-4)
        close(a.log_pattern_BNQK.exp().transpose(1, 2)[real], b.log_pattern_BNQK.exp().transpose(1, 2)[real], 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_several_layers_in_one_pass(name: str) -> None:
    for site, together in zip(sites(name), harvested(name), strict=True):
        alone = harvest([site], *batch())[0]
        real = alone.real_BT  # a padded query's own pattern is nobody's business
        close(alone.x_BTD[real], together.x_BTD[real], 1e-4)
        close(alone.q_BTNH[real], together.q_BTNH[real], 1e-4)
        close(alone.k_BTGH[real], together.k_BTGH[real], 1e-4)
        close(
            alone.log_pattern_BNQK.exp().transpose(1, 2)[real],
            together.log_pattern_BNQK.exp().transpose(1, 2)[real],
            1e-4,
        )


def test_sites_come_back_in_the_order_asked_for() -> None:
    first, second = sites("llama")
    found = harvest([second, first], *batch())
    assert torch.equal(found[0].x_BTD, harvested("llama")[1].x_BTD)
    assert torch.equal(found[1].x_BTD, harvested("llama")[0].x_BTD)


def test_harvest_stops_after_the_last_wanted_layer() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=3)
    opened = open_sites(model, None, [0, 1])
    calls: list[str] = []
    for i, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.append(f"attention {i}"))
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(f"mlp {i}"))
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("head"))
    harvest(opened, *batch())
    assert calls == ["attention 0", "mlp 0", "attention 1"]
    calls.clear()
    run(model, *batch())  # and nothing is left behind
    assert calls[-2:] == ["mlp 2", "head"]


def test_harvest_takes_no_gradients() -> None:
    model = tiny_model("llama").requires_grad_(True)
    inputs = harvest(open_sites(model, None, [1]), *batch())[0]
    assert not any(t.requires_grad for t in (inputs.x_BTD, inputs.q_BTNH, inputs.k_BTGH, inputs.log_pattern_BNQK))


# The rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "scales"),
    [
        ("gpt2", {}, [8**-0.5] * 2),
        ("gpt2", {"scale_attn_weights": False}, [1.0, 1.0]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [8**-0.5, 8**-0.5 / 2]),
        ("gpt2:unscaled", {}, [1.0, 0.5]),
        ("granite", {}, [0.7] * 2),
        ("gemma2", {}, [3**-0.5] * 2),
        ("gemma3_text", {}, [3**-0.5] * 2),
        ("opt", {}, [1.0] * 2),  # it scales its queries instead
        ("deepseek_v3", {}, [16**-0.5] * 2),
    ],
)
def test_scale_is_the_models_own(name: str, changes: dict[str, Any], scales: list[float]) -> None:
    opened = open_sites(tiny_model(name, **changes), None, [0, 1]) if changes else sites(name)
    found = harvest(opened, *batch())
    assert [inputs.rule.scaling for inputs in found] == pytest.approx(scales)


def test_opt_scales_inside_its_queries() -> None:
    site, inputs = sites("opt")[0], harvested("opt")[0]
    module: Any = site.module
    close(inputs.q_BTNH.flatten(2), module.q_proj(inputs.x_BTD) * 8**-0.5)


def test_rule_of_each_layer() -> None:
    assert [i.rule.softcap for i in harvested("gemma2")] == [2.0, 2.0]
    for site, inputs in zip(sites("gpt_oss"), harvested("gpt_oss"), strict=True):
        sink: Any = inputs.rule.sink_N
        module: Any = site.module
        assert torch.equal(sink, module.sinks) and sink.abs().min() > 0
        assert inputs.log_pattern_BNQK.shape == (4, 4, T, T + 1)
    tables = [i.rule.rotary for i in harvested("gemma3_text")]  # local and global layers turn at other speeds
    assert tables[0] and tables[1] and not torch.allclose(tables[0].cos_BTH, tables[1].cos_BTH, atol=0.1)


def slow_pattern(rule: PatternRule, q: Tensor, k: Tensor) -> Tensor:
    """`PatternRule.log_pattern(q, k).exp()` in float64, one number at a time, from the formula."""
    b_size, q_size, heads, width = q.shape
    groups = k.shape[2]
    rotary = rule.rotary
    assert rotary is not None and rule.softcap is not None and rule.sink_N is not None
    cos, sin, partner = rotary.cos_BTH.double(), rotary.sin_BTH.double(), rotary.partner_H.tolist()
    q, k = q.double(), k.double()

    def turn(x: Tensor, b: int, t: int) -> list[float]:
        return [float(x[d] * cos[b, t, d] + x[partner[d]] * sin[b, t, d]) for d in range(width)]

    out = torch.zeros(b_size, heads, q_size, q_size + 1, dtype=torch.float64)
    for b in range(b_size):
        for n in range(heads):
            keys = [turn(k[b, j, n // (heads // groups)], b, j) for j in range(q_size)]
            for i in range(q_size):
                query = turn(q[b, i, n], b, i)
                odds = [0.0] * q_size + [math.exp(float(rule.sink_N[n]))]
                for j in range(q_size):
                    if rule.visible_BQK[b, i, j]:
                        score = rule.scaling * sum(x * y for x, y in zip(query, keys[j], strict=True))
                        odds[j] = math.exp(rule.softcap * math.tanh(score / rule.softcap))
                for j in range(q_size + 1):
                    out[b, n, i, j] = odds[j] / sum(odds)
    return out


def full_rule(positions: int = 7, width: int = 4) -> PatternRule:
    """Every part of a rule at once: sliding window, scale, soft cap, sinks, rotary embedding of part of a head."""
    distance = torch.arange(positions)[:, None] - torch.arange(positions)[None]
    visible = ((distance >= 0) & (distance < 4)).expand(2, -1, -1).clone()
    visible[1, :, 0] = False
    visible[1, 0, 0] = True
    angles = torch.arange(positions)[None, :, None] * torch.tensor([0.9, 0.9, 0.0, 0.0]) + torch.tensor([0.0, 0.4])[
        :, None, None
    ] * torch.tensor([1.0, 1.0, 0.0, 0.0])
    sign = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    rotary = Rotary(angles.cos() * 1.2, angles.sin() * sign * 1.2, torch.tensor([1, 0, 2, 3]))
    assert width == 4
    return PatternRule(visible, scaling=0.8, softcap=1.5, sink_N=torch.tensor([0.3, -0.5, 1.0, 0.1]), rotary=rotary)


def test_rule_against_a_slow_float64_reference() -> None:
    rule = full_rule()
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 7, 4, 4, generator=generator) * 2, torch.randn(2, 7, 2, 4, generator=generator) * 2
    found = rule.log_pattern(q, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().double(), slow_pattern(rule, q, k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sink", [None, torch.zeros(4)])
def test_shift_free_says_whether_a_row_constant_matters(softcap: float | None, sink: Tensor | None) -> None:
    rule = PatternRule(torch.ones(7, 7).tril().bool()[None], scaling=0.5, softcap=softcap, sink_N=sink)
    assert rule.shift_free is (softcap is None and sink is None)
    scores = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(5))
    constant = torch.linspace(-2, 2, 28).reshape(1, 4, 7, 1)
    before = rule.masked(rule.cap(scores)).softmax(-1)
    after = rule.masked(rule.cap(scores + constant)).softmax(-1)
    assert torch.allclose(before, after, atol=1e-6) is rule.shift_free


def test_what_a_rule_does_to_masked_scores() -> None:
    rule = PatternRule(torch.ones(3, 3).tril().bool()[None], scaling=1.0)
    masked = rule.masked(torch.full((1, 2, 3, 3), -1e30))  # lower than any finite fill that somebody might choose
    assert torch.all(masked[..., 0, 1:] == -torch.inf)
    assert torch.equal(masked.softmax(-1)[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


# Precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    opened = open_sites(model, None, [1])
    inputs = harvest(opened, *batch())[0]
    assert inputs.x_BTD.dtype == torch.bfloat16
    assert inputs.q_BTNH.dtype == inputs.k_BTGH.dtype == inputs.log_pattern_BNQK.dtype == torch.float32
    _handed.clear()
    model.set_attn_implementation("test_recorder")  # type: ignore[operator]
    run(model, *batch())
    model.set_attn_implementation("qkscope")  # type: ignore[operator]
    q = inputs.q_BTNH if inputs.rule.rotary is None else inputs.rule.rotary.rotate(inputs.q_BTNH)
    real = batch()[1]
    close(q[real], _handed[1][1][real].float(), 0.2)
    with opened[0].replace_pattern(lambda inputs: inputs.log_pattern_BNQK.exp()):
        assert run(model, *batch()).dtype == torch.bfloat16


# Refusals --------------------------------------------------------------------------------------------


def refusal(model: nn.Module, layer: int = 0) -> str:
    """The one line that a site refuses the model with."""
    with pytest.raises(UserError) as caught:
        AttentionSite(model, layer=layer)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


@pytest.mark.parametrize("layer", [-1, 2, 99])
def test_refuses_a_layer_that_is_not_there(layer: int) -> None:
    assert f"layer {layer} is out of range" in refusal(tiny_model("llama"), layer)


@pytest.mark.parametrize("name", ["bloom", "gptj", "mpt"])
def test_refuses_a_model_outside_the_registry(name: str) -> None:
    line = refusal(tiny_model(name))
    assert line.startswith(f"{name} does not route its attention") and "llama" in line


def test_refuses_an_encoder_decoder() -> None:
    assert "encoder-decoder" in refusal(tiny_model("t5"))
    assert set(UNSUPPORTED) == {"bloom", "gptj", "mpt", "t5"}


def rewritten(model: nn.Module, monkeypatch: pytest.MonkeyPatch, old: str, new: str, **names: Any) -> nn.Module:
    """Swap a piece of text in the source of LlamaAttention.forward, as a model file of another architecture has it."""
    source = textwrap.dedent(inspect.getsource(LlamaAttention.forward))
    assert old in source
    for key, value in names.items():
        monkeypatch.setattr(modeling_llama, key, value, raising=False)
    scope: dict[str, Any] = {}
    exec(source.replace(old, new), modeling_llama.__dict__, scope)
    monkeypatch.setattr(LlamaAttention, "forward", scope["forward"])
    return model


HANDS_OVER = "attn_output, attn_weights = attention_interface("


def test_refuses_an_attention_that_scales_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own eager function is not what the handed arguments say."""
    own = modeling_llama.eager_attention_forward

    def tampered(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, query * 1.1, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", tampered)
    assert "is off by" in refusal(tiny_model("llama"))


def test_refuses_queries_that_change_after_the_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewritten(
        tiny_model("llama"), monkeypatch, HANDS_OVER, f"query_states = query_states * 1.1\n    {HANDS_OVER}"
    )
    assert "changes its queries after the rotary embedding" in refusal(model)


def test_refuses_keys_that_change_with_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = "torch.linspace(1, 2, key_states.shape[2])[:, None]"
    model = rewritten(
        tiny_model("llama"), monkeypatch, HANDS_OVER, f"key_states = key_states * {ramp}\n    {HANDS_OVER}"
    )
    assert "depend on the position" in refusal(model)


def test_refuses_a_rotary_embedding_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unnoticed, it would silently hand over queries as they leave the rotary embedding."""
    model = rewritten(
        tiny_model("llama"),
        monkeypatch,
        "apply_rotary_pos_emb(",
        "turn_by_position(",
        turn_by_position=modeling_llama.apply_rotary_pos_emb,
    )
    for layer in (0, 1):
        assert "depend on the position" in refusal(model, layer)


def test_refuses_a_rotary_embedding_called_through_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaAttention, "turn", staticmethod(modeling_llama.apply_rotary_pos_emb), raising=False)
    model = rewritten(tiny_model("llama"), monkeypatch, "apply_rotary_pos_emb(", "self.turn(")
    assert "depend on the position" in refusal(model)


def test_refuses_rotary_tables_given_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    call = "apply_rotary_pos_emb(query_states, key_states, cos, sin)"
    by_name = "apply_rotary_pos_emb(query_states, key_states, cos=cos, sin=sin)"
    model = rewritten(tiny_model("llama"), monkeypatch, call, by_name)
    assert "rotary embedding" in refusal(model)


def test_refuses_a_pattern_that_takes_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rewritten(
        tiny_model("llama"),
        monkeypatch,
        "attn_output = self.o_proj(attn_output)",
        "attn_output = self.o_proj(0 * attn_output)",
    )
    assert "does not act as it should" in refusal(model)


def test_a_refused_model_still_runs() -> None:
    model = tiny_model("llama")
    refusal(model, 7)
    close(run(model, *batch()), run(reference("llama"), *batch()), 1e-4)
