"""Scores of active features without a rotary embedding: gradients in float64, and what a head without pairs does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import all_pairs, close, some_of
from torch import Tensor

from qkscope.kernels.plain_scores import plain_scores
from qkscope.kernels.row_sums import row_sums, row_weights_gradient, starts_of
from qkscope.kernels.sparse_scores import Events
from qkscope.pairs.pair_map import Pairs


def case(seed: int, share: float, fires: float, batch: int = 2, length: int = 5) -> tuple[Pairs, list[Events], Tensor]:
    g = torch.Generator().manual_seed(seed)
    pairs = some_of(all_pairs(6, 4, 3), share, seed)
    sides = [Events.by_token(torch.rand(batch * length, width, generator=g) < fires) for width in (7, 5)]
    return pairs, sides, torch.randn(len(pairs), generator=g, dtype=torch.float64)


def dense_scores(
    pairs: Pairs, sides: list[Events], a_q: Tensor, a_k: Tensor, s_P: Tensor, batch: int, length: int
) -> Tensor:
    """By einsum over dense activations and a dense map."""
    dense = []
    for events, act, width in zip(sides, (a_q, a_k), (7, 5), strict=True):
        whole = act.new_zeros(batch * length, width).index_put((events.token_L, events.feature_L), act)
        dense.append(whole.view(batch, length, width))
    whole = s_P.new_zeros(3, 7, 5).index_put((pairs.head_P, pairs.query_P, pairs.key_P), s_P)
    return torch.einsum("bia,nac,bjc->bnij", dense[0], whole, dense[1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    fires=st.sampled_from([0.0, 0.3, 1.0]),
    batch=st.integers(1, 3),
)
def test_scores_and_gradients_are_those_of_a_dense_map(seed: int, share: float, fires: float, batch: int) -> None:
    length = 4
    pairs, sides, s_P = case(seed, share, fires, batch, length)
    g = torch.Generator().manual_seed(seed)
    acts = [torch.randn(len(events.token_L), generator=g, dtype=torch.float64) for events in sides]
    leaves = [t.requires_grad_() for t in (*acts, s_P)]
    found = plain_scores(sides[0], leaves[0], sides[1], leaves[1], leaves[2], pairs.plain_layout, batch, length)
    wanted = dense_scores(pairs, sides, leaves[0], leaves[1], leaves[2], batch, length)
    close(found.detach(), wanted.detach(), 1e-10)
    cotangent = torch.randn(wanted.shape, generator=g, dtype=torch.float64)
    for one, two in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (found, wanted)), strict=True):
        close(one, two, 1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_are_those_of_small_steps(wanted: tuple[int, ...]) -> None:
    """Each alone too: what has no use for a gradient is not given one."""
    pairs, sides, s_P = case(3, 0.5, 0.4)
    g = torch.Generator().manual_seed(4)
    leaves = [torch.randn(len(events.token_L), generator=g, dtype=torch.float64) for events in sides] + [s_P]
    for place in wanted:
        leaves[place].requires_grad_()

    def scores(a_q: Tensor, a_k: Tensor, s: Tensor) -> Tensor:
        return plain_scores(sides[0], a_q, sides[1], a_k, s, pairs.plain_layout, 2, 5)

    assert torch.autograd.gradcheck(scores, leaves)


def test_sums_of_rows_by_hand() -> None:
    table = torch.arange(12.0).view(4, 3)
    index, weight, bag = torch.tensor([3, 0, 1]), torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 1, 3])
    start = starts_of(bag, 5)
    assert start.tolist() == [0, 0, 2, 2, 3]
    sums = row_sums(index, table, start, weight)
    assert sums.tolist() == [[0, 0, 0], [18, 19, 20], [0, 0, 0], [1.5, 2, 2.5], [0, 0, 0]]
    grad = torch.arange(15.0).view(5, 3)
    assert row_weights_gradient(index, table, start, grad).tolist() == [
        float(grad[b] @ table[i]) for b, i in zip(bag.tolist(), index.tolist(), strict=True)
    ]
    none = index[:0]
    assert torch.equal(row_sums(none, table, starts_of(none, 2), weight[:0]), torch.zeros(2, 3))
    assert row_weights_gradient(none, table, starts_of(none, 2), grad[:2]).shape == (0,)
