"""Scores of sparse events, against loops over events in float64, and their gradients against finite differences."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import close
from torch import Tensor

from qkscope.kernels import sparse_scores as kernel
from qkscope.kernels.sparse_scores import Cells, Events, sparse_scores


@dataclass
class Case:
    on_q: Tensor
    on_k: Tensor
    query_P: Tensor
    key_P: Tensor
    leaves: list[Tensor]
    """u, v, s: float64."""

    @classmethod
    def of(
        cls, seed: int, batch: int = 2, length: int = 5, fq: int = 4, fk: int = 3, h: int = 2, on: float = 0.5
    ) -> Case:
        g = torch.Generator().manual_seed(seed)
        share = torch.rand(fq + fk, generator=g) * 2 * on  # some features are dense, some fire never or once
        on_q, on_k = (torch.rand(batch, length, f, generator=g) < s for f, s in ((fq, share[:fq]), (fk, share[fq:])))
        if batch > 1:
            on_q[-1, length // 2 :] = on_k[-1, length // 2 :] = False  # a shorter sequence
        query_P, key_P = (torch.rand(fq, fk, generator=g) < 0.6).nonzero(as_tuple=True)
        sizes = [(int(on_q.sum()), h), (int(on_k.sum()), h), (len(query_P),)]
        return cls(on_q, on_k, query_P, key_P, [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes])

    def events(self) -> tuple[Events, Events]:
        return Events.by_token(self.on_q.flatten(0, 1)), Events.by_feature(self.on_k.flatten(0, 1))

    def scores(self, u: Tensor, v: Tensor, s: Tensor) -> Tensor:
        queries, keys = self.events()
        cells = Cells.of(keys, self.on_k.shape[2], *self.on_k.shape[:2])
        return sparse_scores(u, v, s, self.query_P, self.key_P, queries, cells)

    def loops(self) -> Tensor:
        """Events are numbered here by hand: queries by token, keys by feature."""
        batch, length, _ = self.on_q.shape
        u, v, s = (leaf.detach() for leaf in self.leaves)
        value = {(int(a), int(b)): float(x) for a, b, x in zip(self.query_P, self.key_P, s, strict=True)}
        left = [
            (b, i, a)
            for b, i, a in torch.cartesian_prod(*map(torch.arange, self.on_q.shape)).tolist()
            if self.on_q[b, i, a]
        ]
        right = [
            (b, j, f)
            for f in range(self.on_k.shape[2])
            for b in range(batch)
            for j in range(length)
            if self.on_k[b, j, f]
        ]
        out = torch.zeros(batch, length, length, dtype=torch.float64)
        for e, (b, i, a) in enumerate(left):
            for f, (c, j, feature) in enumerate(right):
                if b == c:
                    out[b, i, j] += value.get((a, feature), 0.0) * float(u[e] @ v[f])
        return out


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    fq=st.integers(1, 5),
    fk=st.integers(1, 5),
    h=st.integers(1, 3),
    on=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    tile=st.sampled_from([1, 2, 3, 16]),
)
def test_any_events_are_the_loops(tile: int, **shape: int) -> None:
    case, whole = Case.of(**shape), kernel.TILE
    kernel.TILE = tile
    try:
        found = case.scores(*case.leaves)
    finally:
        kernel.TILE = whole
    assert found.shape == (shape["batch"], shape["length"], shape["length"])
    close(found, case.loops(), 1e-12)


@pytest.mark.parametrize("tile", [1, 3, 16])
@pytest.mark.parametrize("on", [0.3, 0.5, 1.0])
def test_gradients_are_finite_differences(tile: int, on: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TILE", tile)
    case = Case.of(7, on=on, length=6)
    assert all(len(leaf) for leaf in case.leaves)
    assert torch.autograd.gradcheck(case.scores, [leaf.requires_grad_() for leaf in case.leaves])


def test_float32_is_close_to_float64_on_many_events() -> None:
    """Hundreds of cells of all sizes, in tiles that fill up and run over, and more of them than int16 counts."""
    case = Case.of(3, batch=3, length=70, fq=30, fk=12_000, h=8, on=0.02)
    cells = 3 * 12_000
    assert cells > 1 << 15
    exact = [leaf.requires_grad_() for leaf in case.leaves]
    rough = [leaf.detach().float().requires_grad_() for leaf in case.leaves]
    one, two = case.scores(*rough), case.scores(*exact)
    assert one.dtype == torch.float32 and float(two.detach().abs().max()) > 1
    close(one.detach(), two.detach(), 1e-5)
    cotangent = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(
        torch.autograd.grad(one, rough, cotangent), torch.autograd.grad(two, exact, cotangent.double()), strict=True
    ):
        close(a, b, 1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_permuting_features_changes_nothing(seed: int) -> None:
    case = Case.of(seed)
    wanted = case.scores(*case.leaves)
    g = torch.Generator().manual_seed(seed)
    new_q, new_k = torch.randperm(4, generator=g), torch.randperm(3, generator=g)
    old_q, old_k = new_q.argsort(), new_k.argsort()
    u, v, s = case.leaves
    numbers = []
    for on, old, values, by_token in ((case.on_q, old_q, u, True), (case.on_k, old_k, v, False)):
        count = torch.zeros(on.flatten(0, 1).shape, dtype=torch.int64)
        order = on.flatten(0, 1) if by_token else on.flatten(0, 1).T
        place = torch.zeros_like(order, dtype=torch.int64).masked_scatter(order, torch.arange(len(values)))
        count = (place if by_token else place.T)[:, old]
        kept = on.flatten(0, 1)[:, old]
        numbers.append(values[count[kept] if by_token else count.T[kept.T]])
    query, key = new_q[case.query_P], new_k[case.key_P]
    order = (query * 3 + key).argsort()
    moved = Case(case.on_q[..., old_q], case.on_k[..., old_k], query[order], key[order], [*numbers, s[order]])
    close(moved.scores(*moved.leaves), wanted, 1e-12)


def test_a_feature_that_never_fires_adds_nothing_and_learns_nothing() -> None:
    case = Case.of(11, on=0.9)
    case.on_k[..., 1] = False
    case.leaves[1] = case.leaves[1][: int(case.on_k.sum())]
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    found = case.scores(*leaves)
    close(found.detach(), case.loops(), 1e-12)
    (to_s,) = torch.autograd.grad(found.sum(), leaves[2])
    assert (case.key_P == 1).any() and (to_s[case.key_P == 1] == 0).all() and (to_s[case.key_P != 1] != 0).any()


@pytest.mark.parametrize("empty", ["queries", "keys", "pairs"])
def test_nothing_active_or_no_pair_is_zero(empty: str) -> None:
    case = Case.of(5)
    if empty == "pairs":
        case.query_P, case.key_P, case.leaves[2] = case.query_P[:0], case.key_P[:0], case.leaves[2][:0]
    else:
        side = 0 if empty == "queries" else 1
        (case.on_q if side == 0 else case.on_k).fill_(False)
        case.leaves[side] = case.leaves[side][:0]
    assert torch.equal(case.scores(*case.leaves), torch.zeros(2, 5, 5, dtype=torch.float64))
