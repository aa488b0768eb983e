"""Every method on planted worlds, in one table: features found, pairs found, pattern KL against pair count.

All dictionaries train on the same batches, which hold no truth; the truth is met in `judge` alone. A world with a seed
is a task of its own in a process of its own with one thread, so the figures do not depend on how many run at a time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...config import DictionaryConfig, RunConfig, TrainingConfig
from ...decomposition import Decomposition, SiteShape
from ...dictionary import SparseTranscoder
from ...pairs.pair_map import with_bias
from ...pairs.tune import MapJob
from ...pattern import AttentionInputs, HeadPatterns
from ...training.job import Job
from ...training.recipes import resolved
from ...training.step1 import Step1Job
from ..controls import shuffled_pairs, untrained
from ..patterns import KLScore, uniform_log_pattern
from ..stability import Overlap
from ..workbench import Workbench
from ..workers import worker_pool
from .scores import identities, match_activations, match_rows, pair_scores, predictions
from .sizes import Size
from .world import EVENT, LAYER, Planted, PlantedStream

MULTIPLES = (1, 2, 4)  # pairs kept, as multiples of the number of true pairs
JUDGED = 2  # the multiple whose map the pair scores are of
WORLDS = {"plain": False, "rotary": True}


class PlantedBench(Workbench):
    """One world, what is trained on it, and the truth that judges it."""

    def __init__(self, size: Size, world: Planted) -> None:
        self.size, self.world = size, world
        batches = range(math.ceil(size.sample_tokens / size.batch_tokens))
        sample = [world.batch("train", index, size.batch_tokens)[1] for index in batches]
        super().__init__(
            LAYER,
            SiteShape(**world.shape),
            sample,
            lambda: PlantedStream(world, size.batch_tokens),
            TrainingConfig(tokens=size.tokens, seed=world.seed, checkpoint_steps=10**9),
        )
        count = math.ceil(size.heldout_tokens / size.batch_tokens)
        self.heldout = [world.batch("heldout", index, size.batch_tokens) for index in range(count)]
        self.counts = [m * len(world.pairs) for m in MULTIPLES]

    @torch.no_grad()
    def judge(self, dec: Decomposition, worth_P: Tensor | None = None) -> dict[str, Any]:
        """Held-out figures of a decomposition; `worth_P`: its pairs' importance, where it has pairs."""
        sides = {"query": dec.query, "key": dec.key}
        overlaps = {name: Overlap.empty(self.world.bos + 2, side.width) for name, side in sides.items()}
        active, tokens = dict.fromkeys(sides, 0.0), 0
        for acts, inputs in self.heldout:
            true = with_bias(acts).flatten(0, 1)
            tokens += len(true)
            for name, side in sides.items():
                learned = side.encode(inputs.x_BTD).flatten(0, 1)
                overlaps[name].add(true, learned)
                active[name] += float((learned > 0).sum())
        out: dict[str, Any] = {"kl": self.kl(dec.all_by_head if worth_P is None else dec.kept_by_head)}
        for name, side in sides.items():
            live = overlaps[name].other > 0
            out[f"l0_{name}"] = active[name] / tokens
            out[f"live_{name}"] = int(live.sum())
            out[f"match_{name}"] = float(match_activations(self.world, name, overlaps[name]).mean())
            out[f"match_rows_{name}"] = float(match_rows(self.world, name, side, live).mean())
        for score in ("match", "match_rows"):
            out[score] = (out[f"{score}_query"] + out[f"{score}_key"]) / 2
        if worth_P is not None:
            named = (identities(overlaps[name]) for name in sides)
            out |= pair_scores(self.world, predictions(dec.pairs, worth_P, self._signs(dec), *named))
            out["pairs"] = len(dec.pairs)
        return out

    def _signs(self, dec: Decomposition) -> Tensor:
        """Strengths whose sign is that of the scores' (with a rotary embedding a strength is a factor)."""
        return dec.strength_P * dec.weight_strength_P if self.shape.rotary else dec.strength_P

    def kl(self, log_pattern: Callable[[AttentionInputs], HeadPatterns]) -> float:
        """Mean pattern KL on held-out tokens, nats."""
        score = KLScore()
        for _, inputs in self.heldout:
            score.add(inputs, log_pattern(inputs))
        return score.kl.mean

    def judge_map(self, job: MapJob) -> dict[str, Any]:
        """All figures of a map."""
        return self.judge(self.decomposition(job), self.importance(job))

    def kl_map(self, job: MapJob) -> dict[str, Any]:
        """The pattern KL of a map alone: importance, with a rotary embedding, takes longer than all else."""
        return {"kl": self.kl(self.decomposition(job).kept_by_head), "pairs": len(job.pairs)}

    @torch.no_grad()
    def ceiling(self) -> dict[str, Any]:
        """What the world allows: a uniform pattern, the truth without interference, and `oracle` below."""
        score = KLScore()
        for acts, inputs in self.heldout:
            score.add(inputs, self.world.log_pattern_true(acts, inputs))
        oracle = oracle_job(self.world)
        figures = self.judge_map(oracle)
        return {"uniform_kl": self.kl(uniform_log_pattern), "truth_kl": score.kl.mean, "oracle": figures}


def oracle_job(world: Planted) -> MapJob:
    """The true pairs on features read by the layer's own duals, on where they pass half their mean magnitude.

    No method can be expected to beat it in features by much: one linear readout and one threshold, as a transcoder has.
    """
    sides = []
    for rows, readers in ((world.rows_q, world.pairs.query_P), (world.rows_k, world.pairs.key_P)):
        side = SparseTranscoder(world.config.width, world.bos + 1, rows[0].numel(), "jumprelu", 1)
        with torch.no_grad():
            side.W_enc.copy_(world.readout_FD.T)
            side.b_enc.copy_(world.constant_F)
            side.W_dec.copy_(rows[:-1].flatten(1))
            side.b_out.copy_(rows[-1].flatten())
            used = torch.zeros(world.bos + 2, dtype=torch.bool)
            used[readers] = True
            half = world.scale_F * sum(EVENT) / 4 * side.norms()
            side.threshold.copy_(torch.where(used[:-1], half, torch.inf))
        sides.append(side.eval().requires_grad_(False))
    query, key = sides
    return MapJob(LAYER, "oracle", query, key, world.pairs, dictionary_rate=0.0, strength_rate=0.0).eval()


def dictionaries(size: Size) -> dict[str, tuple[DictionaryConfig, tuple[str, ...], bool]]:
    """The dictionaries of the table: configuration, ways to choose their pairs, and whether the mask is one of them."""

    def config(**choices: Any) -> DictionaryConfig:
        return DictionaryConfig(width=size.width, k=size.k, **choices)

    methods = ("importance", "refit", "tune")
    return {
        "seed": (config(recipe="seed", sparsity=size.seed_sparsity), methods[:2], True),
        "default": (config(), methods, True),
        "topk": (config(activation="topk"), methods, False),
        "jumprelu": (config(activation="jumprelu"), methods, False),
    }


def rows_of(bench: PlantedBench) -> Iterator[dict[str, Any]]:
    """Every row of one world's table: a dictionary with all of its pairs, or a map that keeps some."""
    found = {}
    for name, (config, methods, masked) in dictionaries(bench.size).items():
        job = bench.step1(name, config)
        seconds = bench.fit([job], bench.size.tokens)
        found[name] = bench.judge(bench.decomposition(job))
        yield {"dictionary": name, "method": "all pairs", "seconds": seconds, **found[name]}
        yield from _pruned(bench, name, job, methods, (bench.size.mask_sparsity,) if masked else ())
    l0 = {side: found["default"][f"l0_{side}"] for side in ("query", "key")}
    for name, job in control_jobs(bench, l0).items():
        yield {"dictionary": name, "method": "all pairs", "seconds": 0.0, **bench.judge(bench.decomposition(job))}
        yield from _pruned(bench, name, job, ("importance", "refit"), ())


def _pruned(
    bench: PlantedBench, name: str, job: Job, methods: Sequence[str], masks: Sequence[float]
) -> Iterator[dict[str, Any]]:
    for method, count, made, seconds in bench.prune(job, bench.counts, bench.size.pair_tokens, methods, masks):
        if count not in bench.counts:
            continue  # the whole of what a mask left
        multiple = count // len(bench.world.pairs)
        row = {"dictionary": name, "seconds": seconds, "multiple": multiple}
        plain = f"mask{' + refit' * method.endswith('refit')}" if method.startswith("mask") else method
        figures = bench.judge_map(made) if multiple == JUDGED else bench.kl_map(made)
        yield {**row, "method": plain, **figures}
        if (name, method, multiple) == ("default", "prune and tune", JUDGED):
            dec = bench.decomposition(made)
            pairs, strength = shuffled_pairs(dec)
            dec = replace(dec, pairs=pairs, strength_P=strength)
            yield {**row, "method": "shuffled", "kl": bench.kl(dec.kept_by_head), "pairs": len(pairs)}


def control_jobs(bench: PlantedBench, l0: dict[str, float]) -> dict[str, Job]:
    """The untrained controls at the L0 of `default`."""
    config = resolved(DictionaryConfig(width=bench.size.width, k=bench.size.k), bench.config)
    plain = bench.decomposition(bench.step1("controls", config))
    plain = replace(plain, config=RunConfig(training=bench.config))
    made = untrained(plain, bench.sample, l0)
    return {name: Step1Job(LAYER, name, config, dec.query, dec.key).eval() for name, dec in made.items()}


# The whole benchmark


def run_world(size: Size, seed: int, rotary: bool) -> dict[str, Any]:
    """One world: its ceiling and every row."""
    torch.set_num_threads(1)
    bench = PlantedBench(size, Planted(size.of(rotary), seed))
    world = "rotary" if rotary else "plain"
    return {
        "world": world, "seed": seed, "true_pairs": len(bench.world.pairs), "ceiling": bench.ceiling(),
        "rows": list(rows_of(bench)),
    }  # fmt: skip


def run_planted(size: Size, seeds: Sequence[int], processes: int) -> Iterator[dict[str, Any]]:
    """The benchmark's figures (plain values, stable keys) after each world; the last are those of all of them."""
    tasks = [(seed, rotary) for seed in seeds for rotary in WORLDS.values()]
    worlds = []
    with worker_pool(processes) as pool:
        for future in [pool.submit(run_world, size, *task) for task in tasks]:
            worlds.append(future.result())
            common = {"seeds": list(seeds), "multiples": list(MULTIPLES), "worlds_left": len(tasks) - len(worlds)}
            yield {**common, "table": table(worlds), "worlds": worlds}


def table(worlds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by world, dictionary, method and pairs kept; each figure with its mean and spread over seeds."""
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for world in worlds:
        oracle = {"dictionary": "oracle", "method": "true pairs", **world["ceiling"]["oracle"]}
        bounds = [
            {"dictionary": name, "method": "", "kl": world["ceiling"][f"{name}_kl"]} for name in ("uniform", "truth")
        ]
        for row in [*bounds, oracle, *world["rows"]]:
            key = (world["world"], row["dictionary"], row["method"], row.get("multiple"))
            grouped.setdefault(key, []).append(row)
    rows = []
    for (world, dictionary, method, multiple), found in grouped.items():
        names = [n for n, value in found[0].items() if isinstance(value, (int, float)) and n != "multiple"]
        figures = {name: spread([row[name] for row in found]) for name in names}
        rows.append(
            {"world": world, "dictionary": dictionary, "method": method, "multiple": multiple, "figures": figures}
        )
    return rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (none with a single seed) over seeds."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }
