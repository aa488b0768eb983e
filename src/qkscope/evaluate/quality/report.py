"""`qkscope bench quality`: layers of several models, several seeds; a table for people, JSON for programs.

A layer with a seed is a task in a process of its own with one thread. What a JSON file of the same benchmark already
holds is not run again, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ...data.documents import EMBEDDED
from ...decomposition import SIDES
from ...embedded import EMBEDDED_MODELS
from ...errors import UserError
from ...files import unwritable, write_json
from ...models import load_model
from ...routing import attention_modules
from ..workers import worker_pool
from .bench import LIVE, PLAIN, LayerBench, Size, rows_of, whole_masks
from .page import write_scoreboard

SIZES = {
    "small": Size(
        width=300, sparsity=0.02, tokens=300_000, heldout_tokens=8_192,
        counts=(16000, 8000, 4000, 2000, 1000, 500),
        mask_sparsity=(1e-6, 1e-5), mask_tokens=100_000,
        adversary_count=2000, adversary_tokens=512, batch_tokens=512,
    ),
    "medium": Size(
        width=600, sparsity=0.01, tokens=2_000_000, heldout_tokens=32_768, counts=(16000, 8000, 4000, 2000, 1000, 500),
        mask_sparsity=(1e-6, 1e-5), mask_tokens=1_000_000,
        adversary_count=4000, adversary_tokens=4096,
    ),
}  # fmt: skip
LAYERS = 3  # of a model, its last ones, where none are named

Task = tuple[str, str, int, int]  # model, text, layer, seed


def bench_quality(
    size: str, models: Sequence[str], layers: Sequence[int], seeds: Sequence[int], path: Path | None, processes: int
) -> dict[str, Any]:
    """Run what is not there yet, print the tables, write the figures after every layer."""
    if size not in SIZES:
        raise UserError(f"--size {size}: choose {', '.join(SIZES)}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: give different numbers from 0 on, e.g. --seeds 0 1 2")
    if path is not None and (wrong := unwritable(path)):
        raise UserError(f"--json {path}: {wrong}; name a file")
    tasks = [task for seed in seeds for name in models for task in _tasks_of(name, layers, seed)]
    device = f"{platform.processor() or platform.machine()}, CPU, one thread a layer, torch {torch.__version__}"
    found: dict[str, Any] = {"benchmark": "quality", "size": size, "budget": vars(SIZES[size]), "device": device}
    done = _done(path, found)
    left = [task for task in tasks if _key(task) not in done]
    with worker_pool(processes) as pool:
        for number, result in enumerate(pool.map(_run_task, left, [SIZES[size]] * len(left)), start=1):
            done[_key(left[number - 1])] = result
            if path is not None:
                write_json(path, {**found, "layers": list(done.values())}, indent=None)
            print(f"quality: {number} of {len(left)} layers done", file=sys.stderr)
    found["layers"] = list(done.values())  # with those that the file held and nobody asked for: nothing is lost
    found["scoreboard"] = scoreboard(found["layers"])
    if path is not None:
        write_json(path, found, indent=None)  # figures of many rows: half the size
        write_scoreboard(path.with_suffix(".html"), found)
    print("\n".join(lines(found)))
    return found


def _tasks_of(name: str, layers: Sequence[int], seed: int) -> list[Task]:
    model, _, source = name.partition("=")
    if not source and model not in EMBEDDED_MODELS:
        raise UserError(f"--models {name}: name its text too, MODEL=TEXT (a .txt, .jsonl or .parquet file)")
    there = len(attention_modules(load_model(model)[0]))
    wrong = [layer for layer in layers if not 0 <= layer < there]
    if wrong:
        raise UserError(f"--layers {wrong[0]}: {model} has layers 0 to {there - 1}")
    return [(model, source or EMBEDDED, layer, seed) for layer in layers or range(max(there - LAYERS, 0), there)]


def _key(task: Task) -> str:
    model, _, layer, seed = task
    return f"{Path(model).name} {layer} {seed}"


def _done(path: Path | None, found: dict[str, Any]) -> dict[str, Any]:
    """Layers that a file of the same benchmark holds."""
    if path is None or not path.exists():
        return {}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = all(json.loads(json.dumps(found[key])) == old[key] for key in ("benchmark", "size", "budget"))
        layers = {f"{row['model']} {row['layer']} {row['seed']}": row for row in old["layers"]} if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        same, layers = False, {}
    if not same:
        raise UserError(f"--json {path}: holds something other than this benchmark at this size; name another file")
    return layers


def _run_task(task: Task, size: Size) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, source, layer, seed = task
    bench = LayerBench(model, source, layer, seed, size)
    head = {"model": Path(model).name, "layer": layer, "seed": seed, **bench.bounds()}
    return {**head, "rows": list(rows_of(bench))}


# What the rows say against the targets


def scores_of(layer: dict[str, Any]) -> dict[str, float | None]:
    """One layer and seed: ratios to the baseline, and what stands alone."""
    rows = {(row["dictionary"], row["method"], row.get("asked")): row for row in layer["rows"]}
    seed, default = rows["seed", "all pairs", None], rows["default", "all pairs", None]
    masks = whole_masks(layer)
    whole = {key: row for key, row in rows.items() if key[1] == "all pairs"}

    def l0_at_its_kl(name: str) -> float | None:
        """The L0 at which a dictionary's curve has the baseline's KL, relative to the baseline's."""
        curve = [(_l0(row), kl_of(row)) for (which, _, _), row in whole.items() if which.split(", ")[0] == name]
        return _ratio(least(curve, kl_of(seed)), _l0(seed))

    out: dict[str, float | None] = {
        "KL ÷ seed's, at seed's L0": kl_of(default) / kl_of(seed),
        "KL ÷ seed's, at seed's L0, no pair penalty": kl_of(rows[PLAIN, "all pairs", None]) / kl_of(seed),
        "L0 ÷ seed's, at seed's KL": l0_at_its_kl("default"),
        "L0 ÷ seed's, at seed's KL, no pair penalty": l0_at_its_kl(PLAIN),
        "dead, default": max(default[f"dead_{side}"]["mean"] for side in SIDES),
        "KL at the live width ÷ KL, default": kl_of(rows[LIVE, "all pairs", None]) / kl_of(default),
    }
    for method, mask in masks.items():
        out[f"pairs of seed's {method}"] = float(mask["pairs"])
        out[f"KL of seed's {method}"] = kl_of(mask)
    maps = [row for row in layer["rows"] if row["dictionary"] == "default" and row["method"] == "prune and tune"]
    curve = [(float(row["pairs"]), kl_of(row)) for row in maps]
    for method, mask in masks.items():
        out[f"pairs ÷ those of {method}, at its KL"] = _ratio(least(curve, kl_of(mask)), mask["pairs"])
    for row in maps[::2]:
        cut = [kl_of(other) for method in masks if (other := rows.get(("seed", method, row["asked"])))]
        out[f"KL ÷ the best mask's cut to {row['asked']:,} pairs"] = kl_of(row) / min(cut)
    largest = max(maps, key=lambda row: row["pairs"])
    out["KL of the largest map"] = kl_of(largest)
    out["ΔCE of the largest map"] = largest["ce_increase"]["mean"]
    out["dead in the largest map"] = max(largest[f"dead_{side}"]["mean"] for side in SIDES)
    out["random's KL ÷ the largest map's"] = kl_of(rows["random", "all pairs", None]) / kl_of(largest)
    for row in layer["rows"]:
        if row.get("adversary"):
            out[f"adversary, {row['dictionary']}"] = row["adversary"]["logit_kl"]["adversary"]["mean"]
    return out


def _l0(row: dict[str, Any]) -> float:
    """Active features of both sides."""
    return row["l0_query"]["mean"] + row["l0_key"]["mean"]


def kl_of(row: dict[str, Any]) -> float:
    return row["pattern_kl"]["mean"]


def least(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The least cost at which a curve of (cost, KL) reaches this KL, between points by a line in logarithms.

    Cheaper than the cheapest point is not claimed; None where no point reaches it.
    """
    points = sorted(curve)
    if points[0][1] <= kl:
        return points[0][0]
    for (cost, above), (more, below) in pairwise(points):
        if below <= kl:
            share = math.log(above / kl) / math.log(above / below)
            return math.exp(math.log(cost) + share * math.log(more / cost))
    return None


def _ratio(value: float | None, base: float) -> float | None:
    return None if value is None else value / base


def scoreboard(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each score its mean and standard deviation over seeds by layer, and the median of the means over layers."""
    by_layer: dict[str, list[dict[str, float | None]]] = {}
    for layer in layers:
        by_layer.setdefault(f"{layer['model']} {layer['layer']}", []).append(scores_of(layer))
    names = dict.fromkeys(name for found in by_layer.values() for scores in found for name in scores)
    table = []
    for name in names:
        means, spread = {}, {}
        for key, found in by_layer.items():
            values = [scores.get(name) for scores in found]
            known = [v for v in values if v is not None]
            # A layer where a seed never gets there counts as never: the mean of the others would flatter.
            means[key] = statistics.fmean(known) if len(known) == len(values) else None
            spread[key] = statistics.stdev(known) if len(known) == len(values) > 1 else None
        reached = [v if v is not None else math.inf for v in means.values()]
        median = statistics.median(reached)
        middle = median if math.isfinite(median) else None
        table.append({"score": name, "median": middle, "by_layer": means, "spread": spread})
    return table


# Printing


def lines(found: dict[str, Any]) -> Iterator[str]:
    budget = found["budget"]
    yield f"quality, size {found['size']}, dictionaries of {budget['width']} features a side; {found['device']}"
    yield (
        f"tokens: {budget['tokens']:,} to train dictionaries, {budget['tokens']:,} to tune, "
        f"{budget['mask_tokens']:,} for the mask, {budget['heldout_tokens']:,} held out"
    )
    for layer in found["layers"]:
        yield ""
        yield (
            f"{layer['model']} layer {layer['layer']}, seed {layer['seed']}: uniform KL "
            f"{layer['uniform_kl']['mean']:.3f}, model CE {layer['model_ce']['mean']:.3f}, without this attention "
            f"+{layer['zero_ce_increase']['mean']:.3f}"
        )
        yield from (row_line(row) for row in layer["rows"])
    yield ""
    yield "score, median over layers (by layer: mean ± standard deviation over seeds):"
    for score in found["scoreboard"]:
        spread = score["spread"]
        cells = [(_cell(v), spread[key]) for key, v in score["by_layer"].items()]
        values = "  ".join(cell if s is None else f"{cell} ±{_cell(s)}" for cell, s in cells)
        yield f"{score['score']:<40} {_cell(score['median']):>8}   ({values})"


def row_line(row: dict[str, Any]) -> str:
    """A row of a layer's table."""
    kl = row["pattern_kl"]
    half = kl["ci95"][1] - kl["mean"] if kl["ci95"] else math.nan
    parts = [
        f"{row['dictionary']:<22} {row['method']:<15}",
        f"pairs {row['pairs']:>6,}" if "pairs" in row else " " * 12,
        f"KL {kl['mean']:.4f} ±{half:.4f}",
        f"ΔCE {row['ce_increase']['mean']:+.4f}",
        f"logit KL {row['logit_kl']['mean']:.4f}",
        f"L0 {row['l0_query']['mean']:.1f}/{row['l0_key']['mean']:.1f}",
        f"dead {row['dead_query']['mean']:.0%}/{row['dead_key']['mean']:.0%}",
        f"dense {row['dense_query']['mean']:.0%}/{row['dense_key']['mean']:.0%}",
        f"{row['seconds']:.0f} s",
    ]
    if row.get("adversary"):
        parts.append(f"adversary {row['adversary']['logit_kl']['adversary']['mean']:.3f}")
    return "  ".join(parts)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
