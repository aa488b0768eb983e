"""Importance: how many nats of pattern KL a pair is worth, for every pair, with no training.

Taking a pair out changes score row i by δ_ij, which to second order costs ½·Var_{j∼P_i}(δ_ij). Averaged over rows:

    I[a,b,h] = ½ · scale² · E_i[ a_q[i,a]² · Var_{j∼P_i}( M[a,b,h](i-j) · a_k[j,b] ) ]

Without a rotary embedding M leaves the variance and one product a head ranks every pair. With one, the terms of the
variance are made for every active feature of a query and every active feature of a key; both are few. Blocks of [query
features, key features] of one head go by, one at a time, and the best pairs stay in a bounded list. A soft cap enters
by its slope at each score; the mass on a learned sink counts as an outcome with δ = 0.

With a rotary embedding that is the dearest part of pruning. Rows of one sequence are much alike, so `rough` takes one
in `ROUGH`, other places in every sequence: a quarter of the work, and an estimate without bias.

Shapes as in pair_map.py; a batch's tokens are its unpadded ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dictionary import SparseTranscoder
from ..kernels.row_kl import exp
from ..pattern import AttentionInputs
from ..training.start import slopes
from .pair_map import Pairs, rows, turned_rows, with_bias

KEPT_ELEMENTS = 1 << 27  # activations of a sample that stay in memory while its heads go by: 512 MB
BLOCK_ELEMENTS = 1 << 26  # elements of one [query features, key features] block: 256 MB in float32
ROUGH = 4  # rows of scores of which one is taken, where a rough answer will do
MEETING_ELEMENTS = 1 << 20  # meetings of active features made at once with a rotary embedding: 4 MB, near the cache


@dataclass
class Seen:
    """One batch as the pair map sees it; activations carry the bias feature, and are zero at padding."""

    inputs: AttentionInputs
    acts_q_BTF: Tensor
    acts_k_BTF: Tensor

    n_rows: int
    """Tokens whose rows of scores count."""

    def weights(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """P, P·f' and P·f'² of one head, [B, Q, K]: P the true pattern (no sink column), f' the slope of the cap."""
        one = self.inputs.one_head(head)
        length = one.x_BTD.shape[1]
        pattern = exp(one.rule.log_pattern(one.q_BTNH, one.k_BTGH))[:, 0, :, :length] * one.real_BT[..., None]
        slope = slopes(one.rule, one)
        if slope is None:
            return pattern, pattern, pattern
        return pattern, pattern * slope[:, 0], pattern * slope[:, 0].square()


@torch.no_grad()
def see(inputs: AttentionInputs, query: SparseTranscoder, key: SparseTranscoder, rows_BT: Tensor | None = None) -> Seen:
    """Encode one batch, with the dictionaries as they are at inference; queries only in these rows of scores."""
    real = inputs.real_BT
    rows_BT = real if rows_BT is None else rows_BT & real
    acts_q, acts_k = (
        with_bias(side.eval().encode(inputs.x_BTD.float())) * where[..., None]
        for side, where in ((query, rows_BT), (key, real))
    )
    return Seen(inputs, acts_q, acts_k, int(rows_BT.sum()))


def seen(
    sample: Sequence[AttentionInputs], query: SparseTranscoder, key: SparseTranscoder, *, rough: bool = False
) -> Iterable[Seen]:
    """The batches of a sample, encoded; kept where they are small, made anew at each turn where they are not."""
    elements = sum(inputs.real_BT.numel() for inputs in sample) * (query.width + key.width)
    items = _Items(sample, query, key, ROUGH if rough and sample[0].rule.rotary is not None else 1)
    return list(items) if elements <= KEPT_ELEMENTS else items


@dataclass
class _Items:
    sample: Sequence[AttentionInputs]
    query: SparseTranscoder
    key: SparseTranscoder
    stride: int

    def __iter__(self) -> Iterator[Seen]:
        sequences = 0
        for inputs in self.sample:
            batch, length = inputs.real_BT.shape
            place_BT = torch.arange(batch)[:, None] + torch.arange(length) + sequences
            yield see(inputs, self.query, self.key, (place_BT % self.stride == 0).to(inputs.real_BT.device))
            sequences += batch


@torch.no_grad()
def rank_pairs(
    sample: Sequence[AttentionInputs],
    query: SparseTranscoder,
    key: SparseTranscoder,
    most: int,
    *,
    rough: bool = False,
) -> tuple[Pairs, Tensor]:
    """The `most` most important pairs and their importance [P] in nats; features that never fire are left out."""
    n_heads = sample[0].q_BTNH.shape[2]
    best = _Best(most, query.W_dec.device)
    for head, queries, keys, worth in importance_blocks(sample, query, key, rough=rough):
        best.add(worth, queries, keys, head)
    pairs, order = Pairs.sorted(best.index[0], best.index[1], best.index[2], query.width, key.width, n_heads)
    return pairs, best.worth[order]


@torch.no_grad()
def pair_importance(
    pairs: Pairs,
    sample: Sequence[AttentionInputs],
    query: SparseTranscoder,
    key: SparseTranscoder,
    *,
    rough: bool = False,
) -> Tensor:
    """Importance of these pairs at strength 1 of their weights, nats [P]; a strength of s multiplies it by s²."""
    total = torch.zeros(len(pairs), device=query.W_dec.device)
    place_q, place_k = (torch.full((side.width + 1,), -1, device=total.device) for side in (query, key))
    for head, queries, keys, worth in importance_blocks(sample, query, key, rough=rough):
        here = pairs.of_head(head)
        place_q.fill_(-1)[queries] = torch.arange(len(queries), device=total.device)
        place_k.fill_(-1)[keys] = torch.arange(len(keys), device=total.device)
        a, b = place_q[pairs.query_P[here]], place_k[pairs.key_P[here]]
        total[here] += torch.where((a >= 0) & (b >= 0), worth[a.clamp(min=0), b.clamp(min=0)], 0.0)
    return total


def importance_blocks(
    sample: Sequence[AttentionInputs], query: SparseTranscoder, key: SparseTranscoder, *, rough: bool = False
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(head, query features, key features, their importance [queries, keys] in nats), block by block."""
    rule = sample[0].rule
    n_heads, n_groups = sample[0].q_BTNH.shape[2], sample[0].k_BTGH.shape[2]
    rows_q, rows_k = rows(query, n_heads), rows(key, n_groups)
    items = seen(sample, query, key, rough=rough)
    queries, keys = _firing(items)
    add = _add_plain if rule.rotary is None else _add_rotary
    for head in range(n_heads):
        right = rows_k[keys, head * n_groups // n_heads]
        for part in queries.split(max(BLOCK_ELEMENTS // len(keys), 1)):
            left = rows_q[part, head]
            moment = torch.zeros(len(part), len(keys), device=rows_q.device)
            count = 0
            for item in items:
                count += item.n_rows
                add(moment, item, head, part, keys, left, right)
            worth = moment * (0.5 * rule.scaling**2 / count)
            if rule.rotary is None and rule.shift_free:  # a constant along the row cancels in the softmax
                worth[:, keys == key.width] = 0
            yield head, part, keys, worth


class _Best:
    """The highest-ranked pairs so far."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.worth = torch.zeros(0, device=device)
        self.index = torch.zeros(3, 0, dtype=torch.int64, device=device)

    def add(self, worth: Tensor, queries: Tensor, keys: Tensor, head: int) -> None:
        flat = worth.flatten()
        value, place = flat.topk(min(self.limit, len(flat)))
        place, value = place[value > 0], value[value > 0]
        index = torch.stack([queries[place // len(keys)], keys[place % len(keys)], torch.full_like(place, head)])
        self.worth, self.index = torch.cat([self.worth, value]), torch.cat([self.index, index], 1)
        if len(self.worth) > self.limit:
            self.worth, order = self.worth.topk(self.limit)
            self.index = self.index[:, order]


def firing_features(
    sample: Sequence[AttentionInputs], query: SparseTranscoder, key: SparseTranscoder
) -> tuple[Tensor, Tensor]:
    """Indices of the query and of the key features that fire on the sample, bias included."""
    return _firing(seen(sample, query, key))


def _firing(items: Iterable[Seen]) -> tuple[Tensor, Tensor]:
    fired = [((i.acts_q_BTF > 0).flatten(0, 1).any(0), (i.acts_k_BTF > 0).flatten(0, 1).any(0)) for i in items]
    queries, keys = (torch.stack(side).any(0).nonzero()[:, 0] for side in zip(*fired, strict=True))
    return queries, keys


def _add_plain(
    moment: Tensor, item: Seen, head: int, queries: Tensor, keys: Tensor, left: Tensor, right: Tensor
) -> None:
    """Add M² Σ_i a_q² Var(a_k): one product, since M does not depend on the position."""
    _, first, second = item.weights(head)
    acts = item.acts_k_BTF[..., keys]
    variance = second @ acts.square() - (first @ acts).square()
    squares = item.acts_q_BTF[..., queries].square().flatten(0, 1).T
    moment += (left @ right.T).square() * (squares @ variance.flatten(0, 1))


def _add_rotary(
    moment: Tensor, item: Seen, head: int, queries: Tensor, keys: Tensor, left: Tensor, right: Tensor
) -> None:
    """Add Σ_i a_q² Var_j(M(i-j) a_k), with M(i-j) = ⟨R_i W_q, R_j W_k⟩ kept inside the variance.

    δ is made for each active query feature e and active key feature f of a sequence, [m, L] at once, weighted with what
    the query of e sees of the key of f, and added up over the keys of each key feature.
    """
    rotary = item.inputs.rule.rotary
    assert rotary is not None
    order, phase = rotary.phases()
    left, right = left[:, order], right[:, order]
    _, first, second = item.weights(head)
    for b in range(len(first)):
        turns = phase[b if len(phase) > 1 else 0]
        token_L, query_L = item.acts_q_BTF[b][:, queries].nonzero(as_tuple=True)
        key_M, token_M = item.acts_k_BTF[b][:, keys].T.nonzero(as_tuple=True)
        if not (len(token_L) and len(token_M)):
            continue
        u_LH = turned_rows(left, query_L, item.acts_q_BTF[b][token_L, queries[query_L]], turns[token_L])
        v_MH = turned_rows(right, key_M, item.acts_k_BTF[b][token_M, keys[key_M]], turns[token_M])
        seen_M, place_M = key_M.unique_consecutive(return_inverse=True)
        mean = left.new_zeros(len(seen_M), len(token_L))
        square = torch.zeros_like(mean)
        by_key = [weights[b].T.contiguous() for weights in ((first,) if second is first else (first, second))]
        for part in torch.arange(len(token_M), device=left.device).split(max(MEETING_ELEMENTS // len(token_L), 1)):
            delta = v_MH[part] @ u_LH.T
            weight = by_key[0].index_select(0, token_M[part]).index_select(1, token_L)
            mean.index_add_(0, place_M[part], weight.mul(delta))
            if second is not first:
                weight = by_key[1].index_select(0, token_M[part]).index_select(1, token_L)
            square.index_add_(0, place_M[part], weight.mul_(delta).mul_(delta))
        variance = square.sub_(mean.square_())
        moment[:, seen_M] += left.new_zeros(len(left), len(seen_M)).index_add_(0, query_L, variance.T)
