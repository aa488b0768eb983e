"""How a pair's strength depends on distance, with a rotary embedding: what is content in it, and what is position.

A rotation makes a pair's score depend on query i and key j by their features and by d = i - j alone:

    score_ij = scale · M(d) · a_q[i] · a_k[j]        M(d) = strength · ⟨R_d W_q, W_k⟩,   d = 0 … T - 1

Partner dimensions as one complex number, R_d is a factor e^{iωd} on each, so that the profiles of all pairs are one
product, Re(z_q z̄_k) e^{iωd}: [P, H/2] @ [H/2, T].

The **content** of a pair is the number c that makes c · a_q[i] · a_k[j] its best distance-free fit over a text: the
mean of M over the distances at which both features are active, weighted by the squares of their activations there. The
rest, M(d) - c, is its **position**. The two are orthogonal over the text, so their shares of the mean square of the
pair's score add up to 1. Without weights every (query, key) that the mask shows counts once.

A key's bias says nothing of the key, and a constant along a row cancels in the softmax: pairs with it are all position
(but for a soft cap or a sink, where a constant does count).

Shapes: P pairs, T distances, H head width, F features with the bias behind them; others as in attention.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..decomposition import Decomposition
from ..errors import UserError
from ..pairs.importance import see
from ..pairs.pair_map import rows
from ..pattern import AttentionInputs, PatternRule
from ..rotary import Rotary

PURE = 0.02  # by how much R_d may differ along a sequence, in shares of its size; tables in bfloat16 do by 0.01
BLOCK_ELEMENTS = 1 << 24  # of [sequences, frequencies, pairs]


@dataclass(frozen=True)
class DistanceProfiles:
    """Kept pairs by distance, in the order of `Decomposition.pairs`."""

    profile_PT: Tensor
    """M(d), float64; times `scale` and both activations it is a score, before a soft cap."""
    use_PT: Tensor
    """Share of the pair's use at each distance; 0 everywhere for a pair that is never active."""
    query_bias_P: Tensor
    key_bias_P: Tensor
    """bool: the side's feature is its bias."""
    shift_free: bool
    """Whether a constant along a score row cancels (`PatternRule.shift_free`)."""

    @cached_property
    def content_P(self) -> Tensor:
        """c: the distance-free part of M; 0 where it would be a constant along the row that cancels."""
        mean_P = (self.profile_PT * self.use_PT).sum(1)
        return mean_P.masked_fill(self.key_bias_P, 0) if self.shift_free else mean_P

    @cached_property
    def position_PT(self) -> Tensor:
        """M(d) - c, whether or not c cancels."""
        return self.profile_PT - (self.profile_PT * self.use_PT).sum(1, keepdim=True)

    @cached_property
    def position_share_P(self) -> Tensor:
        """Share of the mean square of the pair's score that position explains, content the rest; NaN if never used."""
        position = (self.position_PT.square() * self.use_PT).sum(1)
        return position / (position + self.content_P.square())

    @cached_property
    def peak_P(self) -> Tensor:
        """The distance at which |M| is greatest, of those where the pair is used, int64."""
        return (self.profile_PT.abs() * (self.use_PT > 0)).argmax(1)

    def by_head(self, dec: Decomposition) -> list[dict[str, Any]]:
        """For each head the share of position, weighted by importance; without biases, with either's, and of all."""
        share, worth, of_head = self.position_share_P, dec.importance_P.detach().cpu().double(), dec.pairs.head_P.cpu()
        worth = worth.masked_fill(share.isnan(), 0)
        share = share.nan_to_num(0.0)
        kinds = {
            "two_features": ~self.query_bias_P & ~self.key_bias_P,
            "query_bias": self.query_bias_P & ~self.key_bias_P,
            "key_bias": self.key_bias_P,
            "all": torch.ones_like(self.key_bias_P),
        }
        out = []
        for head in range(dec.shape.N):
            row: dict[str, Any] = {"head": head}
            for name, kind in kinds.items():
                here = kind & (of_head == head)
                total = float(worth[here].sum())
                position = float((worth * share)[here].sum()) / total if total > 0 else None
                row[name] = {"importance": total, "position": position}
            out.append(row)
        return out


@torch.no_grad()
def distance_profiles(
    dec: Decomposition, text: Iterable[AttentionInputs], *, weighted: bool = True
) -> DistanceProfiles:
    """Profiles of a decomposition's kept pairs over a text, whose batches `attention.harvest` gives.

    T is that of the longest batch. `weighted=False`: distances count as often as the mask has them. Raises `UserError`
    for a layer without rotary embedding, tables that are no rotation by the distance alone, and a mask that is no
    function of the distance or shows keys behind the query.
    """
    use = torch.zeros(len(dec.pairs), 0, dtype=torch.float64)
    order, phase = torch.zeros(0), torch.zeros(0, 0)
    rule: PatternRule | None = None
    for inputs in text:
        rule = inputs.rule
        if rule.rotary is None:
            raise no_rotary(dec.layer)
        order, turned = rotation_by_distance(rule.rotary, inputs.real_BT.shape[1])
        shorter = min(len(phase), len(turned))
        if not _same(turned[:shorter], phase[:shorter]):
            raise UserError(f"layer {dec.layer}: its rotary tables differ between texts of different lengths; give one")
        phase = max(phase, turned, key=len)
        seen_T = visible_distances(inputs)
        more = _use(dec, inputs) * (seen_T > 0) if weighted else seen_T.expand(len(dec.pairs), -1)
        if len(phase) > use.shape[1]:
            use = torch.nn.functional.pad(use, (0, len(phase) - use.shape[1]))
        use[:, : more.shape[1]] += more
    if rule is None:
        raise UserError("a distance profile needs a text of at least one batch, for the model's rotary tables")
    profile = (_products(dec, order) @ phase.T).real * dec.strength_P.cpu().double()[:, None]
    p = dec.pairs
    bias_q, bias_k = (p.query_P == p.n_query).cpu(), (p.key_P == p.n_key).cpu()
    return DistanceProfiles(profile, use / use.sum(1, keepdim=True).clamp(min=1e-300), bias_q, bias_k, rule.shift_free)


def no_rotary(layer: int) -> UserError:
    """What to say of a layer without a rotary embedding."""
    return UserError(
        f"layer {layer} has no rotary embedding, so its pairs have no distance profile; what its features say of the "
        "position is by_position in features.parquet"
    )


def rotation_by_distance(rotary: Rotary, length: int) -> tuple[Tensor, Tensor]:
    """The order in which partners are neighbours (`Rotary.phases`), and e^{iωd} of each two, complex [T, H/2].

    Raises `UserError` where R_i and R_j do not make up a rotation by i - j. Lags that are powers of two are checked:
    from them every other one follows.
    """
    order, phase = rotary.phases()
    phase = phase[:, :length].cpu().to(torch.complex128)
    for lag in (1 << n for n in range((length - 1).bit_length())):
        turns = phase[:, lag:] * phase[:, :-lag].conj()
        if not _same(turns, turns[:1, :1]):
            raise UserError(
                "this layer's rotary embedding is no rotation by the distance alone (at distance "
                f"{lag} it depends on the place), so its pairs have no distance profile"
            )
    return order.cpu(), phase[0] * phase[0, :1].conj()


def _same(one: Tensor, other: Tensor) -> bool:
    return not one.numel() or float((one - other).abs().max()) <= PURE * float(one.abs().max())


def visible_distances(inputs: AttentionInputs) -> Tensor:
    """How many (query, key) of a batch are visible at each distance, float64 [T]; refusals as `distance_profiles`."""
    real, visible = inputs.real_BT, inputs.rule.visible_BQK
    at = torch.arange(real.shape[1], device=real.device)
    distance = at[:, None] - at
    both = real[:, :, None] & real[:, None]
    seen = both & visible
    if bool((seen & (distance < 0)).any()):
        raise UserError("this layer's queries see keys behind them; distance profiles are for causal attention")
    causal = distance.clamp(min=0).expand_as(seen)
    counts, of_all = (
        torch.zeros(len(at), dtype=torch.float64, device=real.device).index_add(0, causal[w], w[w].double())
        for w in (seen, both & (distance >= 0))
    )
    if bool(((counts > 0) & (counts < of_all)).any()):
        raise UserError("this layer's mask is no function of the distance, so its pairs have no distance profile")
    return counts.cpu()


def _products(dec: Decomposition, order: Tensor) -> Tensor:
    """z_q z̄_k of each pair, complex [P, H/2]."""
    p = dec.pairs
    group = p.head_P * dec.shape.G // dec.shape.N
    left = rows(dec.query, dec.shape.N)[p.query_P, p.head_P]
    right = rows(dec.key, dec.shape.G)[p.key_P, group]
    z_q, z_k = (
        torch.view_as_complex(row.detach().cpu().double()[:, order].unflatten(1, (-1, 2)).contiguous())
        for row in (left, right)
    )
    return z_q * z_k.conj()


def _use(dec: Decomposition, inputs: AttentionInputs) -> Tensor:
    """Σ_i a_q[i]² a_k[i-d]² of each pair, float64 [P, T]: a correlation, by Fourier transforms."""
    item = see(inputs, dec.query, dec.key)
    length = item.acts_q_BTF.shape[1]
    q_BTF, k_BTF = item.acts_q_BTF.cpu().double().square(), item.acts_k_BTF.cpu().double().square()
    q_BWF, k_BWF = (torch.fft.rfft(a, n=2 * length, dim=1) for a in (q_BTF, k_BTF))
    query, key = dec.pairs.query_P.cpu(), dec.pairs.key_P.cpu()
    out = []
    for block in torch.arange(len(query)).split(max(BLOCK_ELEMENTS // (q_BWF.shape[0] * q_BWF.shape[1]), 1)):
        a, b = query[block], key[block]
        product_WP = (q_BWF[..., a] * k_BWF[..., b].conj()).sum(0)
        sums = torch.fft.irfft(product_WP, n=2 * length, dim=0)[:length].T
        rounding = 1e-12 * (q_BTF[..., a].norm(dim=1) * k_BTF[..., b].norm(dim=1)).sum(0)
        out.append(sums.where(sums > rounding[:, None], 0))
    return torch.cat(out) if out else torch.zeros(0, length, dtype=torch.float64)
