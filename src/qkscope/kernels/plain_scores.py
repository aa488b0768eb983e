"""Scores of a pair map without a rotary embedding: only active features meet.

    scores[i, j] = Σ_{f at j} a_f · y[feature_f, i]          y[b, i] = Σ_{pairs (a, b)} S[a, b] · a_q[i, a]

S does not depend on where the two tokens are, so the query side is added up once for each key feature that a head uses,
and every key token then takes the rows of its few active ones: work grows with pairs and with active features, not with
the features there are. Both sums are weighted sums of rows (`embedding_bag`), in which gradients are too, and these are
made for active features alone. y is made again in the backward pass instead of being kept for every head.

Shapes: B sequences of T positions (Q as a query, K as a key), n = B·T tokens, N heads, P pairs ordered by head, query
feature, key feature; U query features that have a pair, C key features that a head uses; L active query features, M
active key features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .head_kl import HeadKL, handed, returned
from .row_sums import row_sums, row_weights_gradient, starts_of
from .sparse_scores import Events

Meetings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of a batch's `meetings`


@dataclass(frozen=True)
class HeadLayout:
    """One head's pairs: where they stand among all, and how they are summed up."""

    pairs: slice
    key_C: Tensor
    """The key features that it uses, ascending."""
    by_key: tuple[Tensor, Tensor, Tensor]
    """Its pairs in the order of key features: their order, their rows of U, and where each key feature's begin."""
    by_query: tuple[Tensor, Tensor, Tensor]
    """In the order of query features: its rows of U, its pairs' columns of C, and where each row's begin."""

    @classmethod
    def of(cls, pairs: slice, row_P: Tensor, key_P: Tensor) -> HeadLayout:
        key_C, column = key_P.unique(return_inverse=True)
        order = column.argsort(stable=True)
        rows, inner = row_P.unique_consecutive(return_inverse=True)
        return cls(
            pairs, key_C, (order, row_P[order], starts_of(column, len(key_C))),
            (rows, column, starts_of(inner, len(rows))),
        )  # fmt: skip


@dataclass(frozen=True)
class PlainLayout:
    """What all batches share: the pairs of each head, the row of U of each query feature (-1: it has no pair)."""

    heads: list[HeadLayout]
    row_F: Tensor
    n_rows: int
    n_key: int
    """Key features there are, the bias among them."""


@dataclass(frozen=True)
class _Batch:
    """One batch's active features and how a head's meet."""

    layout: PlainLayout
    row_L: Tensor
    """Row of U of each active query feature that has a pair."""
    token_L: Tensor
    keys: Events
    by_feature_M: Tensor
    """Order of the active key features by feature, then token; `keys` are in the order of tokens."""
    batch: int
    length: int

    @classmethod
    def of(cls, queries: Events, keys: Events, layout: PlainLayout, batch: int, length: int) -> tuple[_Batch, Tensor]:
        """And which of the active query features have a pair."""
        row_L = layout.row_F[queries.feature_L]
        paired = (row_L >= 0).nonzero()[:, 0]
        order = keys.feature_L.argsort(stable=True)
        return cls(layout, row_L[paired], queries.token_L[paired], keys, order, batch, length), paired

    def table(self, a_L: Tensor) -> Tensor:
        """Activations of the query features that have a pair, [U, n]."""
        table_Un = a_L.new_zeros(self.layout.n_rows, self.batch * self.length)
        table_Un[self.row_L, self.token_L] = a_L
        return table_Un

    def by_sequence(self, y_Cn: Tensor) -> Tensor:
        """Its rows by (key feature, sequence), [C·B, Q]."""
        return y_Cn.unflatten(1, (self.batch, self.length)).flatten(0, 1)

    def meetings(self, head: HeadLayout) -> Meetings:
        """Which active key features the head uses, by token; their rows of y and where each token's begin; then which
        they are by row of y, and where each row's begin. A row of y is a (key feature, sequence)."""
        column_F = self.keys.feature_L.new_full((self.layout.n_key,), -1)
        column_F[head.key_C] = torch.arange(len(head.key_C), device=column_F.device)
        column_M = column_F[self.keys.feature_L]
        row_M = column_M * self.batch + self.keys.token_L // self.length
        used = (column_M >= 0).nonzero()[:, 0]
        again = self.by_feature_M[column_M[self.by_feature_M] >= 0]
        return (
            used, row_M[used], starts_of(self.keys.token_L[used], self.batch * self.length),
            again, starts_of(row_M[used], len(head.key_C) * self.batch),
        )  # fmt: skip

    def scores(self, meetings: Meetings, y_Cn: Tensor, a_k_M: Tensor) -> Tensor:
        """One head's, [B, K, Q]."""
        used, row, start, *_ = meetings
        found = row_sums(row, self.by_sequence(y_Cn), start, a_k_M[used])  # [key token, query position]
        return found.view(self.batch, self.length, self.length)


class _Gradients:
    """Those of both sides' activations and of S, added up head by head; None for what needs none."""

    def __init__(self, seen: _Batch, a_k_M: Tensor, s_P: Tensor, table_Un: Tensor, needed: Sequence[bool]) -> None:
        self.seen, self.a_k_M, self.s_P, self.table_Un = seen, a_k_M, s_P, table_Un
        made = zip((table_Un, a_k_M, s_P), needed, strict=True)
        self.to_table, self.to_k, self.to_s = (torch.zeros_like(of) if need else None for of, need in made)

    def add(self, head: HeadLayout, meetings: Meetings, y_Cn: Tensor, grad_nQ: Tensor) -> None:
        """Of one head's scores, [key token, query position]."""
        seen, (used, row, start, again, start_y) = self.seen, meetings
        if self.to_k is not None:
            self.to_k[used] += row_weights_gradient(row, seen.by_sequence(y_Cn), start, grad_nQ)
        to_y = row_sums(seen.keys.token_L[again], grad_nQ, start_y, self.a_k_M[again])
        to_y = to_y.view(len(head.key_C), self.table_Un.shape[1])
        if self.to_table is not None:
            rows, column, start_q = head.by_query
            self.to_table.index_add_(0, rows, row_sums(column, to_y, start_q, self.s_P[head.pairs]))
        if self.to_s is not None:
            order, row_q, start_k = head.by_key
            self.to_s[head.pairs][order] = row_weights_gradient(row_q, self.table_Un, start_k, to_y)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In a_q, a_k and S."""
        seen = self.seen
        to_q = None if self.to_table is None else self.to_table[seen.row_L, seen.token_L]
        return to_q, self.to_k, self.to_s


class _PlainScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_q_L: Tensor, a_k_M: Tensor, s_P: Tensor, seen: _Batch) -> Tensor:
        ctx.save_for_backward(a_q_L, a_k_M, s_P)
        ctx.seen = seen
        heads = seen.layout.heads
        scores = s_P.new_empty(seen.batch, len(heads), seen.length, seen.length)
        table_Un = seen.table(a_q_L)
        for n, head in enumerate(heads):
            scores[:, n] = seen.scores(seen.meetings(head), _y(table_Un, s_P, head), a_k_M).transpose(1, 2)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_q_L, a_k_M, s_P = ctx.saved_tensors
        seen: _Batch = ctx.seen
        table_Un = seen.table(a_q_L)
        gradients = _Gradients(seen, a_k_M, s_P, table_Un, ctx.needs_input_grad[:3])
        for n, head in enumerate(seen.layout.heads):
            grad_nQ = grads[0][:, n].transpose(1, 2).flatten(0, 1).contiguous()
            gradients.add(head, seen.meetings(head), _y(table_Un, s_P, head), grad_nQ)
        return *gradients.found(), None


class _PlainKL(torch.autograd.Function):
    """The KL of such scores; a head's gradient goes on before the next head's scores are made."""

    @staticmethod
    def forward(ctx: Any, a_q_L: Tensor, a_k_M: Tensor, s_P: Tensor, seen: _Batch, kl: HeadKL) -> tuple[Tensor, Tensor]:
        table_Un, needed = seen.table(a_q_L), ctx.needs_input_grad[:3]
        gradients = _Gradients(seen, a_k_M, s_P, table_Un, needed)
        rows = []
        for n, head in enumerate(seen.layout.heads):
            meetings, y_Cn = seen.meetings(head), _y(table_Un, s_P, head)
            scores_BKQ = seen.scores(meetings, y_Cn, a_k_M)
            rows.append(kl.rows_(n, scores_BKQ.transpose(1, 2), gradient=any(needed)))
            if any(needed):
                gradients.add(head, meetings, y_Cn, scores_BKQ.flatten(0, 1))
            del meetings, y_Cn, scores_BKQ  # before the next head's are made
        return returned(ctx, kl, torch.stack(rows, 1), gradients.found())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *handed(ctx, grads[0]), None, None


def _y(table_Un: Tensor, s_P: Tensor, head: HeadLayout) -> Tensor:
    """y of one head, [C, n]."""
    order, row, start = head.by_key
    return row_sums(row, table_Un, start, s_P[head.pairs][order])


def plain_scores(
    queries: Events,
    a_q_L: Tensor,
    keys: Events,
    a_k_M: Tensor,
    s_P: Tensor,
    layout: PlainLayout,
    batch: int,
    length: int,
) -> Tensor:
    """Scores [B, N, Q, K] of active features, both sides in the order of tokens; differentiable in a_q, a_k and s.

    Args:
        a_q_L, a_k_M: activations.
        s_P: values of S, in the layout's order.
    """
    seen, paired = _Batch.of(queries, keys, layout, batch, length)
    return _PlainScores.apply(a_q_L.index_select(0, paired), a_k_M, s_P, seen)  # type: ignore[return-value]


def plain_kl(
    queries: Events,
    a_q_L: Tensor,
    keys: Events,
    a_k_M: Tensor,
    s_P: Tensor,
    layout: PlainLayout,
    batch: int,
    length: int,
    kl: HeadKL,
) -> tuple[Tensor, Tensor]:
    """Σ weight · KL under these scores, differentiable as they are, and the KL of each row [B, N, Q], which is not."""
    seen, paired = _Batch.of(queries, keys, layout, batch, length)
    return _PlainKL.apply(a_q_L.index_select(0, paired), a_k_M, s_P, seen, kl)  # type: ignore[return-value]


def plain_scores_by_head(
    queries: Events,
    a_q_L: Tensor,
    keys: Events,
    a_k_M: Tensor,
    s_P: Tensor,
    layout: PlainLayout,
    batch: int,
    length: int,
) -> Callable[[int], Tensor]:
    """The same one head at a time and turned round, [B, K, Q], without gradients."""
    seen, paired = _Batch.of(queries, keys, layout, batch, length)
    a_q_L = a_q_L.index_select(0, paired)

    def one(number: int) -> Tensor:
        """With a table of this head's query features alone: many maps that wait for their turn hold none."""
        head = layout.heads[number]
        row_u = head.by_query[0]
        place_U = row_u.new_full((layout.n_rows,), -1)
        place_U[row_u] = torch.arange(len(row_u), device=row_u.device)
        at_L = place_U[seen.row_L]
        used = (at_L >= 0).nonzero()[:, 0]
        table_un = a_q_L.new_zeros(len(row_u), batch * length)
        table_un[at_L[used], seen.token_L[used]] = a_q_L[used]
        order, row, start = head.by_key
        y_Cn = row_sums(place_U[row], table_un, start, s_P[head.pairs][order])
        return seen.scores(seen.meetings(head), y_Cn, a_k_M)

    return one
