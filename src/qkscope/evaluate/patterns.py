"""How well a pattern is reproduced: KL, top-1 agreement, absolute error; whole, by head, with and without position 0.

Without position 0, both patterns are conditioned on the keys from position 1 on: much of the attention of many heads
rests on the first token, and agreement there can hide disagreement everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.row_kl import LOG2_E, exp
from ..pattern import AttentionInputs, HeadPatterns, patterns_of
from .figures import Ratio


@dataclass(eq=False)  # each is itself, so that `add_kls` can take them as keys
class KLScore:
    """The pattern KL of one variant, gathered over batches: where it is all that is asked for."""

    kl: Ratio = field(default_factory=Ratio)

    def add(self, inputs: AttentionInputs, log_hat: HeadPatterns) -> None:
        """Compare a log-pattern with the true one on one batch."""
        add_kls(inputs, {self: log_hat})


def add_kls(inputs: AttentionInputs, log_hats: Mapping[KLScore, HeadPatterns]) -> None:
    """Compare each score's log-pattern with the true one on one batch."""
    found: dict[KLScore, list[Tensor]] = {score: [] for score in log_hats}
    for heads in inputs.head_blocks():
        log_true = inputs.log_pattern_by_head(heads)
        true = exp(log_true)
        for score, log_hat in log_hats.items():
            kl = (log_true - log_hat(heads)).masked_fill_(true == 0, 0).mul_(true).sum(-1)
            found[score].append(kl.masked_fill_(~inputs.real_BT[:, None], 0).sum(-1))
    tokens_B = inputs.real_BT.sum(1).float()
    for score, parts in found.items():
        kl_BN = torch.cat(parts, 1)
        score.kl.add(kl_BN, tokens_B[:, None].expand_as(kl_BN))


@dataclass
class PatternScore:
    """Scores of one variant, gathered over batches; the last three are without position 0."""

    kl: Ratio = field(default_factory=Ratio)
    top1: Ratio = field(default_factory=Ratio)
    error: Ratio = field(default_factory=Ratio)
    kl_rest: Ratio = field(default_factory=Ratio)
    top1_rest: Ratio = field(default_factory=Ratio)
    error_rest: Ratio = field(default_factory=Ratio)

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


@dataclass
class PatternScores:
    """Scores of variants."""

    by_name: dict[str, PatternScore] = field(default_factory=dict)

    def __getitem__(self, name: str) -> PatternScore:
        return self.by_name.setdefault(name, PatternScore())

    def merge(self, other: PatternScores) -> None:
        """Take in what follows in the text."""
        for name, score in other.by_name.items():
            for metric, ratio in vars(score).items():
                getattr(self[name], metric).merge(ratio)

    def add(self, inputs: AttentionInputs, log_hats: Mapping[str, HeadPatterns]) -> None:
        """Compare log-patterns with the true one on one batch."""
        found: dict[str, list[Tensor]] = {name: [] for name in log_hats}
        counted = []
        for heads in inputs.head_blocks():
            true = _True(inputs.log_pattern_by_head(heads), inputs.real_BT)
            counted.append(torch.stack([true.rows_BnQ, true.later_BnQ]).sum(-1))
            for name, log_hat in log_hats.items():
                found[name].append(true.compared(log_hat(heads)))
        whole_BN, rest_BN = torch.cat(counted, -1)
        for name, parts in found.items():
            score = self[name]
            kl, top1, error, kl_rest, top1_rest, error_rest = torch.cat(parts, -1)
            for ratio, sums_BN in ((score.kl, kl), (score.top1, top1), (score.error, error)):
                ratio.add(sums_BN, whole_BN)
            for ratio, sums_BN in (
                (score.kl_rest, kl_rest), (score.top1_rest, top1_rest), (score.error_rest, error_rest),
            ):  # fmt: skip
                ratio.add(sums_BN, rest_BN)


class _True:
    """The true pattern of some heads n, and what of it every comparison needs."""

    def __init__(self, log: Tensor, real_BT: Tensor) -> None:
        self.pattern, self.rest, first = exp(log), _Rest(log), log[..., 0]
        self.none = self.rest.pattern == 0  # a key that is masked, or as good as that
        self.none[..., 0] = self.pattern[..., 0] == 0
        self.log = log.masked_fill(self.none, 0)
        self.top_BnQ = self.rest.top_of_all(first)
        seen = log > -torch.inf
        self.visible_BnQ = seen.sum(-1).clamp(min=1)  # keys that are compared, and the sink
        self.visible_rest_BnQ = seen[..., 1:].sum(-1).clamp(min=1)
        self.rows_BnQ = real_BT[:, None].expand(first.shape)
        self.later_BnQ = self.rows_BnQ & seen[..., 1:].any(-1)
        self.later_BnQ[:, :, 0] = False

    def compared(self, log_hat: Tensor) -> Tensor:
        """Sums over rows of KL, top-1 agreement and error, of the whole and without position 0, [6, B, n]."""
        rest, first = _Rest(log_hat), log_hat[..., 0]
        difference = (self.log - log_hat).masked_fill_(self.none, 0)
        kl = (self.pattern * difference).sum(-1)
        difference[..., 0] = 0
        kl_rest = difference.mul_(self.rest.pattern).sum(-1) + rest.log_total - self.rest.log_total
        top1, top1_rest = rest.top_of_all(first) == self.top_BnQ, rest.top == self.rest.top
        error_rest = torch.linalg.vector_norm(rest.pattern - self.rest.pattern, 1, -1) / self.visible_rest_BnQ
        hat = rest.pattern.mul_(exp(rest.log_total)[..., None])
        hat[..., 0] = exp(first)
        error = torch.linalg.vector_norm(hat.sub_(self.pattern), 1, -1) / self.visible_BnQ
        whole = torch.stack([kl, top1, error]).masked_fill(~self.rows_BnQ, 0).sum(-1)
        later = torch.stack([kl_rest, top1_rest, error_rest]).masked_fill(~self.later_BnQ, 0).sum(-1)
        return torch.cat([whole, later])


class _Rest:
    """A pattern's largest entry, mass and pattern on the keys from position 1 on; none of the first's is left."""

    def __init__(self, log: Tensor) -> None:
        rest = log.clone()
        rest[..., 0] = -torch.inf
        self.most, self.top = rest.max(-1)
        shift = self.most.masked_fill(self.most == -torch.inf, 0)
        mass = rest.sub_(shift[..., None]).mul_(LOG2_E).exp2_().sum(-1)
        self.pattern = rest.div_(mass.masked_fill(mass == 0, 1)[..., None])
        self.log_total = (shift + mass.log()).masked_fill(mass == 0, 0)

    def top_of_all(self, first: Tensor) -> Tensor:
        """The key with the largest entry, where the first one has this."""
        return self.top.masked_fill(first >= self.most, 0)


def uniform_log_pattern(inputs: AttentionInputs) -> HeadPatterns:
    """Log of the uniform pattern over the visible keys (and the sink)."""
    zeros_BQK = torch.zeros(len(inputs.q_BTNH), *inputs.rule.visible_BQK.shape[1:], device=inputs.q_BTNH.device)
    sink = inputs.rule.sink_N
    rule = inputs.rule if sink is None else replace(inputs.rule, sink_N=torch.zeros_like(sink[:1]))
    log_B1QK = rule.masked(zeros_BQK[:, None]).log_softmax(-1)
    return lambda heads: log_B1QK.expand(-1, heads.stop - heads.start, -1, -1)


def uniform_pattern(inputs: AttentionInputs) -> HeadPatterns:
    return patterns_of(uniform_log_pattern(inputs))


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
            count[:t] += inputs.real_BT.sum(0)
            for heads in inputs.head_blocks():
                pattern = exp(inputs.log_pattern_by_head(heads)).mul_(inputs.real_BT[:, None, :, None])
                total[heads, :t, :t] += pattern[..., :t].sum(0)
                if self.sink:
                    total[heads, :t, -1] += pattern[..., -1].sum(0)
        self.mean_NQK = total.div_(count.clamp(min=1)[:, None])
        self.known = count > 0

    def __call__(self, inputs: AttentionInputs) -> HeadPatterns:
        """The mean pattern for this batch; uniform at positions that the sample never reached."""
        reach = min(inputs.x_BTD.shape[1], len(self.known))
        known_Q1 = self.known[:reach, None]
        uniform = uniform_pattern(inputs)

        def pattern(heads: slice) -> Tensor:
            out, mean_nQK = uniform(heads), self.mean_NQK[heads, :reach]
            out[:, :, :reach, :reach] = torch.where(known_Q1, mean_nQK[..., :reach], out[:, :, :reach, :reach])
            if self.sink:
                out[:, :, :reach, -1:] = torch.where(known_Q1, mean_nQK[..., -1:], out[:, :, :reach, -1:])
            return out

        return pattern

    def log(self, inputs: AttentionInputs) -> HeadPatterns:
        """The log of this pattern, in which what was never seen is not impossible."""
        pattern = self(inputs)
        return lambda heads: pattern(heads).clamp_(min=1e-12).log_()
