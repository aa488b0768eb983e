"""Checkpoints of a running training: one file, written in one step, that holds all there is to go on from.

Parameters, optimiser moments, thresholds and idle counters, the position in the text and the lengths of the logs. No
random number is drawn inside the training loop: starts and document orders are drawn from seeds of their own, so their
seeds (in config.yaml) and the position in the text are the whole state of chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..files import read_tensors, write_tensors


class Job(Protocol):
    """Something that trains on one layer's pattern; also an `nn.Module` whose tensors are its whole state."""

    layer: int
    variant: str


@dataclass
class Progress:
    """How far a run is."""

    phase: str
    step: int = 0
    tokens: int = 0
    done: bool = False
    text: dict[str, Any] = field(default_factory=dict)
    """State of the stream of sequences."""
    logs: dict[str, int] = field(default_factory=dict)
    """Bytes of each log that belong to this state; what stands after them is cut off on the way back."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a phase leaves to later ones (plain values)."""


def job_name(job: Any) -> str:
    return f"{job.variant or 'run'}|{job.layer}"


def save(path: Path, jobs: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], at: Progress) -> None:
    tensors: dict[str, Tensor] = {}
    for job, optimizer in zip(jobs, optimizers, strict=True):
        name = job_name(job)
        tensors |= {f"{name}|{key}": value for key, value in job.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"adam|{name}|{index}|{key}": torch.as_tensor(v) for key, v in moments.items()}
    write_tensors(path, tensors, asdict(at))


def load(path: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """The last checkpoint, or None where there is none."""
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    return tensors, Progress(**metadata)


def restore_job(job: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a job the tensors it had, whatever their shapes are by now (a pruned map is shorter)."""
    prefix = job_name(job) + "|"
    device = next(job.parameters()).device
    for name, old in [*job.named_parameters(), *job.named_buffers()]:
        value = tensors.get(prefix + name)
        if value is None:
            continue
        if isinstance(old, nn.Parameter):
            old.data = value.to(device)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(job.get_submodule(owner), leaf, value.to(device))


def restore_optimizer(optimizer: torch.optim.Optimizer, job: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser the moments it had for this job."""
    prefix = f"adam|{job_name(job)}|"
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split("|")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
