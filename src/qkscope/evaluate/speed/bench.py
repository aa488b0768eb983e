"""Every part of a run at one shape, beside the published procedure: what is measured, and in which turns."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...explain.examples import Examples
from ...pairs.importance import rank_pairs
from ...pairs.mask import MaskJob, shortfall
from ...pairs.selection import map_kl, top
from ...training.recipes import RECIPES
from ..report import CURVE, measure
from . import published, work
from .measure import Ceiling, in_turns, timed
from .race import race
from .step import Steps
from .work import Shape, Work
from .world import RandomText, Size, World, job_of

VARIANTS = 5  # patterns that the report puts into the model, one at a time
MASK_SPARSITY = 1e-6
OURS, THREE, THEIRS = "step 1, default", "step 1, default, three layers", "published step 1"


def run_speed(size: Size, device: torch.device) -> Iterator[dict[str, Any]]:
    """The figures so far, after each group of parts."""
    ceiling = Ceiling.measured(device)
    world = World(size, device)
    found: dict[str, Any] = {
        "machine": machine(device),
        "shape": vars(size),
        "parts": {},
        "load": [os.getloadavg()] if hasattr(os, "getloadavg") else [],
    }
    works: dict[str, Work] = {}
    for group in (_step1, _pairs, _evaluation):
        ways, tokens = group(world)
        timings = in_turns({name: way for name, (way, _) in ways.items()}, size.repeats, device)
        ceiling = ceiling.over(Ceiling.measured(device))
        for name, timing in timings.items():
            works[name] = ways[name][1]
            found["parts"][name] = {"tokens": tokens[name], **timing.figures()}
        for name, part in found["parts"].items():  # by the highest ceiling that the machine has shown so far
            part |= _rates(part, works[name], ceiling)
        found["ceiling"] = {"flops_per_s": ceiling.flops, "bytes_per_s": ceiling.bytes}
        found["ratios"] = ratios(found["parts"])
        if hasattr(os, "getloadavg"):
            found["load"].append(os.getloadavg())
        yield found
    found["whole_mask"] = _whole_mask(world)
    yield found
    del world
    found["race"] = race(size.mask_steps)
    if hasattr(os, "getloadavg"):
        found["load"].append(os.getloadavg())
    yield found


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "dtype": "float32",
    }  # fmt: skip


def _rates(part: dict[str, Any], done: Work, ceiling: Ceiling) -> dict[str, float]:
    seconds = part["wall_s"]
    flops, moved = done.flops / seconds, done.bytes / seconds
    return {
        "tokens_per_s": part["tokens"] / seconds,
        "flops": done.flops, "bytes": done.bytes, "flops_per_s": flops, "bytes_per_s": moved,
        "of_ceiling_flops": flops / ceiling.flops, "of_ceiling_bytes": moved / ceiling.bytes,
    }  # fmt: skip


def ratios(parts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is, for as many layers and tokens: median, and over the turns lowest and highest."""

    def turns(name: str) -> list[float]:
        return parts[name]["wall_s_all"]

    found = {}
    for name, theirs, ours, times in (
        ("step 1, one layer, seed recipe", THEIRS, "step 1, seed", 1),
        ("step 1, one layer, default recipe", THEIRS, OURS, 1),
        ("step 1, three layers, default recipe", THEIRS, THREE, 3),
        ("mask, same live features", "published mask", "mask", 1),
    ):
        if theirs in parts and ours in parts:
            each = sorted(times * a / b for a, b in zip(turns(theirs), turns(ours), strict=True))
            found[name] = {
                "median": times * parts[theirs]["wall_s"] / parts[ours]["wall_s"],
                "range": [each[0], each[-1]],
            }
    return found


Ways = tuple[dict[str, tuple[Callable[[], object], Work]], dict[str, int]]


def _step1(world: World) -> Ways:
    size, device = world.size, world.device
    width, dense = (size.width, size.width), device.type != "cpu"
    shape = _shape(world, width)
    statistics = world.statistics()
    last = world.last.layer

    def steps(recipe: str, n_layers: int) -> Steps:
        chosen = list(zip(world.sites, statistics, strict=True))[-n_layers:]
        jobs = [job_of(site.layer, s, recipe, width, size.k) for site, s in chosen]
        return Steps(jobs, RandomText(world, [site for site, _ in chosen], size.batch_tokens), device)

    seed = job_of(last, statistics[-1], "seed", width, size.k)
    plain = published.Step1(
        world.last, published.Side(seed.query, size.heads), published.Side(seed.key, size.heads),
        sparsity=RECIPES["seed"]["sparsity"], rate=RECIPES["seed"]["learning_rate"] * 0.01,  # as warm-up's first step
    )  # fmt: skip
    ways = {
        "harvest": (lambda: world.read(world.text(size.batch_tokens)), work.harvest(shape)),
        OURS: (steps("default", 1).step, work.step1(shape, 1, batchtopk=True, dense=dense)),
        "step 1, seed": (steps("seed", 1).step, work.step1(shape, 1, batchtopk=False, dense=dense)),
        THREE: (steps("default", 3).step, work.step1(shape, 3, batchtopk=True, dense=dense)),
        THEIRS: (lambda: plain.step(world.text(size.batch_tokens).tokens_BT), work.published_step1(shape)),
    }
    return ways, dict.fromkeys(ways, _tokens(size, size.batch_tokens))


def _pairs(world: World) -> Ways:
    size, device = world.size, world.device
    bench, statistics = world.workbench(size.sample_tokens), world.statistics()[-1]
    job = job_of(world.last.layer, statistics, "default", (size.width, size.width), size.k)
    for side in (job.query, job.key):
        side.calibrate(statistics["query"].x_nD)
    pairs, worth = rank_pairs(bench.sample, job.query.eval(), job.key.eval(), size.pairs)
    stream = RandomText(world, [world.last], size.batch_tokens)
    judged, refitted, tuned = (bench.map_job(n, job, pairs, tuned=n == "tune") for n in ("judge", "refit", "tune"))
    narrow = job_of(world.last.layer, statistics, "seed", size.live, size.k)
    sides = (published.Side(narrow.query, size.heads), published.Side(narrow.key, size.heads))
    plain = published.Mask(world.last, *sides, sparsity=MASK_SPARSITY, rate=1e-2)
    live = tuple(torch.arange(n + 1, device=device) for n in size.live)
    ours = MaskJob(
        world.last.layer, "mask", narrow.query, narrow.key, (live[0], live[1]), size.heads,
        sparsity=MASK_SPARSITY, rate=1e-2,
    )  # fmt: skip
    used = sum(len(columns) for columns, _ in pairs.key_columns) / size.heads
    shape = _shape(world, (size.width, size.width), len(pairs), used)
    sampled = _shape(world, (size.width, size.width), len(pairs), used, tokens=_tokens(size, size.sample_tokens))
    few = _shape(world, size.live)
    dense = device.type != "cpu"
    ways = {
        "importance, ranking": (
            lambda: rank_pairs(bench.sample, job.query, job.key, size.pairs),
            work.importance(sampled),
        ),
        "selection, a count": (
            lambda: map_kl(bench.map_job("few", judged, pairs.take(top(worth, size.pairs))), bench.sample),
            work.selection(sampled),
        ),
        "refit": (Steps([refitted], stream, device).step, work.refit(shape)),
        "tune": (Steps([tuned], stream, device).step, work.tune(shape, dense=dense)),
        "mask": (Steps([ours], stream, device).step, work.mask(few)),
        "published mask": (lambda: plain.step(world.text(size.batch_tokens).tokens_BT), work.published_mask(few)),
    }
    tokens = dict.fromkeys(ways, _tokens(size, size.batch_tokens))
    for name in ("importance, ranking", "selection, a count"):
        tokens[name] = _tokens(size, size.sample_tokens)
    return ways, tokens


def _evaluation(world: World) -> Ways:
    size = world.size
    bench, statistics = world.workbench(size.sample_tokens), world.statistics()[-1]
    job = job_of(world.last.layer, statistics, "default", (size.width, size.width), size.k)
    for side in (job.query, job.key):
        side.calibrate(statistics["query"].x_nD)
    pairs, _ = rank_pairs(bench.sample, job.query.eval(), job.key.eval(), size.pairs)
    dec = bench.decomposition(bench.map_job("map", job, pairs))
    batch = world.text(size.sample_tokens)
    used = sum(len(columns) for columns, _ in pairs.key_columns) / size.heads
    shape = _shape(world, (size.width, size.width), len(pairs), used, tokens=batch.n_tokens)

    def way() -> object:
        examples = Examples(dec, 12, drawn=2, pairs=4)
        return measure(dec, world.last, [batch], bench.sample, examples, controls=False)

    return {"evaluation": (way, work.evaluation(shape, size.vocabulary, VARIANTS, len(CURVE)))}, {
        "evaluation": batch.n_tokens
    }


def _whole_mask(world: World) -> dict[str, Any]:
    """One step of the published mask over all pairs of all features, once and cold; or why it cannot be."""
    size = world.size
    pairs = (size.width + 1) ** 2 * size.heads
    if said := shortfall([(size.width + 1, size.width + 1, size.heads)], world.device):
        return {"pairs": pairs, "skipped": said}
    narrow = job_of(world.last.layer, world.statistics()[-1], "seed", (size.width, size.width), size.k)
    sides = (published.Side(narrow.query, size.heads), published.Side(narrow.key, size.heads))
    mask = published.Mask(world.last, *sides, sparsity=MASK_SPARSITY, rate=1e-2)
    wall, processor = timed(lambda: mask.step(world.text(size.batch_tokens).tokens_BT), world.device)
    return {"pairs": pairs, "wall_s": wall, "processor_s": processor, "tokens": _tokens(size, size.batch_tokens)}


def _tokens(size: Size, tokens: int) -> int:
    return max(tokens // size.context, 1) * size.context


def _shape(world: World, width: tuple[int, int], pairs: int = 0, used: float = 0, tokens: int | None = None) -> Shape:
    size = world.size
    return Shape(
        tokens or _tokens(size, size.batch_tokens), size.context, 64 * size.heads, size.heads, 64, *width, size.k,
        size.model_layers, pairs, used,
    )  # fmt: skip
