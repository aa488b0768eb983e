"""Σ |L Rᵀ|, the sum of a product's absolute entries, with gradients, never holding the product.

Near zero |m| is rounded off to √(m² + ε²), so that the gradient has no jump where the sum would have every entry. The
gradients are finished while a block is still in the cache, as in pattern_kl.py. Float32.

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
    """√(m² + ε²) - ε."""
    return (m.square() + EPSILON**2).sqrt() - EPSILON


class _ProductNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left_ZAH: Tensor, right_ZBH: Tensor) -> Tensor:
        rows = max((CPU_BLOCK if left_ZAH.device.type == "cpu" else GPU_BLOCK) // max(right_ZBH.shape[1], 1), 1)
        grad_left, grad_right = torch.empty_like(left_ZAH), torch.zeros_like(right_ZBH)
        total = left_ZAH.new_zeros(())
        for z, (left, right) in enumerate(zip(left_ZAH, right_ZBH, strict=True)):
            for start in range(0, len(left), rows):
                part = left[start : start + rows]
                product = part @ right.T
                size = (product.square() + EPSILON**2).sqrt_()
                total += size.sum() - EPSILON * size.numel()
                slope = product.div_(size)
                grad_left[z, start : start + rows] = slope @ right
                grad_right[z].addmm_(slope.T, part)
        ctx.save_for_backward(grad_left, grad_right)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return grads[0] * left, grads[0] * right


def product_norm(left_ZAH: Tensor, right_ZBH: Tensor) -> Tensor:
    """Σ_zab `smooth_abs`(⟨left_za, right_zb⟩)."""
    return _ProductNorm.apply(left_ZAH, right_ZBH)  # type: ignore[return-value]
