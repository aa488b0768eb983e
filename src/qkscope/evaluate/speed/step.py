"""Training steps as the loop takes them, without its logs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ...config import Dtype, TrainingConfig
from ...training.job import Job
from ...training.loop import train_step
from ...training.stream import Harvest
from ...training.watch import Watch


class Harvests(Protocol):
    """What steps are taken on, batch after batch; nothing goes back, unlike in a `Stream`."""

    def __next__(self) -> Harvest: ...


class Steps:
    """Jobs on harvests; `done`: the share of training that the rate is taken at; `turn`: steps that `take` takes."""

    def __init__(
        self,
        jobs: Sequence[Job],
        stream: Harvests,
        device: torch.device,
        done: float = 0.0,
        dtype: Dtype = "float32",
        turn: int = 1,
    ) -> None:
        self.jobs, self.stream, self.done, self.turn, self.taken = jobs, stream, done, turn, 0
        self.optimizers = [torch.optim.Adam(job.parameter_groups(), fused=True) for job in jobs]
        self.watch = Watch(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        self.config = TrainingConfig()

    def take(self) -> None:
        """`turn` steps."""
        for _ in range(self.turn):
            self.step()

    def step(self) -> dict[str, dict[str, torch.Tensor]]:
        batch = next(self.stream)
        logged = train_step(
            batch, self.jobs, self.optimizers, self.done, self.config, self.autocast, self.watch, self.taken
        )
        self.taken += 1
        if self.taken % self.config.log_steps == 0:
            self.watch.read()
        return logged
