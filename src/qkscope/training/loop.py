"""The training loop: one stream of what attention layers saw, any number of jobs.

Both steps train in it. A job belongs to a layer and has a loss on that layer's pattern; jobs do not know of each other,
so a sweep over recipes, widths and L0s, and all layers, cost one harvest. What is notable: the loop draws no random
number, and a killed run goes on from its last checkpoint to the same bits (on a CPU).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..config import TrainingConfig
from ..files import disk_errors
from . import checkpoint
from .checkpoint import Progress
from .job import Job
from .objective import PatternTarget
from .stream import Harvest, Reused, Stream, require_finite
from .watch import Watch

FLOOR = 0.01  # the learning rate ends at this share of its peak


def rate_at(done: float, config: TrainingConfig) -> float:
    """Factor on the peak learning rate after this share of the training: up, level, down to `FLOOR`."""
    if done < config.warmup:
        return max(done / config.warmup, FLOOR)
    left = (1 - done) / config.decay if config.decay else 1.0
    return FLOOR + (1 - FLOOR) * min(max(left, 0.0), 1.0)


class Logs:
    """metrics.jsonl of each job, and one line of progress for the person."""

    def __init__(self, paths: dict[str, Path], say: Callable[[dict[str, Any]], None]) -> None:
        self.paths, self.say = paths, say

    def cut(self, lengths: dict[str, int]) -> None:
        """Drop what was written after the state that is gone back to."""
        for name, path in self.paths.items():
            if path.exists():
                with disk_errors(path), path.open("rb+") as file:
                    file.truncate(min(lengths.get(name, 0), path.stat().st_size))

    def write(self, name: str, line: dict[str, Any]) -> None:
        path = self.paths[name]
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def lengths(self) -> dict[str, int]:
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self.paths.items()}


def train(
    phase: str,
    jobs: Sequence[Job],
    stream: Stream,
    tokens: int,
    config: TrainingConfig,
    *,
    saved: tuple[dict[str, Tensor], Progress] | None,
    checkpoint_path: Path,
    logs: Logs,
    notes: dict[str, Any] | None = None,
) -> Progress:
    """Train every job for `tokens` tokens and leave a checkpoint that says so; jobs change in place.

    `saved` is a checkpoint of this same phase to go on from. Raises `UserError` where activations or a loss are not
    finite; the last checkpoint then stands.
    """
    at = Progress(phase, notes=notes or {})
    if config.reuse > 1:
        stream = Reused(stream, config.reuse, config.held_batches, tokens / config.reuse)
    device = next(jobs[0].parameters()).device
    if saved is not None:
        tensors, at = saved
        for job in jobs:
            checkpoint.restore_job(job, tensors)
        if at.text:  # else it is where another process begins
            stream.restore(at.text)
    else:
        at.logs = logs.lengths()
    optimizers = [torch.optim.Adam(job.parameter_groups(), fused=True) for job in jobs]
    if saved is not None:
        for job, optimizer in zip(jobs, optimizers, strict=True):
            checkpoint.restore_optimizer(optimizer, job, saved[0])
    watch, leads = Watch(device), parallel.rank() == 0
    if leads:
        logs.cut(at.logs)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    sums: dict[str, dict[str, Any]] = {}
    counted, since, clock = 0, at.tokens, time.monotonic()

    def keep() -> None:
        if leads:
            at.text, at.logs = stream.state(), logs.lengths()
            checkpoint.save(checkpoint_path, jobs, optimizers, at)

    while at.tokens < tokens:
        batch = next(stream)
        logged = train_step(batch, jobs, optimizers, at.tokens / tokens, config, autocast, watch, at.step)
        for name, log in logged.items():
            totals = sums.setdefault(name, {})
            for key, value in log.items():
                totals[key] = totals.get(key, 0) + value
        at.step += 1
        at.tokens += batch.n_tokens
        counted += 1
        ended = at.tokens >= tokens
        logs_now = at.step % config.log_steps == 0 or ended
        keeps_now = at.step % config.checkpoint_steps == 0 and not ended
        if logs_now or keeps_now:
            watch.read()
        if logs_now:
            speed = (at.tokens - since) / max(time.monotonic() - clock, 1e-9)
            for name, totals in sums.items() if leads else ():
                means = {key: float(value) / counted for key, value in totals.items()}
                line = {"phase": phase, "step": at.step, "tokens": at.tokens, **means, "tokens_per_s": round(speed)}
                logs.write(name, line)
                logs.say({"name": name, "total": tokens, **line})
            sums, counted, since, clock = {}, 0, at.tokens, time.monotonic()
        if keeps_now:
            keep()
    for job in jobs:
        job.before_step(1.0)
    at.done = True
    keep()
    return at


def train_step(
    batch: Harvest,
    jobs: Sequence[Job],
    optimizers: Sequence[torch.optim.Optimizer],
    done: float,
    config: TrainingConfig,
    autocast: torch.autocast,
    watch: Watch,
    step: int,
) -> dict[str, dict[str, Any]]:
    """One step of every job whose layer was harvested, after this share of the training; what each logs.

    What is not finite is noted in `watch`, and no step is taken on a loss that is not.
    """
    logs: dict[str, dict[str, Any]] = {}
    for layer, seen in batch.layers.items():
        require_finite(seen, layer, batch.origin, step, watch)
        target = PatternTarget(seen, batch.padding)
        with parallel.divided(target.n_tokens, batch.n_tokens):
            for job, optimizer in zip(jobs, optimizers, strict=True):
                if job.layer == layer:
                    job.before_step(done)
                    logs[job.name] = _update(job, optimizer, target, rate_at(done, config), autocast, watch, step)
    return logs


def _update(
    job: Job,
    optimizer: torch.optim.Optimizer,
    target: PatternTarget,
    factor: float,
    autocast: torch.autocast,
    watch: Watch,
    step: int,
) -> dict[str, Any]:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    optimizer.zero_grad(set_to_none=True)
    loss, log = job.loss(target, autocast)
    loss.backward(torch.full_like(loss, parallel.share()))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    log = parallel.sum_gradients(parameters, {"loss": loss.detach(), **log})
    bad = ~(log["loss"].abs() < torch.inf)  # NaN is not less either
    watch.note(bad, lambda: _diverged(job.name, log["loss"], step))
    # What a gradient scaler tells a fused optimizer: the step is not taken, and the host need not know.
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.step()
    job.after_step()
    return log


def _diverged(name: str, loss: Tensor, step: int) -> str:
    return f"{name}: the loss is {loss.item()} at step {step}; lower the learning rate (the last checkpoint is kept)"
