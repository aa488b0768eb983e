"""Checkpoints of a running training: one file, written in one step, that holds all there is to go on from.

Parameters, optimiser moments, thresholds and idle counters, the position in the text and the lengths of the logs. No
random number is drawn inside the training loop: starts and document orders are drawn from seeds of their own, so their
seeds (in config.yaml) and the position in the text are the whole state of chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import read_metadata, read_tensors, write_tensors
from .job import Job


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


def save(path: Path, jobs: Sequence[Job], optimizers: Sequence[torch.optim.Optimizer], at: Progress) -> None:
    tensors = tensors_of(jobs)
    for job, optimizer in zip(jobs, optimizers, strict=True):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"adam|{job.name}|{index}|{key}": torch.as_tensor(v) for key, v in moments.items()}
    write_tensors(path, tensors, asdict(at))


def tensors_of(jobs: Sequence[Job]) -> dict[str, Tensor]:
    """What `restore_job` gives back."""
    return {f"{job.name}|{key}": value for job in jobs for key, value in job.state_dict().items()}


def load(path: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """The last checkpoint, or None where there is none; `UserError` for what is none of this version's."""
    if not path.exists():
        return None
    with _or_anew(path):
        tensors, metadata = read_tensors(path)
        return tensors, Progress(**metadata)


def progress(path: Path) -> Progress | None:
    """How far the last checkpoint is, without its tensors; None where there is none."""
    if not path.exists():
        return None
    with _or_anew(path):
        return Progress(**read_metadata(path))


@contextmanager
def _or_anew(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; remove it to begin the run anew") from None
    except TypeError:
        raise UserError(f"{path} is no checkpoint of this version; remove it to begin the run anew") from None


def restore_job(job: Job, tensors: dict[str, Tensor]) -> None:
    """Give a job the tensors it had, whatever their shapes are by now (a pruned map is shorter)."""
    prefix = job.name + "|"
    device = next(job.parameters()).device
    for name, value in tensors.items():
        if not name.startswith(prefix):
            continue
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        owner = job.get_submodule(module)
        if isinstance(old := getattr(owner, leaf), nn.Parameter):
            old.data = value.to(device)
        else:
            setattr(owner, leaf, value.to(device))


def restore_optimizer(optimizer: torch.optim.Optimizer, job: Job, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser the moments it had for this job."""
    prefix = f"adam|{job.name}|"
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split("|")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
