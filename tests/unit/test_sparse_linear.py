"""The sparse product and both of its gradients, against a dense matrix through autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import close
from torch import Tensor

from qkscope.kernels import sparse_linear as kernel
from qkscope.kernels.sparse_linear import SparseLayout, compressed, sparse_linear


def places(n_rows: int, n_columns: int, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` different places in no order."""
    code = torch.randperm(n_rows * n_columns, generator=g)[:count]
    return code // n_columns, code % n_columns


def check(n_rows: int, n_columns: int, n: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    row, column = places(n_rows, n_columns, count, g)
    layout = SparseLayout.of(row, column, n_rows, n_columns)
    a = torch.randn(n_rows, n, generator=g).relu()  # half of it zero, as activations are
    values, cotangent = torch.randn(len(row), generator=g), torch.randn(n_columns, n, generator=g)
    a1, v1 = a.clone().requires_grad_(), values.clone().requires_grad_()
    found = sparse_linear(a1, v1, layout)
    a2, v2 = a.double().requires_grad_(), values.double().requires_grad_()
    dense = torch.zeros(n_rows, n_columns, dtype=torch.float64).index_put((row, column), v2)
    wanted = dense.T @ a2
    assert found.shape == (n_columns, n) and found.dtype == torch.float32
    close(found.detach(), wanted.detach(), 1e-5, floor=0.5)
    found.backward(cotangent)
    wanted.backward(cotangent.double())
    for one, two in ((a1.grad, a2.grad), (v1.grad, v2.grad)):
        assert one is not None and two is not None
        close(one, two, 1e-5, floor=0.5)


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 8),
    n_columns=st.integers(1, 9),
    n=st.integers(1, 6),
    share=st.floats(0, 1),
    block=st.sampled_from([1, 7, 20, 1 << 26]),
    seed=st.integers(0, 10_000),
)
def test_any_layout_in_any_blocks(n_rows: int, n_columns: int, n: int, share: float, block: int, seed: int) -> None:
    whole, kernel.GRADIENT_ELEMENTS = kernel.GRADIENT_ELEMENTS, block
    try:
        check(n_rows, n_columns, n, round(share * n_rows * n_columns), seed)
    finally:
        kernel.GRADIENT_ELEMENTS = whole


@pytest.mark.parametrize("columns_a_block", [1, 2, 3, 5])
def test_column_blocks(monkeypatch: pytest.MonkeyPatch, columns_a_block: int) -> None:
    monkeypatch.setattr(kernel, "GRADIENT_ELEMENTS", 40 * columns_a_block)
    check(40, 7, 30, 90, 0)


def test_an_empty_layout_is_zero_with_zero_gradients() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    layout = SparseLayout.of(none, none, 4, 3)
    a, values = torch.rand(4, 5).requires_grad_(), torch.zeros(0).requires_grad_()
    out = sparse_linear(a, values, layout)
    assert torch.equal(out, torch.zeros(3, 5))
    out.sum().backward()
    assert a.grad is not None and torch.equal(a.grad, torch.zeros(4, 5))
    assert values.grad is not None and values.grad.shape == (0,)


def test_activations_compressed_before_give_the_same() -> None:
    g = torch.Generator().manual_seed(3)
    row, column = places(6, 5, 11, g)
    layout = SparseLayout.of(row, column, 6, 5)
    a = torch.randn(6, 4, generator=g).relu()
    grads = []
    for ready in (None, compressed(a)):
        values = torch.ones(11).requires_grad_()
        sparse_linear(a, values, layout, ready).square().sum().backward()
        grads.append(values.grad)
    assert torch.equal(grads[0], grads[1])


def test_the_order_of_the_values_is_the_callers() -> None:
    """Shuffling the places together with the values changes nothing."""
    g = torch.Generator().manual_seed(4)
    row, column = places(6, 5, 11, g)
    values, a = torch.randn(11, generator=g), torch.rand(6, 4, generator=g)
    order = torch.randperm(11, generator=g)
    one = sparse_linear(a, values, SparseLayout.of(row, column, 6, 5))
    two = sparse_linear(a, values[order], SparseLayout.of(row[order], column[order], 6, 5))
    close(one, two, 1e-6)
