"""How well a pattern is reproduced: KL, top-1 agreement, absolute error; whole, by head, with and without position 0.

Without position 0, both patterns are conditioned on the keys from position 1 on: much of the attention of many heads
rests on the first token, and agreement there can hide disagreement everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.row_kl import exp
from ..pattern import AttentionInputs
from .figures import Ratio


@dataclass
class KLScore:
    """The pattern KL of one variant, gathered over batches: where it is all that is asked for."""

    kl: Ratio = field(default_factory=Ratio)

    def add(self, inputs: AttentionInputs, log_hat_BNQK: Tensor) -> None:
        """Compare a log-pattern with the true one on one batch."""
        log_true = inputs.log_pattern_BNQK
        rows = inputs.real_BT[:, None].expand(log_true.shape[:3])
        kl = _kl_rows(exp(log_true), log_true, log_hat_BNQK)
        self.kl.add(kl.masked_fill(~rows, 0).sum(-1), rows.float().sum(-1))


def _kl_rows(true: Tensor, log_true: Tensor, log_hat: Tensor) -> Tensor:
    return (true * (log_true - log_hat).masked_fill(true == 0, 0)).sum(-1)


@dataclass
class PatternScore:
    """Scores of one variant, gathered over batches."""

    kl: Ratio = field(default_factory=Ratio)
    top1: Ratio = field(default_factory=Ratio)
    error: Ratio = field(default_factory=Ratio)
    kl_rest: Ratio = field(default_factory=Ratio)
    top1_rest: Ratio = field(default_factory=Ratio)
    error_rest: Ratio = field(default_factory=Ratio)

    def add(self, inputs: AttentionInputs, log_hat_BNQK: Tensor) -> None:
        """Compare a log-pattern with the true one on one batch."""
        log_true = inputs.log_pattern_BNQK
        rows = inputs.real_BT[:, None].expand(log_true.shape[:3])
        self._compare(log_true, log_hat_BNQK, rows, (self.kl, self.top1, self.error))
        later = rows.clone()
        later[:, :, 0] = False
        rest_true, rest_hat = (_without_first(log) for log in (log_true, log_hat_BNQK))
        later &= (rest_true > -torch.inf).any(-1)
        self._compare(rest_true, rest_hat, later, (self.kl_rest, self.top1_rest, self.error_rest))

    @staticmethod
    def _compare(log_true: Tensor, log_hat: Tensor, rows: Tensor, into: tuple[Ratio, ...]) -> None:
        true, hat = exp(log_true), exp(log_hat)
        visible = (log_true > -torch.inf).sum(-1).clamp(min=1)  # keys that are compared here, and the sink
        kl = _kl_rows(true, log_true, log_hat)
        top1 = (log_true.argmax(-1) == log_hat.argmax(-1)).float()
        error = (true - hat).abs().sum(-1) / visible
        for ratio, values in zip(into, (kl, top1, error), strict=True):
            ratio.add(values.masked_fill(~rows, 0).sum(-1), rows.float().sum(-1))

    def report(self) -> dict[str, dict[str, Any]]:
        """Figures by metric."""
        return {
            name: {**whole.figure(), "per_head": whole.per_part(), "without_position_0": rest.figure()}
            for name, whole, rest in (
                ("pattern_kl", self.kl, self.kl_rest),
                ("top1", self.top1, self.top1_rest),
                ("absolute_error", self.error, self.error_rest),
            )
        }


def _without_first(log_pattern: Tensor) -> Tensor:
    """Log-pattern conditioned on keys from position 1 on; rows that see nothing else stay -inf."""
    log = log_pattern.clone()
    log[..., 0] = -torch.inf
    total = log.logsumexp(-1, keepdim=True)
    return log - total.masked_fill(total == -torch.inf, 0)


def uniform_log_pattern(inputs: AttentionInputs) -> Tensor:
    """Log of the uniform pattern over the visible keys (and the sink), [B, N, Q, K]."""
    shape = inputs.log_pattern_BNQK.shape
    zeros = torch.zeros(*shape[:3], inputs.x_BTD.shape[1], device=inputs.x_BTD.device)
    scores = zeros.masked_fill(~inputs.rule.visible_BQK[:, None], -torch.inf)
    if shape[-1] > scores.shape[-1]:
        scores = torch.cat([scores, zeros[..., :1]], -1)
    return scores.log_softmax(-1)


def uniform_pattern(inputs: AttentionInputs) -> Tensor:
    return exp(uniform_log_pattern(inputs))


class MeanPattern:
    """The position-wise mean of the true pattern over training text: what a head does whatever the tokens say."""

    def __init__(self, sample: list[AttentionInputs]) -> None:
        length = max(inputs.x_BTD.shape[1] for inputs in sample)
        first = sample[0]
        self.sink = first.rule.sink_N is not None
        device = first.x_BTD.device
        total = torch.zeros(first.q_BTNH.shape[2], length, length + self.sink, device=device)
        count = torch.zeros(length, device=device)
        for inputs in sample:
            t = inputs.x_BTD.shape[1]
            pattern = exp(inputs.rule.log_pattern(inputs.q_BTNH, inputs.k_BTGH)) * inputs.real_BT[:, None, :, None]
            total[:, :t, :t] += pattern[..., :t].sum(0)
            if self.sink:
                total[:, :t, -1] += pattern[..., -1].sum(0)
            count[:t] += inputs.real_BT.sum(0)
        self.mean_NQK = total / count.clamp(min=1)[:, None]
        self.known = count > 0

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        """The mean pattern for this batch, [B, N, Q, K]; uniform at positions that the sample never reached."""
        t = inputs.x_BTD.shape[1]
        out = uniform_pattern(inputs)
        reach = min(t, len(self.known))
        known = self.known[:reach]
        mean = self.mean_NQK[:, :reach, :reach]
        if self.sink:
            out[:, :, :reach, -1] = torch.where(known, self.mean_NQK[:, :reach, -1], out[:, :, :reach, -1])
        out[:, :, :reach, :reach] = torch.where(known[:, None], mean, out[:, :, :reach, :reach])
        return out
