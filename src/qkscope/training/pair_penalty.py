"""The pair penalty: what makes features arrange themselves, from the first step on, to need few pairs.

    penalty = 1/N · Σ_{a,b,h} scale · |M[a,b,h]| · rms(a_q) · sd(a_k)

is how far each pair moves the scores it takes part in, summed over the pairs of a head: a pair's importance is half the
square of that. The L0 of a dictionary says how many features are active; only this says how many of their pairs matter,
and two dictionaries of the same L0 and nearly the same KL differ in it several times over.

With a rotary embedding M depends on the distance. Each step takes it at one (query, key) a head, the key drawn from the
head's attention: on average that is the mean of |M(i-j)| over where the head looks. The biases' rows are left out.

It multiplies with the product of the two sides' widths. So of more than `DRAWN` features of a side each step draws as
many and weighs them up: the sum is the same on average, at a cost that stops growing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import parallel
from ..devices import sent
from ..dictionary import SparseTranscoder
from ..kernels.mostly_zero import MostlyZero, fires
from ..kernels.product_norm import product_norm, smooth_abs
from ..rotary import swap
from .objective import Padding, PatternTarget

TINY = 1e-8  # under a root, where a feature fires on a single token
DRAWN = 512  # features of a side that a step looks at; a twentieth of its operations, at GPT-2 small's shape

Triples = tuple[Tensor, Tensor, Tensor]  # query features, key features and heads of some pairs, int64 [P] each


def pair_penalty(
    target: PatternTarget,
    query: SparseTranscoder,
    key: SparseTranscoder,
    acts_q: Tensor | MostlyZero,
    acts_k: Tensor | MostlyZero,
    draw: int,
    free: Triples | None = None,
) -> Tensor:
    """How far a head's pairs move its scores, in all; features that are not active on the batch move none.

    `draw` seeds which features are looked at where there are many, and the distances that a rotary embedding is taken
    at; `free` pairs cost nothing.
    """
    n_heads, n_groups = target.inputs.q_BTNH.shape[2], target.inputs.k_BTGH.shape[2]
    on_q, on_k = (parallel.anywhere(fires(acts)) for acts in (acts_q, acts_k))
    (index_q, weight_q), (index_k, weight_k) = _drawn(on_q, draw), _drawn(on_k, draw + 1)
    size_q = (_mean_square(acts_q, index_q) + TINY).sqrt() * on_q[index_q]
    size_k = (_variance(acts_k, index_k) + TINY).sqrt() * on_k[index_k]
    left_FNH = (query.W_dec[index_q] * size_q[:, None]).unflatten(1, (n_heads, -1)) * target.rule.scaling
    right_FGH = (key.W_dec[index_k] * size_k[:, None]).unflatten(1, (n_groups, -1))
    right_FNH = right_FGH.repeat_interleave(n_heads // n_groups, 1)
    if target.rule.rotary is not None:
        left_FNH, right_FNH = _turned(target, left_FNH, right_FNH, draw)
    total = product_norm(left_FNH.transpose(0, 1), right_FNH.transpose(0, 1))
    if free is not None:
        place_q, place_k = _places(index_q, query.width + 1), _places(index_k, key.width + 1)
        both = (place_q[free[0]] >= 0) & (place_k[free[1]] >= 0)
        a, b, head = place_q[free[0][both]], place_k[free[1][both]], free[2][both]
        total = total - smooth_abs(torch.linalg.vecdot(left_FNH[a, head], right_FNH[b, head])).sum()
    return total * (weight_q * weight_k / n_heads)


def _mean_square(acts: Tensor | MostlyZero, on: Tensor) -> Tensor:
    """Of these features, over the whole batch's tokens."""
    if isinstance(acts, Tensor):
        return parallel.mean(acts[:, on].float().square().mean(0))
    return parallel.mean(acts.square_distances(torch.zeros(acts.n_columns)))[on]


def _variance(acts: Tensor | MostlyZero, on: Tensor) -> Tensor:
    if isinstance(acts, Tensor):
        return parallel.variance(acts[:, on].float())
    centre_F = parallel.mean(acts.column_means()).detach()  # as in parallel.variance
    return parallel.mean(acts.square_distances(centre_F))[on]


def _drawn(on_F: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """`DRAWN` of the features that are on, in their order, and how many each stands for.

    Where fewer are on: all of them, and on a GPU, whose host would have to wait to know how many, others up to `DRAWN`.
    """
    if on_F.device.type == "cpu" and len(index := on_F.nonzero()[:, 0]) <= DRAWN:
        return index, torch.ones(())
    lot_F = sent(torch.rand(len(on_F), generator=torch.Generator().manual_seed(draw)), on_F.device)
    drawn = torch.where(on_F, lot_F, lot_F - 2).topk(min(DRAWN, len(on_F))).indices  # no ties: alike in all processes
    return drawn.sort().values, (on_F.sum() / DRAWN).clamp(min=1.0)


def _places(index: Tensor, width: int) -> Tensor:
    """Where each of `width` features stands in the index; -1 for those (the bias among them) that do not."""
    places = torch.full((width,), -1, device=index.device)
    places[index] = torch.arange(len(index), device=index.device)
    return places


def _turned(target: PatternTarget, left_FNH: Tensor, right_FNH: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Rows as they meet at one (query, key) of each head."""
    rotary = target.rule.rotary
    assert rotary is not None
    b_N, i_N, j_N = drawn_places(target, draw)
    table_N, here_N = parallel.row_here(b_N, len(target.real_BT))
    if len(rotary.cos_BTH) == 1:
        table_N = torch.zeros_like(b_N)
    turned = []
    for rows_FNH, place_N in ((left_FNH, i_N), (right_FNH, j_N)):
        tables = rotary.cos_BTH[table_N, place_N], rotary.sin_BTH[table_N, place_N]
        cos, sin = (parallel.from_holders(table, here_N) for table in tables)
        turned.append(rows_FNH * cos + swap(rows_FNH, rotary.partner_H) * sin)
    return turned[0], turned[1]


def drawn_places(target: PatternTarget, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each head a sequence, one of its queries, and a key in proportion to the head's attention, int64 [N] each."""
    generator, device = torch.Generator().manual_seed(draw), target.real_BT.device
    n_heads, length = target.inputs.q_BTNH.shape[2], target.real_BT.shape[1]
    whole_BT = parallel.whole_rows(target.real_BT)
    place_n = (target.padding if whole_BT is target.real_BT else Padding.of(whole_BT)).place_n
    n_places = whole_BT.numel() if place_n is None else len(place_n)
    place_N = sent(torch.randint(n_places, (n_heads,), generator=generator), device)
    place_N = place_N if place_n is None else place_n[place_N]
    b_N, i_N = place_N // length, place_N % length
    row_N, here_N = parallel.row_here(b_N, len(target.real_BT))
    attention_NK = parallel.from_holders(target.attention(row_N, i_N), here_N).double() + 1e-12  # a sink may take all
    until_NK = attention_NK.cumsum(1)
    share_N1 = sent(torch.rand(n_heads, 1, generator=generator, dtype=torch.float64), device)
    j_N = (until_NK <= share_N1 * until_NK[:, -1:]).sum(1).clamp(max=length - 1)
    return b_N, i_N, j_N
