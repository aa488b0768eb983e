"""The pair map: which (query feature, key feature, head) triples make up a layer's scores, and how strongly.

    score_ijh = scale · Σ_kept  strength · a_q[i,a] · a_k[j,b]                       without a rotary embedding
    score_ijh = scale · Σ_kept  strength · a_q[i,a] · ⟨R_i W_q[a,h], R_j W_k[b,g]⟩ · a_k[j,b]      with one

Each side has one more feature, its bias, always active with value 1, whose decoder row is `b_out`; it stands behind the
others (index F here, -1 in an artefact). Nothing is left out: with every pair kept the scores are step 1's.

No [Fq, Fk, N] tensor exists: each head sums over its kept pairs by a sparse product on the query side and a dense one
over the key features that the head uses. With a rotary embedding every pair would have H columns of its own there, so
instead only features that are active meet (kernels/sparse_scores.py).

Shapes: P kept pairs, F features of a side (bias not counted), n = B·T tokens; others as in attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..dictionary import SparseTranscoder
from ..kernels.sparse_linear import SparseLayout, compressed, sparse_linear
from ..kernels.sparse_scores import Cells, Events, sparse_scores
from ..pattern import PatternRule
from ..rotary import Rotary


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
    def key_columns(self) -> list[tuple[Tensor, Tensor]]:
        """For each head the key features that it uses, and each of its pairs' place among them."""
        parts = (self.key_P[self.of_head(n)].unique(return_inverse=True) for n in range(self.n_heads))
        return [(used, column) for used, column in parts]

    def layout(self, head: int) -> SparseLayout:
        """Layout of one head's matrix [query features, used key features]; made once."""
        found = self._layouts.get(head)
        if found is None:
            used, column = self.key_columns[head]
            found = SparseLayout.of(self.query_P[self.of_head(head)], column, self.n_query + 1, len(used))
            self._layouts[head] = found
        return found

    @cached_property
    def _layouts(self) -> dict[int, SparseLayout]:
        return {}


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
    """Capped scores from the kept pairs, float32 [B, N, Q, K], before the mask.

    Activations carry the bias feature (`with_bias`); a head without pairs has scores of zero. With a rotary embedding
    the gradient of an activation is made where it is not zero, or where `reach` says, bool [B, T, F + 1] a side: zero
    activations stand behind a step that lets no gradient pass, but for JumpReLU's near its thresholds.
    """
    if rule.rotary is None:
        scores = _plain_scores(pairs, strength_P * rule.scaling, acts_q_BTF, acts_k_BTF)
    else:
        on_q, on_k = reach or (acts_q_BTF != 0, acts_k_BTF != 0)
        strength_P = strength_P * rule.scaling
        scores = _rotary_scores(pairs, strength_P, acts_q_BTF, acts_k_BTF, rows_q, rows_k, rule.rotary, on_q, on_k)
    return rule.cap(scores)


def _plain_scores(pairs: Pairs, strength_P: Tensor, acts_q_BTF: Tensor, acts_k_BTF: Tensor) -> Tensor:
    batch, length = acts_q_BTF.shape[:2]
    flat_Fn = acts_q_BTF.flatten(0, 1).T.contiguous()
    active = compressed(flat_Fn)
    scores = []
    for head in range(pairs.n_heads):
        used, _ = pairs.key_columns[head]
        if not len(used):
            scores.append(acts_q_BTF.new_zeros(batch, length, length))
            continue
        y_Cn = sparse_linear(flat_Fn, strength_P[pairs.of_head(head)], pairs.layout(head), active)
        scores.append(y_Cn.T.unflatten(0, (batch, length)) @ acts_k_BTF[..., used].transpose(1, 2))
    return torch.stack(scores, 1)


def _rotary_scores(
    pairs: Pairs,
    strength_P: Tensor,
    acts_q_BTF: Tensor,
    acts_k_BTF: Tensor,
    rows_q: Tensor,
    rows_k: Tensor,
    rotary: Rotary,
    on_q_BTF: Tensor,
    on_k_BTF: Tensor,
) -> Tensor:
    batch, length = acts_q_BTF.shape[:2]
    order, phase = rotary.phases()
    phase_nh = phase.expand(batch, -1, -1).flatten(0, 1)
    heads_q, groups_k = rows_q[..., order].unbind(1), rows_k[..., order].unbind(1)
    # The query's bias is at every token: it meets the sum of its keys instead of each of them.
    queries = Events.by_token(on_q_BTF.flatten(0, 1)[:, : pairs.n_query])
    keys = Events.by_feature(on_k_BTF.flatten(0, 1))
    cells = Cells.of(keys, pairs.n_key + 1, batch, length)
    a_q_L, a_k_M = _at(acts_q_BTF, queries), _at(acts_k_BTF, keys)
    phase_Lh, phase_Mh = phase_nh[queries.token_L], phase_nh[keys.token_L]
    scores = []
    for head in range(pairs.n_heads):
        here = pairs.of_head(head)
        bias = here.start + int((pairs.query_P[here] < pairs.n_query).sum())  # its pairs are the head's last
        u_LH = turned_rows(heads_q[head], queries.feature_L, a_q_L, phase_Lh)
        group = head * len(groups_k) // pairs.n_heads
        v_MH = turned_rows(groups_k[group], keys.feature_L, a_k_M, phase_Mh)
        pair = slice(here.start, bias)
        found = sparse_scores(u_LH, v_MH, strength_P[pair], pairs.query_P[pair], pairs.key_P[pair], queries, cells)
        if bias < here.stop:
            pair = slice(bias, here.stop)
            strength_F = strength_P.new_zeros(pairs.n_key + 1).index_put((pairs.key_P[pair],), strength_P[pair])
            sums_nH = v_MH.new_zeros(batch * length, v_MH.shape[1])
            sums_nH = sums_nH.index_add(0, keys.token_L, v_MH * strength_F[keys.feature_L, None])
            query_BTH = turn(heads_q[head][-1].expand(len(phase), length, 1, -1), phase)[:, :, 0] * acts_q_BTF[..., -1:]
            found = found + query_BTH @ sums_nH.view(batch, length, -1).transpose(1, 2)
        scores.append(found)
    return torch.stack(scores, 1)


def _at(acts_BTF: Tensor, events: Events) -> Tensor:
    """The activations of these events, [L]."""
    return acts_BTF.flatten().index_select(0, events.token_L * acts_BTF.shape[-1] + events.feature_L)
