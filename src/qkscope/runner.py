"""The passes of a run over the text: which there are, and who takes them.

Several processes either train every pass together, or each takes passes of its own (parallel.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from . import parallel
from .attention import AttentionSite
from .config import RunConfig
from .errors import UserError
from .foreign.carry import Sides
from .jobs import Jobs
from .memory import Need, Part
from .one_pass import OnePass
from .passes import FILE, Passes, checkpoint_of, in_groups, planned
from .progress import Reporter
from .run_folder import TRAINED, layer_folder
from .training import checkpoint
from .training.checkpoint import Progress
from .training.job import job_name


class Runner:
    """The passes of one run."""

    def __init__(
        self,
        config: RunConfig,
        names: dict[str, RunConfig],
        out: Path,
        sites: Sequence[AttentionSite],
        given: dict[int, Sides],
        reporter: Reporter,
    ) -> None:
        self.config, self.out, self.sites, self.reporter = config, out, sites, reporter
        self.jobs = Jobs(config, names, sites, given, reporter)

    def plan(self, *, seen_by_all: bool, free: int) -> tuple[Passes, bool]:
        """The passes, where `free` bytes are, and whether each process takes some for itself, if all see the folder.

        Raises `UserError` where several processes cannot train them so.
        """
        if self.config.training.spread == "layers" and not seen_by_all:
            raise UserError(
                f"--out {self.out}: not all processes see it and can write there; name a folder on a disk that they "
                "share, or give --training.spread text"
            )
        began = Passes.read(self.out)
        if not (plan := began):
            parts = self.jobs.parts()
            most = -(-len(parts) // parallel.size())
            apart = seen_by_all and spreads(self.config, -(-len(parts) // most))
            plan = Passes(self._passes(parts, most if apart else len(parts), free, together=not apart), {})
        for number, parts in enumerate(plan.passes):
            if number in plan.done and not all(map(self._is_trained, parts)):
                plan.undo(self.out, number)
        for number in plan.left:
            self._require_checkpoint_of(plan, number)
        apart = seen_by_all and spreads(self.config, len(plan.left))
        if plan.left and not apart and (said := shortage_of_rows(self.config)):
            if not (began and seen_by_all):
                raise UserError(said)
            apart = True  # it was begun so, and can't be ended otherwise
        return plan, apart

    def _require_checkpoint_of(self, plan: Passes, number: int) -> None:
        """`UserError` for a checkpoint of other layers and variants than the plan says, or a damaged one."""
        path = checkpoint_of(self.out, number)
        if at := checkpoint.progress(path):
            names = {*at.notes.get("k", ()), *at.notes.get("stopped", ())}
            if names != {job_name(*part) for part in plan.passes[number]}:
                raise UserError(f"{path} is of other layers than {self.out / FILE} says; remove it to begin them anew")

    def _passes(self, parts: Sequence[Part], most: int, free: int, *, together: bool) -> list[list[Part]]:
        """All parts, in passes that fit, of `most` at the most."""
        if self.jobs.given:  # they are there, and nothing but strengths is trained between them
            return in_groups(parts, most)
        names = {name: single.dictionary for name, single in self.jobs.names.items()}
        shapes = {site.layer: site.shape for site in self.sites}
        need = Need.of_training(
            names, shapes, self.config.training, self.config.data.context, self.jobs.device,
            together=together and parallel.size() > 1,
        )  # fmt: skip
        return planned(parts, need, free, most, self.reporter.message)

    def _is_trained(self, part: Part) -> bool:
        return all((layer_folder(self.out / part[1], part[0]) / name).exists() for name in TRAINED)

    def train(self, plan: Passes, *, apart: bool) -> None:
        """Both steps of every layer and variant; leaves their files."""
        plan.write(self.out)
        if apart:
            parallel.send({"do": "passes", "passes": plan.passes, "left": plan.left})
            plan.done |= self.take_passes(plan.passes, plan.left)
        for number in plan.left:
            plan.done[number] = self._one_pass(plan.passes, number, others_done=bool(plan.done))

    def take_passes(self, passes: Sequence[Sequence[Part]], left: Sequence[int]) -> dict[int, dict[str, float]]:
        """Train some of these passes while other processes train the rest; seconds of each phase of all of them."""
        mine: list[tuple[int, dict[str, float]]] = []
        for index in parallel.dealt("passes", len(left)):
            with parallel.alone():
                mine.append((left[index], self._one_pass(passes, left[index], others_done=True)))
        return {number: seconds for one in parallel.gathered(mine) for number, seconds in one}

    def _one_pass(self, passes: Sequence[Sequence[Part]], number: int, *, others_done: bool) -> dict[str, float]:
        """Train one of the passes, and leave its files; seconds of each phase."""
        one = OnePass(self.config, self.jobs, self.out, self.sites, self.reporter, number=number)
        if len(passes) > 1:
            layers = list(dict.fromkeys(str(layer) for layer, _ in passes[number]))
            named = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
            self.reporter.message(f"pass {number + 1} of {len(passes)}: {named}")
        return one.run(passes[number], others_done=others_done)

    def take_part(self, told: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Train with the first process what it sends."""
        saved = tensors, Progress(**told["at"])
        one = OnePass(self.config, self.jobs, self.out, self.sites, self.reporter, saved=saved)
        one.follow(told["tokens"], told["steered"])


def spreads(config: RunConfig, passes: int) -> bool:
    """Whether each of several processes is to take some of so many passes for itself."""
    asked, size = config.training.spread, parallel.size()
    return size > 1 and passes > 1 and (asked == "layers" or (asked == "auto" and 2 * passes > size))


def shortage_of_rows(config: RunConfig) -> str:
    """What is wrong where a batch has too few sequences for each of several processes to have one; else nothing."""
    tokens, least = config.training.batch_tokens, parallel.size() * config.data.context
    if parallel.size() == 1 or tokens >= least:
        return ""
    return (
        f"--training.batch-tokens {tokens}: holds too few sequences of {config.data.context} tokens for "
        f"{parallel.size()} processes; give {least:,} or more, or start fewer processes"
    )
