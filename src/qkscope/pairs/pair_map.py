"""The pair map: which (query feature, key feature, head) triples make up a layer's scores, and how strongly.

    score_ijh = scale · Σ_kept  strength · a_q[i,a] · a_k[j,b]                       without a rotary embedding
    score_ijh = scale · Σ_kept  strength · a_q[i,a] · ⟨R_i W_q[a,h], R_j W_k[b,g]⟩ · a_k[j,b]      with one

Each side has one more feature, its bias, always active with value 1, whose decoder row is `b_out`; it stands behind the
others (index F here, -1 in an artefact). Nothing is left out: with every pair kept the scores are step 1's.

No [Fq, Fk, N] tensor exists: each head sums over its kept pairs by a sparse product on the query side and a dense one
over the key features that the head uses.

Shapes: P kept pairs, F features of a side (bias not counted), n = B·T tokens; others as in attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..dictionary import SparseTranscoder
from ..kernels.sparse_linear import SparseLayout, compressed, sparse_linear
from ..pattern import PatternRule


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

    def layout(self, head: int, width: int) -> SparseLayout:
        """Layout of one head's matrix [query features, used key features × width]; made once for each width."""
        found = self._layouts.get((head, width))
        if found is None:
            used, column = self.key_columns[head]
            inner = torch.arange(width, device=column.device)
            rows = self.query_P[self.of_head(head)].repeat_interleave(width)
            columns = (column[:, None] * width + inner).flatten()
            found = SparseLayout.of(rows, columns, self.n_query + 1, len(used) * width)
            self._layouts[head, width] = found
        return found

    @cached_property
    def _layouts(self) -> dict[tuple[int, int], SparseLayout]:
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


def pair_scores(
    pairs: Pairs,
    strength_P: Tensor,
    acts_q_BTF: Tensor,
    acts_k_BTF: Tensor,
    rows_q: Tensor,
    rows_k: Tensor,
    rule: PatternRule,
) -> Tensor:
    """Capped scores from the kept pairs, float32 [B, N, Q, K], before the mask.

    Activations carry the bias feature (`with_bias`); a head without pairs has scores of zero.
    """
    batch, length = acts_q_BTF.shape[:2]
    flat_Fn = acts_q_BTF.flatten(0, 1).T.contiguous()
    active = compressed(flat_Fn)
    if rule.rotary is not None:
        order, phase = rule.rotary.phases()
        rows_q, rows_k = rows_q[..., order], rows_k[..., order]
    scores = []
    for head in range(pairs.n_heads):
        here = pairs.of_head(head)
        used, _ = pairs.key_columns[head]
        keys = acts_k_BTF[..., used]
        if not len(used):
            scores.append(acts_q_BTF.new_zeros(batch, length, length))
            continue
        if rule.rotary is None:
            y = sparse_linear(flat_Fn, strength_P[here] * rule.scaling, pairs.layout(head, 1), active).T.unflatten(
                0, (batch, length)
            )
        else:
            group = head * rows_k.shape[1] // pairs.n_heads
            width = rows_q.shape[-1]
            values = strength_P[here, None] * rule.scaling * rows_q[pairs.query_P[here], head]
            y = sparse_linear(flat_Fn, values.flatten(), pairs.layout(head, width), active).T
            y = turn(y.reshape(batch, length, len(used), width), phase).flatten(2)
            turned = turn(rows_k[used, group].expand(1, length, -1, -1), phase)
            keys = (keys[..., None] * turned).flatten(2)
        scores.append(y @ keys.transpose(1, 2))
    return rule.cap(torch.stack(scores, 1))
