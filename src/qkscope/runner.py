"""The phases of a run: step 1 for every layer and variant at once, then step 2's trainings, each with its checkpoint.

Everything between two trainings is computed from the checkpoint that the first of them ends with, so a run that goes on
after a kill at any moment ends with the same bits (on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import parallel
from .attention import AttentionInputs, AttentionSite
from .config import RunConfig
from .data import Batch, Sequences
from .data.documents import Split
from .decomposition import Decomposition, SiteShape, save_transcoders
from .dictionary import SparseTranscoder
from .foreign.carry import Sides, in_brief
from .memory import Need, Part, free_memory
from .pairs.importance import firing_features, pair_importance, rank_pairs
from .pairs.mask import MaskJob, require_memory, shortfall
from .pairs.pair_map import Pairs, rows, weight_strength
from .pairs.phases import Phase, phases_of
from .pairs.selection import fewest, map_kl, mattering, top
from .pairs.tune import MapJob
from .passes import Passes, that_fit
from .progress import Reporter
from .run_folder import TRAINED, layer_folder
from .target import Bounds, Cost, bounds_of, cost_of, step1_kl
from .training import checkpoint
from .training.checkpoint import Progress
from .training.job import Job, job_name
from .training.loop import Logs, train
from .training.start import label_seed, side_statistics, start
from .training.steering import Steering
from .training.step1 import Step1Job
from .training.stream import ModelStream, harvest_finite

START_TOKENS = 8192  # training tokens that a start is fitted to
STEER_TOKENS = 4096  # validation tokens on which a bound on cross-entropy becomes one on KL


def _title(job: Job) -> str:
    return f"{job.variant} layer {job.layer}".strip()


class Runner:
    """The phases of one run."""

    def __init__(
        self,
        config: RunConfig,
        names: dict[str, RunConfig],
        out: Path,
        sites: Sequence[AttentionSite],
        given: dict[int, Sides],
        reporter: Reporter,
    ) -> None:
        self.config, self.names, self.out = config, names, out
        self.sites, self.given, self.reporter = sites, given, reporter
        self.device = next(sites[0].model.parameters()).device
        self.checkpoint_path = out / "checkpoint.safetensors"
        self.seconds: dict[str, float] = {}
        self.plan = Passes([])
        self._sample: tuple[tuple[int, Split], list[AttentionInputs]] | None = None

    # Text

    def text(self, split: Split, *, repeat: bool, max_tokens: int | None = None, order: str = "") -> Sequences:
        """A stream of one split; each `order` has its own, so that stages do not all begin with the same documents."""
        seed = self.config.training.seed
        return Sequences(
            self.config.data,
            self.sites[0].tokenizer,
            split,
            batch_tokens=self.config.training.batch_tokens,
            seed=label_seed(order, seed) % 2**31 if order else seed,
            repeat=repeat,
            max_tokens=max_tokens,
        )

    def sample(self, layer: int, split: Split, tokens: int) -> list[AttentionInputs]:
        """What one layer saw on the first tokens of a split; the last one asked for is kept."""
        if self._sample is None or self._sample[0] != (layer, split):
            site = self._site(layer)
            batches = self.text(split, repeat=split == "train", max_tokens=tokens)
            inputs = [harvest_finite(site, batch.to(self.device)) for batch in batches]
            self._sample = (layer, split), inputs
        return self._sample[1]

    # Phases

    def train(self) -> None:
        """Both steps of every layer and variant, as many in one pass as memory holds; leaves their files."""
        saved = checkpoint.load(self.checkpoint_path)
        plan = self.plan = Passes.read(self.out) or Passes([self._parts()] if saved else self._passes())
        lost = [n for n, parts in enumerate(plan.passes[: plan.done]) if not all(map(self._is_trained, parts))]
        plan.done = min([plan.done, *lost])
        plan.write(self.out)
        self.seconds = dict(plan.seconds)
        while plan.done < len(plan.passes):
            if saved and saved[1].notes.get("pass", 0) != plan.done:  # of one that is done
                saved = None
            if len(plan.passes) > 1:
                self.reporter.message(f"pass {plan.done + 1} of {len(plan.passes)}")
            self._both_steps(plan.passes[plan.done], saved)
            plan.done, plan.seconds, saved = plan.done + 1, self.seconds, None
            plan.write(self.out)
            if plan.done < len(plan.passes):  # the last pass's checkpoint stands until the run has ended
                self.checkpoint_path.unlink(missing_ok=True)

    def _parts(self) -> list[Part]:
        return [(layer, name) for layer in self.given or (s.layer for s in self.sites) for name in self.names]

    def _is_trained(self, part: Part) -> bool:
        return all((layer_folder(self.out / part[1], part[0]) / name).exists() for name in TRAINED)

    def _passes(self) -> list[list[Part]]:
        """All parts, in passes that fit."""
        parts = self._parts()
        if self.given:  # they are there, and nothing but strengths is trained between them
            return [parts]
        names = {name: single.dictionary for name, single in self.names.items()}
        shapes = {site.layer: site.shape for site in self.sites}
        need = Need.of_training(names, shapes, self.config.training, self.config.data.context, self.device)
        return that_fit(parts, need, free_memory(self.device), self.reporter.message)

    def _both_steps(self, parts: Sequence[Part], saved: tuple[dict[str, Tensor], Progress] | None) -> None:
        """Both steps of one pass; `saved` is a checkpoint of it to go on from."""
        jobs: list[Any] = self._given_jobs(parts) if self.given else self._step1_jobs(parts)
        phases = phases_of(self.config.pairs, target=self.config.target.given)
        order = ["step1", *(p.name for p in phases)]
        reached = order.index(saved[1].phase) if saved else 0
        if saved is None:  # what a run left that is begun anew: killed before its first checkpoint, or short of a file
            for job in jobs:
                for name in ("metrics.jsonl", "report.json"):
                    (self._folder(job) / name).unlink(missing_ok=True)
        else:
            self.seconds = dict(saved[1].notes.get("seconds", {}))
            for job in jobs:  # a target has changed it
                job.query.k, job.key.k = saved[1].notes.get("k", {}).get(job.name, (job.query.k, job.key.k))
            self.reporter.message(f"going on from {saved[1].phase}, {saved[1].tokens:,} tokens")
        if reached == 0 and not self.given:
            if phases and self.config.pairs.method == "mask" and not (saved and saved[1].done):
                self._warn_of_masks(jobs)
            if self.config.target.given:
                self._steer(jobs)
            self._fit("step1", jobs, self.config.training.tokens, saved)
            for job in jobs:
                self._calibrate(job)
            tuned = bool(phases) and self.config.pairs.method == "tune"
            for job in jobs:
                self._write_step1(job, tuned)
        stopped: list[str] = list(saved[1].notes.get("stopped", [])) if saved else []
        maps: list[Any] = jobs
        for index, phase in enumerate(phases, start=1):
            if index < reached:
                continue
            if index == reached:
                maps = [self._empty_job(job) for job in jobs if job.name not in stopped]
                self._fit(phase.name, maps, phase.tokens, saved, stopped)
            else:
                masked = self.config.pairs.method == "mask"
                maps = self._mask_jobs(maps) if masked else [self._next_job(job, phase) for job in maps]
                self._fit(phase.name, maps, phase.tokens, None, stopped)
            if self.config.pairs.method == "tune":
                for job in maps:
                    self._calibrate(job)
                    sample = self.sample(job.layer, "train", self._sample_tokens())
                    worth_P = self._importance(job, sample, rough=phase is not phases[-1])
                    job.keep(matter := mattering(worth_P))
                    job.worth_P = worth_P[matter]
            maps, stopped = self._judge(maps, phase, stopped)
            if not maps:
                break
        for job in maps:
            self._write(self._selected(job))

    def _fit(self, phase: str, jobs: Sequence[Job], tokens: int, saved: Any, stopped: Sequence[str] = ()) -> None:
        """Train one phase; `saved` is a checkpoint of this phase to go on from."""
        notes = {
            "pass": self.plan.done,
            "seconds": self.seconds,
            "stopped": list(stopped),
            "k": {j.name: [j.query.k, j.key.k] for j in jobs},
        }
        steered = {j.name: j.steering.kl for j in jobs if isinstance(j, Step1Job) and j.steering}
        tensors, fresh = saved or (checkpoint.tensors_of(jobs), Progress(phase, notes=notes))
        parallel.send({"at": asdict(fresh), "tokens": tokens, "steered": steered}, tensors)
        began = time.monotonic()
        epochs = self._train(phase, jobs, tokens, saved, notes)
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - began, 1)
        if epochs:
            self.reporter.message(f"{phase}: the training text was repeated {epochs} times")

    def _train(self, phase: str, jobs: Sequence[Job], tokens: int, saved: Any, notes: dict[str, Any]) -> int:
        """How often the text was begun anew."""
        sites = [site for site in self.sites if any(job.layer == site.layer for job in jobs)]
        stream = ModelStream(sites, self.text("train", repeat=True, order=phase))
        train(
            phase,
            jobs,
            stream,
            tokens,
            self.config.training,
            saved=saved,
            checkpoint_path=self.checkpoint_path,
            logs=Logs({j.name: self._folder(j) / "metrics.jsonl" for j in jobs}, self.reporter.step),
            notes=notes,
        )
        return stream.state()["epoch"]

    def follow(self) -> None:
        """Take part in the trainings that the first process leads, from what it sends before each."""
        while (told := parallel.receive())[0] is not None:
            message, tensors = told
            at = Progress(**message["at"])
            parts = [part for part in self._parts() if f"{job_name(*part)}|query.W_enc" in tensors]
            jobs = self._blank_jobs(parts)
            for job in jobs:
                job.query.k, job.key.k = at.notes["k"][job.name]
                if job.name in message["steered"]:
                    job.steering = Steering(message["steered"][job.name], self.config.training)
            if at.phase != "step1":
                jobs = [self._empty_job(job) for job in jobs]
            self._train(at.phase, jobs, message["tokens"], (tensors, at), {})

    # Jobs

    def _blank_jobs(self, parts: Sequence[Part]) -> list[Any]:
        """Step 1's jobs, or the given features'; for what the first process sends to fill."""
        if self.given:
            return [Job(layer, "", *self.given[layer]) for layer, _ in parts]
        jobs = []
        for layer, name in parts:
            d, n, g, h = (self._site(layer).shape[side] for side in "DNGH")
            config = self.names[name].dictionary
            assert config.activation is not None
            query = SparseTranscoder(d, config.width, n * h, config.activation, config.k)
            key = SparseTranscoder(d, config.key_width, g * h, config.activation, config.key_k)
            jobs.append(Step1Job(layer, name, config, query, key).to(self.device))
        return jobs

    def _folder(self, job: Job) -> Path:
        return layer_folder(self.out / job.variant, job.layer)

    def _step1_jobs(self, parts: Sequence[Part]) -> list[Step1Job]:
        jobs = []
        for layer in dict.fromkeys(layer for layer, _ in parts):
            statistics = side_statistics(self.sample(layer, "train", self._sample_tokens()))
            for name in (name for other, name in parts if other == layer):
                config = self.names[name].dictionary
                query, key = (
                    start(config, side, statistics[side], f"layer {layer}", self.config.training.seed)
                    for side in ("query", "key")
                )
                jobs.append(Step1Job(layer, name, config, query, key))
        return jobs

    def _given_jobs(self, parts: Sequence[Part]) -> list[Job]:
        """Features that are given, of which there is nothing to train."""
        jobs = []
        for layer, _ in parts:
            sides = self.given[layer]
            sample = self.sample(layer, "train", self._sample_tokens())
            self.reporter.message(f"layer {layer}: {in_brief(sides, sample)}")
            jobs.append(Job(layer, "", *sides))
        return jobs

    def _steer(self, jobs: Sequence[Step1Job]) -> None:
        """Have step 1 find the k of both sides for what the target leaves it of the bounds."""
        target, bounds = self.config.target, bounds_of(self.config)
        assert bounds is not None
        for job in jobs:
            x_nD = self._sample_x(job.layer)
            batches = self._validation(STEER_TOKENS)
            kl = step1_kl(bounds, target.share, job.query, job.key, x_nD, self._site(job.layer), batches)
            job.steering = Steering(kl, self.config.training)
            self.reporter.message(f"{_title(job)}: step 1 is steered to a pattern KL of {kl:.4f}")

    def _validation(self, tokens: int) -> list[Batch]:
        return [b.to(self.device) for b in self.text("validation", repeat=False, max_tokens=tokens)]

    def _sample_x(self, layer: int) -> torch.Tensor:
        """Inputs of a layer's attention on the sample of training text, [n, D]."""
        sample = self.sample(layer, "train", self._sample_tokens())
        return torch.cat([i.x_BTD[i.real_BT].float() for i in sample])

    def _sample_tokens(self) -> int:
        return max(START_TOKENS, self.config.pairs.importance_tokens)

    def _n_heads(self, layer: int) -> int:
        return self._site(layer).shape["N"]

    def _site(self, layer: int) -> AttentionSite:
        return next(s for s in self.sites if s.layer == layer)

    def _empty_job(self, job: Step1Job) -> Any:
        """A step 2 job without content, for a checkpoint to fill."""
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        if self.config.pairs.method == "mask":
            return self._mask_job(job, (none, none))
        return self._map_job(job, Pairs.of(none, none, none, job.query.width, job.key.width, self._n_heads(job.layer)))

    def _mask_job(self, job: Job, live: tuple[torch.Tensor, torch.Tensor]) -> MaskJob:
        pairs = self.config.pairs
        heads = self._n_heads(job.layer)
        return MaskJob(
            job.layer, job.variant, job.query, job.key, live, heads,
            sparsity=pairs.mask_sparsity, rate=pairs.strength_rate,
        )  # fmt: skip

    def _map_job(self, job: Job, pairs: Pairs) -> MapJob:
        settings, dictionary = self.config.pairs, self.names[job.variant].dictionary
        rate = settings.learning_rate if settings.method == "tune" else 0.0
        return MapJob(
            job.layer, job.variant, job.query, job.key, pairs,
            dictionary_rate=rate, strength_rate=settings.strength_rate,
            sparsity=dictionary.sparsity or 0.0, dropped_sparsity=settings.dropped_sparsity,
        )  # fmt: skip

    def _warn_of_masks(self, jobs: Sequence[Step1Job]) -> None:
        """Say before step 1 is trained what only the features that live after it will decide."""
        shapes = [(job.query.width + 1, job.key.width + 1, self._n_heads(job.layer)) for job in jobs]
        if said := shortfall(shapes, self.device):
            self.reporter.message(f"--pairs.method mask may be refused after step 1: if every feature lives, {said}")

    def _mask_jobs(self, jobs: Sequence[Job]) -> list[MaskJob]:
        """A mask over the features of each job that fire; `UserError` where the masks do not fit side by side."""
        samples = (self.sample(job.layer, "train", self._sample_tokens()) for job in jobs)
        live = [firing_features(sample, job.query, job.key) for job, sample in zip(jobs, samples, strict=True)]
        shapes = [(len(q), len(k), self._n_heads(job.layer)) for job, (q, k) in zip(jobs, live, strict=True)]
        require_memory(shapes, self.device, others_done=self.plan.done > 0)
        return [self._mask_job(job, firing) for job, firing in zip(jobs, live, strict=True)]

    def _next_job(self, job: Job, phase: Phase) -> MapJob:
        """The job of a phase from the one before: ranked from step 1's dictionaries, or pruned further."""
        if isinstance(job, MapJob):
            assert job.worth_P is not None
            job.keep(top(job.worth_P, phase.count))
            return job
        chosen = self._ranked(job, phase.count)
        chosen.keep(torch.arange(len(chosen.pairs), device=self.device))
        chosen.train()
        return chosen

    def _ranked(self, job: Job, count: int) -> MapJob:
        """The most important pairs between a job's dictionaries: `count`, or the fewest under the KL bound."""
        settings = self.config.pairs
        sample = self.sample(job.layer, "train", self._sample_tokens())
        pairs, importance = rank_pairs(sample, job.query, job.key, count, rough=settings.method == "tune")
        if settings.max_kl is not None and settings.method != "tune":
            validation = self.sample(job.layer, "validation", settings.validation_tokens)

            def kl_at(n: int) -> float:
                return map_kl(self._map_job(job, pairs.take(top(importance, n))), validation)

            n, kl = fewest(len(pairs), settings.max_kl, kl_at)
            self.reporter.message(f"{_title(job)}: {n:,} pairs, {Cost(kl).said(Bounds(settings.max_kl))}")
            pairs = pairs.take(top(importance, n))
        return self._map_job(job, pairs)

    def _judge(self, jobs: list[Any], phase: Phase, stopped: list[str]) -> tuple[list[Any], list[str]]:
        """After a phase of tune under bounds: write what satisfies them, stop what does not."""
        bounds = bounds_of(self.config)
        if bounds is None or not phase.judged:
            return jobs, stopped
        going, batches = [], self._validation(self.config.pairs.validation_tokens)
        for job in jobs:
            made = self._decomposition(job.eval())
            cost = cost_of(made, self._site(job.layer), batches, bounds)
            good = cost.within(bounds)
            if good or not phase.spare:  # at the first one there is nothing larger to fall back to
                made.save(self._folder(job))
                self.reporter.message(f"{_title(job)}: {len(job.pairs):,} pairs, {cost.said(bounds)}")
            if good:
                going.append(job.train())
        return going, [*stopped, *(j.name for j in jobs if j not in going)]

    def _importance(self, job: MapJob, sample: list[AttentionInputs], *, rough: bool = False) -> torch.Tensor:
        """Importance of a job's pairs at their present strengths, nats [P]."""
        training = job.training
        plain = pair_importance(job.pairs, sample, job.query, job.key, rough=rough)
        job.train(training)
        return plain * job.factor_P.detach().square()

    def _selected(self, job: Job) -> MapJob:
        """What a run ends with."""
        if isinstance(job, MapJob):
            return job
        if isinstance(job, MaskJob):
            pairs, mask = job.kept()
            chosen = self._map_job(job, pairs)
            with torch.no_grad():
                chosen.factor_P.copy_(mask)
            sample = self.sample(job.layer, "train", self._sample_tokens())
            chosen.keep(top(self._importance(chosen, sample), self.config.pairs.count))
            return chosen
        return self._ranked(job, self.config.pairs.count)

    # Writing

    def _write(self, job: MapJob) -> None:
        self._decomposition(job).save(self._folder(job))

    @torch.no_grad()
    def _decomposition(self, job: MapJob) -> Decomposition:
        site = self._site(job.layer)
        sample = self.sample(job.layer, "train", self._sample_tokens())
        reads = self.given[job.layer][0].reading if self.given else None
        shape = SiteShape(**site.shape, rotary=site.layout is not None, reads=reads)
        weights = weight_strength(job.pairs, rows(job.query, shape.N), rows(job.key, shape.G))
        return Decomposition(
            job.layer, shape, job.query, job.key, job.pairs,
            job.strengths(sample[0].rule).detach(), weights, self._importance(job, sample), self.names[job.variant],
        )  # fmt: skip

    def _calibrate(self, job: Job) -> None:
        """Thresholds as they are after the last step, on training text."""
        x_nD = self._sample_x(job.layer)
        for transcoder in (job.query, job.key):
            transcoder.calibrate(x_nD)

    def _write_step1(self, job: Step1Job, tuned: bool) -> None:
        """Step 1's dictionaries beside the ones that tuning will change, so that both can be measured."""
        path = self._folder(job) / "step1.safetensors"
        if tuned:
            save_transcoders(path, job.query, job.key)
        else:  # of a run that was to tune them when it was stopped
            path.unlink(missing_ok=True)
