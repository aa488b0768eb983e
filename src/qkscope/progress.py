"""What a person sees while a run works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two plain lines of the same job


class Reporter:
    """Progress of training and short messages, on standard error; a context manager.

    `bars`: none where several processes share a terminal.
    """

    def __init__(self, quiet: bool = False, *, bars: bool = True) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.bars = bars and self.console.is_terminal and not quiet
        self.progress: Progress | None = None
        self.tasks: dict[str, Any] = {}
        self.last: dict[str, float] = {}

    def __enter__(self) -> Reporter:
        if self.bars:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"))
            self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def message(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def step(self, line: dict[str, Any]) -> None:
        """A logged step of one job: its `name`, `phase`, `tokens` of `total`, and what it measured."""
        if self.quiet:
            return
        variant, layer = line["name"].rsplit("|", 1)  # of a job: training/job.py
        label, facts = f"{line['phase']} {title(layer, '' if variant == 'run' else variant)}", describe(line)
        if self.progress is not None:
            if label not in self.tasks:
                self.tasks[label] = self.progress.add_task(label, total=line["total"], facts="")
            self.progress.update(self.tasks[label], completed=line["tokens"], facts=facts)
            return
        now, ended = time.monotonic(), line["tokens"] >= line["total"]
        if ended or now - self.last.get(label, 0) >= PLAIN_SECONDS:
            self.last[label] = now
            share = min(line["tokens"] / line["total"], 1)
            print(f"{label}  {share:4.0%}  {facts}", file=sys.stderr, flush=True)


def title(layer: int | str, variant: str) -> str:
    """What a person hears of a layer of a variant ('' without a sweep)."""
    return f"{variant} layer {layer}".strip()


def describe(line: dict[str, Any]) -> str:
    """Speed, loss, KL, L0 and dead share in one short line."""
    parts = [f"{line['tokens_per_s']:,} tok/s", f"loss {line['loss']:.4f}", f"KL {line['pattern_kl']:.4f}"]
    if "l0_query" in line:
        parts.append(f"L0 {line['l0_query']:.1f}/{line['l0_key']:.1f}")
    if "dead_query" in line:
        parts.append(f"dead {line['dead_query']:.1%}/{line['dead_key']:.1%}")
    if "pairs" in line:
        parts.append(f"{line['pairs']:,.0f} pairs")
    return "  ".join(parts)
