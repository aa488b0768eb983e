"""How many pairs to keep: by count, or the fewest under a bound on the pattern's KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..pattern import AttentionInputs
from ..training.objective import PatternTarget
from .tune import MapJob

LADDER = 2**0.25  # counts tried by `fewest` are powers of this: within 19 % of the smallest possible


def top(importance_P: Tensor, count: int) -> Tensor:
    """Index of the `count` most important pairs, ascending."""
    return importance_P.topk(min(count, len(importance_P))).indices.sort().values


def mattering(importance_P: Tensor) -> Tensor:
    """Index of the pairs that have any importance, ascending; of all where none has.

    The others' features have died, or never meet.
    """
    some = (importance_P > 0).nonzero()[:, 0]
    return some if len(some) else torch.arange(len(importance_P), device=importance_P.device)


def fewest(most: int, bound: float, kl_at: Callable[[int], float]) -> tuple[int, float]:
    """The fewest pairs, up to a fifth, whose KL is at most `bound`, and that KL; `most` where even that is too few.

    KL falls with the count up to noise, so a bisection over a geometric ladder finds the place in a few evaluations.
    """
    steps = [1]
    while steps[-1] < most:
        steps.append(min(max(round(steps[-1] * LADDER), steps[-1] + 1), most))
    low, high = 0, len(steps) - 1
    best = kl_at(most)
    if best > bound:
        return most, best
    while low < high:
        middle = (low + high) // 2
        kl = kl_at(steps[middle])
        if kl <= bound:
            high, best = middle, kl
        else:
            low = middle + 1
    return steps[high], best


@torch.no_grad()
def map_kl(job: MapJob, sample: Sequence[AttentionInputs]) -> float:
    """Mean pattern KL of a job's sparse map over a sample, in nats, weighted by tokens."""
    job.eval()
    total = count = 0.0
    for inputs in sample:
        target = PatternTarget(inputs)
        total += float(target.mean(job.kl_rows(target)[0])) * target.n_tokens
        count += target.n_tokens
    job.train()
    return total / count


def ladder(first: float, count: int, stages: int) -> list[int]:
    """Counts after each pruning: from `first` times `count` down to `count` in equal ratios."""
    if stages == 1:
        return [count]
    return [round(count * first ** (1 - i / (stages - 1))) for i in range(stages)]
