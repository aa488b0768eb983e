"""Step 1's objective: the attention pattern, by its KL, from reconstructed queries and keys.

    loss = 3·KL(P ‖ P(q̂,k̂)) + KL(P ‖ P(q̂,k)) + KL(P ‖ P(q,k̂)) + sparsity

Means are over sequences, heads and unpadded query positions. The half-true terms keep the two dictionaries from
agreeing on an arbitrary rotation of head space.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .. import parallel
from ..dictionary import SparseTranscoder
from ..kernels.pattern_kl import pattern_kl
from ..kernels.row_kl import exp, row_entropy, row_kl
from ..pattern import AttentionInputs


class PatternTarget:
    """One layer's true pattern on one batch, computed once and shared by every dictionary that is trained on it."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.rule = inputs.rule
        log_pattern = inputs.rule.log_pattern(inputs.q_BTNH, inputs.k_BTGH)
        self.pattern_BNQK = exp(log_pattern)
        self.entropy_BNQ = row_entropy(log_pattern)
        self.real_BT = inputs.real_BT
        self.padded = not bool(inputs.real_BT.all())
        self.x_nD = self.pack(inputs.x_BTD)
        self.q_nM = self.pack(inputs.q_BTNH.flatten(2))
        self.k_nM = self.pack(inputs.k_BTGH.flatten(2))

    @property
    def n_tokens(self) -> int:
        return len(self.x_nD)

    def pack(self, values_BTd: Tensor) -> Tensor:
        """The unpadded tokens in one row, float32 [n, d]: padding never reaches a dictionary."""
        return (values_BTd[self.real_BT] if self.padded else values_BTd.flatten(0, 1)).float()

    def unpack(self, values_nd: Tensor) -> Tensor:
        """`pack` undone, zeros at padding: [B, T, d]."""
        if not self.padded:
            return values_nd.unflatten(0, self.real_BT.shape)
        out = values_nd.new_zeros(*self.real_BT.shape, values_nd.shape[-1])
        return out.masked_scatter(self.real_BT[..., None], values_nd)

    def queries(self, q_nM: Tensor) -> Tensor:
        return self.unpack(q_nM.float()).view_as(self.inputs.q_BTNH)

    def keys(self, k_nM: Tensor) -> Tensor:
        return self.unpack(k_nM.float()).view_as(self.inputs.k_BTGH)

    def kl_rows(self, scores_BNQK: Tensor) -> Tensor:
        """KL of each row's pattern under these capped, unmasked scores from the true one, [B, N, Q]."""
        return row_kl(self.rule.masked(scores_BNQK), self.pattern_BNQK, self.entropy_BNQ)

    def mean(self, rows_BNQ: Tensor) -> Tensor:
        """Mean over heads and unpadded queries of all sequences."""
        return (rows_BNQ * self.weight_BQ[:, None]).sum()

    @cached_property
    def weight_BQ(self) -> Tensor:
        """What a row counts in a mean over heads and unpadded queries."""
        real = self.real_BT.float()
        return real / (real.sum() * self.inputs.q_BTNH.shape[2])

    @cached_property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """The true queries (scaled) and keys as they meet, float32."""
        return self.turn(self.inputs.q_BTNH) * self.rule.scaling, self.turn(self.inputs.k_BTGH)

    def turn(self, x_BTnH: Tensor) -> Tensor:
        """Queries or keys after the rotary embedding, float32."""
        return x_BTnH.float() if self.rule.rotary is None else self.rule.rotary.rotate(x_BTnH.float())

    def kl(self, q_BTNH: Tensor | None = None, k_BTGH: Tensor | None = None) -> Tensor:
        """Mean KL in nats with the (scaled, rotated) queries, keys or both replaced; see `rotated`."""
        true_q, true_k = self.rotated
        return pattern_kl(
            true_q if q_BTNH is None else q_BTNH,
            true_k if k_BTGH is None else k_BTGH,
            self.pattern_BNQK,
            self.entropy_BNQ,
            self.rule.visible_BQK,
            self.weight_BQ,
            self.rule.sink_N,
            self.rule.softcap,
        )

    def kl_of(self, query_nM: Tensor, key_nM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean KL of P(q̂,k̂), P(q̂,k) and P(q,k̂) for reconstructions of the packed tokens."""
        q = self.turn(self.queries(query_nM)) * self.rule.scaling
        k = self.turn(self.keys(key_nM))
        return self.kl(q, k), self.kl(q_BTNH=q), self.kl(k_BTGH=k)


def root_penalty(acts_nF: Tensor, norms_F: Tensor) -> Tensor:
    """Σ_f √(a_f·‖W_dec_f‖ + 1e-7), mean over tokens (a sum over tokens would tie the weight to the batch size)."""
    return (acts_nF * norms_F + 1e-7).sqrt().sum(-1).mean()


def sparsity_loss(transcoder: SparseTranscoder, pre_nF: Tensor, acts_nF: Tensor, weight: float) -> Tensor:
    """What keeps an activation sparse that is not sparse by itself: ReLU's root penalty, JumpReLU's pull of L0 to k."""
    if weight and transcoder.activation == "jumprelu":
        return weight * transcoder.l0_gap(pre_nF.float())
    if weight and transcoder.activation == "relu":
        return weight * root_penalty(acts_nF.float(), transcoder.W_dec.norm(dim=1))
    return pre_nF.new_zeros(())


def revival_loss(error_nM: Tensor, aux_nM: Tensor, metric_NHH: Tensor | None) -> Tensor:
    """Share of the reconstruction error that dead features leave unexplained (AuxK, Gao et al. 2024).

    Measured in the norm in which errors move the pattern, where there is one.
    """

    def square(e_nM: Tensor) -> Tensor:
        if metric_NHH is None:
            return e_nM.square().sum(-1).mean()
        n, h, _ = metric_NHH.shape
        e = e_nM.view(len(e_nM), n, h)
        return torch.einsum("bnh,nhg,bng->b", e, metric_NHH, e).mean()

    error = error_nM.detach()
    return square(error - aux_nM) / parallel.mean(square(error)).clamp(min=1e-12)
