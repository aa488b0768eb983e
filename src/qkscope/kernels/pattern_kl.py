"""Mean KL of an attention pattern from its queries and keys, with gradients, never holding all patterns at once.

For each (sequence, head): scores = q kᵀ, soft cap, mask, sink, softmax; then

    loss = Σ_rows w_r · KL(P_r ‖ P̂_r)        ∂loss/∂score_rj = w_r · (P̂_rj - P_rj) · cap'(score_rj)

The loss is a weighted sum of rows, so its gradients in q and k are finished while a block is still in the cache, and
the backward pass is one multiplication. On a CPU a block is a few heads of a sequence: at 256 positions four of them
take 1 MB, and every pass over them stays in the second-level cache. Always float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .row_kl import LOG2_E

CPU_BLOCK = 1 << 18  # scores in one block: 1 MB
GPU_BLOCK = 1 << 26


class _PatternKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_ZTH: Tensor,
        k_ZTH: Tensor,
        pattern_ZQK: Tensor,
        entropy_ZQ: Tensor,
        mask_ZQK: Tensor,
        sink_Z: Tensor | None,
        softcap: float | None,
        weight_ZQ: Tensor,
    ) -> Tensor:
        n, length = q_ZTH.shape[:2]
        block = max((CPU_BLOCK if q_ZTH.device.type == "cpu" else GPU_BLOCK) // (length * length), 1)
        grad_q, grad_k = torch.empty_like(q_ZTH), torch.empty_like(k_ZTH)
        total = q_ZTH.new_zeros(())
        for start in range(0, n, block):
            part = slice(start, start + block)
            q, k, true, weight = q_ZTH[part], k_ZTH[part], pattern_ZQK[part], weight_ZQ[part]
            mask = mask_ZQK[part] if len(mask_ZQK) > 1 else mask_ZQK
            scores = q @ k.transpose(1, 2)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (scores / softcap).square_()
            # Σ_j P_j s_j before the mask turns scores to -inf; P is 0 where the mask is.
            agreed = torch.linalg.vecdot(true[..., :length], scores)
            scores = scores.add_(mask)
            if sink_Z is not None:
                sink = sink_Z[part][:, None, None].expand(*scores.shape[:2], 1)
                agreed = agreed + true[..., length] * sink[..., 0]
                scores = torch.cat([scores, sink], -1)
            top = scores.amax(-1, keepdim=True)
            hat = scores.sub_(top).mul_(LOG2_E).exp2_()
            norm = hat.sum(-1, keepdim=True)
            log_sum = (top + norm.log())[..., 0]
            total += (weight * (log_sum - agreed - entropy_ZQ[part])).sum()
            weight = weight[..., None]
            difference = hat.mul_(weight / norm).sub_(true * weight)[..., :length]
            if softcap is not None:
                difference = difference * slope
            torch.bmm(difference, k, out=grad_q[part])
            torch.bmm(difference.transpose(1, 2), q, out=grad_k[part])
        ctx.save_for_backward(grad_q, grad_k)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = ctx.saved_tensors
        to_q = grad_q * grads[0] if ctx.needs_input_grad[0] else None
        to_k = grad_k * grads[0] if ctx.needs_input_grad[1] else None
        return to_q, to_k, None, None, None, None, None, None


def pattern_kl(
    q_BTNH: Tensor,
    k_BTGH: Tensor,
    pattern_BNQK: Tensor,
    entropy_BNQ: Tensor,
    visible_BQK: Tensor,
    weight_BQ: Tensor,
    sink_N: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Σ over sequences, heads and queries of weight · KL(P ‖ softmax(mask(cap(q·k)))), nats, a scalar.

    Args:
        q_BTNH, k_BTGH: float32, rotated already, the scale in q.
        pattern_BNQK: the true pattern (one more column with a sink), `entropy_BNQ` its rows' entropy.
        visible_BQK: bool [B or 1, Q, K], the keys that a query may see.
        weight_BQ: weight of each query row, the same for all heads.
    """
    batch, _, n_heads, _ = q_BTNH.shape
    q = q_BTNH.transpose(1, 2).flatten(0, 1).contiguous()
    k = k_BTGH.transpose(1, 2).repeat_interleave(n_heads // k_BTGH.shape[2], dim=1).flatten(0, 1).contiguous()
    mask = q.new_zeros(visible_BQK.shape).masked_fill_(~visible_BQK, -torch.inf)
    mask = mask if len(mask) == 1 else mask.repeat_interleave(n_heads, 0)
    sink = None if sink_N is None else sink_N.float().repeat(batch)
    weight = weight_BQ.repeat_interleave(n_heads, 0)
    return _PatternKL.apply(  # type: ignore[return-value]
        q, k, pattern_BNQK.flatten(0, 1), entropy_BNQ.flatten(0, 1), mask, sink, softcap, weight
    )
