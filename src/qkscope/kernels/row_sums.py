"""Weighted sums of rows of a table, bag by bag: what all products of a sparse matrix with a dense one are here.

Shapes: E entries in the order of their bags, S bags, R rows of D numbers.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def starts_of(bag_E: Tensor, n: int) -> Tensor:
    """Where the entries of each bag start, [n]; entries may stand in any order."""
    count = torch.bincount(bag_E, minlength=n)
    return count.cumsum(0) - count


def csr_matrix(start_S: Tensor, column_E: Tensor, value_E: Tensor, n_columns: int) -> Tensor:
    """The sparse matrix [S, n_columns] whose rows are the bags."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        starts = torch.cat([start_S, start_S.new_tensor([len(column_E)])])
        return torch.sparse_csr_tensor(starts, column_E, value_E, (len(start_S), n_columns), check_invariants=False)


def row_sums(index_E: Tensor, table_RD: Tensor, start_S: Tensor, weight_E: Tensor) -> Tensor:
    """Σ_{e in bag} weight_e · table[index_e], [S, D]; zero for an empty bag."""
    if not len(index_E):
        return table_RD.new_zeros(len(start_S), table_RD.shape[1])
    return embedding_bag(index_E, table_RD, start_S, mode="sum", per_sample_weights=weight_E)


def row_weights_gradient(index_E: Tensor, table_RD: Tensor, start_S: Tensor, grad_SD: Tensor) -> Tensor:
    """⟨grad of its bag, table[index_e]⟩ of each entry, [E]: the gradient of `row_sums` in the weights."""
    with torch.enable_grad():
        weight_E = table_RD.new_zeros(len(index_E), requires_grad=True)
        sums = row_sums(index_E, table_RD, start_S, weight_E)
    return torch.autograd.grad(sums, weight_E, grad_SD)[0] if len(index_E) else weight_E.detach()
