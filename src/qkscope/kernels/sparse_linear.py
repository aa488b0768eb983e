"""y = a S for a fixed sparse S: its products and gradients without a dense copy of S.

S has one value for each kept (row, column); only the gradient at those places is ever formed. Products go through the
CSR form of S and of Sᵀ, which are made once for a layout and filled with new values at each call.

Shapes: n tokens, R rows (input features), C columns, Z stored values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRADIENT_ELEMENTS = 1 << 24  # elements of one gathered block in the gradient of the values


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


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_Rn: Tensor, values_Z: Tensor, layout: SparseLayout) -> Tensor:
        ctx.save_for_backward(a_Rn, values_Z)
        ctx.layout = layout
        return _product(layout.by_column, values_Z, a_Rn, layout.n_columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a_Rn, values_Z = ctx.saved_tensors
        layout: SparseLayout = ctx.layout
        grad = grads[0].contiguous()
        to_a = _product(layout.by_row, values_Z, grad, layout.n_rows) if ctx.needs_input_grad[0] else None
        to_values = None
        if ctx.needs_input_grad[1]:
            step = max(GRADIENT_ELEMENTS // max(a_Rn.shape[1], 1), 1)
            to_values = torch.cat(
                [
                    torch.linalg.vecdot(a_Rn[row], grad[column])
                    for row, column in zip(layout.row_Z.split(step), layout.column_Z.split(step), strict=True)
                ]
            )
        return to_a, to_values, None


def sparse_linear(a_Rn: Tensor, values_Z: Tensor, layout: SparseLayout) -> Tensor:
    """Sᵀ a, float32 [C, n], for a [R, n] (features first: rows of a feature lie together) and S's values [Z]."""
    return _SparseLinear.apply(a_Rn, values_Z, layout)  # type: ignore[return-value]
