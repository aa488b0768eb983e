"""The trainings of a run: its passes over the text, and the phases of each, every one with its checkpoint.

A pass is step 1 for all its layers and variants at once, then step 2's trainings. Everything between two trainings is
computed from the checkpoint that the first of them ends with, so a run that goes on after a kill at any moment ends
with the same bits (on a CPU).

Several processes either train every pass together, or each takes passes of its own (parallel.py).
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
from .errors import UserError
from .foreign.carry import Sides
from .jobs import Jobs
from .memory import Need, Part
from .pairs.phases import Phase, phases_of
from .passes import FILE, Passes, checkpoint_of, in_groups, note_done, planned
from .progress import Reporter, title
from .run_folder import TRAINED, layer_folder
from .target import bounds_of, cost_of
from .training import checkpoint
from .training.checkpoint import Progress
from .training.job import Job, job_name
from .training.loop import Logs, train
from .training.steering import Steering
from .training.step1 import Step1Job
from .training.stream import ModelStream

Saved = tuple[dict[str, Tensor], Progress]


class Runner:
    """The passes and phases of one run."""

    def __init__(
        self,
        config: RunConfig,
        names: dict[str, RunConfig],
        out: Path,
        sites: Sequence[AttentionSite],
        given: dict[int, Sides],
        reporter: Reporter,
    ) -> None:
        self.config, self.out, self.sites, self.reporter = config, out, sites, reporter
        self.jobs = Jobs(config, names, sites, given, reporter)

    # Passes

    def plan(self, *, seen_by_all: bool, free: int) -> tuple[Passes, bool]:
        """The passes, where `free` bytes are, and whether each process takes some for itself, if all see the folder.

        Raises `UserError` where several processes cannot train them so.
        """
        if self.config.training.spread == "layers" and not seen_by_all:
            raise UserError(
                f"--out {self.out}: not all processes see it and can write there; name a folder on a disk that they "
                "share, or give --training.spread text"
            )
        began = Passes.read(self.out)
        if not (plan := began):
            parts = self.jobs.parts()
            most = -(-len(parts) // parallel.size())
            apart = seen_by_all and spreads(self.config, -(-len(parts) // most))
            plan = Passes(self._passes(parts, most if apart else len(parts), free, together=not apart), {})
        for number, parts in enumerate(plan.passes):
            if number in plan.done and not all(map(self._is_trained, parts)):
                plan.undo(self.out, number)
        for number in plan.left:
            self._require_checkpoint_of(plan, number)
        apart = seen_by_all and spreads(self.config, len(plan.left))
        if plan.left and not apart and (said := shortage_of_rows(self.config)):
            if not (began and seen_by_all):
                raise UserError(said)
            apart = True  # it was begun so, and can't be ended otherwise
        return plan, apart

    def _require_checkpoint_of(self, plan: Passes, number: int) -> None:
        """`UserError` for a checkpoint of other layers and variants than the plan says, or a damaged one."""
        path = checkpoint_of(self.out, number)
        if at := checkpoint.progress(path):
            names = {*at.notes.get("k", ()), *at.notes.get("stopped", ())}
            if names != {job_name(*part) for part in plan.passes[number]}:
                raise UserError(f"{path} is of other layers than {self.out / FILE} says; remove it to begin them anew")

    def _passes(self, parts: Sequence[Part], most: int, free: int, *, together: bool) -> list[list[Part]]:
        """All parts, in passes that fit, of `most` at the most."""
        if self.jobs.given:  # they are there, and nothing but strengths is trained between them
            return in_groups(parts, most)
        names = {name: single.dictionary for name, single in self.jobs.names.items()}
        shapes = {site.layer: site.shape for site in self.sites}
        need = Need.of_training(
            names, shapes, self.config.training, self.config.data.context, self.jobs.device,
            together=together and parallel.size() > 1,
        )  # fmt: skip
        return planned(parts, need, free, most, self.reporter.message)

    def _is_trained(self, part: Part) -> bool:
        return all((layer_folder(self.out / part[1], part[0]) / name).exists() for name in TRAINED)

    def train(self, plan: Passes, *, apart: bool) -> None:
        """Both steps of every layer and variant; leaves their files."""
        plan.write(self.out)
        if apart:
            parallel.send({"do": "passes", "passes": plan.passes, "left": plan.left})
            plan.done |= self.take_passes(plan.passes, plan.left)
        for number in plan.left:
            plan.done[number] = self._one_pass(plan.passes, number, others_done=bool(plan.done))

    def take_passes(self, passes: Sequence[Sequence[Part]], left: Sequence[int]) -> dict[int, dict[str, float]]:
        """Train some of these passes while other processes train the rest; seconds of each phase of all of them."""
        mine: list[tuple[int, dict[str, float]]] = []
        for index in parallel.dealt("passes", len(left)):
            with parallel.alone():
                mine.append((left[index], self._one_pass(passes, left[index], others_done=True)))
        return {number: seconds for one in parallel.gathered(mine) for number, seconds in one}

    # Phases

    def _one_pass(self, passes: Sequence[Sequence[Part]], number: int, *, others_done: bool) -> dict[str, float]:
        """Both steps of one pass, from its checkpoint on if there is one; seconds of each phase.

        `others_done`: so are passes of other layers, or may soon be.
        """
        saved = checkpoint.load(path := checkpoint_of(self.out, number))
        if len(passes) > 1:
            layers = list(dict.fromkeys(str(layer) for layer, _ in passes[number]))
            named = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
            self.reporter.message(f"pass {number + 1} of {len(passes)}: {named}")
        seconds: dict[str, float] = {}
        jobs: list[Any] = self.jobs.first(passes[number])
        phases = phases_of(self.config.pairs, target=self.config.target.given)
        order = ["step1", *(p.name for p in phases)]
        reached = order.index(saved[1].phase) if saved else 0
        if saved is None:  # what a run left that is begun anew: killed before its first checkpoint, or short of a file
            for job in jobs:
                for name in ("metrics.jsonl", "report.json"):
                    (self._folder(job) / name).unlink(missing_ok=True)
        else:
            notes = saved[1].notes
            seconds = dict(notes.get("seconds", {}))
            for job in jobs:  # a target has changed it
                job.query.k, job.key.k = notes["k"].get(job.name, (job.query.k, job.key.k))
            self.reporter.message(f"going on from {saved[1].phase}, {saved[1].tokens:,} tokens")
        if reached == 0 and not self.jobs.given:
            if phases and self.config.pairs.method == "mask" and not (saved and saved[1].done):
                self.jobs.warn_of_masks(jobs)
            if self.config.target.given:
                self.jobs.steer(jobs)
            self._fit("step1", jobs, self.config.training.tokens, path, seconds, saved)
            for job in jobs:
                self.jobs.calibrate(job)
            tuned = bool(phases) and self.config.pairs.method == "tune"
            for job in jobs:
                self._write_step1(job, tuned)
        stopped: list[str] = list(saved[1].notes.get("stopped", [])) if saved else []
        maps: list[Any] = jobs
        for index, phase in enumerate(phases, start=1):
            if index < reached:
                continue
            if index == reached:
                maps = [self.jobs.empty(job) for job in jobs if job.name not in stopped]
                self._fit(phase.name, maps, phase.tokens, path, seconds, saved, stopped)
            else:
                if self.config.pairs.method == "mask":
                    maps = self.jobs.masks(maps, others_done=others_done)
                else:
                    maps = [self.jobs.following(job, phase) for job in maps]
                self._fit(phase.name, maps, phase.tokens, path, seconds, None, stopped)
            if self.config.pairs.method == "tune":
                for job in maps:
                    self.jobs.calibrate(job)
                    self.jobs.weigh(job, rough=phase is not phases[-1])
            maps, stopped = self._judge(maps, phase, stopped)
            if not maps:
                break
        for job in maps:
            self._write(self.jobs.selected(job))
        note_done(self.out, number, seconds)
        return seconds

    def _fit(
        self,
        phase: str,
        jobs: Sequence[Job],
        tokens: int,
        path: Path,
        seconds: dict[str, float],
        saved: Saved | None,
        stopped: Sequence[str] = (),
    ) -> None:
        """Train one phase, to a checkpoint at `path`; `saved` is one of this phase to go on from."""
        notes = {
            "seconds": dict(seconds),
            "stopped": list(stopped),
            "k": {j.name: [j.query.k, j.key.k] for j in jobs},
        }
        steered = {j.name: j.steering.kl for j in jobs if isinstance(j, Step1Job) and j.steering}
        tensors, fresh = saved or (checkpoint.tensors_of(jobs), Progress(phase, notes=notes))
        parallel.send({"do": "train", "at": asdict(fresh), "tokens": tokens, "steered": steered}, tensors)
        began = time.monotonic()
        epochs = self._train(phase, jobs, tokens, path, saved, notes)
        seconds[phase] = round(seconds.get(phase, 0.0) + time.monotonic() - began, 1)
        if epochs:
            self.reporter.message(f"{phase}: the training text was repeated {epochs} times")

    def _train(
        self, phase: str, jobs: Sequence[Job], tokens: int, path: Path, saved: Saved | None, notes: dict[str, Any]
    ) -> int:
        """How often the text was begun anew."""
        sites = [site for site in self.sites if any(job.layer == site.layer for job in jobs)]
        stream = ModelStream(sites, self.jobs.text("train", repeat=True, order=phase))
        train(
            phase,
            jobs,
            stream,
            tokens,
            self.config.training,
            saved=saved,
            checkpoint_path=path,
            logs=Logs({j.name: self._folder(j) / "metrics.jsonl" for j in jobs}, self.reporter.step),
            notes=notes,
        )
        return stream.state()["epoch"]

    def take_part(self, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Train with the first process what it sends."""
        at = Progress(**told["at"])
        jobs = self.jobs.blank([p for p in self.jobs.parts() if f"{job_name(*p)}|query.W_enc" in tensors])
        for job in jobs:
            job.query.k, job.key.k = at.notes["k"][job.name]
            if job.name in told["steered"]:
                job.steering = Steering(told["steered"][job.name], self.config.training)
        if at.phase != "step1":
            jobs = [self.jobs.empty(job) for job in jobs]
        self._train(at.phase, jobs, told["tokens"], checkpoint_of(self.out, 0), (tensors, at), {})

    def _judge(self, jobs: list[Any], phase: Phase, stopped: list[str]) -> tuple[list[Any], list[str]]:
        """After a phase of tune under bounds: write what satisfies them, stop what does not."""
        bounds = bounds_of(self.config)
        if bounds is None or not phase.judged:
            return jobs, stopped
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
        return going, [*stopped, *(j.name for j in jobs if j not in going)]

    # Writing

    def _folder(self, job: Job) -> Path:
        return layer_folder(self.out / job.variant, job.layer)

    def _write(self, job: Any) -> None:
        self.jobs.decomposition(job).save(self._folder(job))

    def _write_step1(self, job: Step1Job, tuned: bool) -> None:
        """Step 1's dictionaries beside the ones that tuning will change, so that both can be measured."""
        path = self._folder(job) / "step1.safetensors"
        if tuned:
            save_transcoders(path, job.query, job.key)
        else:  # of a run that was to tune them when it was stopped
            path.unlink(missing_ok=True)


def spreads(config: RunConfig, passes: int) -> bool:
    """Whether each of several processes is to take some of so many passes for itself."""
    asked, size = config.training.spread, parallel.size()
    return size > 1 and passes > 1 and (asked == "layers" or (asked == "auto" and 2 * passes > size))


def shortage_of_rows(config: RunConfig) -> str:
    """What is wrong where a batch has too few sequences for each of several processes to have one; else nothing."""
    tokens, least = config.training.batch_tokens, parallel.size() * config.data.context
    if parallel.size() == 1 or tokens >= least:
        return ""
    return (
        f"--training.batch-tokens {tokens}: holds too few sequences of {config.data.context} tokens for "
        f"{parallel.size()} processes; give {least:,} or more, or start fewer processes"
    )
