"""k steered while step 1 trains, so that its pattern KL ends at what is asked for.

After each step both sides' k grow where the batch's KL is above the bound and shrink where it is below, all on
logarithms. How features are shared between the sides follows from KL(P ‖ P(q̂, k)) and KL(P ‖ P(q, k̂)): with KLs that
fall as a power of k, the sum of the two k's is least where each side's KL is in proportion to its k.

Steering starts when the first part of the training is over: until then the KL is far above what it ends at. While the
learning rate is high, the KL is allowed to be above the bound by what the rate's fall will take from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import TrainingConfig
from .loop import rate_at

FROM = 0.3  # share of the training after which k is steered
DENSEST = 0.25  # share of the features that may be active: what needs more has no sparse description
PULL = 20.0  # how far, over a whole training, a steady error in log KL would move log k ...
GAINS = 0.02, 0.2  # ... and how far in one step, at the least and at the most
DESCENT = 0.5  # share of the final KL by which it may stand above that while the learning rate is at its peak ...
LEAD = 0.15  # ... and share of the training for which, at the end, it may no longer


class Steering:
    """How the k of both sides follow the KL of a batch."""

    def __init__(self, kl: float, config: TrainingConfig) -> None:
        """`kl`: nats to end at."""
        self.kl, self.config = kl, config
        self.gain = min(max(PULL * config.batch_tokens / config.tokens, GAINS[0]), GAINS[1])

    def step(self, log_k_2: Tensor, kl_3: Tensor, most_2: Tensor, done: float) -> Tensor:
        """log k of query and key after a batch with these KLs (of q̂k̂, q̂k and qk̂), no more than log `most`."""
        if done < FROM:
            return log_k_2
        both, *sides = kl_3.double().clamp(min=1e-9).log().tolist()
        wanted = torch.tensor(sides, dtype=torch.float64) - log_k_2.cpu()  # alike on both sides where the sum is least
        allowed = math.log(self.kl) + math.log(1 + DESCENT * rate_at(min(done + LEAD, 1.0), self.config))
        shift = both - allowed + (wanted - wanted.mean())
        return (log_k_2.cpu() + self.gain * shift).clamp(min=0.0).minimum(most_2.log())
