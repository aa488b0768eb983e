"""`qkscope bench planted`: a table for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import unwritable, write_json
from .bench import JUDGED, MULTIPLES, run_planted
from .sizes import SIZES

HEAD = ("dictionary", "pairs", "match q", "match k", "rows", "pair F1", "P", "R", "L0 q/k", "live q/k")


def bench_planted(size: str, seeds: Sequence[int], path: Path | None, processes: int) -> dict[str, Any]:
    """Run the benchmark, print its table, write its figures; a `UserError` before any work where that cannot be."""
    if size not in SIZES:
        raise UserError(f"--size {size}: choose {', '.join(SIZES)}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: give different numbers from 0 on, e.g. --seeds 3 4 5")
    if path is not None and (wrong := unwritable(path)):
        raise UserError(f"--json {path}: {wrong}; name a file")
    found: dict[str, Any] = {}
    for found in run_planted(SIZES[size], seeds, processes):
        found.update(benchmark="planted", size=size)
        if path is not None:  # after every world: an hour's figures are not lost with its last minute
            write_json(path, found)
        print(f"planted: {len(found['worlds'])} worlds done, {found['worlds_left']} left", file=sys.stderr)
    print("\n".join(lines(found)))
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """One table a world; ± is the standard deviation over seeds."""
    seeds = " ".join(map(str, found["seeds"]))
    yield f"planted, size {found['size']}, seeds {seeds}: mean ± standard deviation over seeds"
    yield f"pair scores: maps of {JUDGED} n pairs, n the number of true ones; KL: nats, maps of 1, 2 and 4 n pairs"
    for world in dict.fromkeys(row["world"] for row in found["table"]):
        rows = [row for row in found["table"] if row["world"] == world]
        kl = {row["dictionary"]: cell(row["figures"], "kl", 3) for row in rows if row["multiple"] is None}
        yield ""
        yield f"{world}: KL of a uniform pattern {kl['uniform']}, of the truth without interference {kl['truth']}"
        yield "  ".join([*(f"{name:<{w}}" for name, w in zip(HEAD, WIDTHS, strict=True)), "KL"])
        for dictionary, method in dict.fromkeys((row["dictionary"], row["method"]) for row in rows):
            if dictionary in ("uniform", "truth"):
                continue
            same = [row for row in rows if (row["dictionary"], row["method"]) == (dictionary, method)]
            shown = next((row for row in same if row["multiple"] == JUDGED), same[0])
            yield one(dictionary, method, shown["figures"], [by_multiple(same, m) for m in MULTIPLES])


WIDTHS = (10, 18, 10, 10, 10, 10, 5, 5, 9, 7)


def one(dictionary: str, method: str, figures: dict[str, Any], maps: list[dict[str, Any]]) -> str:
    """A row's line."""
    whole = not any(maps)
    cells = [
        dictionary,
        method,
        *(cell(figures, name) for name in ("match_query", "match_key", "match_rows", "f1")),
        *(cell(figures, name, 2, False) for name in ("precision", "recall")),
        "/".join(cell(figures, f"l0_{side}", 2, False) for side in ("query", "key")),
        "/".join(cell(figures, f"live_{side}", 0, False) for side in ("query", "key")),
    ]
    kls = [cell(figures, "kl", 3)] if whole else [cell(m, "kl", 3) for m in maps]
    return "  ".join([*(f"{c:<{w}}" for c, w in zip(cells, WIDTHS, strict=True)), "  ".join(kls)])


def by_multiple(rows: list[dict[str, Any]], multiple: int) -> dict[str, Any]:
    return next((row["figures"] for row in rows if row["multiple"] == multiple), {})


def cell(figures: dict[str, Any], name: str, digits: int = 2, with_spread: bool = True) -> str:
    """`0.93 ±0.02`; a dash where there is no such figure."""
    figure = figures.get(name)
    if figure is None:
        return "-"
    spread = f" ±{figure['sd']:.{digits}f}" if with_spread and figure["sd"] is not None else ""
    return f"{figure['mean']:.{digits}f}{spread}"
