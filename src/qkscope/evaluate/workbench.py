"""Methods side by side on one layer: dictionaries trained on the same batches, and every way to prune their pairs.

What the benchmarks stand on; a run (runner.py) has one method, checkpoints and a folder instead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import DictionaryConfig, PairsConfig, RunConfig, TrainingConfig
from ..decomposition import Decomposition, SiteShape
from ..dictionary import SparseTranscoder
from ..pairs.importance import firing_features, pair_importance, rank_pairs
from ..pairs.mask import MaskJob
from ..pairs.pair_map import Pairs, rows, weight_strength
from ..pairs.selection import mattering, top
from ..pairs.tune import MapJob
from ..pattern import AttentionInputs
from ..training.job import Job
from ..training.loop import Logs, train
from ..training.recipes import resolved
from ..training.start import side_statistics, start
from ..training.step1 import Step1Job
from ..training.stream import Stream

MASK = "mask λ="  # what a mask's method begins with; its penalty follows
Pruned = tuple[str, int, MapJob, float]  # method, pairs asked for, map, processor seconds


class Workbench:
    """One layer, a sample of what it saw, and a training stream that every method reads from its beginning."""

    def __init__(
        self,
        layer: int,
        shape: SiteShape,
        sample: Sequence[AttentionInputs],
        stream: Callable[[], Stream],
        config: TrainingConfig,
        pairs_config: PairsConfig | None = None,
    ) -> None:
        self.layer, self.shape, self.sample, self.stream, self.config = layer, shape, list(sample), stream, config
        self.pairs_config = pairs_config or PairsConfig()
        self.statistics = side_statistics(self.sample)
        self.x_nD = torch.cat([inputs.x_BTD[inputs.real_BT].float() for inputs in self.sample])

    def step1(self, name: str, config: DictionaryConfig) -> Step1Job:
        """Untrained dictionaries."""
        config = resolved(config, self.config)
        query, key = (start(config, s, self.statistics[s], name, self.config.seed) for s in ("query", "key"))
        return Step1Job(self.layer, name, config, query, key)

    def fit(self, jobs: Sequence[Job], tokens: int) -> float:
        """Train jobs on the same batches and set their thresholds; processor seconds."""
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            logs = Logs({job.name: Path(folder) / f"{i}.jsonl" for i, job in enumerate(jobs)}, lambda line: None)
            path = Path(folder) / "checkpoint.safetensors"
            train("bench", jobs, self.stream(), tokens, self.config, saved=None, checkpoint_path=path, logs=logs)
        for job in jobs:
            if not isinstance(job, MaskJob) and getattr(job, "dictionary_rate", 1) > 0:
                job.query.calibrate(self.x_nD)
                job.key.calibrate(self.x_nD)
            job.eval()
        return time.process_time() - began

    def map_job(self, name: str, job: Job, pairs: Pairs, *, tuned: bool = False) -> MapJob:
        """A sparse map on its own copy of a job's dictionaries; `tuned`: they are trained with it."""
        settings, dictionary = self.pairs_config, getattr(job, "config", DictionaryConfig())
        return MapJob(
            self.layer, name, *self.copies(job), pairs,
            dictionary_rate=settings.learning_rate if tuned else 0.0, strength_rate=settings.strength_rate,
            sparsity=dictionary.sparsity or 0.0, dropped_sparsity=settings.dropped_sparsity,
        )  # fmt: skip

    def copies(self, job: Job) -> tuple[SparseTranscoder, SparseTranscoder]:
        """Independent copies of a job's dictionaries."""
        query, key = (copy_of(t, self.statistics[s].metric_NHH) for s, t in (("query", job.query), ("key", job.key)))
        return query, key

    @torch.no_grad()
    def decomposition(self, job: Job) -> Decomposition:
        """A job as a decomposition, for its patterns: a step 1 job has no pairs, and no pair has its importance."""
        n = self.shape.N
        if isinstance(job, MapJob):
            pairs, strength = job.pairs, job.strengths(self.sample[0].rule)
            weight = weight_strength(pairs, rows(job.query, n), rows(job.key, self.shape.G))
        else:
            none = torch.zeros(0, dtype=torch.int64)
            pairs = Pairs.of(none, none, none, job.query.width, job.key.width, n)
            strength = weight = torch.zeros(0)
        query, key = job.query.eval(), job.key.eval()
        return Decomposition(self.layer, self.shape, query, key, pairs, strength, weight, strength, RunConfig())

    def importance(self, job: MapJob, *, rough: bool = False) -> Tensor:
        """Importance of a map's pairs at their present strengths, nats [P]."""
        plain = pair_importance(job.pairs, self.sample, job.query, job.key, rough=rough)
        return plain * job.factor_P.detach().square()

    # Pairs

    def prune(
        self,
        job: Job,
        counts: Collection[int],
        tokens: int,
        methods: Collection[str] = ("importance", "refit", "tune"),
        mask_sparsity: Sequence[float] = (),
        mask_tokens: int | None = None,
    ) -> Iterator[Pruned]:
        """Every way to prune one pair of dictionaries to each count; fewer pairs where there are no more.

        Every training sees `tokens` (the mask `mask_tokens`, where given), mask + refit twice that, and tune at a count
        before its last one less. A map that tune hands over goes on being trained afterwards: judge it at once.
        """
        ordered = sorted(counts, reverse=True)
        if methods:
            yield from self._ranked(job, ordered, tokens, methods)
        for sparsity in mask_sparsity:
            yield from self._masked(job, ordered, mask_tokens or tokens, sparsity, "refit" in methods)

    def _ranked(self, job: Job, ordered: list[int], tokens: int, methods: Collection[str]) -> Iterator[Pruned]:
        """What begins with the pairs ranked by importance; where tune is all that is wanted, roughly."""
        began, most, rough = time.process_time(), max(ordered[0] * 4, 50_000), set(methods) == {"tune"}
        ranked, worth = rank_pairs(self.sample, job.query.eval(), job.key.eval(), most, rough=rough)
        ranking = time.process_time() - began
        kept = [ranked.take(top(worth, count)) for count in ordered]
        if "importance" in methods:
            for count, pairs in zip(ordered, kept, strict=True):
                yield "importance", count, self.map_job("importance", job, pairs), ranking
        if "refit" in methods:
            refits = [self.map_job(f"refit{i}", job, pairs) for i, pairs in enumerate(kept)]
            took = self.fit(refits, tokens)
            for count, made in zip(ordered, refits, strict=True):
                yield "importance + refit", count, made, ranking + took / len(refits)
        if "tune" in methods:
            tuned, spent = self.map_job("tune", job, ranked, tuned=True), ranking
            for number, count in enumerate([ordered[0] * 2, *ordered]):
                tuned.keep(top(worth, count))
                tuned.train()
                spent += self.fit([tuned], tokens // (len(ordered) + 1))
                worth = self.importance(tuned, rough=True)
                tuned.keep(matter := mattering(worth))
                worth = worth[matter]
                if number:
                    yield "prune and tune", count, tuned, spent

    def _masked(self, job: Job, counts: list[int], tokens: int, sparsity: float, refit: bool) -> Iterator[Pruned]:
        """The published step 2, as it is and cut to each count by importance, and a refit of what each cut leaves."""
        live = firing_features(self.sample, job.query, job.key)
        query, key = self.copies(job)
        mask = MaskJob(self.layer, "mask", query, key, live, self.shape.N, sparsity=sparsity, rate=1e-2)
        took = self.fit([mask], tokens)
        pairs, values = mask.kept()
        worth = pair_importance(pairs, self.sample, query, key, rough=True) * values.square()
        made: dict[int, MapJob] = {}
        for count in dict.fromkeys([len(pairs), *counts]):
            index = top(worth, count)
            made[count] = self.map_job(f"mask{count}", job, pairs.take(index))
            with torch.no_grad():
                made[count].factor_P.copy_(values[index])
            yield f"{MASK}{sparsity:g}", count, made[count], took
        if refit:
            spent = took + self.fit([made[count] for count in counts], tokens) / len(counts)
            for count in counts:
                yield f"{MASK}{sparsity:g} + refit", count, made[count], spent


def copy_of(transcoder: SparseTranscoder, metric_NHH: Tensor | None) -> SparseTranscoder:
    """An independent copy of a dictionary, its metric included."""
    d_in, width = transcoder.W_enc.shape
    other = SparseTranscoder(d_in, width, transcoder.W_dec.shape[1], transcoder.activation, transcoder.k)
    other.to(transcoder.W_enc.device).set_metric(None if transcoder.metric is None else metric_NHH)
    other.load_state_dict(transcoder.state_dict())
    return other
