"""What a model predicts, and how far its predictions move: cross-entropy and KL of logits, a few tokens at a time.

Logits are large (of GPT-2, 100 times the residual stream), so no copy of them is made: what is needed of them is made
of a few tokens that stay in the cache. Each token's largest is subtracted first: GPT-2's logits are about -100, where
float32 has no more than five decimals.

Shapes: B sequences, T positions, V vocabulary, n = B·T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSite
from ..data.sequences import Batch
from ..kernels.row_kl import exp

CHUNK = 1 << 26  # logits at once; ...
CHUNK_CPU = 1 << 19  # ... on a CPU 2 MB, near the cache


class Predictions:
    """The logits of one pass of the model as it now is."""

    def __init__(self, site: AttentionSite, batch: Batch) -> None:
        self.batch = batch
        logits: Tensor = site._forward(batch.tokens_BT, batch.real_BT).logits
        self.logits_nV = logits.flatten(0, 1)
        self.shape = logits.shape[:2]
        most, total = [], []
        with torch.no_grad():
            for here in self.chunks():
                part = self.logits_nV[here].float()
                most.append(part.amax(-1))
                total.append(exp(part - most[-1][:, None]).sum(-1).log())
        self.most_n, self.total_n = torch.cat(most), torch.cat(total)
        """Each token's largest logit, and the log of the sum of exponentials of all less the largest."""

    def chunks(self) -> Iterator[slice]:
        """Some tokens at a time."""
        n, vocabulary = self.logits_nV.shape
        chunk = CHUNK_CPU if self.logits_nV.device.type == "cpu" else CHUNK
        step = max(chunk // vocabulary, 1)
        return (slice(start, start + step) for start in range(0, n, step))

    def shifted(self, here: slice) -> Tensor:
        """The logits of some tokens, float32, less each one's largest."""
        return self.logits_nV[here].float() - self.most_n[here, None]

    @torch.no_grad()
    def next_token_loss(self) -> Tensor:
        """Nats for each token after the first, [B, T - 1]; without a gradient."""
        following_n = self.batch.tokens_BT.roll(-1, 1).flatten()
        logit_n = self.logits_nV.gather(-1, following_n[:, None])[:, 0].float()
        return (self.total_n - (logit_n - self.most_n)).view(self.shape)[:, :-1]

    def kl(self, other: Predictions) -> Tensor:
        """KL(these ‖ the other) of each token in nats, [B, T]; differentiable in the other's logits."""
        return _KL.apply(other.logits_nV, self, other).view(self.shape)  # type: ignore[union-attr]


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, own: Predictions, other: Predictions) -> Tensor:
        ctx.own, ctx.other = own, other
        found = []
        for here in own.chunks():
            mine = own.shifted(here)
            difference = mine - other.shifted(here)
            found.append(exp(mine - own.total_n[here, None]).mul_(difference).sum(-1))
        return torch.cat(found) + other.total_n - own.total_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, other, (grad_n,) = ctx.own, ctx.other, grads
        to_logits = torch.empty_like(other.logits_nV)
        for here in own.chunks():
            moved = exp(other.shifted(here) - other.total_n[here, None])
            moved -= exp(own.shifted(here) - own.total_n[here, None])
            to_logits[here] = moved.mul_(grad_n[here, None])
        return to_logits, None, None
