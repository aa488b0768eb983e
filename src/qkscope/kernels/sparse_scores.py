"""Scores between tokens whose features are sparse: only features that are active meet, in small dense products.

    scores[i, j] = Σ_{e at i} Σ_{f at j} S[feature_e, feature_f] · ⟨u_e, v_f⟩          i, j in the same sequence

An event is a feature active at a token, with a vector of its own (as under a rotary embedding, where a feature's vector
turns with the position). For every (key feature b, sequence), a cell, the query events are first added up,

    y[cell, i] = Σ_{e at i} S[feature_e, b] · u_e                 only at tokens i with such an event,

and y is multiplied with the cell's few keys. Cells of about as many keys stand together (up to half as many more,
filled up with zeros), their rows of y in tiles of `TILE`, so that all take a few batched products, whose results are
added into the scores. The gradients are written down: the backward pass makes y again instead of keeping it.

Shapes: L query events, M key events, P values of S, H width, E meetings of a query event with one of its feature's
pairs, R rows of y (tiles filled up), C tiles, K keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .row_sums import row_sums

TILE = 16  # rows of y in one product


@dataclass(frozen=True)
class Events:
    """Features that are active at a token: int64 [L] each, token b·T + t."""

    token_L: Tensor
    feature_L: Tensor

    @classmethod
    def by_token(cls, on_nF: Tensor) -> Events:
        """In the order of tokens, as queries."""
        return cls(*on_nF.nonzero(as_tuple=True))

    @classmethod
    def by_feature(cls, on_nF: Tensor) -> Events:
        """In the order of features, then tokens, as keys."""
        feature, token = on_nF.T.nonzero(as_tuple=True)
        return cls(token, feature)


@dataclass(frozen=True)
class Cells:
    """Key events by (feature, sequence), a cell each; cells are numbered from few keys to many, empty ones last."""

    place_FB: Tensor
    """Number of each cell."""
    ends: list[int]
    """Where the cells of up to 1, 2, 3, 4, 6, 8 ... keys end."""
    keys: list[Tensor]
    """Key events of each of these groups, int64 [cells, K], M where a cell has fewer."""
    positions: list[Tensor]
    """Their positions in the sequence, [cells, K], 0 where there are fewer."""
    length: int

    @classmethod
    def of(cls, keys: Events, n_features: int, batch: int, length: int) -> Cells:
        device, none = keys.token_L.device, len(keys.token_L)
        cell_M = keys.feature_L * batch + keys.token_L // length
        count = torch.bincount(cell_M, minlength=n_features * batch)
        first = count.cumsum(0) - count
        sizes = [1]  # 1, 2, 3, 4, 6, 8, 12, 16 ...
        while sizes[-1] < length:
            sizes.append(sizes[-1] * 4 // 3 if sizes[-1] % 3 == 0 else -(-sizes[-1] * 3 // 2))
        group = torch.bucketize(count, torch.tensor(sizes, device=device))
        group = torch.where(count > 0, group, len(sizes))
        order = group.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        ends = torch.bincount(group, minlength=len(sizes)).cumsum(0)[: len(sizes)].tolist()
        position_M = torch.cat([keys.token_L % length, keys.token_L.new_zeros(1)])
        events, positions = [], []
        for size, start, end in zip(sizes, [0, *ends], ends, strict=False):
            cells, inner = order[start:end, None], torch.arange(size, device=device)
            events.append(torch.where(inner < count[cells], first[cells] + inner, none))
            positions.append(position_M[events[-1]])
        return cls(place.view(n_features, batch), ends, events, positions, length)


@dataclass(frozen=True)
class _Meetings:
    """Which query events are added up in which row of y, and which keys the rows meet. Int32 where nothing is said."""

    event_E: Tensor
    """Query event of each meeting, in the order of the rows of y."""
    pair_E: Tensor
    """Its value of S."""
    start_R: Tensor
    """Where each row's meetings start; one more row, of none."""
    by_event: tuple[Tensor, Tensor, Tensor]
    """Row and value of each meeting in the order of the query events, and where each event's meetings start."""
    begin_CT: Tensor
    """Where the scores of each row's token begin, int64 [C, TILE]; 0 for rows of none."""
    groups: list[tuple[slice, Tensor, int]]
    """Tiles, the cell of each within its group of cells, int64, and that group."""

    @classmethod
    def of(cls, queries: Events, cells: Cells, query_P: Tensor, key_P: Tensor) -> _Meetings:
        device, length, live = query_P.device, cells.length, cells.ends[-1]
        n_features, batch = cells.place_FB.shape
        n_pairs = torch.bincount(query_P, minlength=int(queries.feature_L.max()) + 1)
        count_L = n_pairs[queries.feature_L]
        start_L = count_L.cumsum(0) - count_L
        first_L = (n_pairs.cumsum(0) - n_pairs)[queries.feature_L]
        event = torch.arange(len(count_L), device=device).repeat_interleave(count_L)
        pair = torch.arange(len(event), dtype=torch.int32, device=device)
        pair += (first_L - start_L).int().index_select(0, event)
        sequence = (queries.token_L // length).int().index_select(0, event)
        cell = cells.place_FB.int()[key_P].flatten().index_select(0, sequence.add_(pair, alpha=batch))
        # The sort is stable and events come in the order of tokens: so do those of a cell. Narrow integers sort faster.
        narrow = torch.int16 if n_features * batch < 1 << 15 else torch.int32
        order = cell.to(narrow).argsort(stable=True)[: int((cell < live).sum())]
        event = event.int()
        event_E, pair_E = event.index_select(0, order), pair.index_select(0, order)
        token_E = queries.token_L.index_select(0, event_E)
        code_E = token_E + cell.index_select(0, order).long() * (batch * length)
        code, row_E, size = torch.unique_consecutive(code_E, return_inverse=True, return_counts=True)
        # Rows of a cell start at a tile of their own.
        cell_of_row = code // (batch * length)
        n_rows = torch.bincount(cell_of_row, minlength=live)
        n_tiles = (n_rows + TILE - 1) // TILE
        until = n_tiles.cumsum(0)
        row = (
            torch.arange(len(code), device=device) + ((until - n_tiles) * TILE - n_rows.cumsum(0) + n_rows)[cell_of_row]
        )
        total = TILE * int(until[-1])
        size_R = size.new_zeros(total + 1).index_copy(0, row, size)
        begin_R = size.new_zeros(total).index_copy(0, row, code % (batch * length) * length)
        by_event = torch.full((len(event),), total, dtype=torch.int32, device=device)
        by_event.scatter_(0, order, row.int().index_select(0, row_E))
        ends, groups = torch.cat([until.new_zeros(1), until])[cells.ends].tolist(), []
        for group, (start, end, tile, tile_end) in enumerate(
            zip([0, *cells.ends], cells.ends, [0, *ends], ends, strict=False)
        ):
            inner = torch.arange(end - start, device=device).repeat_interleave(n_tiles[start:end])
            if len(inner):
                groups.append((slice(tile, tile_end), inner, group))
        start_R = (size_R.cumsum(0) - size_R).int()
        return cls(event_E, pair_E, start_R, (by_event, pair, start_L.int()), begin_R.view(-1, TILE), groups)


class _SparseScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_LH: Tensor, v_MH: Tensor, s_P: Tensor, meet: _Meetings, cells: Cells) -> Tensor:
        ctx.save_for_backward(u_LH, v_MH, s_P)
        ctx.meet, ctx.cells = meet, cells
        scores = u_LH.new_zeros(cells.place_FB.shape[1] * cells.length**2)
        y_CTH = _tiles(row_sums(meet.event_E, u_LH, meet.start_R, s_P.index_select(0, meet.pair_E)))
        for tiles, cell_C, keys_CKH, place in _products(v_MH, meet, cells):
            found = y_CTH[tiles] @ keys_CKH.index_select(0, cell_C).transpose(1, 2)
            scores.scatter_add_(0, place, found.flatten())
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u_LH, v_MH, s_P = ctx.saved_tensors
        meet: _Meetings = ctx.meet
        grad, width = grads[0].contiguous(), u_LH.shape[1]
        with torch.enable_grad():
            weight_E = s_P.detach().index_select(0, meet.pair_E).requires_grad_()
            y = row_sums(meet.event_E, u_LH.detach(), meet.start_R, weight_E)
        y_CTH, to_y, to_v = _tiles(y.detach()), torch.empty_like(y), v_MH.new_zeros(len(v_MH) + 1, width)
        to_y[-1] = 0  # for what meets no key; the tiles are all written
        to_y_CTH = _tiles(to_y)
        for (tiles, cell_C, keys_CKH, place), (*_, group) in zip(
            _products(v_MH, meet, ctx.cells), meet.groups, strict=True
        ):
            g_CTK = grad.index_select(0, place).view(len(cell_C), TILE, -1)
            torch.bmm(g_CTK, keys_CKH.index_select(0, cell_C), out=to_y_CTH[tiles])
            by_cell = torch.zeros_like(keys_CKH).index_add_(0, cell_C, g_CTK.transpose(1, 2) @ y_CTH[tiles])
            to_v[ctx.cells.keys[group].flatten()] = by_cell.flatten(0, 1)
        row_E, pair_E, start_L = meet.by_event
        to_u = row_sums(row_E, to_y, start_L, s_P.index_select(0, pair_E))
        (to_weight_E,) = torch.autograd.grad(y, weight_E, to_y)
        to_s = torch.zeros_like(s_P).index_add_(0, meet.pair_E, to_weight_E)
        return to_u, to_v[:-1], to_s, None, None


def _products(v_MH: Tensor, meet: _Meetings, cells: Cells) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Tiles, the cell of each, the cells' keys [cells, K, H] and where the products stand among the scores."""
    keys_MH = torch.cat([v_MH, v_MH.new_zeros(1, v_MH.shape[1])])  # a zero stands in where a cell has fewer keys
    for tiles, cell_C, group in meet.groups:
        events = cells.keys[group]
        keys_CKH = keys_MH.index_select(0, events.flatten()).view(*events.shape, -1)
        place = meet.begin_CT[tiles, :, None] + cells.positions[group].index_select(0, cell_C)[:, None]
        yield tiles, cell_C, keys_CKH, place.flatten()


def _tiles(y_RH: Tensor) -> Tensor:
    return y_RH[:-1].unflatten(0, (-1, TILE))


def sparse_scores(
    u_LH: Tensor, v_MH: Tensor, s_P: Tensor, query_P: Tensor, key_P: Tensor, queries: Events, cells: Cells
) -> Tensor:
    """Scores [B, T, T] of query events (`Events.by_token`) and key events (in `cells`), differentiable in u, v and s.

    Args:
        u_LH, v_MH: the events' vectors.
        s_P, query_P, key_P: values of S and their places, ordered by query feature.
    """
    batch, length = cells.place_FB.shape[1], cells.length
    if not (len(u_LH) and len(v_MH) and len(s_P)):
        return u_LH.new_zeros(batch, length, length)
    meet = _Meetings.of(queries, cells, query_P, key_P)
    return _SparseScores.apply(u_LH, v_MH, s_P, meet, cells).view(batch, length, length)  # type: ignore[union-attr]
