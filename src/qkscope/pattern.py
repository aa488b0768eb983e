"""From queries and keys to a pattern: the rule of one layer on one batch, and what its attention was handed.

Shapes: B sequences, T positions (Q as a query, K as a key), D residual width, N query heads, G key-value heads, H head
width. With learned sinks a pattern has one more column at the end, the sink's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .kernels.row_kl import exp
from .rotary import Rotary

HeadPatterns = Callable[[slice], Tensor]
"""A pattern or its log, some heads (of `head_blocks`) at a time, [B, n, Q, K]: whole, it may be too large to hold."""

BLOCK = 1 << 25  # entries of patterns at once, 128 MB; ...
BLOCK_CPU = 1 << 19  # ... on a CPU 2 MB, near the cache


@dataclass(frozen=True)
class PatternRule:
    """All that makes a layer's pattern of its queries and keys on one batch; taken from the model, never set by us."""

    visible_BQK: Tensor
    """bool [B or 1, Q, K]: which keys a query may see (causal, sliding or padding mask)."""
    scaling: float
    softcap: float | None = None
    sink_N: Tensor | None = None
    """Learned score of a sink that takes part in the softmax and is then dropped."""
    rotary: Rotary | None = None

    @property
    def shift_free(self) -> bool:
        """Whether a constant added to a score row leaves the pattern as it is."""
        return self.softcap is None and self.sink_N is None

    def scores(self, q_BTNH: Tensor, k_BTGH: Tensor) -> Tensor:
        """Scaled, soft-capped scores of every query and key, float32 [B, N, Q, K], before the mask."""
        q, k = q_BTNH.float(), k_BTGH.float()
        if self.rotary is not None:
            q, k = self.rotary.rotate(q), self.rotary.rotate(k)
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return self.cap((q * self.scaling) @ k.transpose(2, 3))

    def cap(self, scores: Tensor) -> Tensor:
        """The model's soft cap on scaled scores."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def masked(self, scores_BNQK: Tensor) -> Tensor:
        """-inf where a key is not visible, and the sink's column where there is one."""
        scores = scores_BNQK.masked_fill(~self.visible_BQK[:, None], -torch.inf)
        if self.sink_N is None:
            return scores
        sink = self.sink_N.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1)

    def plain(self) -> PatternRule:
        """The same mask, and nothing else: scores are bare products."""
        return PatternRule(self.visible_BQK, 1.0)

    def crop(self, length: int, b: int = 0) -> PatternRule:
        """The rule for the first `length` positions of one sequence."""
        row = b if len(self.visible_BQK) > 1 else 0
        visible = self.visible_BQK[row : row + 1, :length, :length]
        return replace(self, visible_BQK=visible, rotary=self.rotary and self.rotary.of_sequence(b, length))

    def log_pattern(self, q_BTNH: Tensor, k_BTGH: Tensor) -> Tensor:
        """Log of the attention pattern, float32 [B, N, Q, K] (one more column with a sink); -inf where masked."""
        return self.masked(self.scores(q_BTNH, k_BTGH)).log_softmax(-1)

    def log_pattern_by_head(self, q_BTNH: Tensor, k_BTGH: Tensor) -> HeadPatterns:
        """`log_pattern` some heads at a time."""
        return lambda heads: self.of_heads(heads).log_pattern(*qk_of_heads(heads, q_BTNH, k_BTGH))

    def of_heads(self, heads: slice) -> PatternRule:
        """The rule of some query heads."""
        return self if self.sink_N is None else replace(self, sink_N=self.sink_N[heads])


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention was handed on one batch."""

    x_BTD: Tensor
    """Input of the attention module, after the layer's own norm."""
    q_BTNH: Tensor
    """Queries as they enter the rotary embedding; float32, as the keys, whatever the model computes in."""
    k_BTGH: Tensor
    rule: PatternRule
    real_BT: Tensor
    """bool: False at padding. Every average leaves padded queries out."""
    residual: bool = False
    """Whether x is the residual stream before the layer's norm, which is then still to come."""

    @cached_property
    def log_pattern_BNQK(self) -> Tensor:
        """The model's own pattern; kept, so for batches that go by rather than for samples that stay."""
        return self.rule.log_pattern(self.q_BTNH, self.k_BTGH)

    @property
    def log_pattern_by_head(self) -> HeadPatterns:
        """The same some heads at a time, and not kept."""
        return self.rule.log_pattern_by_head(self.q_BTNH, self.k_BTGH)

    def head_blocks(self) -> Iterator[slice]:
        """Which heads at a time."""
        return head_blocks(self.q_BTNH, self.k_BTGH)

    def one_head(self, head: int) -> AttentionInputs:
        """The same for one query head (and the key head it reads) alone."""
        heads = slice(head, head + 1)
        q, k = qk_of_heads(heads, self.q_BTNH, self.k_BTGH)
        return replace(self, q_BTNH=q, k_BTGH=k, rule=self.rule.of_heads(heads))

    def crop(self, length: int, b: int = 0) -> AttentionInputs:
        """The first `length` positions of one sequence."""
        x, q, k, real = (y[b : b + 1, :length] for y in (self.x_BTD, self.q_BTNH, self.k_BTGH, self.real_BT))
        return AttentionInputs(x, q, k, self.rule.crop(length, b), real, self.residual)

    def detached(self) -> AttentionInputs:
        return replace(self, x_BTD=self.x_BTD.detach(), q_BTNH=self.q_BTNH.detach(), k_BTGH=self.k_BTGH.detach())


def block_of(device: torch.device) -> int:
    """Entries of patterns that are held at once, where one head's are not more."""
    return BLOCK_CPU if device.type == "cpu" else BLOCK


def head_blocks(q_BTNH: Tensor, k_BTGH: Tensor) -> Iterator[slice]:
    """Query heads, as many at a time as `BLOCK` allows: whole groups of them that share a key head, or equal parts of
    one."""
    batch, length, n_query, _ = q_BTNH.shape
    most = max(block_of(q_BTNH.device) // max(batch * length * k_BTGH.shape[1], 1), 1)
    group = n_query // k_BTGH.shape[2]
    step = most // group * group or max(n for n in range(1, min(most, group) + 1) if group % n == 0)
    return (slice(start, min(start + step, n_query)) for start in range(0, n_query, step))


def patterns_of(log_patterns: HeadPatterns) -> HeadPatterns:
    """Patterns of their logs."""
    return lambda heads: exp(log_patterns(heads))


def qk_of_heads(heads: slice, q_BTNH: Tensor, k_BTGH: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of these heads (of `head_blocks`), and the keys that they read."""
    n_query, n_key = q_BTNH.shape[2], k_BTGH.shape[2]
    groups = slice(heads.start * n_key // n_query, (heads.stop - 1) * n_key // n_query + 1)
    return q_BTNH[:, :, heads], k_BTGH[:, :, groups]


class PatternSource(Protocol):
    """Anything that gives a pattern for what an attention saw: a decomposition, an ablation, a control."""

    def __call__(self, inputs: AttentionInputs) -> Tensor: ...


class HeadSource(Protocol):
    """The same, some heads at a time, for long contexts."""

    def __call__(self, inputs: AttentionInputs) -> HeadPatterns: ...
