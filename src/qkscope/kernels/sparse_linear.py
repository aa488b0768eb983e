"""y = a S for a fixed sparse S: its products and gradients without a dense copy of S.

Products go through the CSR form of S and of Sᵀ, whose places are kept for a layout and filled with new values at each
call. The gradient of the values uses that activations are sparse too: only the tokens at which a feature is active add
to it, so it is a sparse product as well, taken in blocks of columns, of which the kept places are picked.

Shapes: n tokens, R rows (input features), C columns, Z stored values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRADIENT_ELEMENTS = 1 << 26  # elements of one block of columns in the gradient of the values


@dataclass(frozen=True)
class SparseLayout:
    """Where S has values: `row_Z`, `column_Z` int64, no place twice."""

    row_Z: Tensor
    column_Z: Tensor
    n_rows: int
    n_columns: int
    by_row: tuple[Tensor, Tensor, Tensor]
    """Order of the values, row starts and columns of S in CSR form."""
    by_column: tuple[Tensor, Tensor, Tensor]
    """The same for Sᵀ."""

    @classmethod
    def of(cls, row_Z: Tensor, column_Z: Tensor, n_rows: int, n_columns: int) -> SparseLayout:
        by_row = _compressed(row_Z, column_Z, n_rows, n_columns)
        by_column = _compressed(column_Z, row_Z, n_columns, n_rows)
        return cls(row_Z, column_Z, n_rows, n_columns, by_row, by_column)


def _compressed(major: Tensor, minor: Tensor, n_major: int, n_minor: int) -> tuple[Tensor, Tensor, Tensor]:
    order = (major * n_minor + minor).argsort()
    starts = torch.zeros(n_major + 1, dtype=torch.int64, device=major.device)
    starts[1:] = torch.bincount(major, minlength=n_major).cumsum(0)
    return order, starts, minor[order]


def _product(form: tuple[Tensor, Tensor, Tensor], values: Tensor, dense: Tensor, n_out: int) -> Tensor:
    order, starts, minor = form
    if not len(minor):
        return dense.new_zeros(n_out, dense.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        matrix = torch.sparse_csr_tensor(starts, minor, values[order], (n_out, dense.shape[0]), check_invariants=False)
        return matrix @ dense


def compressed(a_Rn: Tensor) -> Tensor:
    """Activations in CSR form, detached; made once where several heads use them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return a_Rn.detach().to_sparse_csr()


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_Rn: Tensor, values_Z: Tensor, layout: SparseLayout, a_csr: Tensor) -> Tensor:
        ctx.save_for_backward(values_Z)
        ctx.layout, ctx.a_csr = layout, a_csr
        return _product(layout.by_column, values_Z, a_Rn, layout.n_columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values_Z,) = ctx.saved_tensors
        layout: SparseLayout = ctx.layout
        grad_Cn = grads[0].contiguous()
        to_a = _product(layout.by_row, values_Z, grad_Cn, layout.n_rows) if ctx.needs_input_grad[0] else None
        to_values = None
        if ctx.needs_input_grad[1]:
            to_values = torch.empty_like(values_Z)
            step = max(GRADIENT_ELEMENTS // layout.n_rows, 1)
            for start in range(0, layout.n_columns, step):
                dense = ctx.a_csr @ grad_Cn[start : start + step].T
                order, starts, rows = layout.by_column  # values in the order of their columns
                here = slice(int(starts[start]), int(starts[min(start + step, layout.n_columns)]))
                places = order[here]
                to_values[places] = dense[rows[here], layout.column_Z[places] - start]
        return to_a, to_values, None, None


def sparse_linear(a_Rn: Tensor, values_Z: Tensor, layout: SparseLayout, a_csr: Tensor | None = None) -> Tensor:
    """Sᵀ a, float32 [C, n], for a [R, n] (features first: rows of a feature lie together) and S's values [Z].

    `a_csr`: `compressed(a_Rn)`, where it is at hand.
    """
    a_csr = compressed(a_Rn) if a_csr is None else a_csr
    return _SparseLinear.apply(a_Rn, values_Z, layout, a_csr)  # type: ignore[return-value]
