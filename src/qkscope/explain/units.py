"""Units: groups of pairs that a few query features, a few key features and some heads make up together.

The importance of a layer's pairs, as shares of their sum, is factorised without labels into R units, each a product:

    importance[a,b,h] ≈ Σ_r w_r · u_r[a] · v_r[b] · h_r[h]        u_r, v_r, h_r ≥ 0 that sum to 1, Σ_r w_r = 1

by the EM updates of latent class analysis, which are the multiplicative updates of non-negative CP for the Poisson
(Kullback-Leibler) loss (Hofmann 1999; Shashua and Hazan 2005; Chi and Kolda 2012). What is notable:

- The zeros count, and cost nothing: the model sums to 1, so Σ_zeros model = 1 - Σ_kept model, and
  KL(x ‖ model) = Σ_kept x log(x / model) exactly. Nothing dense is made; a step is linear in pairs × units.
- The loss never rises, and factors become sparse by themselves.
- One unit is the product of the marginals, and its loss is what query features, key features and heads say of each
  other (their total correlation, nats). The share of it that R units explain is set beside the same figure of rewired
  importance (entries.py, null "kept"): with as many numbers to fit, some of anything is explained.

Pairs with a bias are left out: a bias goes with every feature.

Shapes: P kept pairs, R units, S restarts, A query features, B key features, N heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decomposition import Decomposition
from ..errors import UserError
from .entries import Entries, rewired
from .names import FeatureNames

RANKS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
RESTARTS = 3
DRAWS = 3  # of the null, each with as many restarts
STEPS = 200
CLOSE = 1e-5  # nats that ten steps must gain, in shares of the loss of one unit
ENOUGH = 0.9  # of the greatest excess over chance, with which fewer units do
LEADING = 0.8  # share of a unit that its leading features or heads hold together ...
MOST = 5  # ... but no more than so many are listed


@dataclass(frozen=True)
class Units:
    """A factorisation; units with the greatest weight first, all factors float64."""

    weight_R: Tensor
    query_AR: Tensor
    key_BR: Tensor
    head_NR: Tensor
    again_R: Tensor
    """How well the other restarts found the unit again: the product of the cosines of its three factors with those of
    the likest unit there, the mean over restarts; 1: the same in all. NaN with a single restart."""
    loss: float
    """KL of the importances' shares from the model's, nats."""
    total: float
    """The same of one unit: the total correlation."""

    @property
    def explained(self) -> float | None:
        """Share of the total correlation; None where there is none."""
        return 1 - self.loss / self.total if self.total > 1e-9 else None

    def parts(self, entries: Entries) -> Tensor:
        """What each unit gives to each entry, as a share of the whole, [P, R]."""
        factors = (self.query_AR[:, None], self.key_BR[:, None], self.head_NR[:, None])
        return _joint(entries, self.weight_R[None], *factors)[:, 0]


def factorise(
    entries: Entries,
    rank: int,
    *,
    restarts: int = RESTARTS,
    steps: int = STEPS,
    seed: int = 0,
    losses: list[Tensor] | None = None,
) -> Units:
    """The best of several restarts; the same seed gives the same units.

    `entries`: of one draw, without biases. `losses`: takes each step's KL of every restart, [S].
    """
    assert len(entries.worth_SP) == 1
    x_P = entries.worth_SP[0] / entries.worth_SP.sum().clamp(min=1e-30)
    g = torch.Generator().manual_seed(seed)
    # Each entry starts in all units, in random parts.
    start = torch.empty(len(entries), restarts, rank, dtype=torch.float64).exponential_(generator=g)
    factors = _maximise(entries, start.div_(start.sum(-1, keepdim=True)).mul_(x_P[:, None, None]))
    total = _loss(x_P, _joint(entries, *_maximise(entries, x_P[:, None, None])).sum(-1))
    joint = _joint(entries, *factors)
    loss = before = _loss(x_P, joint.sum(-1))
    for step in range(1, steps + 1):
        factors = _maximise(entries, joint.mul_((x_P[:, None] / joint.sum(-1).clamp(min=1e-300))[..., None]))
        joint = _joint(entries, *factors)
        loss = _loss(x_P, joint.sum(-1))
        if losses is not None:
            losses.append(loss)
        if step % 10 == 0:
            if float(before.min() - loss.min()) < CLOSE * float(total):
                break
            before = loss
    best = int(loss.argmin())
    order = factors[0][best].argsort(descending=True, stable=True)
    weight, query, key, head = (f[..., best, :][..., order] for f in factors)
    return Units(weight, query, key, head, _again(factors[1:], best)[order], float(loss[best]), float(total))


def _again(factors: tuple[Tensor, ...], best: int) -> Tensor:
    """How well the best restart's units are found again in the others, [R]."""
    congruence = torch.ones(())
    for factor in factors:
        unit = factor / factor.norm(dim=0).clamp(min=1e-300)
        congruence = congruence * torch.einsum("ar,asq->srq", unit[:, best], unit)
    others = torch.arange(len(congruence)) != best
    return congruence.amax(2)[others].mean(0)


def _joint(entries: Entries, weight_SR: Tensor, *factors: Tensor) -> Tensor:
    """w_r u_r[a] v_r[b] h_r[h] of each entry, [P, S, R]; factors [A, S, R] and so on."""
    index = (entries.query_SP[0], entries.key_SP[0], entries.head_P)
    query, key, head = (factor.index_select(0, i) for factor, i in zip(factors, index, strict=True))
    return query.mul_(key).mul_(head).mul_(weight_SR)


def _maximise(entries: Entries, part_PSR: Tensor) -> tuple[Tensor, ...]:
    """The weights [S, R] and factors that fit best where this part of each entry belongs to each unit."""
    weight_SR = part_PSR.sum(0)
    factors = []
    for index, width in (
        (entries.query_SP[0], entries.n_query),
        (entries.key_SP[0], entries.n_key),
        (entries.head_P, entries.n_heads),
    ):
        sums = part_PSR.new_zeros(width, *weight_SR.shape).index_add_(0, index, part_PSR)
        factors.append(sums.div_(weight_SR.clamp(min=1e-300)))
    return weight_SR, *factors


def _loss(x_P: Tensor, model_PS: Tensor) -> Tensor:
    """KL(x ‖ model), [S]."""
    return torch.xlogy(x_P, x_P).sum() - (x_P[:, None] * model_PS.clamp(min=1e-300).log()).sum(0)


# Choosing the rank, and what a person reads


def explained_by_rank(entries: Entries, ranks: tuple[int, ...] = RANKS, seed: int = 0) -> list[dict[str, Any]]:
    """For each number of units the explained share, and the same of each draw of rewired importance."""
    null = rewired(entries, "kept", DRAWS, seed)
    rows = []
    for rank in ranks:
        chance = [factorise(null.draw(s), rank, seed=seed).explained or 0.0 for s in range(DRAWS)]
        rows.append({"rank": rank, "explained": factorise(entries, rank, seed=seed).explained or 0.0, "chance": chance})
    return rows


def chosen_rank(rows: list[dict[str, Any]]) -> int:
    """The fewest units whose explained share exceeds that of rewired importance by `ENOUGH` of the most any does."""
    excess = [row["explained"] - sum(row["chance"]) / len(row["chance"]) for row in rows]
    return next(
        row["rank"] for row, e in zip(rows, excess, strict=True) if e >= ENOUGH * max(excess) or e == max(excess)
    )


def describe(
    dec: Decomposition, names: FeatureNames, rank: int | None = None, seed: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """A layer's units with their names, `rank` of them or as many as `chosen_rank` says; and of each pair the unit that
    gives it most, int64 [pairs of `dec`], -1 for a pair with a bias.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: name a number of units of at least 1")
    entries = Entries.of(dec)
    pairs = dec.pairs
    unit_P = torch.full((len(pairs),), -1)
    if not float(entries.worth_SP.sum()) > 0:
        return {"rank": 0, "units": []}, unit_P
    ranks = (rank,) if rank else tuple(r for r in RANKS if r <= max(len(entries), RANKS[0]))
    by_rank = explained_by_rank(entries, ranks, seed)
    rank = rank or chosen_rank(by_rank)
    chosen = next(row for row in by_rank if row["rank"] == rank)
    found = factorise(entries, rank, seed=seed)
    two_features = (pairs.query_P < pairs.n_query) & (pairs.key_P < pairs.n_key)
    unit_P[two_features.cpu()] = found.parts(entries).argmax(1)
    rows = [
        {
            "share": float(found.weight_R[r]),
            "again": float(found.again_R[r]),
            "name": " → ".join(
                names.of_group(side, enumerate(factor[:, r].tolist()))
                for side, factor in (("query", found.query_AR), ("key", found.key_BR))
            ),
            "pairs": int((unit_P == r).sum()),
            "query_features": _leading(found.query_AR[:, r], "feature"),
            "key_features": _leading(found.key_BR[:, r], "feature"),
            "heads": _leading(found.head_NR[:, r], "head"),
        }
        for r in range(rank)
    ]
    return {**chosen, "total_correlation": found.total, "by_rank": by_rank, "units": rows}, unit_P


def _leading(share_F: Tensor, what: str) -> list[dict[str, Any]]:
    """What makes up most of a factor, at most `MOST` of it."""
    values, index = share_F.sort(descending=True, stable=True)
    count = min(int((values.cumsum(0) < LEADING).sum()) + 1, MOST, int((values > 0).sum()))
    return [{what: int(index[i]), "share": float(values[i])} for i in range(count)]
