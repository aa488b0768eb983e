"""Where each kept pair does most to the pattern: the pairs of tokens, with both contexts.

A pair (a, b) of a head adds δ_ij = scale · strength · a_q[i,a] · M(i-j) · a_k[j,b] to the score of query i and key j
(M is 1 without a rotary embedding). To first order that changes the pattern P of the pruned map by

    effect_ij = P_ij · (δ_ij·f'_ij - Σ_j' P_ij' · δ_ij'·f'_ij')

which is the derivative of P_ij by the logarithm of the pair's strength (f' the slope of a soft cap; a sink takes part
with δ = 0). P is the map's pattern, not the model's, because the pair is a part of the map: effects are then
derivatives of one function, whose distance from the model the report says.

What is notable:
- Only tokens on which both features fire count as places; inhibiting pairs (effect below 0) as much as exciting ones.
- At most one place a sequence and pair.
- Terms are listed sparsely: for each pair and sequence, every query on which a fires with every key on which b does.
  With a rotary embedding M depends on i-j alone, so a block needs one product [pairs, H] · [H, distances] more.
- Most terms are never made. No effect in a row is larger than Σ_j P_ij |δ_ij|, which with |M| at its largest is one
  product of patterns and activations for all rows of a head. Rows that can't reach the worst example that their pair
  has already, or what the most promising row of their cell reaches, are left out; the rest is found exactly.

Shapes: B sequences, T positions, N heads, G key-value heads, H head width, F features of a side (the bias behind them;
f those that a block's pairs read), P kept pairs (p of a block), D distances, C cells (a pair in a sequence) with a row,
R rows (a query of a cell), E terms (a key of a row).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..data.sequences import Batch
from ..decomposition import SIDES, Decomposition
from ..kernels.row_kl import exp
from ..pairs.active import Active
from ..pairs.pair_map import active_scores_by_head, rows, with_bias
from ..pattern import AttentionInputs, PatternRule
from ..rotary import Rotary
from .best import Best
from .columns import array, token_lists
from .firing import NO_TOKEN, Firing, sequence_numbers, window_tokens

BLOCK_ROWS = 1 << 18  # rows of one block of pairs, before any is left out
BLOCK_TERMS = 1 << 17  # terms at once: about 10 MB, what a cache holds; one row alone has at most T
WORTH = 1 << 11  # entries of the product behind a bound that cost as much as a term
SLACK = 1e-2  # by which a bound may be wrong for rounding
ROUNDING = 4e-3  # of a mean square, by which the variance may: also with products in TF32
MERGED_PAIRS = 4096  # at once
LEAST_EFFECT = 1e-6  # of a pattern entry; what is below is rounding


class PairExamples:
    """The `most` places of the largest effect for each kept pair, with `window` tokens around the query and the key."""

    def __init__(self, dec: Decomposition, most: int, window: int) -> None:
        self.dec, self.window = dec, window
        self.index_P3 = torch.stack([dec.pairs.query_P, dec.pairs.key_P, dec.pairs.head_P], 1)
        tokens = ((2 * window + 1,), torch.int32)
        kept = {
            "effect": ((), torch.float32),
            "pattern": ((), torch.float32),
            "document": ((), torch.int64),
            "query_position": ((), torch.int32),
            "key_position": ((), torch.int32),
            "query_tokens": tokens,
            "key_tokens": tokens,
        }
        self.best = Best(len(dec.pairs), most, kept, dec.strength_P.device)

    def __getstate__(self) -> dict[str, Any]:
        """As that of `Examples`."""
        return {**vars(self), "dec": None}

    def add(self, batch: Batch, inputs: AttentionInputs, acts: dict[str, Tensor], query: Firing, key: Firing) -> None:
        """Take in one batch: both sides' activations [B, T, F], and where they fire."""
        if not self.best.most:
            return
        dec = self.dec
        both = Places.of(query, dec.query.width, batch), Places.of(key, dec.key.width, batch)
        terms = Terms(dec, inputs.rule, with_bias(acts["query"].float()), with_bias(acts["key"].float()), *both)
        for block in terms.blocks(self.best.worst_G.clamp(min=LEAST_EFFECT)):
            if len(block.cell_R):
                self._add(batch, terms, block)

    def _add(self, batch: Batch, terms: Terms, block: Rows) -> None:
        """Offer the best place of each cell of a block."""
        length = batch.tokens_BT.shape[1]
        if block.bound_R is not None:
            count_C = block.cell_R.unique_consecutive(return_counts=True)[1]
            best_C = _first_largest(block.bound_R, count_C)
            may_R = block.bound_R >= terms.sizes(block.take(best_C)).repeat_interleave(count_C)
            may_R[best_C] = True
            block = block.take(may_R.nonzero()[:, 0])
        size_R = terms.sizes(block)
        row_C = _first_largest(size_R, block.cell_R.unique_consecutive(return_counts=True)[1])
        size_C = size_R[row_C]

        def place(index: Tensor) -> dict[str, Tensor]:
            """What is shown of the cells' best places."""
            chosen = block.take(row_C[index])
            change, token, pattern, count = terms.of(chosen)
            best = _first_largest(change.abs(), count)
            sequence, query_at, key_at = chosen.token_R // length, chosen.token_R % length, token[best] % length
            return {
                "effect": change[best] * chosen.weight_R,
                "pattern": pattern[best],
                "document": batch.document_B[sequence],
                "query_position": batch.positions(sequence, query_at).int(),
                "key_position": batch.positions(sequence, key_at).int(),
                "query_tokens": window_tokens(batch, sequence, query_at, self.window),
                "key_tokens": window_tokens(batch, sequence, key_at, self.window),
            }

        self.best.add(
            block.pair_p[block.place_R[row_C]],
            size_C.masked_fill(size_C < LEAST_EFFECT, 0),
            sequence_numbers(batch)[block.token_R[row_C] // length],
            place,
        )

    def merge(self, other: PairExamples) -> None:
        """Take in what another gathered on other text for the same pairs."""
        for pairs in torch.arange(len(self.index_P3), device=self.best.score_GM.device).split(MERGED_PAIRS):
            self.best.merge(other.best, pairs, pairs)

    def used_tokens(self) -> set[int]:
        """The tokens that the table holds."""
        kept = self.best.take().payload
        return {t for n in ("query_tokens", "key_tokens") for t in kept[n].unique().tolist()} - {NO_TOKEN}

    def table(self, texts: dict[int, str]) -> pa.Table:
        """A row for each example, by head, query feature, key feature and rank; -1 is a side's bias."""
        got, pairs = self.best.take(), self.dec.pairs
        query, key, head = (t[got.place] for t in (pairs.query_P, pairs.key_P, pairs.head_P))
        kept = {name: values.cpu() for name, values in got.payload.items()}
        return pa.table(
            {
                "query_feature": array(query.where(query < pairs.n_query, -1), pa.int32()),
                "key_feature": array(key.where(key < pairs.n_key, -1), pa.int32()),
                "head": array(head, pa.int16()),
                "rank": array(got.rank, pa.int32()),
                "effect": array(kept["effect"], pa.float32()),
                "pattern": array(kept["pattern"], pa.float32()),
                "document": array(kept["document"], pa.int64()),
                **{
                    name: column
                    for side in SIDES
                    for name, column in {
                        f"{side}_position": array(kept[f"{side}_position"], pa.int32()),
                        f"{side}_center": array(
                            (kept[f"{side}_tokens"][:, : self.window] != NO_TOKEN).sum(1), pa.int32()
                        ),
                        f"{side}_tokens": token_lists(kept[f"{side}_tokens"], texts),
                    }.items()
                },
            }
        )


@dataclass(frozen=True)
class Places:
    """Where each feature of a side fires in a batch, the bias (the last one) at every token; by feature, then token."""

    token_E: Tensor
    value_E: Tensor
    place_E: Tensor
    """(feature · B + sequence) · T + position: rises."""
    count_FB: Tensor
    start_FB: Tensor

    @classmethod
    def of(cls, firing: Firing, width: int, batch: Batch) -> Places:
        sequences, length = batch.tokens_BT.shape
        real = batch.real_BT.flatten().nonzero()[:, 0]
        token = torch.cat([firing.token_E, real])
        feature = torch.cat([firing.feature_E, torch.full_like(real, width)])
        value = torch.cat([firing.value_E, torch.ones_like(real, dtype=torch.float32)])
        cell = feature * sequences + token // length
        count = torch.bincount(cell, minlength=(width + 1) * sequences)
        start = count.cumsum(0) - count
        place = cell * length + token % length
        return cls(token, value, place, count.view(-1, sequences), start.view(-1, sequences))


@dataclass(frozen=True)
class Rows:
    """The rows of a block of pairs, by cell."""

    pair_p: Tensor
    cell_R: Tensor
    place_R: Tensor
    """The row's pair, as its place in the block."""
    token_R: Tensor
    """The query: sequence · T + position."""
    weight_R: Tensor
    """scale · strength · a_q."""
    first_R: Tensor
    """The first of the keys on which the key feature fires within what the query sees, and how many there are."""
    count_R: Tensor
    bound_R: Tensor | None
    """What no effect of the row exceeds, where finding it saves more than it costs (`WORTH`)."""
    distance_pD: Tensor | None
    """M at each distance from -(T-1) to T-1."""

    def take(self, index: Tensor) -> Rows:
        """Some of the rows."""
        names = ("cell_R", "place_R", "token_R", "weight_R", "first_R", "count_R")
        bound_R = None if self.bound_R is None else self.bound_R[index]
        return replace(self, bound_R=bound_R, **{name: getattr(self, name)[index] for name in names})


class Terms:
    """The terms of all pairs on one batch, head by head and block by block."""

    def __init__(
        self, dec: Decomposition, rule: PatternRule, acts_q_BTF: Tensor, acts_k_BTF: Tensor, query: Places, key: Places
    ) -> None:
        self.dec, self.rule, self.query, self.key = dec, rule, query, key
        self.rows_q, self.rows_k = rows(dec.query, dec.shape.N), rows(dec.key, dec.shape.G)
        both, both_rows = (Active.of(acts_q_BTF), Active.of(acts_k_BTF)), (self.rows_q, self.rows_k)
        self.scores_by_head = active_scores_by_head(dec.pairs, dec.strength_P, *both, lambda: both_rows, rule)
        self.acts_k_BTF = acts_k_BTF
        self.length = acts_k_BTF.shape[1]
        visible_BQK = rule.visible_BQK.expand(len(acts_k_BTF), -1, -1)
        self.first_seen_n = visible_BQK.byte().argmax(-1).flatten()  # the first and the last key that a query sees
        self.last_seen_n = self.length - 1 - visible_BQK.flip(-1).byte().argmax(-1).flatten()

    def _enter(self, head: int) -> None:
        """What follows is of this head's pairs: one pattern at a time is held."""
        heads = slice(head, head + 1)
        scores = self.scores_by_head(heads)
        pattern = exp(self.rule.of_heads(heads).masked(scores).log_softmax(-1))
        self.pattern_BQK = pattern[:, 0, :, : self.length].contiguous()
        self.largest_BQ = (self.pattern_BQK * (1 - self.pattern_BQK)).amax(-1)
        softcap = self.rule.softcap
        self.slope = None if softcap is None else (1 - (scores / softcap).square()).flatten()

    def blocks(self, least_P: Tensor) -> Iterator[Rows]:
        """The rows that may hold an effect of a pair's `least` or more, in blocks of about `BLOCK_ROWS` of one head.

        Each is to be used (`of`, `sizes`) before the next one is asked for.
        """
        pairs = self.dec.pairs
        rows_P, terms_P = torch.zeros_like(pairs.query_P), torch.zeros_like(pairs.query_P)
        for query_F, key_F in zip(self.query.count_FB.T, self.key.count_FB.T, strict=True):
            query_P, key_P = query_F[pairs.query_P], key_F[pairs.key_P]
            rows_P += query_P * (key_P > 0)
            terms_P += query_P * key_P
        if self.rule.rotary is None and self.rule.shift_free:  # a constant along the row cancels in the softmax
            rows_P[pairs.key_P == pairs.n_key] = 0
        n = self.query.count_FB.shape[1] * self.length
        # A pair's column of the product behind its bound, n entries that cost less than rows, and its distances.
        itself = n // 8 + (0 if self.rule.rotary is None else 2 * self.length)
        for head in range(self.dec.shape.N):
            here = pairs.of_head(head)
            index = rows_P[here].nonzero()[:, 0] + here.start
            if not len(index):
                continue
            self._enter(head)
            size = rows_P[index].clamp(min=itself)
            blocks = (size.cumsum(0) // BLOCK_ROWS).unique_consecutive(return_counts=True)[1]
            for pair_p in index.split(blocks.tolist()):
                yield self._rows(pair_p, int(terms_P[pair_p].sum()), least_P[pair_p])

    def _rows(self, pair_p: Tensor, terms: int, least_p: Tensor) -> Rows:
        """The rows of some pairs of one head that have so many terms, as far as they may reach `least`."""
        pairs = self.dec.pairs
        query_p, key_p = pairs.query_P[pair_p], pairs.key_P[pair_p]
        sequences = self.query.count_FB.shape[1]
        strength_p = self.dec.strength_P[pair_p] * self.rule.scaling
        distance_pD = None if self.rule.rotary is None else self._distances(self.rule.rotary, pair_p)
        count_S = (self.query.count_FB[query_p] * (self.key.count_FB[key_p] > 0)).flatten()
        cell_R = torch.arange(len(count_S), device=pair_p.device).repeat_interleave(count_S)
        within_R = torch.arange(len(cell_R), device=pair_p.device) - (count_S.cumsum(0) - count_S)[cell_R]
        entry_R = self.query.start_FB[query_p].flatten()[cell_R] + within_R
        bound_R = None
        key_f, column_p = key_p.unique(return_inverse=True)
        if terms * WORTH > len(self.first_seen_n) * self.length * len(key_f):
            most_p = strength_p.abs() if distance_pD is None else strength_p.abs() * distance_pD.abs().amax(1)
            place_R = cell_R // sequences
            bound_R = self._bounds(key_f)[self.query.token_E[entry_R], column_p[place_R]]
            bound_R = bound_R * self.query.value_E[entry_R] * most_p[place_R]
            may = (bound_R >= least_p[place_R]).nonzero()[:, 0]
            cell_R, entry_R, bound_R = cell_R[may], entry_R[may], bound_R[may]
        place_R, token_R = cell_R // sequences, self.query.token_E[entry_R]
        begin_R = (key_p[place_R] * sequences + cell_R % sequences) * self.length
        first_R = torch.searchsorted(self.key.place_E, begin_R + self.first_seen_n[token_R])
        count_R = torch.searchsorted(self.key.place_E, begin_R + self.last_seen_n[token_R], right=True) - first_R
        found = Rows(
            pair_p=pair_p,
            cell_R=cell_R,
            place_R=place_R,
            token_R=token_R,
            weight_R=strength_p[place_R] * self.query.value_E[entry_R],
            first_R=first_R,
            count_R=count_R,
            bound_R=bound_R,
            distance_pD=distance_pD,
        )
        return found.take(count_R.nonzero()[:, 0])

    def _bounds(self, key_f: Tensor) -> Tensor:
        """What no e = P_ij |x_j - m|, m = Σ_j P_ij x_j, exceeds, where |x_j| is at most a_k[j,b], for these b, [n, f].

        Such an e is at most Σ_j P_ij |x_j|. And with V the variance of x (0 at a sink), e² ≤ V · P_ij (1 - P_ij): as
        Σ_{j' ≠ j} P_ij' (x_j' - m) = -P_ij (x_j - m), the other keys add at least e² / (1 - P_ij) to V, and j adds
        e² / P_ij. Only where x is a_k itself is V known; else the mean square, which it cannot exceed, stands for it.
        """
        pattern_BQK, acts_BTf = self.pattern_BQK, self.acts_k_BTF[..., key_f]
        mean_BQf = pattern_BQK @ acts_BTf
        square_BQf = pattern_BQK @ acts_BTf.square()
        variance_BQf = square_BQf * (1 + ROUNDING)
        if self.rule.rotary is None and self.slope is None:
            variance_BQf = variance_BQf - mean_BQf.square()
        spread_BQf = (variance_BQf.clamp(min=0) * self.largest_BQ[..., None]).sqrt()
        return torch.minimum(mean_BQf, spread_BQf).flatten(0, 1) * (1 + SLACK)

    def _distances(self, rotary: Rotary, pair_p: Tensor) -> Tensor:
        """M = ⟨R_i W_q, R_j W_k⟩ of each pair at every distance i-j."""
        dec, pairs = self.dec, self.dec.pairs
        order, phase = rotary.phases()
        head_p = pairs.head_P[pair_p]
        left = self.rows_q[pairs.query_P[pair_p], head_p]
        right = self.rows_k[pairs.key_P[pair_p], head_p * dec.shape.G // dec.shape.N]
        left, right = (torch.view_as_complex(x[:, order].unflatten(1, (-1, 2)).contiguous()) for x in (left, right))
        forward = phase[0] * phase[0, :1].conj()  # the rotation over each distance from 0 on
        turned = torch.cat([forward[1:].conj().flip(0), forward])
        product = left * right.conj()
        return torch.cat([product.real, -product.imag], 1) @ torch.cat([turned.real, turned.imag], 1).T

    def sizes(self, chosen: Rows) -> Tensor:
        """The size of the largest effect of each of these rows, [R]."""
        found, blocks = [], (chosen.count_R.cumsum(0) // BLOCK_TERMS).unique_consecutive(return_counts=True)[1]
        for index in torch.arange(len(chosen.count_R), device=blocks.device).split(blocks.tolist()):
            change_E, _, _, count_R = self.of(chosen.take(index))
            found.append(torch.segment_reduce(change_E.abs(), "max", lengths=count_R))
        return torch.cat(found) * chosen.weight_R.abs()

    def of(self, chosen: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The terms of some rows: the change of the pattern for a query's weight of 1, key token and pattern [E] each,
        and how many terms each row has."""
        # Where a query's line of the pattern starts, less what its sequence's key tokens are counted from.
        start_R = (chosen.token_R - chosen.token_R // self.length) * self.length
        row_E = torch.arange(len(start_R), device=start_R.device).repeat_interleave(chosen.count_R)
        skipped_R = chosen.first_R - (chosen.count_R.cumsum(0) - chosen.count_R)
        entry_E = torch.arange(len(row_E), device=row_E.device) + skipped_R.index_select(0, row_E)
        token_E = self.key.token_E.index_select(0, entry_E)
        at_E = start_R.index_select(0, row_E) + token_E
        pattern_E = self.pattern_BQK.flatten().index_select(0, at_E)
        value_E = self.key.value_E.index_select(0, entry_E)
        if chosen.distance_pD is not None:
            far = chosen.distance_pD.shape[1]
            origin_R = chosen.place_R * far + chosen.token_R + self.length - 1  # both tokens are of the same sequence
            value_E = value_E * chosen.distance_pD.flatten().index_select(0, origin_R.index_select(0, row_E) - token_E)
        if self.slope is not None:
            value_E = value_E * self.slope.index_select(0, at_E)
        mean_R = torch.segment_reduce(pattern_E * value_E, "sum", lengths=chosen.count_R)
        change_E = pattern_E * (value_E - mean_R.index_select(0, row_E))
        return change_E, token_E, pattern_E, chosen.count_R


def _first_largest(values: Tensor, lengths: Tensor) -> Tensor:
    """Index of the largest value of each segment, of equal ones the first; no segment is empty."""
    segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    largest = torch.segment_reduce(values, "max", lengths=lengths)
    at = (values == largest[segment]).nonzero()[:, 0]
    first = torch.ones_like(at, dtype=torch.bool)
    first[1:] = segment[at].diff() != 0
    return at[first]
