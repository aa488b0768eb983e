"""What several processes gain: one run by one process, and by several with `--training.spread` layers and text.

    python benchmarks/several_processes.py --processes 2 --repeats 3 -- --layers all --training.tokens 200000
    python benchmarks/several_processes.py --modes text -- --layers 3 --training.tokens 200000

What follows `--` goes to `qkscope run`. All have as many threads in all: one process `--processes` of them, each of
several one. They take turns, `--repeats` times; `--modes text` is for one layer, which can't be spread as a layer. For
each: seconds from start to end, beside one process's of the same turn (median over turns, least and most); of these the
trainings' and the evaluation's of the layer where they took longest (of an evaluation that is shared, the seconds of
all); and the pattern KLs that came out. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ("one process", "layers", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:])
    parser.add_argument("options", nargs="*", help="of qkscope run, after --")
    args = parser.parse_args()
    modes = (MODES[0], *args.modes)
    found: dict[str, list[float]] = {mode: [] for mode in modes}
    print(f"{args.processes} processes, {os.cpu_count()} cores: {' '.join(args.options)}")
    for turn in range(args.repeats):
        for mode in modes:
            with tempfile.TemporaryDirectory() as folder:
                seconds = timed(mode, args.processes, [*args.options, "--out", f"{folder}/run"])
                found[mode].append(seconds)
                print(f"turn {turn + 1}  {mode:12} {seconds:6.1f} s  {facts(Path(folder))}", flush=True)
    for mode in modes:
        ratios = [one / other for one, other in zip(found[MODES[0]], found[mode], strict=True)]
        middle = statistics.median(ratios)
        print(f"{mode:12} {middle:.2f} times as fast as one process ({min(ratios):.2f} to {max(ratios):.2f})")


def timed(mode: str, processes: int, options: list[str]) -> float:
    """Seconds of one run."""
    alone = mode == MODES[0]
    program = [
        sys.executable,
        "-m",
        *([] if alone else ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]),
    ]
    spread = [] if alone else ["--training.spread", mode]
    began = time.monotonic()
    subprocess.run(
        [*program, "qkscope", "run", *options, *spread],
        env={**os.environ, "OMP_NUM_THREADS": str(processes if alone else 1)},
        check=True, stderr=subprocess.PIPE,
    )  # fmt: skip
    return time.monotonic() - began


def facts(folder: Path) -> str:
    """Where the time went, and what came out."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.rglob("report.json"))]
    trained = max(sum(s for phase, s in r["seconds"].items() if phase != "evaluation") for r in reports)
    evaluated = max(r["seconds"]["evaluation"] for r in reports)
    kls = ", ".join(f"{r['pattern_kl']['map_pruned']['mean']:.4f}" for r in reports)
    return f"trainings {trained:.1f} s, evaluation {evaluated:.1f} s a layer; KL {kls}"


if __name__ == "__main__":
    main()
