"""Importance: how many nats of pattern KL a pair is worth, for every pair, with no training.

Taking a pair out changes score row i by δ_ij, which to second order costs ½·Var_{j∼P_i}(δ_ij). Averaged over rows:

    I[a,b,h] = ½ · scale² · E_i[ a_q[i,a]² · Var_{j∼P_i}( M[a,b,h](i-j) · a_k[j,b] ) ]

Without a rotary embedding M leaves the variance: that is made for the key features that are active in a sequence, from
the tokens that they are active at; a sparse product with the queries' squares and a dense one for M rank every pair,
and M is made only of the query features of a block that can still have a pair among the best. With one, the terms of
the variance are made for every active feature of a query and every active feature of a key; both are few. Blocks of
[query features, key features] of one head go by, one at a time, and the best pairs stay in a bounded list. A soft cap
enters by its slope at each score; the mass on a learned sink counts as an outcome with δ = 0.

With a rotary embedding that is the dearest part of pruning. Rows of one sequence are much alike, so `rough` takes one
in `ROUGH`, other places in every sequence: a quarter of the work, and an estimate without bias.

Shapes as in pair_map.py and active.py; a batch's tokens are its unpadded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..dictionary import SparseTranscoder
from ..kernels.row_kl import exp
from ..kernels.row_sums import csr_matrix, row_sums, starts_of
from ..pattern import AttentionInputs
from ..training.start import slopes
from .active import Active
from .pair_map import Pairs, rows, turned_rows

KEPT_ELEMENTS = 1 << 27  # of one head's patterns that stay in memory while its blocks go by: 512 MB
CPU_BLOCK = 1 << 22  # elements of one [query features, key features] block: 16 MB, near the cache
GPU_BLOCK = 1 << 26
SLACK = 1e-3  # by which a bound may be wrong for rounding
ROUGH = 4  # rows of scores of which one is taken, where a rough answer will do
MEETING_ELEMENTS = 1 << 20  # meetings of active features made at once with a rotary embedding: 4 MB, near the cache
QUERIES = 32  # positions whose queries meet the same keys, all that one of them sees


@dataclass
class Seen:
    """One batch as the pair map sees it: what is active at its unpadded tokens, the bias among it."""

    inputs: AttentionInputs
    queries: Active
    keys: Active

    n_rows: int
    """Tokens whose rows of scores count."""

    @cached_property
    def acts_q_BTF(self) -> Tensor:
        """Activations with their zeros and the bias, [B, T, F + 1]; zero at padding and in rows that do not count."""
        return self.queries.dense()

    @cached_property
    def acts_k_BTF(self) -> Tensor:
        return self.keys.dense()

    @cached_property
    def keys_by_feature(self) -> Active:
        return self.keys.by_feature()

    def weights(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """P, P·f' and P·f'² of one head, [B, Q, K]: P the true pattern (no sink column), f' the slope of the cap."""
        one = self.inputs.one_head(head)
        length = one.x_BTD.shape[1]
        pattern = exp(one.rule.log_pattern(one.q_BTNH, one.k_BTGH))[:, 0, :, :length] * one.real_BT[..., None]
        slope = slopes(one.rule, one)
        if slope is None:
            return pattern, pattern, pattern
        return pattern, pattern * slope[:, 0], pattern * slope[:, 0].square()


def see(
    inputs: AttentionInputs,
    query: SparseTranscoder,
    key: SparseTranscoder,
    rows_BT: Tensor | None = None,
    features: tuple[Tensor, Tensor] | None = None,
) -> Seen:
    """Encode one batch, with the dictionaries as they are at inference; queries only in these rows of scores.

    `features`: the only query and key features that are wanted, if not all are; the biases are there in any case.
    """
    real = inputs.real_BT
    rows_BT = real if rows_BT is None else rows_BT & real
    of_q, of_k = features or (None, None)
    queries = Active.read(query, inputs.x_BTD[rows_BT], rows_BT, of_q)
    keys = Active.read(key, inputs.x_BTD[real], real, of_k)
    return Seen(inputs, queries, keys, int(rows_BT.sum()))


def seen(
    sample: Sequence[AttentionInputs],
    query: SparseTranscoder,
    key: SparseTranscoder,
    *,
    rough: bool = False,
    features: tuple[Tensor, Tensor] | None = None,
) -> list[Seen]:
    """The batches of a sample, encoded."""
    stride = ROUGH if rough and sample[0].rule.rotary is not None else 1
    items, sequences = [], 0
    for inputs in sample:
        batch, length = inputs.real_BT.shape
        place_BT = torch.arange(batch)[:, None] + torch.arange(length) + sequences
        items.append(see(inputs, query, key, (place_BT % stride == 0).to(inputs.real_BT.device), features))
        sequences += batch
    return items


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
    for head, queries, keys, worth in importance_blocks(sample, query, key, rough=rough, least=lambda: best.least):
        best.add(worth, queries, keys, head)
    best.sort_out()
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
    items = seen(sample, query, key, rough=rough, features=(pairs.queries, pairs.keys))
    n_heads, n_groups = sample[0].q_BTNH.shape[2], sample[0].k_BTGH.shape[2]
    rows_q, rows_k = rows(query, n_heads), rows(key, n_groups)
    firing = [torch.zeros(len(r), dtype=torch.bool, device=total.device) for r in (rows_q, rows_k)]
    for mask, features in zip(firing, _firing(items), strict=True):
        mask[features] = True
    for head in range(n_heads):
        here = pairs.of_head(head)
        meet = (firing[0][pairs.query_P[here]] & firing[1][pairs.key_P[here]]).nonzero()[:, 0] + here.start
        queries, a = pairs.query_P[meet].unique(return_inverse=True)
        keys, b = pairs.key_P[meet].unique(return_inverse=True)
        done = 0
        for _, part, worth in _blocks(items, head, queries, keys, rows_q, rows_k):
            inside = ((b >= done) & (b < done + len(part))).nonzero()[:, 0]
            total[meet[inside]] = worth[a[inside], b[inside] - done]
            done += len(part)
    return total


def importance_blocks(
    sample: Sequence[AttentionInputs],
    query: SparseTranscoder,
    key: SparseTranscoder,
    *,
    rough: bool = False,
    least: Callable[[], float] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(head, query features, key features, their importance [queries, keys] in nats), block by block.

    `least`: what importance must exceed to be of interest, asked for at each block. Query features of a block that
    have no such pair may then be left out of it.
    """
    n_heads, n_groups = sample[0].q_BTNH.shape[2], sample[0].k_BTGH.shape[2]
    rows_q, rows_k = rows(query, n_heads), rows(key, n_groups)
    items = seen(sample, query, key, rough=rough)
    queries, keys = _firing(items)
    for head in range(n_heads):
        for row, part, worth in _blocks(items, head, queries, keys, rows_q, rows_k, least):
            yield head, queries[row], part, worth


def _blocks(
    items: list[Seen],
    head: int,
    queries: Tensor,
    keys: Tensor,
    rows_q: Tensor,
    rows_k: Tensor,
    least: Callable[[], float] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Importance of one head's [query features, key features], both ascending, some keys at a time.

    With it which of the query features these are: all, or those that may have a pair of more than `least`.
    """
    if not (len(queries) and len(keys)):
        return
    rule = items[0].inputs.rule
    kind = _Plain if rule.rotary is None else _Rotary
    left, right = rows_q[queries, head], rows_k[keys, head * rows_k.shape[1] // rows_q.shape[1]]
    left = left * (0.5 * rule.scaling**2 / sum(item.n_rows for item in items)) ** 0.5
    every = torch.arange(len(queries), device=left.device)
    parts = torch.arange(len(keys), device=left.device).split(max(_block_elements(left.device) // len(queries), 1))
    elements = sum(item.inputs.real_BT.numel() * item.inputs.real_BT.shape[1] for item in items)

    def prepared() -> Iterator[_Plain | _Rotary]:
        return (kind(item, head, queries, left) for item in items)

    held = list(prepared()) if len(parts) > 1 and elements <= KEPT_ELEMENTS else None
    squares_Q = left.square().sum(1)
    for part in parts:
        worth = torch.zeros(len(queries), len(part), device=left.device)
        for item in held or prepared():
            item.add(worth, keys[part], right[part])
        rows = every
        if rule.rotary is None:  # it stands for M² = |left|² |right|² by now, which it cannot exceed
            if rule.shift_free and int(keys[part[-1]]) == len(rows_k) - 1:
                worth[:, -1] = 0  # the key's bias: a constant along the row cancels in the softmax
            if least is not None:
                rows = (worth.amax(1) * squares_Q > least() * (1 - SLACK)).nonzero()[:, 0]
                worth = worth[rows]
            worth = worth.mul_((left[rows] @ _unit(right[part]).T).square_())
        yield rows, keys[part], worth


def _unit(rows_FH: Tensor) -> Tensor:
    return rows_FH / rows_FH.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows_FH.dtype).tiny)


def _block_elements(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK


class _Best:
    """The highest-ranked pairs so far, and some more: they are sorted out once there are twice as many as wanted."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit, self.least = limit, 0.0
        self.worth = torch.zeros(0, device=device)
        self.index = torch.zeros(3, 0, dtype=torch.int64, device=device)

    def add(self, worth: Tensor, queries: Tensor, keys: Tensor, head: int) -> None:
        if not len(queries):
            return
        rows = (worth.amax(1) > self.least).nonzero()[:, 0]  # of a block few have anything to add
        flat = worth[rows].flatten()
        place = (flat > self.least).nonzero()[:, 0]
        if len(place) > self.limit:
            place = place[flat[place].topk(self.limit).indices]
        a, b = queries[rows[place // len(keys)]], keys[place % len(keys)]
        self.worth = torch.cat([self.worth, flat[place]])
        self.index = torch.cat([self.index, torch.stack([a, b, torch.full_like(a, head)])], 1)
        if len(self.worth) >= 2 * self.limit:
            self.sort_out()

    def sort_out(self) -> None:
        if len(self.worth) > self.limit:
            self.worth, order = self.worth.topk(self.limit)
            self.index = self.index[:, order]
            self.least = float(self.worth[-1])


def firing_features(
    sample: Sequence[AttentionInputs], query: SparseTranscoder, key: SparseTranscoder
) -> tuple[Tensor, Tensor]:
    """Indices of the query and of the key features that fire on the sample, bias included."""
    return _firing(seen(sample, query, key))


def _firing(items: Iterable[Seen]) -> tuple[Tensor, Tensor]:
    sides = zip(*((item.queries.fired, item.keys.fired) for item in items), strict=True)
    queries, keys = (torch.cat(side).unique() for side in sides)
    return queries, keys


def _events_of(active: Active, features: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the active ones, ordered by feature, are of these ascending features, and each one's place there."""
    ends = torch.stack([features[0], features[-1] + 1])
    first, last = torch.searchsorted(active.events.feature_L, ends).tolist()
    here = active.events.feature_L[first:last]
    place = torch.searchsorted(features, here)
    inside = (features[place] == here).nonzero()[:, 0]
    return inside + first, place[inside]


class _Plain:
    """One head on one batch: Σ_i a_q² Var_j(a_k) |right|². M, of unit keys, is then to come: no position is in it."""

    def __init__(self, item: Seen, head: int, queries: Tensor, left: Tensor) -> None:
        self.keys = item.keys_by_feature
        _, first, second = item.weights(head)
        self.first_KQ = first.transpose(1, 2).flatten(0, 1).contiguous()
        self.second_KQ = self.first_KQ if second is first else second.transpose(1, 2).flatten(0, 1).contiguous()
        by_query = item.queries.by_feature()
        index, row = _events_of(by_query, queries)
        token_L, square_L = by_query.events.token_L[index], by_query.act_L[index].square()
        self.squares = csr_matrix(starts_of(row, len(queries)), token_L, square_L, len(self.first_KQ))

    def add(self, total: Tensor, keys: Tensor, right: Tensor) -> None:
        batch, length = self.keys.batch, self.keys.length
        index, column = _events_of(self.keys, keys)
        token, act = self.keys.events.token_L[index], self.keys.act_L[index]
        cell, place = (column * batch + token // length).unique_consecutive(return_inverse=True)
        start = starts_of(place, len(cell))
        variance = row_sums(token, self.second_KQ, start, act.square())
        variance -= row_sums(token, self.first_KQ, start, act).square_()
        table_BCQ = variance.new_zeros(batch, len(keys), length)
        table_BCQ[cell % batch, cell // batch] = variance * right.square().sum(1)[cell // batch, None]
        total.addmm_(self.squares, table_BCQ.transpose(1, 2).reshape(batch * length, len(keys)))


class _Rotary:
    """One head on one batch: Σ_i a_q² Var_j(M(i-j) a_k), with M(i-j) = ⟨R_i W_q, R_j W_k⟩ kept inside the variance.

    δ is made for each active query feature e and active key feature f of a sequence, [m, L] at once, weighted with what
    the query of e sees of the key of f, and added up over the keys of each key feature. Queries go by in blocks of
    neighbours, so that keys that none of a block sees are left out.
    """

    def __init__(self, item: Seen, head: int, queries: Tensor, left: Tensor) -> None:
        rotary = item.inputs.rule.rotary
        assert rotary is not None
        self.keys, (self.order, phase) = item.keys_by_feature, rotary.phases()
        self.phase_BTh = phase.expand(self.keys.batch, -1, -1)
        _, first, second = item.weights(head)
        self.first_BKQ = first.transpose(1, 2).contiguous()
        self.second_BKQ = None if second is first else second.transpose(1, 2).contiguous()
        by_query = item.queries.by_feature()
        index, row = _events_of(by_query, queries)
        token, act = by_query.events.token_L[index], by_query.act_L[index]
        sequence, place = token // self.keys.length, token % self.keys.length
        turned = turned_rows(left[:, self.order], row, act, self.phase_BTh[sequence, place])
        visible_BQK = item.inputs.rule.visible_BQK
        self.sequences = []
        for b in range(self.keys.batch):
            here = (sequence == b).nonzero()[:, 0]
            fired, inner = row[here].unique_consecutive(return_inverse=True)
            blocks = []
            for start in range(0, self.keys.length, QUERIES):
                near = (place[here] // QUERIES == start // QUERIES).nonzero()[:, 0]
                visible_K = visible_BQK[b % len(visible_BQK), start : start + QUERIES].any(0)
                blocks.append((visible_K, place[here[near]], inner[near], turned[here[near]]))
            self.sequences.append((fired, blocks))

    def add(self, total: Tensor, keys: Tensor, right: Tensor) -> None:
        index, column = _events_of(self.keys, keys)
        token, act = self.keys.events.token_L[index], self.keys.act_L[index]
        sequence, place = token // self.keys.length, token % self.keys.length
        turned = turned_rows(right[:, self.order], column, act, self.phase_BTh[sequence, place])
        for b, (fired, blocks) in enumerate(self.sequences):
            here = (sequence == b).nonzero()[:, 0]
            seen, inner = column[here].unique_consecutive(return_inverse=True)
            sums = total.new_zeros(len(seen), len(fired))
            for visible_K, query_L, row_L, u_LH in blocks:
                near = visible_K[place[here]].nonzero()[:, 0]
                if len(near) and len(query_L):
                    keys_M = place[here[near]], inner[near], turned[here[near]]
                    sums.index_add_(1, row_L, self._variance(b, query_L, u_LH, *keys_M, len(seen)))
            # By whole rows: adding them up entry by entry takes six times as long.
            whole = total.new_zeros(len(fired), len(keys))
            total.index_add_(0, fired, whole.scatter_(1, seen.expand(len(fired), -1), sums.T.contiguous()))

    def _variance(
        self, b: int, query_L: Tensor, u_LH: Tensor, key_M: Tensor, place_M: Tensor, v_MH: Tensor, n_seen: int
    ) -> Tensor:
        """Variance of δ of each active query feature and each key feature of a sequence."""
        mean = u_LH.new_zeros(n_seen, len(query_L))
        square = torch.zeros_like(mean)
        for part in torch.arange(len(key_M), device=key_M.device).split(max(MEETING_ELEMENTS // len(query_L), 1)):
            delta = v_MH[part] @ u_LH.T
            weight = self.first_BKQ[b].index_select(0, key_M[part]).index_select(1, query_L)
            mean.index_add_(0, place_M[part], weight.mul(delta))
            if self.second_BKQ is not None:
                weight = self.second_BKQ[b].index_select(0, key_M[part]).index_select(1, query_L)
            square.index_add_(0, place_M[part], weight.mul_(delta).mul_(delta))
        return square.sub_(mean.square_())
