"""The published step 2: a trained mask over every pair of live features, for comparison.

    scores from mask ∘ M, mask clamped to [0, 1] after each step, loss = KL + λ Σ √(|mask| + ε)

This is the only place with dense [Fq, Fk, N] tensors; `require_memory` says beforehand what they take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import parallel
from ..dictionary import SparseTranscoder
from ..errors import UserError
from ..memory import COPIES, free_memory
from ..training.job import Job
from ..training.objective import PatternTarget
from .gated import GatedScores
from .pair_map import Pairs, rows, with_bias

EPSILON = 1e-6
AT_PEAK = 3  # more of the one whose step it is: a head's product, its gradient and the penalty's


def shortfall(shapes: Sequence[tuple[int, int, int]], device: torch.device) -> str | None:
    """What training these masks (query and key features, bias included, and heads) takes, where that is not free."""
    sizes = [4 * math.prod(shape) for shape in shapes]
    summed = max(sizes) if parallel.size() > 1 else 0  # gradients of all processes are added up in one piece
    need = COPIES * sum(sizes) + AT_PEAK * max(sizes) + summed
    free = free_memory(device)
    if need <= free:
        return None
    largest = " x ".join(map(str, max(shapes, key=math.prod)))
    masks = f"a mask of {largest} takes" if len(shapes) == 1 else f"{len(shapes)} masks of at most {largest} take"
    return f"{masks} {need / 2**30:.1f} GiB to train and {free / 2**30:.1f} GiB are free"


def require_memory(shapes: Sequence[tuple[int, int, int]], device: torch.device, *, others_done: bool = False) -> None:
    """`UserError` where the masks of these live features can't fit; `others_done`: other layers of the run have one."""
    if said := shortfall(shapes, device):
        how = "with another --out" if others_done else "(step 1 is kept: the same --out goes on from there)"
        raise UserError(f"--pairs.method mask: {said}; use --pairs.method tune, which needs no dense tensor {how}")


class MaskJob(Job):
    """The dense mask between two frozen dictionaries: [N, live query + 1, live key + 1], starting at 1."""

    live_q: Tensor
    live_k: Tensor

    def __init__(
        self,
        layer: int,
        variant: str,
        query: SparseTranscoder,
        key: SparseTranscoder,
        live: tuple[Tensor, Tensor],
        n_heads: int,
        *,
        sparsity: float,
        rate: float,
    ) -> None:
        super().__init__(layer, variant, query.eval().requires_grad_(False), key.eval().requires_grad_(False))
        self.n_heads, self.sparsity, self.rate = n_heads, sparsity, rate
        self.register_buffer("live_q", live[0])
        self.register_buffer("live_k", live[1])
        self.mask = nn.Parameter(torch.ones(n_heads, len(live[0]), len(live[1]), device=query.W_dec.device))

    def train(self, mode: bool = True) -> MaskJob:
        """The dictionaries stay in evaluation mode."""
        super().train(mode)
        self.query.eval()
        self.key.eval()
        return self

    def parameter_groups(self) -> list[dict]:
        """Parameters with their peak learning rate."""
        return [{"params": [self.mask], "lr": self.rate, "peak": self.rate}]

    def after_step(self) -> None:
        with torch.no_grad():
            self.mask.clamp_(0, 1)

    def loss(self, target: PatternTarget, autocast: torch.autocast) -> tuple[Tensor, dict[str, Tensor]]:
        """KL(P ‖ P(masked map)) + penalty on one batch, and what to log of it."""
        kl = target.mean(self.kl_rows(target))
        log = {"pattern_kl": kl.detach(), "pairs": (self.mask.detach() > 0).sum().float()}
        return kl + self.sparsity * (self.mask.abs() + EPSILON).sqrt().sum(), log

    def kl_rows(self, target: PatternTarget) -> Tensor:
        n_groups = target.inputs.k_BTGH.shape[2]
        acts_q, acts_k = (
            with_bias(side.encode(target.x_nD))[:, live]
            for side, live in ((self.query, self.live_q), (self.key, self.live_k))
        )
        q, k = ((acts > 0).any(0).nonzero()[:, 0] for acts in (acts_q, acts_k))  # the others add zeros to every score
        scores = GatedScores(
            target.unpack(acts_q[:, q]),
            target.unpack(acts_k[:, k]),
            rows(self.query, self.n_heads)[self.live_q[q]],
            rows(self.key, n_groups)[self.live_k[k]],
            target.rule,
        )
        return target.kl_rows(target.rule.cap(scores(self.mask[:, q][:, :, k])))

    @torch.no_grad()
    def kept(self) -> tuple[Pairs, Tensor]:
        """The pairs whose mask is above zero, and the mask's values there [P]."""
        head, a, b = (self.mask > 0).nonzero(as_tuple=True)
        pairs = Pairs.of(self.live_q[a], self.live_k[b], head, self.query.width, self.key.width, self.n_heads)
        # live_q and live_k are ascending, so `nonzero` already gives the order that Pairs.of sorts to.
        return pairs, self.mask[head, a, b]
