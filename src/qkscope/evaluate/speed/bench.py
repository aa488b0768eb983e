"""Every part of a run at one shape, beside the published procedure: what is measured, and in which turns."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ...config import Dtype
from ...data.sequences import Batch
from ...decomposition import Decomposition
from ...dictionary import SparseTranscoder
from ...pairs.active import Active, read_width
from ...pairs.importance import firing_features, rank_pairs
from ...pairs.mask import MaskJob, shortfall
from ...pairs.pair_map import Pairs
from ...pairs.selection import map_kl, top
from ...pattern import AttentionInputs
from ...tables.examples import Examples
from ...training.loop import FLOOR
from ...training.recipes import RECIPES
from ...training.step1 import Step1Job
from ...training.stream import Reused
from ..measure import CURVE, Sources, measure
from ..report import figures
from . import published, work
from .measure import Ceiling, by_processor, in_turns, timed
from .race import race
from .step import Steps
from .work import Shape, Work
from .world import RandomText, Size, World, job_of

VARIANTS = 5  # patterns that the report puts into the model, one at a time
MASK_SPARSITY, MASK_RATE = 1e-6, 1e-2
SEED, DEFAULT, THEIRS = "step 1, seed", "step 1, default", "published step 1"
MASK, THEIR_MASK = "mask", "published mask"
REUSED, HELD = ", reuse ", 2  # after a name: steps a batch; batches that are held meanwhile
AT_ONCE = 8  # steps that are timed together on a GPU
PLAIN: Dtype = "float32"


@dataclass(frozen=True)
class Way:
    """A part of a run: what is done, to how many tokens, and what that takes."""

    act: Callable[[], object]
    tokens: int
    work: Work


def several(way: Way, device: torch.device) -> Way:
    """On a GPU as many of a step as its host runs ahead of: waiting for the last one is then little of the time."""
    if device.type == "cpu":
        return way

    def act() -> None:
        for _ in range(AT_ONCE):
            way.act()  # nothing that comes of it is held

    return Way(act, way.tokens * AT_ONCE, way.work * AT_ONCE)


def run_speed(size: Size, device: torch.device, dtype: Dtype = "float32") -> Iterator[dict[str, Any]]:
    """The figures so far, after each group of parts. `dtype`: of our products; the published ones are float32."""
    dtypes: list[Dtype] = [dtype] if dtype == PLAIN else [dtype, PLAIN]
    ceilings = {name: Ceiling.measured(device, name) for name in dtypes}
    world = World(size, device, dtype=dtype)
    found: dict[str, Any] = {
        "machine": machine(device, dtype),
        "shape": {**vars(size), "layer": size.layer},
        "parts": {},
        "load": load(),
    }
    counted: dict[str, tuple[int, Work]] = {}
    for group in (step1_ways, pair_ways):
        ways = group(world)
        counted |= {name: (way.tokens, way.work) for name, way in ways.items()}
        timings = in_turns({name: way.act for name, way in ways.items()}, size.repeats, device)
        ways.clear()  # dictionaries with their gradients and moments
        ceilings = {name: ceilings[name].over(Ceiling.measured(device, name)) for name in dtypes}
        found["parts"] |= {name: timing.figures(device) for name, timing in timings.items()}
        for name, part in found["parts"].items():  # by the highest ceiling that the machine has shown so far
            part |= _rates(part["seconds"], *counted[name], ceilings[PLAIN if name.startswith("published") else dtype])
        found["ceiling"] = {
            "flops_per_s": {name: ceiling.flops for name, ceiling in ceilings.items()},
            "bytes_per_s": max(ceiling.bytes for ceiling in ceilings.values()),
        }
        found["ratios"] = ratios(found["parts"])
        found["load"] += load()
        yield found
    found["whole_mask"] = _whole_mask(world)
    yield found
    del world
    found["race"] = race(size.mask_steps)
    found["load"] += load()
    yield found


def machine(device: torch.device, dtype: Dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "dtype": dtype, "seconds_are": "processor" if by_processor(device) else "wall",
    }  # fmt: skip


def load() -> list[float]:
    """Mean number of processes that wanted to run in the last minute, where the system says."""
    return [round(os.getloadavg()[0], 2)] if hasattr(os, "getloadavg") else []


def _rates(seconds: float, tokens: int, done: Work, ceiling: Ceiling) -> dict[str, float]:
    flops, moved = done.flops / seconds, done.bytes / seconds
    return {
        "tokens": tokens, "tokens_per_s": tokens / seconds,
        "flops": done.flops, "flops_per_s": flops, "of_ceiling_flops": flops / ceiling.flops,
        "bytes": done.bytes, "bytes_per_s": moved, "of_ceiling_bytes": moved / ceiling.bytes,
    }  # fmt: skip


def ratios(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How many times as fast ours is on the same layers, a token that is learned from, turn by turn."""
    found = {}
    for ours, part in parts.items():
        theirs = {SEED: THEIRS, MASK: THEIR_MASK}.get(ours, ours.replace(DEFAULT, THEIRS).partition(REUSED)[0])
        if theirs != ours and theirs in parts:
            turns = zip(parts[theirs]["seconds_all"], part["seconds_all"], strict=True)
            each = [a / b * part["tokens"] / parts[theirs]["tokens"] for a, b in turns]
            found[ours] = {"median": median(each), "range": [min(each), max(each)]}
    return found


def step1_ways(world: World) -> dict[str, Way]:
    """Harvest, and a step of step 1 of one layer and of several: ours in one pass, the published one a pass a layer."""
    size, device = world.size, world.device
    width, dense, n = (size.width, size.width), device.type != "cpu", size.step_tokens
    sparsity, rate = (RECIPES["seed"][name] for name in ("sparsity", "learning_rate"))

    def jobs(recipe: str, layers: Sequence[int]) -> list[Step1Job]:
        return [job_of(i, s, recipe, width, size.k) for i, s in zip(layers, world.statistics(layers), strict=True)]

    def steps(recipe: str, layers: Sequence[int], reuse: int = 1) -> Way:
        """As many steps as a batch is learned from; it is one of few that are held, so that none is in the cache."""
        text = RandomText(world, [world.sites[layer] for layer in layers], n)
        stream = Reused(text, reuse, HELD, math.inf) if reuse > 1 else text
        shape, batches = shape_of(size, width, below=layers[-1]), HELD if reuse > 1 else 1
        done = work.step1(shape, len(layers), default=recipe == "default", dense=dense, steps=reuse)
        turn = reuse * batches
        act = Steps(jobs(recipe, layers), stream, device, dtype=world.dtype, turn=turn).take
        return Way(act, n * turn, done * batches)

    def published_steps(layers: Sequence[int]) -> Way:
        done = sum((work.published_step1(shape_of(size, width, below=layer)) for layer in layers), Work())
        plain = [
            published.Step1(world.plain[job.layer], *_sides(job, size), sparsity=sparsity, rate=FLOOR * rate)
            for job in jobs("seed", layers)
        ]
        return Way(lambda: [step1.step(world.text(n).tokens_BT) for step1 in plain], n, done)

    one = [size.layer]
    together: dict[str, Sequence[int]] = {f"layers {' '.join(map(str, size.layers))}": size.layers}
    if size.all_layers:
        together[f"all {size.model_layers}"] = range(size.model_layers)
    ways = {
        "harvest": Way(lambda: world.read(world.text(n)), n, work.harvest(shape_of(size, width))),
        DEFAULT: steps("default", one),
        SEED: steps("seed", one),
        THEIRS: published_steps(one),
        **{f"{DEFAULT}{REUSED}{reuse}": steps("default", one, reuse) for reuse in (2, 4)},
        **{f"{DEFAULT}, {name}": steps("default", layers) for name, layers in together.items()},
        **{f"{THEIRS}, {name}": published_steps(layers) for name, layers in together.items()},
    }
    return {name: several(way, device) for name, way in ways.items()}


def pair_ways(world: World) -> dict[str, Way]:
    """All that follows step 1, on dictionaries of the whole width; the masks on as many features as lived."""
    size, device = world.size, world.device
    width, dense, n = (size.width, size.width), device.type != "cpu", size.step_tokens
    n_sample, n_judged = size.whole(size.sample_tokens), size.whole(size.judged_tokens)
    bench, statistics = world.workbench(n_sample), world.statistics([size.layer])[0]
    job = job_of(world.site.layer, statistics, "default", width, size.k).eval()
    for side in (job.query, job.key):
        side.calibrate(statistics["query"].x_nD)
    pairs, worth = rank_pairs(bench.sample, job.query, job.key, size.pairs)
    used, sample_shape = _used(job.key, pairs, bench.sample), shape_of(size, width, tokens=n_sample)
    encoded = read_width(job.query, pairs.queries), read_width(job.key, pairs.keys)
    step_shape, selected_shape, judged_shape = (
        shape_of(size, encoded, len(pairs), used, tokens) for tokens in (n, n_sample, n_judged)
    )
    stream = RandomText(world, [world.site], n)
    refitted, tuned = (bench.map_job(name, job, pairs, tuned=name == "tune") for name in ("refit", "tune"))
    tuned.keep(torch.arange(len(pairs), device=device))  # as a run does: features without a pair go
    tuned_shape = shape_of(size, (tuned.query.width, tuned.key.width), len(pairs), used)
    firing = [len(features) for features in firing_features(bench.sample, job.query, job.key)]
    dec, batch = bench.decomposition(bench.map_job("map", job, pairs)), world.text(n_judged)

    few = job_of(world.site.layer, statistics, "seed", size.live, size.k)
    plain = published.Mask(world.plain[size.layer], *_sides(few, size), sparsity=MASK_SPARSITY, rate=MASK_RATE)
    live = torch.arange(size.live[0] + 1, device=device), torch.arange(size.live[1] + 1, device=device)
    ours = MaskJob(
        world.site.layer, "mask", few.query, few.key, live, size.heads, sparsity=MASK_SPARSITY, rate=MASK_RATE
    )  # fmt: skip
    few_shape = shape_of(size, size.live)
    steps = {
        "refit": Way(Steps([refitted], stream, device, dtype=world.dtype).step, n, work.refit(step_shape)),
        "tune": Way(Steps([tuned], stream, device, dtype=world.dtype).step, n, work.tune(tuned_shape, dense=dense)),
        MASK: Way(Steps([ours], stream, device, dtype=world.dtype).step, n, work.mask(few_shape)),
        THEIR_MASK: Way(lambda: plain.step(world.text(n).tokens_BT), n, work.published_mask(few_shape)),
    }
    return {
        "importance and ranking": Way(
            lambda: rank_pairs(bench.sample, job.query, job.key, size.pairs), n_sample,
            work.importance(sample_shape, (firing[0], firing[1])),
        ),
        "selection, for each count": Way(
            lambda: map_kl(bench.map_job("few", job, pairs.take(top(worth, size.pairs))), bench.sample),
            n_sample, work.selection(selected_shape),
        ),
        **{name: several(way, device) for name, way in steps.items()},
        "evaluation": Way(
            lambda: _evaluate(dec, world, batch, bench.sample),
            n_judged, work.evaluation(judged_shape, size.vocabulary, VARIANTS, len(CURVE)),
        ),
    }  # fmt: skip


def _used(key: SparseTranscoder, pairs: Pairs, sample: list[AttentionInputs]) -> float:
    """Active key features of a token that a head's pairs name, the bias among them; mean over heads."""
    total = tokens = 0
    for inputs in sample:
        fired = Active.read(key, inputs.x_BTD[inputs.real_BT], inputs.real_BT).events.feature_L
        total += sum(int(torch.isin(fired, head.key_C).sum()) for head in pairs.plain_layout.heads)
        tokens += int(inputs.real_BT.sum())
    return total / tokens / pairs.n_heads


@torch.no_grad()
def _evaluate(dec: Decomposition, world: World, batch: Batch, sample: list[AttentionInputs]) -> None:
    examples = Examples(dec, 12, drawn=2, pairs=4)
    figures(dec, measure(dec, world.site, [batch], Sources.of(dec, sample, controls=False), examples))


def _whole_mask(world: World) -> dict[str, Any]:
    """One step of the published mask over all pairs of all features, once and cold; or why it cannot be."""
    size = world.size
    pairs = (size.width + 1) ** 2 * size.heads
    if said := shortfall([(size.width + 1, size.width + 1, size.heads)], world.device):
        return {"pairs": pairs, "skipped": said}
    job = job_of(world.site.layer, world.statistics([size.layer])[0], "seed", (size.width, size.width), size.k)
    mask = published.Mask(world.plain[size.layer], *_sides(job, size), sparsity=MASK_SPARSITY, rate=MASK_RATE)
    wall, processor = timed(lambda: mask.step(world.text(size.batch_tokens).tokens_BT), world.device)
    return {"pairs": pairs, "wall_s": wall, "processor_s": processor, "tokens": size.step_tokens}


def _sides(job: Step1Job, size: Size) -> tuple[published.Side, published.Side]:
    return published.Side(job.query, size.heads), published.Side(job.key, size.heads)


def shape_of(
    size: Size, width: tuple[int, int], pairs: int = 0, used: float = 0, tokens: int | None = None,
    below: int | None = None,
) -> Shape:  # fmt: skip
    """What the counts of work.py are of; `below`: where layers above the one that is measured alone are read."""
    return Shape(
        tokens or size.step_tokens, size.context, 64 * size.heads, size.heads, 64, *width, size.k, size.model_layers,
        size.layer if below is None else below, pairs, used,
    )  # fmt: skip
