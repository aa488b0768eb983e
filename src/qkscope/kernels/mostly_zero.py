"""Products with a matrix of which few entries are not zero: on a CPU only those take part.

Of a dictionary's activations under one in a hundred is not zero, and of their gradients as few. Dense products spend
themselves on the others: of the six of a dictionary's step (encode, decode, a gradient for each factor of both) one is
left, encode, whose result decides what is active. On a GPU, under autocast, or where more than `SHARE` of the entries
are not zero, the products are dense.

Shapes: n tokens, D inputs, F features, M outputs, L entries that are not zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .row_sums import csr_matrix, row_sums, starts_of

SHARE = 1 / 25  # of entries that are not zero; with 2,400 features on one core both ways take as long at 1 / 15


class _Entries:
    """What is not zero of a matrix [n, F], in the order of its rows."""

    def __init__(self, dense_nF: Tensor) -> None:
        self.n_rows, self.n_columns = dense_nF.shape
        self.row_L, self.column_L = dense_nF.nonzero(as_tuple=True)
        self.value_L = dense_nF.flatten().index_select(0, self.row_L * self.n_columns + self.column_L)
        self.start_n = starts_of(self.row_L, self.n_rows)

    def times(self, right_FM: Tensor) -> Tensor:
        """A right, [n, M]."""
        return row_sums(self.column_L, right_FM, self.start_n, self.value_L)

    def transposed_times(self, right_nM: Tensor) -> Tensor:
        """Aᵀ right, [F, M]."""
        order = self.column_L.argsort(stable=True)
        start_F = starts_of(self.column_L, self.n_columns)
        return row_sums(self.row_L[order], right_nM, start_F, self.value_L[order])

    def product_here(self, left_nM: Tensor, right_FM: Tensor) -> Tensor:
        """left rightᵀ where A is not zero, zero elsewhere, [n, F]."""
        places = csr_matrix(self.start_n, self.column_L, torch.zeros_like(self.value_L), self.n_columns)
        found_L = torch.sparse.sampled_addmm(places, left_nM, right_FM.T, beta=0.0).values()
        out = left_nM.new_zeros(self.n_rows * self.n_columns)
        return out.index_copy_(0, self.row_L * self.n_columns + self.column_L, found_L).view(self.n_rows, -1)


def _entries(matrix: Tensor) -> _Entries | None:
    """The entries of a matrix that is worth it."""
    if matrix.device.type != "cpu" or matrix.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    few = int(matrix.count_nonzero()) <= SHARE * matrix.numel()
    return _Entries(matrix.detach()) if few else None


class _ActsProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts_nF: Tensor, right_FM: Tensor, entries: _Entries) -> Tensor:
        ctx.save_for_backward(right_FM)
        ctx.entries = entries
        return entries.times(right_FM)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (right_FM,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_acts = ctx.entries.product_here(grad, right_FM) if ctx.needs_input_grad[0] else None
        to_right = ctx.entries.transposed_times(grad) if ctx.needs_input_grad[1] else None
        return to_acts, to_right, None


def acts_product(acts_nF: Tensor, right_FM: Tensor) -> Tensor:
    """acts right, [n, M].

    An activation of zero may be handed no gradient: the step that made it so must let none pass (JumpReLU's does, near
    its thresholds).
    """
    entries = _entries(acts_nF)
    if entries is None:
        return acts_nF @ right_FM
    return _ActsProduct.apply(acts_nF, right_FM, entries)  # type: ignore[return-value]


class _PreProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, W_DF: Tensor) -> Tensor:
        ctx.save_for_backward(x_nD, W_DF)
        return x_nD @ W_DF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_nD, W_DF = ctx.saved_tensors
        grad_nF, to_x, to_W = grads[0], None, None
        entries = _entries(grad_nF)
        if ctx.needs_input_grad[0]:
            to_x = grad_nF @ W_DF.T if entries is None else entries.times(W_DF.T)
        if ctx.needs_input_grad[1]:
            to_W = x_nD.T @ grad_nF if entries is None else entries.transposed_times(x_nD).T
        return to_x, to_W


def pre_product(x_nD: Tensor, W_DF: Tensor) -> Tensor:
    """x W, [n, F], whose gradient is expected to be mostly zero: few features are active."""
    if x_nD.device.type != "cpu" or x_nD.dim() != 2 or torch.is_autocast_enabled("cpu"):
        return x_nD @ W_DF
    return _PreProduct.apply(x_nD, W_DF)  # type: ignore[return-value]
