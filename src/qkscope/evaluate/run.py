"""Evaluate a run's artefacts and write what a person reads: report.json, features, examples, the page.

Several processes measure whole layers, as many for each; whoever is free takes the next. What is left over, fewer
layers than processes, and all layers at once they measure piece by piece, and one of them puts together what was found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import parallel
from ..attention import AttentionSite
from ..config import RunConfig, build
from ..decomposition import read_run
from ..memory import Part
from ..progress import Reporter, title
from ..run_folder import layer_folder
from .layer import LayerEvaluation, pieces_of
from .page import write_page
from .pieces import Evaluation, Found, Piece, handed_over, shares_of_text
from .together import NAME, Together

SHARES = 2  # of a layer's held-out text for each process that shares it, so that none waits long for the last


@dataclass(frozen=True)
class Task:
    """What one process does without the others."""

    variant: str
    layer: int | None
    """None: all layers at once."""
    pieces: list[Piece]
    whole: bool
    """Whether these are all of them, so that this process also writes what it found."""
    seconds: dict[str, float] | None = None
    """What the layer's trainings took; None: as an earlier report says."""

    @property
    def title(self) -> str:
        return "all layers at once" if self.layer is None else title(self.layer, self.variant)

    def said(self) -> str:
        """What a person reads when it begins."""
        if self.whole:
            return f"evaluating {self.title} on held-out text"
        ((name, share, shares),) = self.pieces
        return f"evaluating {self.title}: {name}{f', {share + 1} of {shares}' if shares > 1 else ''}"


def config_of(folder: Path) -> RunConfig:
    """The configuration of the run in a folder."""
    return build(read_run(folder)["run"], str(folder / "config.yaml"))


def evaluate_run(
    folders: dict[str, Path],
    sites: Sequence[AttentionSite],
    reporter: Reporter,
    *,
    seconds: Mapping[Part, dict[str, float]] | None = None,
    again: bool = False,
) -> None:
    """Measure each layer of each variant that has no report yet (`again`: all), then write the pages.

    `seconds`: what its trainings took.
    """
    layers = [
        (name, site.layer)
        for name, folder in folders.items()
        for site in sites
        if again or not (layer_folder(folder, site.layer) / "report.json").exists()
    ]
    for name, _ in layers:
        (folders[name] / NAME).unlink(missing_ok=True)  # it was of another decomposition of this layer
    several = len(sites) > 1 and sites[0].has_head
    together = [name for name, folder in folders.items() if several and not (folder / NAME).exists()]
    config = config_of(next(iter(folders.values())))
    took = {(layer, name): None if again else (seconds or {}).get((layer, name), {}) for name, layer in layers}
    tasks = _tasks(took, together, config, has_head=sites[0].has_head)
    parallel.send({"do": "evaluate", "tasks": [asdict(task) for task in tasks]})
    take_tasks(folders, tasks, sites, reporter)
    parallel.gathered(None)  # once all have measured theirs, and left the folder
    for folder in folders.values():
        write_page(folder)
    if "" not in folders:
        write_page(next(iter(folders.values())).parent)


def _tasks(
    layers: Mapping[Part, dict[str, float] | None], together: Sequence[str], config: RunConfig, *, has_head: bool
) -> list[Task]:
    """Whole layers, as many for each process; then pieces of those that are left over, and of all layers at once.

    Args:
        layers: seconds of each one's trainings.
        together: variants whose layers are measured all at once.
    """
    size = parallel.size()
    over = len(layers) % size
    shares = -(-SHARES * size // max(over, 1))
    tasks = []
    for place, ((layer, name), seconds) in enumerate(layers.items()):
        if place < len(layers) - over:
            tasks.append(Task(name, layer, pieces_of(config, 1, has_head=has_head), True, seconds))
        else:
            pieces = pieces_of(config, shares, has_head=has_head)
            tasks += [Task(name, layer, [piece], False, seconds) for piece in pieces]
    return tasks + [Task(name, None, [piece], size == 1) for name in together for piece in shares_of_text(size)]


def told_tasks(told: Mapping[str, Any]) -> list[Task]:
    """The tasks that another process has sent."""
    return [Task(**{**task, "pieces": [tuple(piece) for piece in task["pieces"]]}) for task in told["tasks"]]


def take_tasks(
    folders: dict[str, Path], tasks: Sequence[Task], sites: Sequence[AttentionSite], reporter: Reporter
) -> None:
    """Do some of these tasks while other processes do the rest; then put together what is found of shared layers."""
    found: dict[tuple[str, int | None], list[Found]] = defaultdict(list)
    last: tuple[Any, Evaluation] | None = None  # it has read its sample

    def opened(task: Task) -> Evaluation:
        nonlocal last
        if last is None or last[0] != (task.variant, task.layer):
            last = None  # let go of before the next one
            last = (task.variant, task.layer), _opened(folders[task.variant], task, sites)
        return last[1]

    for index in parallel.dealt("evaluation", len(tasks)):
        task = tasks[index]
        reporter.message(task.said())
        with parallel.alone():
            mine = [opened(task).find(piece) for piece in task.pieces]
            if task.whole:
                reporter.message(f"{task.title}: {opened(task).write(mine)}")
            else:
                found[task.variant, task.layer] += mine
    last = None
    shared = {(task.variant, task.layer): task for task in tasks if not task.whole}
    for place, (key, task) in enumerate(shared.items()):
        if every := handed_over(found.pop(key, []), place % parallel.size()):
            with parallel.alone():
                reporter.message(f"{task.title}: {opened(task).write(every)}")


def _opened(folder: Path, task: Task, sites: Sequence[AttentionSite]) -> Evaluation:
    if task.layer is None:
        return Together(folder, sites)
    site = next(site for site in sites if site.layer == task.layer)
    return LayerEvaluation(layer_folder(folder, task.layer), site, task.seconds)
