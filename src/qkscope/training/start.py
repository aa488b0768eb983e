"""Where a dictionary starts: what a few batches say about a layer, and the first weights.

What is notable: queries and keys are (nearly) linear in the attention's input, so a decoder row that is its encoder
direction sent through the model's own projection reconstructs from the first step. The projection is read off the data
by least squares, which is exact for a linear projection and needs no architecture's weight names. The directions are
those of inputs that were seen, each a little off, so that a common one (BOS) is not there twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import DictionaryConfig
from ..dictionary import SparseTranscoder
from ..kernels.row_kl import exp
from ..pattern import AttentionInputs, PatternRule
from .objective import PatternTarget

JITTER = 0.2
FIT_TOKENS, FIT_ELEMENTS = 4096, 1 << 25  # of the activations that a gain or threshold is fitted to: the lesser of both


@dataclass(frozen=True)
class SideStatistics:
    """One side (query or key) of one layer, from a few training batches."""

    x_nD: Tensor
    """Inputs."""
    out_nM: Tensor
    """True queries or keys, before the rotary embedding."""
    metric_NHH: Tensor | None
    """KL per token of a small error e in head h: ½ eᵀ C_h e (nats); None where it was not asked for."""

    @property
    def projection_DM(self) -> Tensor:
        """Least-squares map from centred inputs to centred outputs, [D, M]."""
        x = (self.x_nD - self.x_nD.mean(0)).double()
        y = (self.out_nM - self.out_nM.mean(0)).double()
        gram = x.T @ x
        # LayerNorm leaves a direction without variance; a trace of ridge keeps the solution finite and small there.
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + ridge, x.T @ y).float()


def side_statistics(batches: Sequence[AttentionInputs], *, metrics: bool = True) -> dict[str, SideStatistics]:
    """Statistics of the query and key side of one layer; `metrics`: those that need patterns too."""
    targets = [PatternTarget(inputs) for inputs in batches]
    x = torch.cat([t.x_nD for t in targets])
    query = key = None
    if metrics:
        found = zip(*(score_metrics(inputs) for inputs in batches[:4]), strict=True)
        query, key = (torch.stack(side).mean(0) for side in found)
    return {
        "query": SideStatistics(x, torch.cat([t.q_nM for t in targets]), query),
        "key": SideStatistics(x, torch.cat([t.k_nM for t in targets]), key),
    }


def score_metrics(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """How errors of queries [N, H, H] and keys [G, H, H] move the pattern, to second order, in nats a token (doubled).

    An error e of query i moves score row i by scale·⟨e, k_j⟩, which costs KL ½·Var_{j∼P_i}; an error of key j moves
    column j, which costs ½·Σ_i P_ij(1-P_ij)·(scale·⟨q_i, e⟩)². Both are taken in the frame before the rotary embedding.
    """
    rule = inputs.rule
    n_query, n_key = inputs.q_BTNH.shape[2], inputs.k_BTGH.shape[2]
    q, k = inputs.q_BTNH.float(), inputs.k_BTGH.float()
    metric_q = q.new_zeros(n_query, *[q.shape[-1]] * 2)
    metric_k = q.new_zeros(n_key, *[q.shape[-1]] * 2)
    if rule.rotary is not None:
        q, k = rule.rotary.rotate(q), rule.rotary.rotate(k)
    tokens = int(inputs.real_BT.sum())
    for n in range(n_query):  # head by head: the patterns of all are never held at once
        one, g = inputs.one_head(n), n * n_key // n_query
        pattern_BQK = exp(one.rule.log_pattern(one.q_BTNH, one.k_BTGH))[:, 0]
        slope = slopes(one.rule, one)
        for b, real in enumerate(inputs.real_BT):
            weight = pattern_BQK[b, real, : len(real)]
            rate = 1.0 if slope is None else slope[b, 0, real]
            kk, qq = k[b, :, g], q[b, real, n]
            first = (weight * rate) @ kk
            second = (weight * rate * rate) @ (kk[:, :, None] * kk[:, None]).flatten(1)
            spread_q = second.view(-1, *metric_q.shape[1:]) - first[:, :, None] * first[:, None]
            column = (weight * (1 - weight) * rate * rate).T
            spread_k = (column @ (qq[:, :, None] * qq[:, None]).flatten(1)).view(-1, *metric_k.shape[1:])
            metric_q[n] += _unrotate(rule, spread_q, b, real).sum(0)
            metric_k[g] += _unrotate(rule, spread_k, b, torch.ones_like(real)).sum(0)
    return metric_q * rule.scaling**2 / tokens, metric_k * rule.scaling**2 / tokens


def slopes(rule: PatternRule, inputs: AttentionInputs) -> Tensor | None:
    """Derivative of the soft cap at each score, [B, N, Q, K]; None without a cap (it is 1)."""
    if rule.softcap is None:
        return None
    return 1 - (rule.scores(inputs.q_BTNH, inputs.k_BTGH) / rule.softcap).square()


def _unrotate(rule: PatternRule, spread_THH: Tensor, b: int, rows: Tensor) -> Tensor:
    """R_pᵀ S R_p for the matrix S of each position p."""
    if rule.rotary is None:
        return spread_THH
    cos, sin = (t[b if len(t) > 1 else 0][rows][:, None] for t in (rule.rotary.cos_BTH, rule.rotary.sin_BTH))

    def back(s: Tensor) -> Tensor:  # Rᵀ on the last axis (the inverse, times the tables' squared scale)
        return s * cos - s[..., rule.rotary.partner_H] * sin  # type: ignore[union-attr]

    return back(back(spread_THH).transpose(1, 2))


def start(config: DictionaryConfig, side: str, statistics: SideStatistics, label: str, seed: int) -> SparseTranscoder:
    """A fresh dictionary of one side; the same for the same label and seed, whatever else is trained beside it."""
    assert config.activation is not None
    query = side == "query"
    width, k = (config.width, config.k) if query else (config.key_width, config.key_k)
    x, out = statistics.x_nD, statistics.out_nM
    d_in, d_out = x.shape[1], out.shape[1]
    transcoder = SparseTranscoder(d_in, width, d_out, config.activation, k)
    generator = torch.Generator().manual_seed(label_seed(f"{label}/{side}", seed))
    with torch.no_grad():
        if config.start == "kaiming":
            transcoder.W_enc.uniform_(-((6 / d_in) ** 0.5), (6 / d_in) ** 0.5, generator=generator)
            transcoder.W_dec.uniform_(-((6 / width) ** 0.5), (6 / width) ** 0.5, generator=generator)
            transcoder.to(x.device)
        else:
            transcoder.to(x.device)
            share = 0.0 if config.start == "random" else 1.0
            transcoder.W_enc.copy_(_directions(x, width, generator, share))
            transcoder.b_in.copy_(x.mean(0))
            transcoder.b_out.copy_(out.mean(0))
            transcoder.W_dec.copy_(transcoder.W_enc.T @ statistics.projection_DM)
        if config.norm == "score":
            assert statistics.metric_NHH is not None
            transcoder.set_metric(statistics.metric_NHH)
        transcoder.train()
        few = max(min(FIT_TOKENS, FIT_ELEMENTS // width), 1)  # a wide dictionary's activations of all would be GBs
        if config.start != "kaiming":
            _fit_gain(transcoder, x[:few], out[:few])
        if config.activation == "jumprelu":
            sizes = transcoder.pre(x[:few]).relu() * transcoder.norms()
            count = max(round(k * len(sizes)), 1)
            transcoder.threshold.fill_(sizes.flatten().kthvalue(max(sizes.numel() - count, 1)).values)
        elif config.activation == "batchtopk":
            transcoder.threshold.zero_()
    return transcoder


def _directions(x_nD: Tensor, width: int, generator: torch.Generator, share: float) -> Tensor:
    """Unit directions: of inputs from their mean, times `share`, with a random one of `JITTER` length added, [D, F]."""
    order = torch.cat([torch.randperm(len(x_nD), generator=generator) for _ in range(-(-width // len(x_nD)))])
    seen = (x_nD - x_nD.mean(0))[order[:width].to(x_nD.device)].T
    seen = seen / seen.norm(dim=0).clamp(min=1e-12)
    other = torch.randn(seen.shape, generator=generator).to(x_nD.device)
    both = share * seen + JITTER * other / other.norm(dim=0)
    return both / both.norm(dim=0)


def _fit_gain(transcoder: SparseTranscoder, x_nD: Tensor, out_nM: Tensor) -> None:
    """Scale the decoder so that its sum fits the centred outputs best: random directions overlap, and overshoot."""
    moved = transcoder.encode(x_nD) @ transcoder.W_dec
    centred = out_nM - transcoder.b_out
    gain = (moved * centred).sum() / moved.square().sum().clamp(min=1e-12)
    transcoder.W_dec.mul_(gain.clamp(min=1e-3))


def label_seed(label: str, seed: int) -> int:
    """A seed of its own for every label."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{label}".encode(), digest_size=7).digest(), "big")
