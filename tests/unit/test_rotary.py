"""Rotations read off a model file's own function: their inverse and their layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as interleaved
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split

from qkscope.rotary import RotaryCall, RotaryLayout

T, N, H = 40, 3, 16


def tables(width: int, scale: float = 1.0, positions: int = T) -> tuple[Tensor, Tensor]:
    """cos, sin [1, T, width] as a model makes them: the angles of width/2 frequencies, twice over."""
    angles = torch.arange(positions)[:, None] * 50.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos() * scale, angles.sin() * scale


def layout(function: Callable, width: int, first: int = 0) -> tuple[RotaryLayout, Tensor, Tensor]:
    """The layout probed from a call on part of each head, with the queries before [T, N, H] and after it."""
    q = torch.randn(1, N, T, H, generator=torch.Generator().manual_seed(1))
    cos, sin = tables(width)
    handled = H if function is partial else width
    inner = q[..., first : first + handled]
    result = function(inner, inner, cos, sin)
    turned = torch.cat([q[..., :first], result[0], q[..., first + handled :]], -1)
    found = RotaryLayout.probe(RotaryCall(function, (inner, inner, cos, sin), {}, result), turned)
    assert found is not None
    return found, q.transpose(1, 2), turned.transpose(1, 2)


LAYOUTS = [
    pytest.param(half_split, 16, 0, id="half-split"),
    pytest.param(half_split, 8, 0, id="first-dimensions-only"),
    pytest.param(half_split, 8, 8, id="last-dimensions-only"),
    pytest.param(partial, 8, 0, id="partial-inside-the-function"),
    pytest.param(interleaved, 16, 0, id="interleaved"),
    pytest.param(interleaved, 8, 8, id="interleaved-last-dimensions"),
]


@pytest.mark.parametrize(("function", "width", "first"), LAYOUTS)
def test_layout_reproduces_the_function(function: Callable, width: int, first: int) -> None:
    found, before, after = layout(function, width, first)
    rotary = found.rotary(*tables(width))
    entered = before.clone()
    if function is interleaved:  # described in the order in which the function hands it back: evens, then odds
        part = before[..., first : first + width]
        entered[..., first : first + width] = torch.cat([part[..., 0::2], part[..., 1::2]], -1)
    torch.testing.assert_close(rotary.rotate(entered), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotary.unrotate(after), entered, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, entered, atol=0.1)


@pytest.mark.parametrize(("function", "width", "first"), LAYOUTS)
def test_partners_are_mutual_and_the_rest_stands_still(function: Callable, width: int, first: int) -> None:
    found, _, _ = layout(function, width, first)
    partner, every = found.partner_H, torch.arange(H)
    assert torch.equal(partner[partner], every)
    assert torch.equal(partner != every, (every >= first) & (every < first + width))


def test_layout_is_not_found_in_other_queries() -> None:
    cos, sin = tables(H)
    q = torch.randn(1, N, T, H)
    call = RotaryCall(half_split, (q, q, cos, sin), {}, half_split(q, q, cos, sin))
    assert RotaryLayout.probe(call, call.result[0] * 1.01) is None
    assert RotaryLayout.probe(RotaryCall(half_split, (q, q), {"cos": cos, "sin": sin}, call.result), q) is None


@pytest.mark.parametrize("scale", [1.0, 0.7, 1.37])
def test_unrotate_is_the_inverse_with_scaled_tables(scale: float) -> None:
    found, before, _ = layout(half_split, H)
    rotary = found.rotary(*tables(H, scale))
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(before)), before, rtol=1e-5, atol=1e-5)
    norm = rotary.rotate(before).norm(dim=-1)
    torch.testing.assert_close(norm, scale * before.norm(dim=-1))


def test_tables_of_a_batch_keep_their_sequences() -> None:
    found, before, _ = layout(half_split, H)
    cos, sin = tables(H, positions=T + 5)
    early, late = (cos[:, :T], sin[:, :T]), (cos[:, 5:], sin[:, 5:])
    both = found.rotary(torch.cat([early[0], late[0]]), torch.cat([early[1], late[1]]))
    rotated = both.rotate(before.expand(2, -1, -1, -1))
    torch.testing.assert_close(rotated[:1], found.rotary(*early).rotate(before))
    torch.testing.assert_close(rotated[1:], found.rotary(*late).rotate(before))
