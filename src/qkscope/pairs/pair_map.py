"""The pair map: which (query feature, key feature, head) triples make up a layer's scores, and how strongly.

    score_ijh = scale · Σ_kept  strength · a_q[i,a] · a_k[j,b]                       without a rotary embedding
    score_ijh = scale · Σ_kept  strength · a_q[i,a] · ⟨R_i W_q[a,h], R_j W_k[b,g]⟩ · a_k[j,b]      with one

Each side has one more feature, its bias, always active with value 1, whose decoder row is `b_out`; it stands behind the
others (index F here, -1 in an artefact). Nothing is left out: with every pair kept the scores are step 1's.

No [Fq, Fk, N] tensor exists, and none over all features of a batch: only features that are active meet, by sums over
pairs and rows (kernels/plain_scores.py) or, with a rotary embedding, by small products (kernels/sparse_scores.py).

Shapes: P kept pairs, F features of a side (bias not counted), n = B·T tokens; others as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..dictionary import SparseTranscoder
from ..kernels.head_kl import HeadKL, OfHead, headwise_kl
from ..kernels.plain_scores import HeadLayout, PlainLayout, plain_kl, plain_scores, plain_scores_by_head
from ..kernels.sparse_scores import Cells, sparse_scores
from ..pattern import PatternRule
from ..rotary import Rotary
from .active import Active


@dataclass(frozen=True)
class Pairs:
    """Kept pairs, ordered by head: int64 [P] each; the bias of a side has the index `n_query` or `n_key`."""

    query_P: Tensor
    key_P: Tensor
    head_P: Tensor
    n_query: int
    n_key: int
    n_heads: int

    @classmethod
    def of(cls, query_P: Tensor, key_P: Tensor, head_P: Tensor, n_query: int, n_key: int, n_heads: int) -> Pairs:
        """Pairs in any order; the result is sorted by head, query feature, key feature."""
        return cls.sorted(query_P, key_P, head_P, n_query, n_key, n_heads)[0]

    @classmethod
    def sorted(
        cls, query_P: Tensor, key_P: Tensor, head_P: Tensor, n_query: int, n_key: int, n_heads: int
    ) -> tuple[Pairs, Tensor]:
        """`of`, and the order that sorts what belongs to the pairs."""
        order = ((head_P * (n_query + 1) + query_P) * (n_key + 1) + key_P).argsort()
        return cls(query_P[order], key_P[order], head_P[order], n_query, n_key, n_heads), order

    def __len__(self) -> int:
        return len(self.query_P)

    def take(self, index: Tensor) -> Pairs:
        """These of the pairs, in their own order: `index` is sorted first."""
        index = index.sort().values
        return Pairs(self.query_P[index], self.key_P[index], self.head_P[index], self.n_query, self.n_key, self.n_heads)

    @cached_property
    def starts(self) -> list[int]:
        """Where each head's pairs start, and the end: N + 1 numbers."""
        return [0, *torch.bincount(self.head_P, minlength=self.n_heads).cumsum(0).tolist()]

    def of_head(self, head: int) -> slice:
        return slice(self.starts[head], self.starts[head + 1])

    @cached_property
    def queries(self) -> Tensor:
        """The query features that have a pair, the bias not among them."""
        used = self.query_P.unique()
        return used[used < self.n_query]

    @cached_property
    def keys(self) -> Tensor:
        """The same of the key side."""
        used = self.key_P.unique()
        return used[used < self.n_key]

    @cached_property
    def turned(self) -> tuple[Tensor, Pairs]:
        """The pairs with queries and keys in each other's place, and the order of these that sorts them so."""
        pairs, order = Pairs.sorted(self.key_P, self.query_P, self.head_P, self.n_key, self.n_query, self.n_heads)
        return order, pairs

    @cached_property
    def plain_layout(self) -> PlainLayout:
        """How the pairs are summed up without a rotary embedding; made once."""
        used, row_P = self.query_P.unique(return_inverse=True)
        row_F = self.query_P.new_full((self.n_query + 1,), -1)
        row_F[used] = torch.arange(len(used), device=row_F.device)
        heads = [HeadLayout.of(here, row_P[here], self.key_P[here]) for here in map(self.of_head, range(self.n_heads))]
        return PlainLayout(heads, row_F, len(used), self.n_key + 1)


def with_bias(acts: Tensor) -> Tensor:
    """Activations with the bias feature's constant 1 behind them, [..., F + 1]."""
    return torch.cat([acts, acts.new_ones(*acts.shape[:-1], 1)], -1)


def rows(transcoder: SparseTranscoder, n_heads: int) -> Tensor:
    """Decoder rows by head with the bias behind them, [F + 1, heads, H]."""
    return torch.cat([transcoder.W_dec, transcoder.b_out[None]]).unflatten(1, (n_heads, -1))


def weight_strength(pairs: Pairs, rows_q: Tensor, rows_k: Tensor) -> Tensor:
    """⟨W_dec_q[a,h], W_dec_k[b,g(h)]⟩ of each pair, [P]."""
    group = pairs.head_P * rows_k.shape[1] // pairs.n_heads
    return torch.linalg.vecdot(rows_q[pairs.query_P, pairs.head_P], rows_k[pairs.key_P, group])


def turn(x_BTnH: Tensor, phase_BTh: Tensor) -> Tensor:
    """Rotary rotation of x whose partner dimensions are neighbours, by `Rotary.phases`."""
    z = torch.view_as_complex(x_BTnH.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * phase_BTh[:, :, None]).flatten(-2)


def turned_rows(rows_FH: Tensor, feature_L: Tensor, acts_L: Tensor, phase_Lh: Tensor) -> Tensor:
    """Decoder rows of active features, times their activations, rotated to where they are active, [L, H]."""
    rows_LH = rows_FH.index_select(0, feature_L) * acts_L[:, None]
    return turn(rows_LH[None, :, None], phase_Lh[None])[0, :, 0]


def pair_scores(
    pairs: Pairs,
    strength_P: Tensor,
    acts_q_BTF: Tensor,
    acts_k_BTF: Tensor,
    rows_q: Tensor,
    rows_k: Tensor,
    rule: PatternRule,
    reach: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`active_scores` of dense activations that carry the bias feature (`with_bias`), [B, T, F + 1] a side.

    Gradients reach the activations that are not zero, or those that `reach` says, bool [B, T, F + 1] a side: zero
    activations stand behind a step that lets no gradient pass, but for JumpReLU's near its thresholds.
    """
    on_q, on_k = reach or (None, None)
    queries, keys = Active.of(acts_q_BTF, on_q), Active.of(acts_k_BTF, on_k)
    return active_scores(pairs, strength_P, queries, keys, lambda: (rows_q, rows_k), rule)


def active_scores(
    pairs: Pairs,
    strength_P: Tensor,
    queries: Active,
    keys: Active,
    both_rows: Callable[[], tuple[Tensor, Tensor]],
    rule: PatternRule,
) -> Tensor:
    """Capped scores from the kept pairs, float32 [B, N, Q, K], before the mask; a head without pairs has zeros.

    Differentiable in the strengths, the activations and, with a rotary embedding, the decoder rows of both sides
    (`rows`), which are not asked for without one.
    """
    if rule.rotary is not None:
        return active_scores_by_head(pairs, strength_P, queries, keys, both_rows, rule)(slice(0, pairs.n_heads))
    both = queries.events, queries.act_L, keys.events, keys.act_L
    scores = plain_scores(*both, strength_P * rule.scaling, pairs.plain_layout, keys.batch, keys.length)
    return rule.cap(scores)


def active_kl(
    pairs: Pairs,
    strength_P: Tensor,
    queries: Active,
    keys: Active,
    both_rows: Callable[[], tuple[Tensor, Tensor]],
    rule: PatternRule,
    kl: HeadKL,
) -> tuple[Tensor, Tensor]:
    """Σ weight · KL of the true pattern from that of `active_scores`, of which one head's at a time are held.

    Differentiable in what these are; and the KL of each row, [B, N, Q], which is not.
    """
    strength_P = strength_P * rule.scaling
    if rule.rotary is None:
        both = queries.events, queries.act_L, keys.events, keys.act_L
        return plain_kl(*both, strength_P, pairs.plain_layout, keys.batch, keys.length, kl)
    rotary = rule.rotary

    def heads_of(strength: Tensor, act_q: Tensor, act_k: Tensor, *rows_FH: Tensor) -> OfHead:
        both = replace(queries, act_L=act_q), replace(keys, act_L=act_k)
        return _rotary_scores_by_head(
            pairs, strength, *both, rows_FH[: pairs.n_heads], rows_FH[pairs.n_heads :], rotary
        )

    rows_FH = (row for rows in both_rows() for row in rows.unbind(1))
    return headwise_kl(kl, heads_of, strength_P, queries.act_L, keys.act_L, *rows_FH)


def active_scores_by_head(
    pairs: Pairs,
    strength_P: Tensor,
    queries: Active,
    keys: Active,
    both_rows: Callable[[], tuple[Tensor, Tensor]],
    rule: PatternRule,
) -> Callable[[slice], Tensor]:
    """The same some heads at a time, [B, n, Q, K]; differentiable only with a rotary embedding."""
    strength_P = strength_P * rule.scaling
    if rule.rotary is None:
        # Keys in the queries' place: what is found is then as it is wanted, and large patterns need not be turned.
        order, turned = pairs.turned
        both = keys.events, keys.act_L, queries.events, queries.act_L
        one = plain_scores_by_head(*both, strength_P[order], turned.plain_layout, keys.batch, keys.length)
    else:
        heads_q, groups_k = (rows.unbind(1) for rows in both_rows())
        one = _rotary_scores_by_head(pairs, strength_P, queries, keys, heads_q, groups_k, rule.rotary)

    def some(heads: slice) -> Tensor:
        found = [one(head)[:, None] for head in range(heads.start, heads.stop)]
        return rule.cap(torch.cat(found, 1) if len(found) > 1 else found[0])

    return some


def _rotary_scores_by_head(
    pairs: Pairs,
    strength_P: Tensor,
    queries: Active,
    keys: Active,
    heads_q: Sequence[Tensor],
    groups_k: Sequence[Tensor],
    rotary: Rotary,
) -> OfHead:
    """Of decoder rows [F + 1, H] of each query and key head."""
    batch, length = keys.batch, keys.length
    order, phase = rotary.phases()
    phase_nh = phase.expand(batch, -1, -1).flatten(0, 1)
    # The query's bias is at every token: it meets the sum of its keys instead of each of them.
    on_bias = queries.events.feature_L == pairs.n_query
    bias = queries.take(on_bias.nonzero()[:, 0])
    bias_n = bias.act_L.new_zeros(batch * length).index_put((bias.events.token_L,), bias.act_L)
    queries, keys = queries.take((~on_bias).nonzero()[:, 0]), keys.by_feature()
    at_q, at_k = queries.events, keys.events
    cells = Cells.of(at_k, pairs.n_key + 1, batch, length)
    phase_Lh, phase_Mh = phase_nh[at_q.token_L], phase_nh[at_k.token_L]

    def one(head: int) -> Tensor:
        here = pairs.of_head(head)
        end = here.start + int((pairs.query_P[here] < pairs.n_query).sum())  # the bias's pairs are the head's last
        rows_q, rows_k = (
            rows_FH[:, order] for rows_FH in (heads_q[head], groups_k[head * len(groups_k) // pairs.n_heads])
        )
        u_LH = turned_rows(rows_q, at_q.feature_L, queries.act_L, phase_Lh)
        v_MH = turned_rows(rows_k, at_k.feature_L, keys.act_L, phase_Mh)
        pair = slice(here.start, end)
        found = sparse_scores(u_LH, v_MH, strength_P[pair], pairs.query_P[pair], pairs.key_P[pair], at_q, cells)
        if end < here.stop:
            pair = slice(end, here.stop)
            strength_F = strength_P.new_zeros(pairs.n_key + 1).index_put((pairs.key_P[pair],), strength_P[pair])
            sums_nH = v_MH.new_zeros(batch * length, v_MH.shape[1])
            sums_nH = sums_nH.index_add(0, at_k.token_L, v_MH * strength_F[at_k.feature_L, None])
            query_BTH = turn(rows_q[-1].expand(len(phase), length, 1, -1), phase)[:, :, 0]
            query_BTH = query_BTH * bias_n.view(batch, length, 1)
            found = found + query_BTH @ sums_nH.view(batch, length, -1).transpose(1, 2)
        return found

    return one
