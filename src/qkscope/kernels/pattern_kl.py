"""Step 1's three pattern KLs from queries and keys, with gradients, never holding a pattern.

    KL(P ‖ P(q̂,k̂)),  KL(P ‖ P(q̂,k)),  KL(P ‖ P(q,k̂))          ∂KL_r/∂ŝ_rj = (P̂_rj - P_rj) · cap'(ŝ_rj)

The loss is a weighted sum of rows, so its gradients in q̂ and k̂ are finished while a block is still in the cache, and
the backward pass is one multiplication. A block is some queries of some heads against the keys that these queries see:
keys after a causal block's last query are never touched, nor those before a sliding window. Query heads that share a
key head stand in one block as further rows, so no key is repeated. The true pattern is made anew in each block. Always
float32. On a CUDA device with Triton, pattern_kl_triton.py does the same.

Shapes: M query heads of a key head, R = M · queries rows of a block; others as in attention.py. A leading 4 are the
kinds of scores: q·k (the true ones), q̂·k̂, q̂·k and q·k̂; a leading 3 leaves the true ones out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .row_kl import LOG2_E

CPU_BLOCK = 1 << 18  # scores of one kind in a block: 1 MB
GPU_BLOCK = 1 << 24
ROWS = 64  # most queries in a block
MASKED = -1e30  # finite, for P is 0 there and 0 · -inf is no number; beside any score, e to the power of it is 0

Parts = tuple[float, float, float]
Found = tuple[Tensor, Tensor | None, Tensor | None]


def pattern_kl(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    q_hat_BTNH: Tensor,
    k_hat_BTGH: Tensor,
    visible_BQK: Tensor,
    weight_BQ: Tensor,
    sink_N: Tensor | None,
    softcap: float | None,
    parts: Parts,
) -> tuple[Tensor, Tensor]:
    """KL(P ‖ P(q̂,k̂)), KL(P ‖ P(q̂,k)) and KL(P ‖ P(q,k̂)), each Σ over sequences, heads and queries of weight · KL.

    P(q,k) = softmax(mask(cap(q·k))). Returns the three's sum weighed by `parts`, in nats, differentiable in q̂ and k̂
    and in nothing else, and the three themselves, [3], without gradients.

    Args:
        q_BTNH, k_BTGH: true queries and keys, rotated already, the scale in q; the `hat` ones likewise.
        visible_BQK: bool [B or 1, Q, K], the keys that a query may see, one at least.
        weight_BQ: weight of each query row, the same for all heads.
        sink_N: learned score of each head's sink.
    """
    arrays = (y.float() for y in (q_hat_BTNH, k_hat_BTGH, q_BTNH, k_BTGH))
    sink_N = None if sink_N is None else sink_N.float()
    return _PatternKL.apply(*arrays, visible_BQK, weight_BQ, sink_N, softcap, parts)  # type: ignore[return-value]


class _PatternKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_hat: Tensor, k_hat: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        kl_3, *grads = solver(q.device)(q, k, q_hat, k_hat, *rest, gradients=any(ctx.needs_input_grad))
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(kl_3)
        both, query_only, key_only = (part * kl for part, kl in zip(rest[-1], kl_3, strict=True))
        return both + query_only + key_only, kl_3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = ctx.saved_tensors
        to_q = grad_q * grads[0] if ctx.needs_input_grad[0] else None
        to_k = grad_k * grads[0] if ctx.needs_input_grad[1] else None
        return to_q, to_k, *[None] * 7


@cache
def solver(device: torch.device) -> Callable[..., Found]:
    """Triton's kernels on a CUDA device where Triton is installed, else blocks."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from .pattern_kl_triton import fused

        return fused
    return blocked


def blocked(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    q_hat_BTNH: Tensor,
    k_hat_BTGH: Tensor,
    visible_BQK: Tensor,
    weight_BQ: Tensor,
    sink_N: Tensor | None,
    softcap: float | None,
    parts: Parts,
    *,
    gradients: bool,
) -> Found:
    """The three KLs [3], and the gradients of their weighted sum in q̂ and k̂ (None where they are not asked for)."""
    length, n_groups = k_BTGH.shape[1:3]
    n_each = q_BTNH.shape[2] // n_groups
    size = min(CPU_BLOCK if q_BTNH.device.type == "cpu" else GPU_BLOCK, q_BTNH.shape[2] * ROWS * length)
    size = max(size, n_each * length)
    work = q_BTNH.new_empty(9, size)  # kept: fresh pages for each block would take as long as its products
    kl_3 = q_BTNH.new_zeros(3)
    grad_q, grad_k = torch.empty_like(q_hat_BTNH), torch.zeros_like(k_hat_BTGH)
    for b in range(len(q_BTNH)):
        q, q_hat = (y[b].transpose(0, 1).unflatten(0, (n_groups, n_each)).contiguous() for y in (q_BTNH, q_hat_BTNH))
        k, k_hat = (y[b].transpose(0, 1).contiguous() for y in (k_BTGH, k_hat_BTGH))
        to_q, to_k = grad_q[b].transpose(0, 1).unflatten(0, (n_groups, n_each)), grad_k[b].transpose(0, 1)
        for heads, queries, keys, hull, mask in _blocks(visible_BQK[b % len(visible_BQK)], n_groups, n_each, size):
            true_q, hat_q = (y[heads, :, queries].flatten(1, 2) for y in (q, q_hat))
            true_k, hat_k = k[heads, keys], k_hat[heads, keys]
            weight_R1 = weight_BQ[b, queries].repeat(n_each)[:, None]
            shape = len(true_k), len(weight_R1), true_k.shape[1]
            space = work[:, : math.prod(shape)].view(9, *shape)
            scores = space[:4]
            meet = (true_q, true_k), (hat_q, hat_k), (hat_q, true_k), (true_q, hat_k)
            for out, (left, right) in zip(scores, meet, strict=True):
                torch.bmm(left, right.mT, out=out)
            slope = None if softcap is None else cap_(scores, softcap)
            if mask is not None:
                scores.unflatten(2, (n_each, -1))[..., hull].add_(mask)
            sink = None
            if sink_N is not None:
                sink = sink_N.view(n_groups, n_each, 1)[heads].expand(-1, -1, queries.stop - queries.start)
                sink = sink.flatten(1)[..., None]
            true, rows_kl = patterns_(scores, sink, space[4:])
            kl_3 += (rows_kl * weight_R1).sum((1, 2, 3))
            if not gradients:
                continue
            slopes = scores[1:].sub_(true)
            both, query_only, key_only = slopes if slope is None else slopes.mul_(slope)
            found = torch.bmm(both, hat_k)
            torch.baddbmm(found, query_only, true_k, beta=parts[0], alpha=parts[1], out=found)
            to_q[heads, :, queries] = found.mul_(weight_R1).unflatten(1, (n_each, -1))
            found = torch.bmm(both.mT, hat_q * weight_R1)
            torch.baddbmm(found, key_only.mT, true_q * weight_R1, beta=parts[0], alpha=parts[2], out=found)
            to_k[heads, keys] += found
    return (kl_3, grad_q, grad_k) if gradients else (kl_3, None, None)


def cap_(scores: Tensor, softcap: float) -> Tensor:
    """Cap scores of some kinds in place; the cap's derivative at all but the first kind's."""
    scores.div_(softcap).tanh_()
    slope = 1 - scores[1:].square()
    scores.mul_(softcap)
    return slope


def patterns_(scores_SGRK: Tensor, sink_GR1: Tensor | None, space: Tensor) -> tuple[Tensor, Tensor]:
    """The true pattern, and the KLs of each row [S - 1, G, R, 1] in nats; the other patterns replace their scores.

    S kinds of scores, the true ones first; `space` is of one kind more.
    """
    top = scores_SGRK.amax(-1, keepdim=True)
    top = top if sink_GR1 is None else top.maximum(sink_GR1)
    # In units of log 2, for exponentials are powers of 2: torch.exp is slow where its result is 0 or denormal.
    scores = torch.add(top * -LOG2_E, scores_SGRK, alpha=LOG2_E, out=scores_SGRK)
    true, hat = torch.exp2(scores[0], out=space[-1]), scores[1:]
    sum_true = true.sum(-1, keepdim=True)
    sink = None if sink_GR1 is None else (sink_GR1 - top) * LOG2_E
    if sink is not None:
        sum_true += sink[0].exp2()
    true.div_(sum_true)
    agreed = torch.mul(true, scores, out=space[:-1]).sum(-1, keepdim=True)
    sums = hat.exp2_().sum(-1, keepdim=True)
    if sink is not None:
        agreed += sink[0].exp2() / sum_true * sink
        sums += sink[1:].exp2()
    hat.div_(sums)
    return true, (agreed[0] - sum_true.log2() - agreed[1:] + sums.log2()) / LOG2_E


def _blocks(
    visible_QK: Tensor, n_groups: int, n_each: int, size: int
) -> Iterator[tuple[slice, slice, slice, slice, Tensor | None]]:
    """Key heads, queries and keys of each block, and its mask: which of its keys, and what is added to their scores."""
    n_rows = min(max(size // (n_each * len(visible_QK)), 1), ROWS)
    for queries, keys, hull, mask in query_blocks(visible_QK, n_rows):
        n_heads = max(size // (n_each * (queries.stop - queries.start) * (keys.stop - keys.start)), 1)
        for first in range(0, n_groups, n_heads):
            yield slice(first, min(first + n_heads, n_groups)), queries, keys, hull, mask


def query_blocks(visible_QK: Tensor, n_rows: int) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """So many queries at a time, the keys that they see, and which of these need a mask, and what it adds to scores.

    Keys that no query of a block sees are left out, and those that all of them see need no mask.
    """
    length = len(visible_QK)
    bytes_QK = visible_QK.view(torch.uint8)  # maxima of bytes are fast where `any` is not
    for start in range(0, length, n_rows):
        queries = slice(start, min(start + n_rows, length))
        keys = _hull(bytes_QK[queries].amax(0))
        hull = _hull(1 - bytes_QK[queries, keys].amin(0))
        yield queries, keys, hull, torch.where(visible_QK[queries, keys][:, hull], 0.0, MASKED) if hull.stop else None


def _hull(marked_K: Tensor) -> slice:
    """From the first that is not zero to the last."""
    places = marked_K.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
