"""Step 1's objective: the attention pattern, by its KL, from reconstructed queries and keys.

    loss = 3·KL(P ‖ P(q̂,k̂)) + KL(P ‖ P(q̂,k)) + KL(P ‖ P(q,k̂)) + sparsity

Means are over sequences, heads and unpadded query positions. The half-true terms keep the two dictionaries from
agreeing on an arbitrary rotation of head space.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import parallel
from ..devices import sent
from ..dictionary import SparseTranscoder
from ..kernels.head_kl import HeadKL
from ..kernels.mostly_zero import MostlyZero
from ..kernels.pattern_kl import pattern_kl
from ..kernels.row_kl import exp, row_entropy, row_kl
from ..pattern import AttentionInputs

PARTS = 3.0, 1.0, 1.0  # of the three KLs in the loss


@dataclass(frozen=True)
class Padding:
    """Which tokens of a batch are padding; how many, the host knows."""

    place_n: Tensor | None
    """Where the real ones stand among those of all sequences, one after the other, int64; None: all are real."""

    @classmethod
    def of(cls, real_BT: Tensor, device: torch.device | None = None) -> Padding:
        """Of bool [B, T], for tokens on a device; flags that lie on a GPU are waited for."""
        if bool(real_BT.all()):
            return cls(None)
        return cls(sent(real_BT.flatten().nonzero()[:, 0], device or real_BT.device))


class PatternTarget:
    """One layer's true pattern on one batch, for every dictionary that is trained on it.

    It stands there as queries and keys: no pattern [B, N, Q, K] is ever held. Kept, it would save a second dictionary
    on the same batch 10 to 20 % of its KL, and nothing to the first.
    """

    def __init__(self, inputs: AttentionInputs, padding: Padding | None = None) -> None:
        """`padding`: that of `inputs.real_BT`, where it is known already."""
        self.inputs = inputs
        self.rule = inputs.rule
        self.real_BT = inputs.real_BT
        self.padding = Padding.of(inputs.real_BT) if padding is None else padding
        self.x_nD = self.pack(inputs.x_BTD)
        self.q_nM = self.pack(inputs.q_BTNH.flatten(2))
        self.k_nM = self.pack(inputs.k_BTGH.flatten(2))

    @property
    def n_tokens(self) -> int:
        return len(self.x_nD)

    def pack(self, values_BTd: Tensor) -> Tensor:
        """The unpadded tokens in one row, float32 [n, d]: padding never reaches a dictionary."""
        values, place_n = values_BTd.flatten(0, 1), self.padding.place_n
        return (values if place_n is None else values.index_select(0, place_n)).float()

    def unpack(self, values_nd: Tensor) -> Tensor:
        """`pack` undone, zeros at padding: [B, T, d]."""
        if (place_n := self.padding.place_n) is not None:
            zeros = values_nd.new_zeros(self.real_BT.numel(), values_nd.shape[-1])
            values_nd = zeros.index_copy(0, place_n, values_nd)
        return values_nd.unflatten(0, self.real_BT.shape)

    def queries(self, q_nM: Tensor) -> Tensor:
        return self.unpack(q_nM.float()).view_as(self.inputs.q_BTNH)

    def keys(self, k_nM: Tensor) -> Tensor:
        return self.unpack(k_nM.float()).view_as(self.inputs.k_BTGH)

    def kl_rows(self, scores_BNQK: Tensor) -> Tensor:
        """KL of each row's pattern under these capped, unmasked scores from the true one, [B, N, Q]; head by head."""
        rows = []
        for n, scores_BQK in enumerate(scores_BNQK.unbind(1)):
            one = self.inputs.one_head(n)
            log_pattern = one.rule.log_pattern(one.q_BTNH, one.k_BTGH)
            rows.append(row_kl(one.rule.masked(scores_BQK[:, None]), exp(log_pattern), row_entropy(log_pattern)))
        return torch.cat(rows, 1)

    def attention(self, b_N: Tensor, i_N: Tensor) -> Tensor:
        """The true pattern of one query of each head, by its sequence and position, [N, K]; without a sink's share."""
        q_BTNH, k_BTGH = self.rotated
        heads = torch.arange(len(b_N), device=b_N.device)
        keys_NKH = k_BTGH[b_N, :, heads * k_BTGH.shape[2] // len(b_N)]
        scores_NK = self.rule.cap(torch.linalg.vecdot(q_BTNH[b_N, i_N, heads][:, None], keys_NKH))
        scores_NK = scores_NK.masked_fill(~self.rule.visible_BQK[b_N % len(self.rule.visible_BQK), i_N], -torch.inf)
        if self.rule.sink_N is not None:
            scores_NK = torch.cat([scores_NK, self.rule.sink_N.float()[:, None]], -1)
        return scores_NK.softmax(-1)[:, : self.real_BT.shape[1]]

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

    @cached_property
    def by_head(self) -> HeadKL:
        """For scores that come one head at a time."""
        rule = self.rule
        return HeadKL(*self.rotated, rule.visible_BQK, self.weight_BQ, rule.sink_N, rule.softcap)

    def turn(self, x_BTnH: Tensor) -> Tensor:
        """Queries or keys after the rotary embedding, float32."""
        return x_BTnH.float() if self.rule.rotary is None else self.rule.rotary.rotate(x_BTnH.float())

    def kl_of(self, query_nM: Tensor, key_nM: Tensor) -> tuple[Tensor, Tensor]:
        """3·KL(P ‖ P(q̂,k̂)) + KL(P ‖ P(q̂,k)) + KL(P ‖ P(q,k̂)) for reconstructions of the packed tokens, mean nats.

        And the three KLs themselves, [3], without gradients.
        """
        q_hat = self.turn(self.queries(query_nM)) * self.rule.scaling
        k_hat = self.turn(self.keys(key_nM))
        return self.kl(q_hat, k_hat)

    def kl(self, q_hat_BTNH: Tensor, k_hat_BTGH: Tensor) -> tuple[Tensor, Tensor]:
        """`kl_of` queries and keys as they meet; see `rotated`."""
        rule = self.rule
        hat = q_hat_BTNH, k_hat_BTGH
        return pattern_kl(*self.rotated, *hat, rule.visible_BQK, self.weight_BQ, rule.sink_N, rule.softcap, PARTS)


def root_penalty(acts_nF: Tensor, norms_F: Tensor) -> Tensor:
    """Σ_f √(a_f·‖W_dec_f‖ + 1e-7), mean over tokens (a sum over tokens would tie the weight to the batch size)."""
    return (acts_nF * norms_F + 1e-7).sqrt().sum(-1).mean()


def sparsity_loss(
    transcoder: SparseTranscoder, pre_nF: Tensor | None, acts: Tensor | MostlyZero, weight: float
) -> Tensor:
    """What keeps an activation sparse that is not sparse by itself: ReLU's root penalty, JumpReLU's pull of L0 to k."""
    if weight and transcoder.activation == "jumprelu":
        assert pre_nF is not None  # BatchTopK alone has none
        return weight * transcoder.l0_gap(pre_nF.float())
    if weight and transcoder.activation == "relu":
        assert isinstance(acts, Tensor)
        return weight * root_penalty(acts.float(), transcoder.W_dec.norm(dim=1))
    return transcoder.W_dec.new_zeros(())


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
