"""Matrices of which few entries are not zero, and products with them: on a CPU only those entries take part.

Of a dictionary's activations under one in a hundred is not zero, and of their gradients as few. Dense products spend
themselves on the others: of the six of a dictionary's step (encode, decode, a gradient for each factor of both) one is
left, encode, whose result decides what is active; under autocast it alone is in bfloat16. Where few are known to be
active, no zeros are written down either (`large_entries`). On a GPU, or where more than `SHARE` of the entries are not
zero, matrices and products are dense.

Shapes: n tokens, D inputs, F features, M outputs, L entries that are not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .row_sums import csr_matrix, row_sums, starts_of

SHARE = 1 / 25  # of entries that are not zero; with 2,400 features on one core both ways take as long at 1 / 15
BLOCK = 1 << 20  # entries of a product that are looked at while they are in the cache: 4 MB


@dataclass(frozen=True)
class MostlyZero:
    """A matrix [n, F] by its entries that are not zero, in the order of its rows; their values may have a gradient."""

    row_L: Tensor
    column_L: Tensor
    value_L: Tensor
    n_rows: int
    n_columns: int

    @classmethod
    def of(cls, dense_nF: Tensor, on_nF: Tensor | None = None) -> MostlyZero:
        """What is not zero of a matrix; or what `on` says, bool [n, F]."""
        row_L, column_L = (dense_nF if on_nF is None else on_nF).nonzero(as_tuple=True)
        value_L: Tensor = _At.apply(dense_nF, row_L * dense_nF.shape[1] + column_L)  # type: ignore[assignment]
        return cls(row_L, column_L, value_L, *dense_nF.shape)

    def __len__(self) -> int:
        return self.n_rows

    @cached_property
    def start_n(self) -> Tensor:
        """Where each row's entries start."""
        return starts_of(self.row_L, self.n_rows)

    def take(self, index: Tensor) -> MostlyZero:
        """These of the entries, in this order, which must keep the rows'."""
        return replace(self, row_L=self.row_L[index], column_L=self.column_L[index], value_L=self.value_L[index])

    def detach(self) -> MostlyZero:
        return replace(self, value_L=self.value_L.detach())

    def dense(self) -> Tensor:
        """With its zeros, [n, F]."""
        zeros_nF = self.value_L.new_zeros(self.n_rows, self.n_columns)
        return zeros_nF.index_put((self.row_L, self.column_L), self.value_L)

    def times(self, right_FM: Tensor) -> Tensor:
        """A right, [n, M]."""
        return _Times.apply(self.value_L, right_FM, self)  # type: ignore[return-value]

    def column_sums(self, value_L: Tensor) -> Tensor:
        """Sums of these numbers, one an entry, over each column, [F]."""
        return value_L.new_zeros(self.n_columns).index_add(0, self.column_L, value_L)

    def column_means(self) -> Tensor:
        """Of each column, its zeros included, [F]."""
        return self.column_sums(self.value_L) / self.n_rows

    def square_distances(self, centre_F: Tensor) -> Tensor:
        """Mean over rows of (A - centre)², [F]."""
        zeros_F = self.n_rows - torch.bincount(self.column_L, minlength=self.n_columns)
        squares_F = self.column_sums((self.value_L - centre_F[self.column_L]).square())
        return (squares_F + zeros_F * centre_F.square()) / self.n_rows

    # Without gradients

    def plain_times(self, right_FM: Tensor) -> Tensor:
        return row_sums(self.column_L, right_FM, self.start_n, self.value_L)

    def transposed_times(self, right_nM: Tensor) -> Tensor:
        """Aᵀ right, [F, M]."""
        order = self.column_L.argsort(stable=True)
        start_F = starts_of(self.column_L, self.n_columns)
        return row_sums(self.row_L[order], right_nM, start_F, self.value_L[order])

    def product_here(self, left_nM: Tensor, right_FM: Tensor) -> Tensor:
        """left rightᵀ where A is not zero, [L]."""
        places = csr_matrix(self.start_n, self.column_L, torch.zeros_like(self.value_L), self.n_columns)
        return torch.sparse.sampled_addmm(places, left_nM, right_FM.T, beta=0.0).values()


class _At(torch.autograd.Function):
    """Entries of a matrix by their places in its rows one after the other: no place twice, so gradients are copied."""

    @staticmethod
    def forward(ctx: Any, dense_nF: Tensor, place_L: Tensor) -> Tensor:
        ctx.save_for_backward(place_L)
        ctx.shape = dense_nF.shape
        return dense_nF.flatten().index_select(0, place_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place_L,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape.numel()).index_copy_(0, place_L, grads[0]).view(ctx.shape), None


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_L: Tensor, right_FM: Tensor, matrix: MostlyZero) -> Tensor:
        ctx.save_for_backward(right_FM)
        ctx.matrix = matrix.detach()
        return ctx.matrix.plain_times(right_FM)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (right_FM,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_value = ctx.matrix.product_here(grad, right_FM) if ctx.needs_input_grad[0] else None
        to_right = ctx.matrix.transposed_times(grad) if ctx.needs_input_grad[1] else None
        return to_value, to_right, None


def _entries(matrix: Tensor) -> MostlyZero | None:
    """The entries of a matrix that is worth it."""
    if matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        return None
    return MostlyZero.of(matrix) if int(matrix.count_nonzero()) <= SHARE * matrix.numel() else None


def acts_product(acts: Tensor | MostlyZero, right_FM: Tensor) -> Tensor:
    """acts right, [n, M].

    An activation of zero may be handed no gradient: the step that made it so must let none pass (JumpReLU's does, near
    its thresholds).
    """
    entries = acts if isinstance(acts, MostlyZero) else _entries(acts)
    return acts @ right_FM if entries is None else entries.times(right_FM)  # type: ignore[operator]


def fires(acts: Tensor | MostlyZero) -> Tensor:
    """Which features are active anywhere, bool [F]; activations are not negative."""
    if isinstance(acts, Tensor):
        return acts.detach().amax(0) > 0
    return torch.zeros(acts.n_columns, dtype=torch.bool).index_fill(0, acts.column_L[acts.value_L.detach() > 0], True)


def count(acts: Tensor | MostlyZero) -> Tensor:
    """How many entries are not zero."""
    return (acts if isinstance(acts, Tensor) else acts.value_L).detach().count_nonzero()


class _PreProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, W_DF: Tensor) -> Tensor:
        ctx.save_for_backward(x_nD, W_DF)
        return (x_nD @ W_DF).to(x_nD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_nD, W_DF = ctx.saved_tensors
        grad_nF, to_x, to_W = grads[0], None, None
        entries = _entries(grad_nF)
        if ctx.needs_input_grad[0]:
            to_x = grad_nF @ W_DF.T if entries is None else entries.plain_times(W_DF.T)
        if ctx.needs_input_grad[1]:
            to_W = x_nD.T @ grad_nF if entries is None else entries.transposed_times(x_nD).T
        return to_x, to_W


def pre_product(x_nD: Tensor, W_DF: Tensor) -> Tensor:
    """x W, [n, F], whose gradient is expected to be mostly zero: few features are active."""
    if x_nD.device.type != "cpu" or x_nD.dim() != 2:
        return x_nD @ W_DF
    return _PreProduct.apply(x_nD, W_DF)  # type: ignore[return-value]


def large_entries(x_nD: Tensor, W_DF: Tensor, b_F: Tensor, least_F: Tensor) -> MostlyZero:
    """Entries of x W + b that are larger than their column's `least`, without gradients; see `with_gradient`.

    A block of tokens at a time: what is too small never leaves the cache.
    """
    parts = []
    with torch.no_grad():
        limit_F = least_F - b_F
        for start, product_rF in _blocks(x_nD, W_DF):
            row, column = (product_rF > limit_F).nonzero(as_tuple=True)
            value = product_rF.flatten().index_select(0, row * product_rF.shape[1] + column)
            parts.append((row + start, column, value + b_F[column]))
    row_L, column_L, value_L = (torch.cat(column) for column in zip(*parts, strict=True))
    return MostlyZero(row_L, column_L, value_L, len(x_nD), W_DF.shape[1])


def _blocks(x_nD: Tensor, W_DF: Tensor) -> Iterator[tuple[int, Tensor]]:
    """x W of some rows at a time, float32, and where they start; the products of autocast's type."""
    rows = max(BLOCK // max(W_DF.shape[1], 1), 1)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    x_nD, W_DF = x_nD.to(dtype), W_DF.to(dtype)
    for start in range(0, max(len(x_nD), 1), rows):  # of no rows too
        yield start, (x_nD[start : start + rows] @ W_DF).float()


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, W_DF: Tensor, b_F: Tensor, entries: MostlyZero) -> Tensor:
        ctx.save_for_backward(x_nD, W_DF)
        ctx.entries = entries
        return entries.value_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_nD, W_DF = ctx.saved_tensors
        grad = replace(ctx.entries, value_L=grads[0])
        to_x = grad.plain_times(W_DF.T) if ctx.needs_input_grad[0] else None
        to_W = grad.transposed_times(x_nD).T if ctx.needs_input_grad[1] else None
        to_b = grad.column_sums(grad.value_L) if ctx.needs_input_grad[2] else None
        return to_x, to_W, to_b, None


def with_gradient(entries: MostlyZero, x_nD: Tensor, W_DF: Tensor, b_F: Tensor) -> MostlyZero:
    """Entries of x W + b (of those that `large_entries` found, any) with their gradients in x, W and b."""
    return replace(entries, value_L=_Values.apply(x_nD, W_DF, b_F, entries))
