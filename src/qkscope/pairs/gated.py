"""Scores of every pair of active features, each as far as its gate lets it through: for masks and adversaries.

    scores[i, j] = scale · Σ_{a, b} gate[a, b] · a_q[i,a] · ⟨R_i W_q[a], R_j W_k[b]⟩ · a_k[j,b]            for each head

This is linear in the gates, so nothing is kept for the backward pass: it is the same sum turned round. Without a rotary
embedding (R) it is two products a head. With one, every active feature has a vector of its own, u_e = a_q R_i W_q for
a query's and v_f for a key's, and features meet sequence by sequence,

    y[i, b] = Σ_{e at i} gate[a_e, b] · u_e                scores[i, j] = Σ_{f at j} ⟨y[i, b_f], v_f⟩

in products over the few features of a token and the few keys of a feature (`Cells` of about as many stand together).

Shapes: B sequences, T positions (Q as a query, K as a key; t that have an active feature), N heads, G key-value heads,
H head width; F query features, J key features (c that are active in a sequence); L active query features, M active key
features, E of a token, n keys of a feature (filled up with zeros).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.row_sums import row_sums, starts_of
from ..kernels.sparse_scores import Cells, Events
from ..pattern import PatternRule
from .pair_map import turned_rows

BLOCK = 1 << 26  # numbers of y at once; ...
BLOCK_CPU = 1 << 22  # ... on a CPU 16 MB


class GatedScores:
    """One batch's activations, [B, T, F] and [B, T, J], with decoder rows by head, [F, N, H] and [J, G, H].

    Biases are features whose activation is 1.
    """

    def __init__(
        self, acts_q_BTF: Tensor, acts_k_BTJ: Tensor, rows_q_FNH: Tensor, rows_k_JGH: Tensor, rule: PatternRule
    ) -> None:
        self.acts = acts_q_BTF * rule.scaling, acts_k_BTJ
        self.rows = rows_q_FNH, rows_k_JGH
        self.sequences: list[_Sequence] = []
        if rule.rotary is not None:
            order, phase = rule.rotary.phases()
            self.rows = rows_q_FNH[..., order], rows_k_JGH[..., order]
            both = zip(*self.acts, phase.expand(len(acts_q_BTF), -1, -1), strict=True)
            self.sequences = [_Sequence.of(*one) for one in both]

    def __call__(self, gates_NFJ: Tensor) -> Tensor:
        """Scores before cap and mask, [B, N, Q, K]; differentiable in the gates."""
        return _Gated.apply(gates_NFJ, self)  # type: ignore[return-value]

    def head_rows(self, head: int) -> tuple[Tensor, Tensor]:
        """Decoder rows of a query head and of the key head that it reads."""
        left, right = self.rows
        return left[:, head], right[:, head * right.shape[1] // left.shape[1]]

    def scores(self, gates_FJ: Tensor, head: int) -> Tensor:
        """One head's scores, [B, Q, K]."""
        left, right = self.head_rows(head)
        if self.sequences:
            return torch.stack([sequence.scores(gates_FJ, left, right) for sequence in self.sequences])
        acts_q, acts_k = self.acts
        return acts_q @ (gates_FJ * (left @ right.T)) @ acts_k.transpose(1, 2)

    def to_gates(self, grad_BQK: Tensor, head: int) -> Tensor:
        """The gradient of one head's gates, [F, J]."""
        left, right = self.head_rows(head)
        acts_q, acts_k = self.acts
        if self.sequences:
            found = grad_BQK.new_zeros(len(left), len(right))
            for sequence, grad_QK in zip(self.sequences, grad_BQK, strict=True):
                sequence.add_to_gates(found, grad_QK, left, right)
            return found
        return (acts_q.flatten(0, 1).T @ (grad_BQK @ acts_k).flatten(0, 1)).mul_(left @ right.T)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_NFJ: Tensor, made: GatedScores) -> Tensor:
        ctx.made = made
        return torch.stack([made.scores(gates, head) for head, gates in enumerate(gates_NFJ)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        made: GatedScores = ctx.made
        heads = grads[0].unbind(1)
        return torch.stack([made.to_gates(grad_BQK, head) for head, grad_BQK in enumerate(heads)]), None


@dataclass(frozen=True)
class _Sequence:
    """One sequence's active features under a rotary embedding; a token's are a cell, and so are a key feature's."""

    queries: Events
    act_L: Tensor
    keys: Events
    act_M: Tensor
    by_token: Cells
    by_feature: Cells
    phase_Th: Tensor

    @classmethod
    def of(cls, acts_q_TF: Tensor, acts_k_TJ: Tensor, phase_Th: Tensor) -> _Sequence:
        length, n_query = acts_q_TF.shape
        queries, keys = Events.by_token(acts_q_TF != 0), Events.by_feature(acts_k_TJ != 0)
        # Cells are of features at tokens. A query's are of tokens at features, so the two change places.
        by_token = Cells.of(Events(queries.feature_L, queries.token_L), length, 1, n_query)
        by_feature = Cells.of(keys, acts_k_TJ.shape[1], 1, length)
        acts = acts_q_TF[queries.token_L, queries.feature_L], acts_k_TJ[keys.token_L, keys.feature_L]
        return cls(queries, acts[0], keys, acts[1], by_token, by_feature, phase_Th)

    @property
    def token_t(self) -> Tensor:
        """The tokens with an active query feature, in the order of their cells."""
        return self.by_token.place_FB[:, 0].argsort()[: self.by_token.ends[-1]]

    @property
    def feature_c(self) -> Tensor:
        """The active key features, in the order of theirs."""
        return self.by_feature.place_FB[:, 0].argsort()[: self.by_feature.ends[-1]]

    def token_blocks(self, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """`_groups` of tokens in blocks of about `BLOCK` numbers of y, or of their gates."""
        block = BLOCK_CPU if self.act_L.device.type == "cpu" else BLOCK
        n_keys = max(self.by_feature.ends[-1], 1)
        for here, events, features in _groups(self.by_token):
            at, size = here.start, n_keys * max(width, events.shape[1])
            for some in zip(*(y.split(max(block // size, 1)) for y in (events, features)), strict=True):
                yield slice(at, at + len(some[0])), *some
                at += len(some[0])

    def vectors(self, left_FH: Tensor, right_JH: Tensor) -> tuple[Tensor, Tensor]:
        """u [L + 1, H] and v [M + 1, H]: a zero stands in where a cell has fewer."""
        found = []
        for at, act, rows in ((self.queries, self.act_L, left_FH), (self.keys, self.act_M, right_JH)):
            turned = turned_rows(rows, at.feature_L, act, self.phase_Th.index_select(0, at.token_L))
            found.append(torch.cat([turned, turned.new_zeros(1, turned.shape[1])]))
        return found[0], found[1]

    def scores(self, gates_FJ: Tensor, left_FH: Tensor, right_JH: Tensor) -> Tensor:
        """One head's, [Q, K]."""
        u, v = self.vectors(left_FH, right_JH)
        gates_Fc = gates_FJ.index_select(1, self.feature_c)
        found_Mt = u.new_zeros(len(v), self.by_token.ends[-1])
        for here, event_tE, feature_tE in self.token_blocks(u.shape[1]):
            gate_tEc = gates_Fc.index_select(0, feature_tE.flatten()).view(*feature_tE.shape, -1)
            y_tcH = gate_tEc.transpose(1, 2) @ u[event_tE]
            for there, event_cn, _ in _groups(self.by_feature):
                found = v[event_cn] @ y_tcH[:, there].permute(1, 2, 0)
                found_Mt[event_cn.flatten(), here] = found.flatten(0, 1)
        order = self.keys.token_L.argsort(stable=True)
        length = len(self.phase_Th)
        ones = found_Mt.new_ones(len(order))
        scores_Kt = row_sums(order, found_Mt, starts_of(self.keys.token_L, length), ones)
        return scores_Kt.new_zeros(length, length).index_copy_(0, self.token_t, scores_Kt.T)

    def add_to_gates(self, into_FJ: Tensor, grad_QK: Tensor, left_FH: Tensor, right_JH: Tensor) -> None:
        """Add the gradient of one head's gates."""
        u, v = self.vectors(left_FH, right_JH)
        grad_Kt = grad_QK.index_select(0, self.token_t).T.contiguous()
        feature_c = self.feature_c
        to_gate_Lc = u.new_zeros(len(u), len(feature_c))
        for here, event_tE, _ in self.token_blocks(u.shape[1]):
            to_y_ctH = u.new_empty(len(feature_c), len(event_tE), u.shape[1])
            grad_Kh = grad_Kt[:, here]
            for there, event_cn, token_cn in _groups(self.by_feature):
                grad_cnh = grad_Kh.index_select(0, token_cn.flatten()).view(*token_cn.shape, -1)
                torch.bmm(grad_cnh.transpose(1, 2), v[event_cn], out=to_y_ctH[there])
            found = u[event_tE] @ to_y_ctH.permute(1, 2, 0)
            to_gate_Lc[event_tE.flatten()] = found.flatten(0, 1)
        at = self.queries.feature_L
        ones = to_gate_Lc.new_ones(len(at))
        to_gate_Fc = row_sums(at.argsort(stable=True), to_gate_Lc, starts_of(at, len(into_FJ)), ones)
        into_FJ.index_add_(1, feature_c, to_gate_Fc)


def _groups(cells: Cells) -> list[tuple[slice, Tensor, Tensor]]:
    """Cells of about as many events: which, their events, and where in the cell these are."""
    starts = [0, *cells.ends]
    groups = zip(starts, cells.ends, cells.keys, cells.positions, strict=False)
    return [(slice(a, b), events, places) for a, b, events, places in groups if b > a]
