"""Rotary position embeddings of any model, as one small value: two tables and a permutation.

Every rotary embedding mixes each head dimension with one partner dimension:

    rotated[d] = x[d] · cos[p, d] + x[partner[d]] · sin[p, d]         (p the position, sin signed)

Architectures differ in which dimensions are partners, which are left alone, where in the head the rotated part lies
and whether it is re-ordered on the way. None of that is written down here: it is read off the model file's own function
by calling it on unit vectors, so a new layout needs no new code. A model that re-orders (DeepSeek's interleaved layout)
is described in the order it leaves the function with; queries and keys are re-ordered alike, so scores do not change.

Shapes: B sequences, T positions, n heads (query or key), H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Swap(torch.autograd.Function):
    """x[..., partner]; partners come in pairs, so the gradient is the same exchange (autograd would scatter)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, partner_H: Tensor) -> Tensor:
        ctx.save_for_backward(partner_H)
        return x[..., partner_H]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][..., ctx.saved_tensors[0]], None


def swap(x: Tensor, partner_H: Tensor) -> Tensor:
    """Each head dimension's partner in its place."""
    return _Swap.apply(x, partner_H)  # type: ignore[return-value]


@dataclass(frozen=True)
class Rotary:
    """The rotation R_p at each position of a batch; `cos`, `sin` are float32 [B or 1, T, H], `partner` int64 [H]."""

    cos_BTH: Tensor
    sin_BTH: Tensor
    partner_H: Tensor

    def rotate(self, x_BTnH: Tensor) -> Tensor:
        """R_p x, for x [B, T, n, H]."""
        cos, sin = self.cos_BTH[:, :, None], self.sin_BTH[:, :, None]
        return x_BTnH * cos + swap(x_BTnH, self.partner_H) * sin

    def unrotate(self, y_BTnH: Tensor) -> Tensor:
        """The x whose rotation is y: the inverse of `rotate`, also where the tables carry a scale."""
        cos, sin = self.cos_BTH[:, :, None], self.sin_BTH[:, :, None]
        return (y_BTnH * cos - y_BTnH[..., self.partner_H] * sin) / (cos * cos + sin * sin)

    def of_sequence(self, b: int, length: int) -> Rotary:
        """The tables of one sequence's first `length` positions."""
        b = b if len(self.cos_BTH) > 1 else 0
        return Rotary(self.cos_BTH[b : b + 1, :length], self.sin_BTH[b : b + 1, :length], self.partner_H)

    def phases(self) -> tuple[Tensor, Tensor]:
        """The same rotation on complex numbers: an order of the head dimensions in which partners are neighbours, [H],
        and the factor of each neighbouring pair, complex [B or 1, T, H/2]. One product and no exchange of places."""
        here = torch.arange(len(self.partner_H), device=self.partner_H.device)
        first = here[here < self.partner_H]
        alone = here[here == self.partner_H]  # dimensions that are left as they are pair up with each other
        order = torch.cat([torch.stack([first, self.partner_H[first]], 1).flatten(), alone])
        # z = x₁ + i x₂ turns into z (cos + i sin₂): sin is signed, and sin₁ = -sin₂.
        return order, torch.complex(self.cos_BTH[..., order[::2]], self.sin_BTH[..., order[1::2]])


@dataclass(frozen=True)
class RotaryCall:
    """One recorded call of a model file's rotary function: `function(q, k, cos, sin, *rest, **named)`."""

    function: Callable[..., tuple[Tensor, Tensor]]
    args: tuple
    named: dict
    result: tuple[Tensor, Tensor]

    def on(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The function's answer for other queries [1, n, T, r] and tables."""
        return self.function(q, q, cos, sin, *self.args[4:], **self.named)[0]


@dataclass(frozen=True)
class RotaryLayout:
    """How one attention module uses its rotary function; found once, then applied to each batch's tables."""

    call: RotaryCall
    first: int
    """Where in the head the function's output starts."""
    width: int
    """Head dimensions the function handles."""
    head_width: int
    partner_H: Tensor

    @classmethod
    def probe(cls, call: RotaryCall, q_BnTH: Tensor) -> RotaryLayout | None:
        """Read the layout off a recorded call and the queries that reached the attention function, [B, n, T, H].

        None where the function's output is not found in those queries (then the caller refuses the model).
        """
        if len(call.args) < 4 or not isinstance(call.result, tuple):
            return None  # not a function of (q, k, cos, sin)
        out = call.result[0]
        width, head_width = out.shape[-1], q_BnTH.shape[-1]
        starts = [s for s in (0, head_width - width) if torch.equal(q_BnTH[..., s : s + width], out)]
        if not starts:
            return None
        first, (cos, _) = starts[0], call.args[2:4]
        eye = torch.eye(width, dtype=cos.dtype, device=cos.device)[None, :, None]  # [1, n=width, T=1, width]
        one = cos.new_ones(1, 1, cos.shape[-1])
        plain = call.on(eye, one, torch.zeros_like(one))[0, :, 0]  # [input, output], a permutation
        turned = call.on(eye, one, one)[0, :, 0] - plain
        order = plain.abs().argmax(0)  # input that each output dimension comes from
        source = turned.abs().argmax(0)  # input that sin brings to each output dimension
        place = torch.empty_like(order).scatter_(0, order, torch.arange(width, device=order.device))
        still = turned.abs().amax(0) == 0
        partner = torch.where(still, torch.arange(width, device=order.device), place[source])
        whole = torch.arange(head_width, device=order.device)
        whole[first : first + width] = partner + first
        return cls(call, first, width, head_width, whole)

    def rotary(self, cos: Tensor, sin: Tensor) -> Rotary:
        """The rotation for one batch's tables as the model hands them to its attention modules, [B or 1, T, r]."""
        ones = cos.new_ones(cos.shape[0], 1, cos.shape[1], self.width)
        turned = self.call.on(ones, cos, sin)[:, 0].float()
        plain = self.call.on(ones, cos, torch.zeros_like(sin))[:, 0].float()
        cos_full = plain.new_ones(*plain.shape[:2], self.head_width)
        sin_full = torch.zeros_like(cos_full)
        cos_full[..., self.first : self.first + self.width] = plain
        sin_full[..., self.first : self.first + self.width] = turned - plain
        return Rotary(cos_full, sin_full, self.partner_H)
