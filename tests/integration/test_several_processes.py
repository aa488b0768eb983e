"""A run of several processes: what one finds, from any of its checkpoints on; and one voice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import small_runs
import yaml
from small_runs import Moment, finish, free_memory, require_equal, require_like, small_constants

from qkscope.cli import main

LIGHT: dict[str, Any] = {
    "training.tokens": 800,
    "pairs.tokens": 800,
    "pairs.count": 40,
    "dictionary.width": 24,
    "evaluation.tokens": 200,
    "evaluation.examples": 2,
}
STEPS = 4  # of step 1
Words = Callable[..., list[str]]


def command(words: list[str], moment: Moment | None, free: int | None) -> None:
    """Give a command; the first process is killed just before the moment, and told that so much memory is free."""
    if moment and os.environ["RANK"] == "0":
        small_runs.die_at(moment)
    with small_constants(), free_memory(free):
        main(words)


def start(
    words: list[str], folder: Path, size: int = 2, moment: Moment | None = None, free: int | None = None
) -> list[Any]:
    """A command in several processes (1: in this one); their exit codes."""
    if size > 1:
        return processes.start(size, command, folder, words, moment, free)
    finish(words)
    return [0]


@pytest.fixture(scope="module")
def words(models: Callable[[str], Path], source: Path) -> Words:
    def make(out: Path, changes: dict[str, Any] | None = None, model: str = "gpt2") -> list[str]:
        return small_runs.argv(out, models(model), source, {**LIGHT, **(changes or {})})

    return make


@pytest.fixture(scope="module")
def by_two(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    assert start(words(folder / "run"), folder) == [0, 0], processes.said(folder, 2)
    assert (folder / "0.err").read_text() and not (folder / "1.err").read_text()
    return folder / "run"


def test_two_processes_find_what_one_does(by_two: Path, words: Words, tmp_path: Path) -> None:
    """The default recipe, and tune."""
    finish(words(tmp_path / "run"))
    require_like(by_two, tmp_path / "run")
    lines = [(folder / "layer_0" / "metrics.jsonl").read_text().splitlines() for folder in (by_two, tmp_path / "run")]
    for one, two in zip(*([yaml.safe_load(line) for line in part] for part in lines), strict=True):
        assert one.keys() == two.keys()
        assert one.get("pairs") == two.get("pairs")
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        # The published recipe; with a rotary embedding the pair penalty draws its places from all rows of a batch.
        # Without the root penalty, whose slope where an activation vanishes makes much of rounding: its gradients, step
        # by step, are in test_parallel.py.
        ({"dictionary.recipe": "seed", "dictionary.sparsity": 0.0}, "llama"),
        ({"target.max-kl": 1.2}, "gpt2"),  # k is steered
        ({"training.reuse": 2, "training.held-batches": 2}, "gpt2"),
        ({"dictionary.width": 150, "dictionary.k": 3}, "gpt2"),  # so few are active that no zeros are written down
    ],
)
def test_two_processes_find_what_one_does_otherwise(
    words: Words, tmp_path: Path, changes: dict[str, Any], model: str
) -> None:
    assert start(words(tmp_path / "two", changes, model), tmp_path) == [0, 0], processes.said(tmp_path, 2)
    finish(words(tmp_path / "one", changes, model))
    require_like(tmp_path / "two", tmp_path / "one", positions=model == "gpt2")


def test_two_processes_take_several_passes_where_memory_is_short(by_two: Path, words: Words, tmp_path: Path) -> None:
    assert start(words(tmp_path / "run"), tmp_path, free=0) == [0, 0], processes.said(tmp_path, 2)
    assert any("2 passes over the text, of 1, 1 pairs" in line for line in processes.said(tmp_path, 2))
    require_like(tmp_path / "run", by_two)


@pytest.mark.parametrize(
    ("before", "after", "moment"),
    [
        (2, 2, ("open", "layer_0/metrics.jsonl", 4)),
        (2, 1, ("open", "layer_1/metrics.jsonl", STEPS + 3)),
        (1, 2, ("open", "layer_1/metrics.jsonl", STEPS + 1)),
    ],
)
def test_killed(by_two: Path, words: Words, tmp_path: Path, before: int, after: int, moment: Moment) -> None:
    """Whatever the number of processes before and after."""
    out = tmp_path / "run"
    if before == 1:
        small_runs.kill_at(moment, words(out))
    else:  # the other one finds it gone, and does not wait
        assert start(words(out), tmp_path, before, moment) == [-signal.SIGKILL, 2]
        (line,) = (tmp_path / "1.err").read_text().splitlines()
        assert line == "qkscope: another process of this run has ended; give the same command again to go on"
    assert (out / "checkpoint.safetensors").exists()
    assert start(words(out), tmp_path, after) == [0] * after
    if before == after == 2:
        for layer in ("layer_0", "layer_1"):
            require_equal(out / layer, by_two / layer)
    require_like(out, by_two)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dictionary.k": -1}, "--dictionary.k"),
        ({"layers": 7}, "layer 7 is out of range"),
        ({"training.batch-tokens": 47}, "--training.batch-tokens 47: holds too few sequences of 24 tokens for 2 proc"),
    ],
)
def test_a_mistake_is_said_once(words: Words, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert start(words(tmp_path / "run", changes), tmp_path) == [2, 2]
    lines = [line for line in processes.said(tmp_path, 2) if not line.startswith("loading ")]
    assert len(lines) == 1 and lines[0].startswith("qkscope: ") and part in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_torchrun(by_two: Path, words: Words, tmp_path: Path) -> None:
    """As a person starts it; a run that is finished is said to be, by one process."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qkscope"]
    said = subprocess.run([*program, *words(by_two)], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert said.stderr.count(f"{by_two} is already finished") == 1
