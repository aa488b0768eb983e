"""Controls: what the same budget buys without any training.

- `random`: dictionaries of the same width with random directions, never trained, their decoder rows the directions sent
  through the model's own projection, one gain fitted; as many active features a token as the trained ones.
- `svd`: the singular directions of each head's W_Qᵀ W_K (both signs), the largest kept, at the same L0.
- `residual`: the residual stream's own coordinates as features, both signs, at the same L0.
- `shuffled`: the kept pairs with their strengths, the key features permuted within each head.

Where the decomposition reads the residual stream, so do its controls: through the layer's norm, whose result the
attention is handed, for it is to that the projections are linear.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import DictionaryConfig
from ..decomposition import Decomposition
from ..dictionary import SparseTranscoder
from ..pairs.pair_map import Pairs, rows, with_bias
from ..pattern import AttentionInputs
from ..training.objective import PatternTarget
from ..training.start import SideStatistics, label_seed, side_statistics, start


def untrained(dec: Decomposition, sample: list[AttentionInputs], l0: dict[str, float]) -> dict[str, Decomposition]:
    """The `random` and `svd` controls as decompositions without pairs (their patterns are `log_pattern_all`)."""
    statistics = _statistics(dec, sample)
    config = DictionaryConfig(
        recipe="default", activation="batchtopk", start="random", norm="decoder",
        width=dec.query.width, width_key=dec.key.width, k=l0["query"], k_key=l0["key"],
    )  # fmt: skip
    seed = dec.config.training.seed
    random = {side: start(config, side, statistics[side], f"control/{dec.layer}", seed) for side in statistics}
    svd = svd_dictionaries(dec, statistics, l0)
    out = {}
    for name, sides in (("random", random), ("svd", svd)):
        for side, transcoder in sides.items():
            _set_threshold(transcoder, statistics[side].x_nD)
        out[name] = _without_pairs(dec, sides["query"], sides["key"])
    return out


def svd_dictionaries(
    dec: Decomposition, statistics: dict[str, SideStatistics], l0: dict[str, float]
) -> dict[str, SparseTranscoder]:
    """Singular directions of each head's product of projections, as dictionaries with features of both signs.

    A feature's decoder row is its direction through the projection, in its own head only; key heads shared by several
    query heads take the directions of their stacked product.
    """
    n, g, h = dec.shape.N, dec.shape.G, dec.shape.H
    to_q = statistics["query"].projection_DM.unflatten(1, (n, h))
    to_k = statistics["key"].projection_DM.unflatten(1, (g, h))
    rank = min(h, dec.shape.D)
    queries, keys = [], []
    for head in range(n):
        product = to_q[:, head] @ to_k[:, head * g // n].T
        queries.append((head, torch.linalg.svd(product, full_matrices=False).U[:, :rank]))
    for group in range(g):
        heads = [head for head in range(n) if head * g // n == group]
        stacked = torch.cat([to_q[:, head] @ to_k[:, group].T for head in heads])
        keys.append((group, torch.linalg.svd(stacked, full_matrices=False).Vh[:rank].T))
    return {
        "query": _directions(queries, to_q, statistics["query"], l0["query"]),
        "key": _directions(keys, to_k, statistics["key"], l0["key"]),
    }


def _directions(
    parts: list[tuple[int, Tensor]], projection_DnH: Tensor, statistics: SideStatistics, k: float
) -> SparseTranscoder:
    d, n, h = projection_DnH.shape
    width = sum(2 * u.shape[1] for _, u in parts)
    transcoder = SparseTranscoder(d, width, n * h, "batchtopk", k).to(projection_DnH.device)
    with torch.no_grad():
        transcoder.b_in.copy_(statistics.x_nD.mean(0))
        transcoder.b_out.copy_(statistics.out_nM.mean(0))
        at = 0
        for head, u in parts:
            both = torch.cat([u, -u], 1)
            place = slice(at, at + both.shape[1])
            transcoder.W_enc[:, place] = both
            transcoder.W_dec[place, head * h : (head + 1) * h] = both.T @ projection_DnH[:, head]
            at = place.stop
    return transcoder


@torch.no_grad()
def residual_basis(dec: Decomposition, sample: list[AttentionInputs], l0: dict[str, float]) -> Decomposition:
    """The residual stream's own coordinates as features, of both signs, at the same L0; without pairs."""
    sides = {}
    for side, s in _statistics(dec, sample).items():
        basis = torch.eye(dec.shape.D, device=s.x_nD.device)
        transcoder = SparseTranscoder(dec.shape.D, 2 * dec.shape.D, s.out_nM.shape[1], "batchtopk", l0[side])
        transcoder.to(basis.device)
        transcoder.b_in.copy_(s.x_nD.mean(0))
        transcoder.b_out.copy_(s.out_nM.mean(0))
        transcoder.W_enc.copy_(torch.cat([basis, -basis], 1))
        transcoder.W_dec.copy_(torch.cat([s.projection_DM, -s.projection_DM]))
        _set_threshold(transcoder, s.x_nD)
        sides[side] = transcoder
    return _without_pairs(dec, sides["query"], sides["key"])


@torch.no_grad()
def _set_threshold(transcoder: SparseTranscoder, x_nD: Tensor) -> None:
    """The threshold that gives the wanted L0 on a sample."""
    sizes = transcoder.pre(x_nD[:8192]).relu() * transcoder.norms()
    count = min(max(round(transcoder.k * len(sizes)), 1), sizes.numel() - 1)
    transcoder.threshold.fill_(sizes.flatten().kthvalue(sizes.numel() - count).values)
    transcoder.eval().requires_grad_(False)


def _statistics(dec: Decomposition, sample: list[AttentionInputs]) -> dict[str, SideStatistics]:
    """Of the attention's input, which is what the controls are made for."""
    few, norm = sample[:16], dec.query.input_norm
    if norm is not None:
        few = [replace(i, x_BTD=norm(i.x_BTD.float()), residual=False) for i in few]
    return side_statistics(few, metrics=False)


def _without_pairs(dec: Decomposition, query: SparseTranscoder, key: SparseTranscoder) -> Decomposition:
    query.input_norm = key.input_norm = dec.query.input_norm
    none = torch.zeros(0, dtype=torch.int64)
    pairs = Pairs(none, none, none, query.width, key.width, dec.shape.N)
    empty = torch.zeros(0)
    shape = replace(dec.shape, reads=None)
    return Decomposition(dec.layer, shape, query, key, pairs, empty, empty, empty, dec.config)


def shuffled_pairs(dec: Decomposition) -> tuple[Pairs, Tensor]:
    """The kept pairs and strengths with key features permuted within each head."""
    generator = torch.Generator().manual_seed(label_seed(f"shuffle/{dec.layer}", dec.config.training.seed))
    key = dec.pairs.key_P.clone()
    for head in range(dec.pairs.n_heads):
        here = dec.pairs.of_head(head)
        key[here] = key[here][torch.randperm(here.stop - here.start, generator=generator).to(key.device)]
    # A permutation can bring two pairs to the same place; their strengths then add up.
    p = dec.pairs
    code = (p.head_P * (p.n_query + 1) + p.query_P) * (p.n_key + 1) + key
    unique, place = code.unique(return_inverse=True)
    strength = dec.strength_P.new_zeros(len(unique)).index_add(0, place, dec.strength_P)
    rest = unique // (p.n_key + 1)
    pairs = Pairs(
        rest % (p.n_query + 1), unique % (p.n_key + 1), rest // (p.n_query + 1), p.n_query, p.n_key, p.n_heads
    )
    return pairs, strength


def explicit_scores(dec: Decomposition, inputs: AttentionInputs, head: int) -> Tensor:
    """Uncapped scores of one head from every pair of active features, one by one, [B, Q, K]: the full map, literally.

    Slow; it checks that the map leaves nothing out.
    """
    target = PatternTarget(inputs)
    acts_q, acts_k = (with_bias(side.encode(inputs.x_BTD.float())) for side in (dec.query, dec.key))
    left, right = rows(dec.query, dec.shape.N)[:, head], rows(dec.key, dec.shape.G)
    right = right[:, head * dec.shape.G // dec.shape.N]
    batch, length = inputs.real_BT.shape
    scores = acts_q.new_zeros(batch, length, length)
    rotary = target.rule.rotary
    for b in range(batch):
        for i in range(length):
            a = acts_q[b, i].nonzero()[:, 0]
            for j in range(length):
                c = acts_k[b, j].nonzero()[:, 0]
                if rotary is None:
                    m = left[a] @ right[c].T
                else:
                    here = torch.arange(length, device=a.device) == i
                    there = torch.arange(length, device=a.device) == j
                    turned_q = rotary.rotate(left[a].expand(1, length, -1, -1))[0, here][0]
                    turned_k = rotary.rotate(right[c].expand(1, length, -1, -1))[0, there][0]
                    m = turned_q @ turned_k.T
                scores[b, i, j] = acts_q[b, i, a] @ m @ acts_k[b, j, c] * target.rule.scaling
    return scores
