"""`qkscope bench speed`: a table for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...config import Dtype
from ...errors import UserError
from ...files import unwritable, write_json
from .bench import run_speed
from .world import SIZES

HEAD = (
    f"{'':<31}{'s':>8}{'lowest-highest':>15}{'wall s':>8}{'tokens/s':>10}"
    f"{'GFLOP/s':>9}{'of max':>8}{'GB/s':>7}{'of max':>8}{'peak MB':>9}"
)
RACE_HEAD = f"{'':<20}{'from pairs':>12}{'to pairs':>10}{'steps':>7}{'s':>8}{'CPU s':>8}{'KL':>9}{'times as fast':>15}"


def bench_speed(size: str, path: Path | None, dtype: Dtype = "float32") -> dict[str, Any]:
    """Run the benchmark, print its tables, write its figures after each group of parts."""
    if size not in SIZES:
        raise UserError(f"--size {size}: choose {', '.join(SIZES)}")
    if path is not None and (wrong := unwritable(path)):
        raise UserError(f"--json {path}: {wrong}; name a file")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    for found in run_speed(SIZES[size], device, dtype):
        found = {"benchmark": "speed", "size": size, **found}
        if path is not None:
            write_json(path, found)
        print(f"speed: {len(found['parts'])} parts done", file=sys.stderr)
    print("\n".join(lines(found)))
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    machine, shape, ceiling = found["machine"], found["shape"], found["ceiling"]
    products = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, flops in ceiling["flops_per_s"].items())
    yield (
        f"speed, size {found['size']}: {machine['name']} ({machine['device']}), {machine['threads']} of "
        f"{machine['cores']} threads, torch {machine['torch']}, {machine['dtype']} (published procedure: float32)"
    )
    yield (
        f"a GPT-2 of random weights, {shape['model_layers']} layers, {shape['heads']} heads x 64, context "
        f"{shape['context']}; layer {shape['layer']}; {shape['width']:,} features a side, "
        f"{shape['k']:g} active; {shape['batch_tokens']:,} tokens a step; maps of {shape['pairs']:,} pairs, masks over "
        f"{shape['live'][0]} x {shape['live'][1]} features"
    )
    yield (
        f"ceiling, measured in the same run: {products} (a large product), "
        f"{ceiling['bytes_per_s'] / 1e9:.1f} GB/s (a large copy)"
    )
    if found["load"]:
        yield f"load of the machine meanwhile: {', '.join(f'{load:.1f}' for load in found['load'])}"
    yield (
        f"s: median of {shape['repeats']} repeats in turns, seconds of the {machine['seconds_are']}, as for rates and "
        "ratios; steps with their harvest (reuse: so many on each of 2 batches)"
    )
    yield ""
    yield HEAD
    for name, part in found["parts"].items():
        low, high = min(part["seconds_all"]), max(part["seconds_all"])
        peak = "-" if part["peak_bytes"] is None else f"{part['peak_bytes'] / 1e6:,.0f}"
        yield (
            f"{name:<31}{part['seconds']:>8.3f}{f'{low:.2f}-{high:.2f}':>15}{part['wall_s']:>8.2f}"
            f"{part['tokens_per_s']:>10,.0f}{part['flops_per_s'] / 1e9:>9,.1f}{part['of_ceiling_flops']:>8.0%}"
            f"{part['bytes_per_s'] / 1e9:>7.2f}{part['of_ceiling_bytes']:>8.0%}{peak:>9}"
        )
    yield ""
    yield "times as fast as the published procedure (lowest and highest over the turns):"
    for name, ratio in found["ratios"].items():
        low, high = ratio["range"]
        yield f"{name:<31}{ratio['median']:>6.2f}  ({low:.2f}-{high:.2f})"
    if whole := found.get("whole_mask"):
        yield ""
        if "skipped" in whole:
            yield f"published mask over all {whole['pairs']:,} pairs: not measured, {whole['skipped']}"
        else:
            yield (
                f"published mask over all {whole['pairs']:,} pairs: {whole['wall_s']:.1f} s a step of "
                f"{whole['tokens']:,} tokens ({whole['processor_s']:.1f} s of the processor), measured once"
            )
    if raced := found.get("race"):
        yield ""
        yield from race_lines(raced)


def race_lines(raced: dict[str, Any]) -> Iterator[str]:
    """The table of one race."""
    first, live = raced["rows"][0], raced["live"]
    yield (
        f"to the mask's KL, {raced['model']} layer {raced['layer']}, the same dictionaries ({raced['recipe']}, "
        f"{live[0]:,} x {live[1]:,} live features), {raced['batch_tokens']} tokens a step:"
    )
    yield RACE_HEAD
    for row in raced["rows"]:
        ratio = f"{first['processor_s'] / row['processor_s']:.1f}" if row["reached"] else "not reached"
        yield (
            f"{row['method']:<20}{row['from_pairs']:>12,}{row['pairs']:>10,}{row['steps']:>7}{row['wall_s']:>8.1f}"
            f"{row['processor_s']:>8.1f}{row['kl']:>9.4f}{ratio:>15}"
        )
