"""The published procedure with its faults mended, as plainly as it is usually written: the thing to beat.

For comparison only: no other part of the package uses it, and of the package's own ways to be fast it uses one, a
forward pass that ends at its layer. Float32 and dense einsums throughout, patterns as whole tensors through
`log_softmax` and autograd, Adam unfused, one layer at a time with a pass for it alone. Step 1 is ReLU dictionaries with
the root penalty, step 2 the dense [Fq, Fk, N] mask between frozen dictionaries. Masks, scales and means are those of a
correct implementation: its losses equal ours (tests/unit/test_published.py), so what differs is the time they take.

Source: K. Wynroe and L. Sharkey, "Decomposing the QK circuit with Bilinear Sparse Dictionary Learning" (2024).
Shapes: B sequences, T positions (Q as a query, K as a key), D residual width, N query heads, G key-value heads, H head
width, F (and J, for keys) features.
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn
from torch.nn.functional import log_softmax, relu

from ...attention import AttentionSite, harvest
from ...dictionary import SparseTranscoder
from ...pattern import AttentionInputs, PatternRule
from ...routing import plain_batches

ROOT_EPSILON, MASK_EPSILON = 1e-7, 1e-6  # what stands under the two root penalties beside their argument


class Side(nn.Module):
    """A ReLU dictionary of one side: W_enc [D, F], W_dec [F, n, H], b_in [D], b_enc [F], b_out [n, H]."""

    def __init__(self, like: SparseTranscoder, n_heads: int) -> None:
        super().__init__()
        self.W_enc, self.b_enc, self.b_in = (
            nn.Parameter(p.detach().clone()) for p in (like.W_enc, like.b_enc, like.b_in)
        )
        self.W_dec = nn.Parameter(like.W_dec.detach().clone().unflatten(1, (n_heads, -1)))
        self.b_out = nn.Parameter(like.b_out.detach().clone().unflatten(0, (n_heads, -1)))

    def encode(self, x_BTD: Tensor) -> Tensor:
        return relu(einsum("btd,df->btf", x_BTD - self.b_in, self.W_enc) + self.b_enc)

    def decode(self, acts_BTF: Tensor) -> Tensor:
        return einsum("btf,fnh->btnh", acts_BTF, self.W_dec) + self.b_out

    def penalty(self, acts_BTF: Tensor, real_BT: Tensor) -> Tensor:
        """Σ_f √(a_f·‖W_dec_f‖ + ε), mean over tokens."""
        sizes = acts_BTF * self.W_dec.flatten(1).norm(dim=1)
        return torch.sqrt(sizes + ROOT_EPSILON).sum(-1)[real_BT].mean()

    @property
    def rows(self) -> Tensor:
        """Decoder rows with the bias behind them as the row of a feature that is always 1, [F + 1, n, H]."""
        return torch.cat([self.W_dec, self.b_out[None]])


def rotate(x_BTnH: Tensor, rule: PatternRule) -> Tensor:
    """x after the rotary embedding."""
    if rule.rotary is None:
        return x_BTnH
    cos, sin = rule.rotary.cos_BTH[:, :, None], rule.rotary.sin_BTH[:, :, None]
    return x_BTnH * cos + x_BTnH[..., rule.rotary.partner_H] * sin


def log_pattern(scores_BNQK: Tensor, rule: PatternRule) -> Tensor:
    """Log of the pattern of unscaled scores: scale, soft cap, mask, sink, softmax."""
    scores = scores_BNQK * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = torch.where(rule.visible_BQK[:, None], scores, -torch.inf)
    if rule.sink_N is not None:
        sink = rule.sink_N[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    return log_softmax(scores, -1)


def log_pattern_of(q_BTNH: Tensor, k_BTGH: Tensor, rule: PatternRule) -> Tensor:
    """Log-pattern of queries and keys as they enter the rotary embedding."""
    q, k = rotate(q_BTNH, rule), rotate(k_BTGH, rule)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return log_pattern(einsum("bqnh,bknh->bnqk", q, k), rule)


def kl(log_true_BNQK: Tensor, log_hat_BNQK: Tensor, real_BT: Tensor) -> Tensor:
    """Mean KL over heads and unpadded queries; a key without mass adds nothing."""
    some = log_true_BNQK > -torch.inf
    difference = torch.where(some, log_true_BNQK, 0) - torch.where(some, log_hat_BNQK, 0)
    rows_BNQ = (log_true_BNQK.exp() * difference).sum(-1)
    return rows_BNQ.transpose(1, 2)[real_BT].mean()


def step1_loss(query: Side, key: Side, inputs: AttentionInputs, sparsity: float) -> Tensor:
    """3·KL(P ‖ P(q̂,k̂)) + KL(P ‖ P(q̂,k)) + KL(P ‖ P(q,k̂)) and the root penalties."""
    x, q, k, rule, real = inputs.x_BTD, inputs.q_BTNH, inputs.k_BTGH, inputs.rule, inputs.real_BT
    acts_q, acts_k = query.encode(x), key.encode(x)
    hat_q, hat_k = query.decode(acts_q), key.decode(acts_k)
    true = log_pattern_of(q, k, rule)
    loss = 3 * kl(true, log_pattern_of(hat_q, hat_k, rule), real)
    loss = loss + kl(true, log_pattern_of(hat_q, k, rule), real) + kl(true, log_pattern_of(q, hat_k, rule), real)
    return loss + sparsity * (query.penalty(acts_q, real) + key.penalty(acts_k, real))


def pair_map(query: Side, key: Side) -> Tensor:
    """⟨W_dec_q[f,n], W_dec_k[j,g(n)]⟩ of every pair, biases as features, dense [F + 1, J + 1, N]."""
    rows_q, rows_k = query.rows, key.rows
    rows_k = rows_k.repeat_interleave(rows_q.shape[1] // rows_k.shape[1], dim=1)
    return einsum("fnh,jnh->fjn", rows_q, rows_k)


def mask_loss(
    mask_FJN: Tensor, map_FJN: Tensor, query: Side, key: Side, inputs: AttentionInputs, sparsity: float
) -> Tensor:
    """KL(P ‖ P(mask ∘ map)) + λ Σ √(|mask| + ε); without a rotary embedding, as published."""
    if inputs.rule.rotary is not None:
        raise ValueError(
            "the published mask has one number a pair; with a rotary embedding the map turns with distance"
        )
    with torch.no_grad():
        acts_q, acts_k = query.encode(inputs.x_BTD), key.encode(inputs.x_BTD)
        ones = torch.ones_like(acts_q[..., :1])
        acts_q, acts_k = torch.cat([acts_q, ones], -1), torch.cat([acts_k, ones], -1)
        true = log_pattern_of(inputs.q_BTNH, inputs.k_BTGH, inputs.rule)
    y_BTJN = einsum("bqf,fjn->bqjn", acts_q, mask_FJN * map_FJN)
    scores = einsum("bqjn,bkj->bnqk", y_BTJN, acts_k)
    penalty = torch.sqrt(mask_FJN.abs() + MASK_EPSILON).sum()
    return kl(true, log_pattern(scores, inputs.rule), inputs.real_BT) + sparsity * penalty


@torch.no_grad()
def read(site: AttentionSite, tokens_BT: Tensor) -> AttentionInputs:
    """What one layer's attention is handed, by a forward pass for it alone."""
    with plain_batches():
        return harvest([site], tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))[0]


class Step1:
    """Step 1 of one layer."""

    def __init__(self, site: AttentionSite, query: Side, key: Side, *, sparsity: float, rate: float) -> None:
        self.site, self.query, self.key, self.sparsity = site, query, key, sparsity
        self.optimizer = unfused([*query.parameters(), *key.parameters()], rate)

    def step(self, tokens_BT: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = step1_loss(self.query, self.key, read(self.site, tokens_BT), self.sparsity)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Mask:
    """Step 2 of one layer: a mask that starts at 1 and is clamped to [0, 1] after each step."""

    def __init__(self, site: AttentionSite, query: Side, key: Side, *, sparsity: float, rate: float) -> None:
        self.site, self.query, self.key, self.sparsity = site, query, key, sparsity
        self.map_FJN = pair_map(query, key).detach()
        self.mask_FJN = torch.ones_like(self.map_FJN, requires_grad=True)
        self.optimizer = unfused([self.mask_FJN], rate)

    def step(self, tokens_BT: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        inputs = read(self.site, tokens_BT)
        loss = mask_loss(self.mask_FJN, self.map_FJN, self.query, self.key, inputs, self.sparsity)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.mask_FJN.clamp_(0, 1)
        return loss.detach()


def unfused(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate, fused=False, foreach=False)
