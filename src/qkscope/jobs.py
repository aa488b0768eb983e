"""What the trainings of a run train: jobs, each made from what its layer saw, or from the job before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .attention import AttentionInputs, AttentionSite
from .config import RunConfig
from .data import Batch, Sequences
from .data.documents import Split
from .decomposition import Decomposition, SiteShape
from .dictionary import SparseTranscoder
from .foreign.carry import Sides, in_brief
from .memory import Part
from .pairs.importance import firing_features, pair_importance, rank_pairs
from .pairs.mask import MaskJob, require_memory, shortfall
from .pairs.pair_map import Pairs, rows, weight_strength
from .pairs.phases import Phase
from .pairs.selection import fewest, map_kl, mattering, top
from .pairs.tune import MapJob
from .progress import Reporter, title
from .target import Bounds, Cost, bounds_of, step1_kl
from .training.job import Job
from .training.start import label_seed, side_statistics, start
from .training.steering import Steering
from .training.step1 import Step1Job
from .training.stream import harvest_finite

START_TOKENS = 8192  # training tokens that a start is fitted to
STEER_TOKENS = 4096  # validation tokens on which a bound on cross-entropy becomes one on KL


class Jobs:
    """Makes the jobs of a run, from its text and its model's layers."""

    def __init__(
        self,
        config: RunConfig,
        names: dict[str, RunConfig],
        sites: Sequence[AttentionSite],
        given: dict[int, Sides],
        reporter: Reporter,
    ) -> None:
        self.config, self.names, self.sites, self.given, self.reporter = config, names, sites, given, reporter
        self.device = next(sites[0].model.parameters()).device
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

    def validation(self, tokens: int) -> list[Batch]:
        return [b.to(self.device) for b in self.text("validation", repeat=False, max_tokens=tokens)]

    def sample(self, layer: int, split: Split = "train", tokens: int | None = None) -> list[AttentionInputs]:
        """What one layer saw on the first tokens of a split, of training text those that a start and a ranking take.

        The last one asked for is kept.
        """
        if self._sample is None or self._sample[0] != (layer, split):
            tokens = tokens or max(START_TOKENS, self.config.pairs.importance_tokens)
            batches = self.text(split, repeat=split == "train", max_tokens=tokens)
            inputs = [harvest_finite(self.site(layer), batch.to(self.device)) for batch in batches]
            self._sample = (layer, split), inputs
        return self._sample[1]

    def _sample_x(self, layer: int) -> torch.Tensor:
        """Inputs of a layer's attention on the sample of training text, [n, D]."""
        return torch.cat([i.x_BTD[i.real_BT].float() for i in self.sample(layer)])

    def site(self, layer: int) -> AttentionSite:
        return next(s for s in self.sites if s.layer == layer)

    def _n_heads(self, layer: int) -> int:
        return self.site(layer).shape["N"]

    # Step 1

    def parts(self) -> list[Part]:
        return [(layer, name) for layer in self.given or (s.layer for s in self.sites) for name in self.names]

    def blank(self, parts: Sequence[Part]) -> list[Any]:
        """Step 1's jobs, or the given features'; for what another process sends to fill."""
        if self.given:
            return [Job(layer, "", *self.given[layer]) for layer, _ in parts]
        jobs = []
        for layer, name in parts:
            d, n, g, h = (self.site(layer).shape[side] for side in "DNGH")
            config = self.names[name].dictionary
            assert config.activation is not None
            query = SparseTranscoder(d, config.width, n * h, config.activation, config.k)
            key = SparseTranscoder(d, config.key_width, g * h, config.activation, config.key_k)
            jobs.append(Step1Job(layer, name, config, query, key).to(self.device))
        return jobs

    def first(self, parts: Sequence[Part]) -> list[Any]:
        """What a pass begins with: step 1's jobs at their start, or features that are given, with nothing to train."""
        jobs: list[Any] = []
        for layer in dict.fromkeys(layer for layer, _ in parts):
            sample = self.sample(layer)
            if self.given:
                self.reporter.message(f"layer {layer}: {in_brief(self.given[layer], sample)}")
                jobs.append(Job(layer, "", *self.given[layer]))
                continue
            statistics = side_statistics(sample)
            for name in (name for other, name in parts if other == layer):
                config = self.names[name].dictionary
                query, key = (
                    start(config, side, statistics[side], f"layer {layer}", self.config.training.seed)
                    for side in ("query", "key")
                )
                jobs.append(Step1Job(layer, name, config, query, key))
        return jobs

    def steer(self, jobs: Sequence[Step1Job]) -> None:
        """Have step 1 find the k of both sides for what the target leaves it of the bounds."""
        target, bounds = self.config.target, bounds_of(self.config)
        assert bounds is not None
        for job in jobs:
            x_nD = self._sample_x(job.layer)
            batches = self.validation(STEER_TOKENS)
            kl = step1_kl(bounds, target.share, job.query, job.key, x_nD, self.site(job.layer), batches)
            job.steering = Steering(kl, self.config.training)
            self.reporter.message(f"{title(job.layer, job.variant)}: step 1 is steered to a pattern KL of {kl:.4f}")

    def calibrate(self, job: Job) -> None:
        """Thresholds as they are after the last step, on training text."""
        x_nD = self._sample_x(job.layer)
        for transcoder in (job.query, job.key):
            transcoder.calibrate(x_nD)

    # Step 2

    def empty(self, job: Job) -> Any:
        """A step 2 job without content, for a checkpoint to fill."""
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        if self.config.pairs.method == "mask":
            return self._mask(job, (none, none))
        return self._map(job, Pairs.of(none, none, none, job.query.width, job.key.width, self._n_heads(job.layer)))

    def _mask(self, job: Job, live: tuple[torch.Tensor, torch.Tensor]) -> MaskJob:
        pairs = self.config.pairs
        heads = self._n_heads(job.layer)
        return MaskJob(
            job.layer, job.variant, job.query, job.key, live, heads,
            sparsity=pairs.mask_sparsity, rate=pairs.strength_rate,
        )  # fmt: skip

    def _map(self, job: Job, pairs: Pairs) -> MapJob:
        settings, dictionary = self.config.pairs, self.names[job.variant].dictionary
        rate = settings.learning_rate if settings.method == "tune" else 0.0
        return MapJob(
            job.layer, job.variant, job.query, job.key, pairs,
            dictionary_rate=rate, strength_rate=settings.strength_rate,
            sparsity=dictionary.sparsity or 0.0, dropped_sparsity=settings.dropped_sparsity,
        )  # fmt: skip

    def warn_of_masks(self, jobs: Sequence[Step1Job]) -> None:
        """Say before step 1 is trained what only the features that live after it will decide."""
        shapes = [(job.query.width + 1, job.key.width + 1, self._n_heads(job.layer)) for job in jobs]
        if said := shortfall(shapes, self.device):
            self.reporter.message(f"--pairs.method mask may be refused after step 1: if every feature lives, {said}")

    def masks(self, jobs: Sequence[Job], *, others_done: bool) -> list[MaskJob]:
        """A mask over the features of each job that fire; `UserError` where the masks do not fit side by side."""
        live = [firing_features(self.sample(job.layer), job.query, job.key) for job in jobs]
        shapes = [(len(q), len(k), self._n_heads(job.layer)) for job, (q, k) in zip(jobs, live, strict=True)]
        require_memory(shapes, self.device, others_done=others_done)
        return [self._mask(job, firing) for job, firing in zip(jobs, live, strict=True)]

    def following(self, job: Job, phase: Phase) -> MapJob:
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
        pairs, importance = rank_pairs(
            self.sample(job.layer), job.query, job.key, count, rough=settings.method == "tune"
        )
        if settings.max_kl is not None and settings.method != "tune":
            validation = self.sample(job.layer, "validation", settings.validation_tokens)

            def kl_at(n: int) -> float:
                return map_kl(self._map(job, pairs.take(top(importance, n))), validation)

            n, kl = fewest(len(pairs), settings.max_kl, kl_at)
            self.reporter.message(
                f"{title(job.layer, job.variant)}: {n:,} pairs, {Cost(kl).said(Bounds(settings.max_kl))}"
            )
            pairs = pairs.take(top(importance, n))
        return self._map(job, pairs)

    def weigh(self, job: MapJob, *, rough: bool) -> None:
        """Find what each pair of a trained map is worth, and drop those that are worth nothing."""
        worth_P = self._importance(job, rough=rough)
        job.keep(matter := mattering(worth_P))
        job.worth_P = worth_P[matter]

    def _importance(self, job: MapJob, *, rough: bool = False) -> torch.Tensor:
        """Importance of a job's pairs at their present strengths, nats [P]."""
        training = job.training
        plain = pair_importance(job.pairs, self.sample(job.layer), job.query, job.key, rough=rough)
        job.train(training)
        return plain * job.factor_P.detach().square()

    def selected(self, job: Job) -> MapJob:
        """What a run ends with."""
        if isinstance(job, MapJob):
            return job
        if isinstance(job, MaskJob):
            pairs, mask = job.kept()
            chosen = self._map(job, pairs)
            with torch.no_grad():
                chosen.factor_P.copy_(mask)
            chosen.keep(top(self._importance(chosen), self.config.pairs.count))
            return chosen
        return self._ranked(job, self.config.pairs.count)

    @torch.no_grad()
    def decomposition(self, job: MapJob) -> Decomposition:
        site = self.site(job.layer)
        reads = self.given[job.layer][0].reading if self.given else None
        shape = SiteShape(**site.shape, rotary=site.layout is not None, reads=reads)
        weights = weight_strength(job.pairs, rows(job.query, shape.N), rows(job.key, shape.G))
        strengths = job.strengths(self.sample(job.layer)[0].rule).detach()
        return Decomposition(
            job.layer, shape, job.query, job.key, job.pairs,
            strengths, weights, self._importance(job), self.names[job.variant],
        )  # fmt: skip
