"""One pass over the text: step 1 for all its layers and variants at once, then step 2's trainings.

Each training ends with a checkpoint. Everything between two of them is computed from the one that the first ends with,
so a pass that goes on after a kill at any moment ends with the same bits (on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from . import parallel
from .attention import AttentionSite
from .config import RunConfig
from .decomposition import save_transcoders
from .jobs import Jobs
from .memory import Part
from .pairs.phases import Phase, phases_of
from .passes import checkpoint_of, note_done
from .progress import Reporter, title
from .run_folder import layer_folder
from .target import bounds_of, cost_of
from .training import checkpoint
from .training.checkpoint import Progress
from .training.job import Job, job_name
from .training.loop import Logs, train
from .training.steering import Steering
from .training.step1 import Step1Job
from .training.stream import ModelStream

Saved = tuple[dict[str, Tensor], Progress]


class OnePass:
    """The trainings of some layers and variants, from a checkpoint on if there is one."""

    def __init__(
        self,
        config: RunConfig,
        jobs: Jobs,
        out: Path,
        sites: Sequence[AttentionSite],
        reporter: Reporter,
        *,
        number: int = 0,
        saved: Saved | None = None,
    ) -> None:
        """`saved`: what the first process sends; else it is what the pass's own checkpoint says."""
        self.config, self.jobs, self.out, self.sites, self.reporter = config, jobs, out, sites, reporter
        self.number, self.path = number, checkpoint_of(out, number)
        self.saved = saved or checkpoint.load(self.path)
        """What the next training goes on from."""
        self.at = self.saved[1] if self.saved else None
        notes = self.at.notes if self.at else {}
        self.seconds: dict[str, float] = dict(notes.get("seconds", {}))
        self.stopped: list[str] = list(notes.get("stopped", []))
        """Jobs that ended before the last phase: their next map did not satisfy the bounds."""

    # The phases

    def run(self, parts: Sequence[Part], *, others_done: bool) -> dict[str, float]:
        """Train these layers and variants, and leave their files; seconds of each phase.

        `others_done`: so are passes of other layers, or may soon be.
        """
        jobs: list[Any] = self.jobs.first(parts)
        self._begin(jobs)
        phases = phases_of(self.config.pairs, target=self.config.target.given)
        reached = ["step1", *(phase.name for phase in phases)].index(self.at.phase) if self.at else 0
        if reached == 0 and not self.jobs.given:
            self._step1(jobs, phases)
        for index, phase in enumerate(phases, start=1):
            if index < reached:
                continue
            if index == reached:
                jobs = [self.jobs.empty(job) for job in jobs if job.name not in self.stopped]
            elif self.config.pairs.method == "mask":
                jobs = self.jobs.masks(jobs, others_done=others_done)
            else:
                jobs = [self.jobs.following(job, phase) for job in jobs]
            self._fit(phase.name, jobs, phase.tokens)
            if self.config.pairs.method == "tune":
                for job in jobs:
                    self.jobs.calibrate(job)
                    self.jobs.weigh(job, rough=phase is not phases[-1])
            jobs = self._judged(jobs, phase)
            if not jobs:
                break
        for job in jobs:
            self._write(self.jobs.selected(job))
        note_done(self.out, self.number, self.seconds)
        return self.seconds

    def _begin(self, jobs: Sequence[Any]) -> None:
        if self.at is None:  # what a run left that was killed before its first checkpoint, or is short of a file
            for job in jobs:
                for name in ("metrics.jsonl", "report.json"):
                    (self._folder(job) / name).unlink(missing_ok=True)
            return
        self._set_k(jobs)
        self.reporter.message(f"going on from {self.at.phase}, {self.at.tokens:,} tokens")

    def _set_k(self, jobs: Sequence[Job]) -> None:
        """As the checkpoint has it: a target changes it."""
        assert self.at is not None
        for job in jobs:
            job.query.k, job.key.k = self.at.notes["k"].get(job.name, (job.query.k, job.key.k))

    def _step1(self, jobs: Sequence[Step1Job], phases: Sequence[Phase]) -> None:
        method = self.config.pairs.method
        if phases and method == "mask" and not (self.at and self.at.done):
            self.jobs.warn_of_masks(jobs)
        if self.config.target.given:
            self.jobs.steer(jobs)
        self._fit("step1", jobs, self.config.training.tokens)
        for job in jobs:
            self.jobs.calibrate(job)
            # Step 1's dictionaries stay beside the ones that tuning will change, so that both can be measured.
            path = self._folder(job) / "step1.safetensors"
            if phases and method == "tune":
                save_transcoders(path, job.query, job.key)
            else:  # of a run that was to tune them when it was stopped
                path.unlink(missing_ok=True)

    def _judged(self, jobs: list[Any], phase: Phase) -> list[Any]:
        """After a phase of tune under bounds: write what satisfies them, stop what does not."""
        bounds = bounds_of(self.config)
        if bounds is None or not phase.judged:
            return jobs
        going, batches = [], self.jobs.validation(self.config.pairs.validation_tokens)
        for job in jobs:
            made = self.jobs.decomposition(job.eval())
            cost = cost_of(made, self.jobs.site(job.layer), batches, bounds)
            good = cost.within(bounds)
            if good or not phase.spare:  # at the first one there is nothing larger to fall back to
                made.save(self._folder(job))
                self.reporter.message(f"{title(job.layer, job.variant)}: {len(job.pairs):,} pairs, {cost.said(bounds)}")
            if good:
                going.append(job.train())
        self.stopped += [job.name for job in jobs if job not in going]
        return going

    # Training

    def _fit(self, phase: str, jobs: Sequence[Job], tokens: int) -> None:
        """Train one phase, to a checkpoint."""
        notes = {
            "seconds": dict(self.seconds),
            "stopped": list(self.stopped),
            "k": {j.name: [j.query.k, j.key.k] for j in jobs},
        }
        steered = {j.name: j.steering.kl for j in jobs if isinstance(j, Step1Job) and j.steering}
        tensors, fresh = self.saved or (checkpoint.tensors_of(jobs), Progress(phase, notes=notes))
        parallel.send({"do": "train", "at": asdict(fresh), "tokens": tokens, "steered": steered}, tensors)
        began = time.monotonic()
        epochs = self._train(phase, jobs, tokens, notes)
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - began, 1)
        if epochs:
            self.reporter.message(f"{phase}: the training text was repeated {epochs} times")

    def follow(self, tokens: int, steered: dict[str, float]) -> None:
        """Train one phase with the first process, which has sent where it begins."""
        assert self.saved is not None and self.at is not None
        tensors, at = self.saved
        jobs = self.jobs.blank([p for p in self.jobs.parts() if f"{job_name(*p)}|query.W_enc" in tensors])
        self._set_k(jobs)
        for job in jobs:
            if job.name in steered:
                job.steering = Steering(steered[job.name], self.config.training)
        if at.phase != "step1":
            jobs = [self.jobs.empty(job) for job in jobs]
        self._train(at.phase, jobs, tokens, {})

    def _train(self, phase: str, jobs: Sequence[Job], tokens: int, notes: dict[str, Any]) -> int:
        """How often the text was begun anew."""
        saved, self.saved = self.saved, None
        sites = [site for site in self.sites if any(job.layer == site.layer for job in jobs)]
        stream = ModelStream(sites, self.jobs.text("train", repeat=True, order=phase))
        train(
            phase,
            jobs,
            stream,
            tokens,
            self.config.training,
            saved=saved,
            checkpoint_path=self.path,
            logs=Logs({j.name: self._folder(j) / "metrics.jsonl" for j in jobs}, self.reporter.step),
            notes=notes,
        )
        return stream.state()["epoch"]

    # Writing

    def _folder(self, job: Job) -> Path:
        return layer_folder(self.out / job.variant, job.layer)

    def _write(self, job: Any) -> None:
        self.jobs.decomposition(job).save(self._folder(job))
