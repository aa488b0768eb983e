"""Σ |L Rᵀ|, the sum of a product's absolute entries, with gradients, never holding the product.

Within ε of zero |m| is rounded off to m²/2ε + ε/2, so that the gradient has no jump where the sum would have all its
entries (Huber's function, less ε/2). Its slope is m/ε, cut off at ±1: one pass over a block between its products. The
gradients are finished while a block is still in the cache, as in pattern_kl.py. Products are of autocast's type, sums
float32.

Shapes: Z products (heads), A and B rows, H inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-4
CPU_BLOCK = 1 << 18  # entries in one block: 1 MB
GPU_BLOCK = 1 << 26


def smooth_abs(m: Tensor) -> Tensor:
    """|m| - ε/2 where |m| ≥ ε, m²/2ε within."""
    slope = (m / EPSILON).clamp(-1, 1)
    return m * slope - EPSILON / 2 * slope.square()


class _ProductNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left_ZAH: Tensor, right_ZBH: Tensor) -> Tensor:
        device = left_ZAH.device.type
        rows = max((CPU_BLOCK if device == "cpu" else GPU_BLOCK) // max(right_ZBH.shape[1], 1), 1)
        products = max(rows // max(left_ZAH.shape[1], 1), 1)  # as many at once, where all rows of one are
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else left_ZAH.dtype
        grad_left, grad_right = torch.empty_like(left_ZAH), torch.zeros_like(right_ZBH)
        total = left_ZAH.new_zeros(())
        with torch.autocast(device, enabled=False):
            whole = zip(
                *(y.split(products) for y in (left_ZAH, right_ZBH.to(dtype), grad_left, grad_right)), strict=True
            )
            for left, right, to_left, to_right in whole:
                for part, to_part in zip(left.split(rows, 1), to_left.split(rows, 1), strict=True):
                    slope = ((part / EPSILON).to(dtype) @ right.mT).clamp_(-1, 1)
                    to_part.copy_(slope @ right)
                    to_right += slope.mT @ part.to(dtype)
                    squares = torch.linalg.vector_norm(slope, dtype=total.dtype) ** 2
                    total += (to_part * part).sum() - EPSILON / 2 * squares  # Σ m·slope, from a product that is there
        ctx.save_for_backward(grad_left, grad_right)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return grads[0] * left, grads[0] * right


def product_norm(left_ZAH: Tensor, right_ZBH: Tensor) -> Tensor:
    """Σ_zab `smooth_abs`(⟨left_za, right_zb⟩)."""
    return _ProductNorm.apply(left_ZAH, right_ZBH)  # type: ignore[return-value]
