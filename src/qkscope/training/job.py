"""What the training loop asks of a job: something that learns from one layer's pattern."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..dictionary import SparseTranscoder
from .objective import PatternTarget


def job_name(layer: int, variant: str) -> str:
    """What tells the jobs of a run apart."""
    return f"{variant or 'run'}|{layer}"


class Job(nn.Module):
    """Two dictionaries of one layer and what is trained with them; parameters and buffers are its whole state.

    `variant` names the pair of dictionaries within a sweep ('' without one).
    """

    def __init__(self, layer: int, variant: str, query: SparseTranscoder, key: SparseTranscoder) -> None:
        super().__init__()
        self.layer, self.variant = layer, variant
        self.query, self.key = query, key
        self.done = 0.0  # share of the training that came before the step at hand

    @property
    def name(self) -> str:
        return job_name(self.layer, self.variant)

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with their peak learning rate."""

    @abstractmethod
    def loss(self, target: PatternTarget, autocast: torch.autocast) -> tuple[Tensor, dict[str, Any]]:
        """The objective on one batch, and what to log of it: means over its tokens, and numbers."""

    @property
    def draw(self) -> int:
        """A seed for what the step at hand draws; it follows from `done`, so that a resumed run draws the same."""
        return int(self.done * 2**52)

    def before_step(self, done: float) -> None:
        """What precedes a step, after this share of the training; all that it sets follows from `done`."""
        self.done = done

    def after_step(self) -> None:
        """What follows the optimiser's step."""
