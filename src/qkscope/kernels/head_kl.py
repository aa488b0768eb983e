"""The pattern's KL from scores that come one head at a time, and their gradient, never holding more than one head's.

    KL(P ‖ softmax(mask(cap(s))))          ∂KL_r/∂s_rj = (P̂_rj - P_rj) · cap'(s_rj)

The loss is a weighted sum of rows, so a head's gradient is known as soon as its scores are: it takes their place, and
whoever made the scores hands it on before the next head's. On a CPU it is found in blocks of queries, with the steps of
pattern_kl.py.

Shapes as in attention.py; R queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .pattern_kl import CPU_BLOCK, MASKED, cap_, patterns_, query_blocks

OfHead = Callable[[int], Tensor]
"""A head's scores [B, Q, K], before cap and mask."""
Block = tuple[slice, slice, slice, slice, Tensor | None]
"""Sequences, queries and the keys that they see; among these, those with a mask, and what it adds."""


class HeadKL:
    """One layer's true pattern on one batch, for scores of its heads."""

    def __init__(
        self,
        q_BTNH: Tensor,
        k_BTGH: Tensor,
        visible_BQK: Tensor,
        weight_BQ: Tensor,
        sink_N: Tensor | None,
        softcap: float | None,
    ) -> None:
        """True queries and keys rotated already, float32, the scale in q; `weight`: of each row, for all heads."""
        self.q_BTNH, self.k_BTGH, self.weight_BQ = q_BTNH, k_BTGH, weight_BQ
        self.sink_N, self.softcap = sink_N, softcap
        self.blocks = _blocks(visible_BQK, len(q_BTNH))
        sizes = (math.prod(part.stop - part.start for part in block[:3]) for block in self.blocks)
        self.largest = max(sizes, default=0)

    @property
    def n_heads(self) -> int:
        return self.q_BTNH.shape[2]

    def rows_(self, head: int, scores_BQK: Tensor, *, gradient: bool) -> Tensor:
        """KL of each row in nats [B, Q] under a head's scores before cap and mask; they may be turned round in memory.

        The scores are lost; with `gradient` that of Σ weight · KL takes their place.
        """
        q_BQH, k_BKH = self.q_BTNH[:, :, head], self.k_BTGH[:, :, head * self.k_BTGH.shape[2] // self.n_heads]
        sink = None if self.sink_N is None else self.sink_N[head].float()
        rows_BQ = torch.empty_like(self.weight_BQ)
        # Kept: fresh pages for each block would take as long as its products.
        work = scores_BQK.new_empty(5, self.largest)
        for b, queries, keys, hull, mask in self.blocks:
            hat_BRK = scores_BQK[b, queries, keys]
            space = work[:, : hat_BRK.numel()].view(5, *hat_BRK.shape)
            both = space[:2]
            torch.bmm(q_BQH[b, queries], k_BKH[b, keys].mT, out=both[0])
            both[1].copy_(hat_BRK)
            slope = None if self.softcap is None else cap_(both, self.softcap)
            if mask is not None:
                both[..., hull] += mask
            sink_BR1 = None if sink is None else sink.expand(*hat_BRK.shape[:2], 1)
            true, rows_1BR1 = patterns_(both, sink_BR1, space[2:])
            rows_BQ[b, queries] = rows_1BR1[0, ..., 0]
            if not gradient:
                continue
            found = both[1].sub_(true).mul_(self.weight_BQ[b, queries, None])
            hat_BRK.copy_(found if slope is None else found.mul_(slope[0]))
            for unseen in (slice(keys.start), slice(keys.stop, None)):
                scores_BQK[b, queries, unseen] = 0
        return rows_BQ


def _blocks(visible_BQK: Tensor, batch: int) -> Sequence[Block]:
    """On a CPU some queries of a sequence against the keys that they see; a GPU takes a head's rows all at once."""
    length = visible_BQK.shape[1]
    if visible_BQK.device.type != "cpu":
        everything = slice(0, length)
        return [(slice(0, batch), everything, everything, everything, torch.where(visible_BQK, 0.0, MASKED))]
    of_mask = [list(query_blocks(visible_QK, max(CPU_BLOCK // length, 1))) for visible_QK in visible_BQK]
    return [(slice(b, b + 1), *block) for b in range(batch) for block in of_mask[b % len(of_mask)]]


class _Headwise(torch.autograd.Function):
    """Σ weight · KL over heads of differentiable scores; each head's gradient is handed on before the next is made."""

    @staticmethod
    def forward(ctx: Any, kl: HeadKL, heads_of: Callable[..., OfHead], *leaves: Tensor) -> Any:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        inner = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        sums: dict[int, Tensor] = {}
        rows = []
        with torch.set_grad_enabled(bool(wanted)):
            one = heads_of(*inner)
            for head in range(kl.n_heads):
                scores_BQK = one(head)
                gradient_BQK = scores_BQK.detach()  # in the scores' place, which nobody needs again
                rows.append(kl.rows_(head, gradient_BQK, gradient=scores_BQK.requires_grad))
                if scores_BQK.requires_grad:
                    found = torch.autograd.grad(
                        scores_BQK, [inner[i] for i in wanted], gradient_BQK, retain_graph=True, allow_unused=True
                    )
                    for i, grad in zip(wanted, found, strict=True):
                        if grad is not None:
                            sums[i] = sums[i] + grad if i in sums else grad
                    del found
                del scores_BQK, gradient_BQK  # and what made them, before the next head's are made
        return returned(ctx, kl, torch.stack(rows, 1), [sums.get(i) for i in range(len(leaves))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *handed(ctx, grads[0])


def headwise_kl(kl: HeadKL, heads_of: Callable[..., OfHead], *leaves: Tensor) -> tuple[Tensor, Tensor]:
    """Σ weight · KL, differentiable in the leaves, and the KL of each row [B, N, Q] without gradients.

    `heads_of` makes scores of the leaves.
    """
    return _Headwise.apply(kl, heads_of, *leaves)  # type: ignore[return-value]


def returned(ctx: Any, kl: HeadKL, rows_BNQ: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """What a KL's function gives, its gradients being kept."""
    ctx.save_for_backward(*grads)
    ctx.mark_non_differentiable(rows_BNQ)
    return (rows_BNQ * kl.weight_BQ[:, None]).sum(), rows_BNQ


def handed(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    return [None if kept is None else kept * grad for kept in ctx.saved_tensors]
