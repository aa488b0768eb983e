"""A run of several processes: what one finds, from any of its checkpoints on; and one voice.

First of those that train every dictionary together, each on its share of every batch; then of those that have each some
layers for themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import processes
import pytest
import small_runs
import yaml
from small_runs import Moment, finish, free_memory, read_json, require_equal, require_like, small_constants

from qkscope import pipeline
from qkscope.cli import main
from qkscope.errors import UserError
from qkscope.runner import Runner

LIGHT: dict[str, Any] = {
    "training.tokens": 800,
    "pairs.tokens": 800,
    "pairs.count": 40,
    "dictionary.width": 24,
    "evaluation.tokens": 700,
    "evaluation.examples": 2,
    "training.spread": "text",
}
STEPS = 4  # of step 1
EACH = -1  # process
TWO = 1_175_000  # bytes that hold two pairs of dictionaries at a time
Words = Callable[..., list[str]]


def command(words: list[str], moment: Moment | None, free: int | None, dies: int, fails: int, blind: bool) -> None:
    """Give a command; one process is killed just before the moment, the first one told that so much memory is free.

    In another one, passes may fail, or the folder not be seen.
    """
    rank = int(os.environ["RANK"])
    if moment and dies in (rank, EACH):
        small_runs.die_at(moment)
    with small_constants(), free_memory(free), pytest.MonkeyPatch.context() as patch:
        if rank == fails:
            patch.setattr(Runner, "_one_pass", failing)
        if blind and rank:
            patch.setattr(pipeline, "shared", lambda out, word: nullcontext(False))
        main(words)


def failing(runner: Runner, *args: Any, **options: Any) -> None:
    raise UserError("layer 7: the loss is nan")


def start(
    words: list[str],
    folder: Path,
    size: int = 2,
    moment: Moment | None = None,
    free: int | None = None,
    *,
    dies: int = 0,
    fails: int = -1,
    blind: bool = False,
) -> list[Any]:
    """A command in several processes (1: in this one); their exit codes."""
    if size > 1:
        return processes.start(size, command, folder, words, moment, free, dies, fails, blind)
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
    assert "step1" in (folder / "0.err").read_text() and "step1" not in (folder / "1.err").read_text()
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


# Layers for each process -----------------------------------------------------------------------------

APART = {"training.spread": "auto"}
SWEEP = {**APART, "sweep.k": (2, 3)}


@pytest.fixture(scope="module")
def in_passes(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process's run that took a pass for each layer."""
    out = tmp_path_factory.mktemp("passes") / "run"
    with free_memory(0):
        finish(words(out, APART))
    return out


def require_equal_layers(found: Path, wanted: Path) -> None:
    assert small_runs.tree(found).keys() == small_runs.tree(wanted).keys()
    for layer in ("layer_0", "layer_1"):
        require_equal(found / layer, wanted / layer)
    assert read_json(found / "together.json") == read_json(wanted / "together.json")


def test_each_trains_a_layer(in_passes: Path, words: Words, tmp_path: Path) -> None:
    assert start(words(tmp_path / "run", APART), tmp_path) == [0, 0], processes.said(tmp_path, 2)
    require_equal_layers(tmp_path / "run", in_passes)
    for said in (tmp_path / "0.err", tmp_path / "1.err"):
        lines = said.read_text().splitlines()
        trained, evaluated = (
            {line.split(" layer ")[1][0] for line in lines if line.startswith(start)}
            for start in ("step1", "evaluating layer")
        )
        assert len(trained) == 1 and len(evaluated) == 1
    assert sum(line.startswith("report: ") for line in processes.said(tmp_path, 2)) == 1


def said_by(folder: Path, rank: int) -> list[str]:
    return (folder / f"{rank}.err").read_text().splitlines()


def trained_by(folder: Path, size: int) -> list[set[str]]:
    """What each process trained, by its titles."""
    said = [(folder / f"{r}.err").read_text().splitlines() for r in range(size)]
    return [{line.split("  ")[0] for line in lines if line.startswith("step1 ")} for lines in said]


@pytest.mark.parametrize(("free", "size"), [(None, 2), (0, 2), (0, 3)])
def test_each_trains_variants(words: Words, tmp_path: Path, free: int | None, size: int) -> None:
    """Of a sweep; where memory is short there are more passes than processes."""
    assert start(words(tmp_path / "run", SWEEP), tmp_path, size, free=free) == [0] * size, processes.said(
        tmp_path, size
    )
    trained = trained_by(tmp_path, size)
    assert sorted(title for one in trained for title in one) == [
        f"step1 k{k} layer {n}" for k in (2, 3) for n in (0, 1)
    ]
    assert all(trained)
    passes = sum("pass " in line for line in processes.said(tmp_path, size))
    assert passes == (2 if free is None else 4)
    with free_memory(TWO if free is None else free):
        finish(words(tmp_path / "one", SWEEP))
    for name in ("k2", "k3"):
        require_equal_layers(tmp_path / "run" / name, tmp_path / "one" / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs.method": "mask"},
        {"pairs.method": "refit", "pairs.max-kl": 1.2},
        {"target.max-kl": 1.2},
    ],
)
def test_each_trains_a_layer_otherwise(words: Words, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert start(words(tmp_path / "run", {**APART, **changes}), tmp_path) == [0, 0], processes.said(tmp_path, 2)
    assert all(trained_by(tmp_path, 2))
    with free_memory(0):
        finish(words(tmp_path / "one", {**APART, **changes}))
    require_equal_layers(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize(
    ("dies", "moment"),
    [
        (0, ("os.rename", ".json", 2)),  # its pass is done, and not yet noted
        (0, ("open", "/metrics.jsonl", 3)),
        (1, ("open", "/metrics.jsonl", STEPS + 3)),
        (1, ("os.rename", "/report.json", 1)),
    ],
)
def test_killed_apart(in_passes: Path, words: Words, tmp_path: Path, dies: int, moment: Moment, after: int) -> None:
    """Any of them, at any moment: the others end what they have begun, and any number goes on.

    To the same bits; but several train the one layer that is left together.
    """
    out = tmp_path / "run"
    codes = start(words(out, APART), tmp_path, 2, moment, dies=dies)
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 2
    last = (tmp_path / f"{1 - dies}.err").read_text().splitlines()[-1]
    assert last == "qkscope: another process of this run has ended; give the same command again to go on"
    left = 2 - len(list(out.glob("pass_*.json")))
    assert left == (not moment[1].endswith("report.json"))
    assert start(words(out, APART), tmp_path, after) == [0] * after, processes.said(tmp_path, after)
    if after == 1 or not left:
        require_equal_layers(out, in_passes)
    require_like(out, in_passes)


def test_killed_in_a_second_pass(words: Words, tmp_path: Path) -> None:
    """Whoever it is; what others have done by then is kept, with its seconds."""
    out, command = tmp_path / "run", words(tmp_path / "run", SWEEP)
    codes = start(command, tmp_path, 2, ("os.rename", "pass_2.json", 1), free=0, dies=EACH)
    assert sorted(codes) == [-signal.SIGKILL, 2]
    assert {path.name for path in out.glob("*_*.json")} == {"pass_0.json", "pass_1.json", "pass_3.json"}
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint_2.safetensors"]
    assert start(command, tmp_path, 1) == [0]
    with free_memory(0):
        finish(words(tmp_path / "one", SWEEP))
    for name in ("k2", "k3"):
        require_equal_layers(out / name, tmp_path / "one" / name)
        for layer in ("layer_0", "layer_1"):
            seconds = read_json(out / name / layer / "report.json")["seconds"]
            assert seconds.keys() == {"step1", "tune1", "tune2", "evaluation"}


@pytest.mark.parametrize("size", [1, 2])
def test_a_file_lost_from_one_pass_is_made_again(in_passes: Path, words: Words, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    codes = start(words(out, APART), tmp_path, 2, ("os.rename", "report.html", 1))
    assert codes == [-signal.SIGKILL, 2]
    (out / "layer_0" / "pairs.parquet").unlink()
    assert start(words(out, APART), tmp_path, size) == [0] * size
    require_like(out, in_passes)
    if size == 1:
        require_equal_layers(out, in_passes)


def test_a_last_layer_is_not_refused_for_short_batches(in_passes: Path, words: Words, tmp_path: Path) -> None:
    """Each had a layer for itself; what is left cannot be shared, and is ended by one."""
    short = words(tmp_path / "run", {**APART, "training.batch-tokens": 47})
    assert start(short, tmp_path, 2, ("open", "/metrics.jsonl", 3)) == [-signal.SIGKILL, 2]
    assert start(short, tmp_path, 2) == [0, 0], processes.said(tmp_path, 2)
    with free_memory(0):
        finish(words(tmp_path / "one", {**APART, "training.batch-tokens": 47}))
    require_equal_layers(tmp_path / "run", tmp_path / "one")


def test_a_checkpoint_of_other_layers(words: Words, tmp_path: Path) -> None:
    """A person has removed the plan, or mixed up two folders."""
    command = words(tmp_path / "run", SWEEP)
    small_runs.kill_at(("os.rename", "k3/layer_0/pairs.parquet", 1), command, free=TWO)
    (tmp_path / "run" / "passes.json").unlink()
    before = small_runs.tree(tmp_path / "run")
    assert start(command, tmp_path, 3, free=0) == [2, 2, 2]
    (line,) = (line for line in processes.said(tmp_path, 3) if line.startswith("qkscope: "))
    where = tmp_path / "run"
    assert f"{where / 'checkpoint.safetensors'} is of other layers than {where / 'passes.json'} says; remove it" in line
    assert small_runs.tree(tmp_path / "run").keys() == {name for name in before if not name.endswith(".tmp")}


def test_a_mistake_in_another_process_is_said_once(words: Words, tmp_path: Path) -> None:
    assert start(words(tmp_path / "run", APART), tmp_path, fails=1) == [2, 2]
    lines = [line for line in processes.said(tmp_path, 2) if line.startswith("qkscope: ")]
    assert len(lines) == 1 and lines[0].startswith("qkscope: layer 7: the loss is nan"), lines


def test_a_folder_that_not_all_see(by_two: Path, words: Words, tmp_path: Path) -> None:
    """They train every dictionary together, and the first one does the rest; unless that was not wanted."""
    assert start(words(tmp_path / "run", APART), tmp_path, blind=True) == [0, 0], processes.said(tmp_path, 2)
    said = (tmp_path / "0.err").read_text()
    assert f"not all processes see {tmp_path / 'run'} and can write there: the first one measures alone" in said
    assert not (tmp_path / "1.err").read_text()
    for layer in ("layer_0", "layer_1"):
        require_equal(tmp_path / "run" / layer, by_two / layer)
    assert start(words(tmp_path / "again", {"training.spread": "layers"}), tmp_path, blind=True) == [2, 2]
    lines = [line for line in processes.said(tmp_path, 2) if line.startswith("qkscope: ")]
    assert len(lines) == 1 and "--training.spread text" in lines[0], lines
    assert not (tmp_path / "again").exists()


def test_one_layer_is_trained_together(words: Words, tmp_path: Path) -> None:
    """There are fewer layers than processes."""
    assert start(words(tmp_path / "run", {**APART, "layers": 1}), tmp_path) == [0, 0], processes.said(tmp_path, 2)
    assert trained_by(tmp_path, 2) == [{"step1 layer 1"}, set()]


# Layers that several measure -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_is_measured_by_all(in_passes: Path, words: Words, tmp_path: Path, size: int) -> None:
    """What each finds in its pieces becomes the report and the tables of one process."""
    out = tmp_path / "run"
    shutil.copytree(in_passes, out)
    (out / "layer_1" / "report.json").unlink()
    assert start(words(out, APART), tmp_path, size) == [0] * size, processes.said(tmp_path, size)
    require_equal_layers(out, in_passes)
    seconds = read_json(out / "layer_1" / "report.json")["seconds"]
    assert seconds["evaluation"] > 0
    pieces = [{line for line in said_by(tmp_path, r) if line.startswith("evaluating ")} for r in range(size)]
    assert all(pieces) and sum(map(len, pieces)) == len(set.union(*pieces))
    shares = 2 * size
    texts = [f"evaluating layer 1: held-out text, {share + 1} of {shares}" for share in range(shares)]
    together = [f"evaluating all layers at once: held-out text, {share + 1} of {size}" for share in range(size)]
    alone = ["evaluating layer 1: adversary", "evaluating layer 1: fewer pairs"]
    assert set.union(*pieces) == {*texts, *together, *alone}


def test_a_finished_run_is_measured_again_by_all(in_passes: Path, tmp_path: Path) -> None:
    """One layer by each, and all of them at once by both."""
    out = tmp_path / "run"
    shutil.copytree(in_passes, out)
    report = read_json(out / "layer_0" / "report.json")
    (out / "layer_0" / "report.json").write_text(json.dumps({"seconds": report["seconds"]}))
    (out / "layer_1" / "examples.parquet").unlink()
    assert start(["evaluate", str(out)], tmp_path) == [0, 0], processes.said(tmp_path, 2)
    require_equal_layers(out, in_passes)
    seconds = read_json(out / "layer_0" / "report.json")["seconds"]
    assert {name: s for name, s in seconds.items() if name != "evaluation"}.items() <= report["seconds"].items()
    assert start(["evaluate", str(tmp_path / "none")], tmp_path) == [2, 2]
    lines = [line for line in processes.said(tmp_path, 2) if line.startswith("qkscope: ")]
    assert len(lines) == 1 and "config.yaml is missing" in lines[0], lines
    assert not (tmp_path / "none").exists()


def test_killed_while_all_measure_a_layer(in_passes: Path, words: Words, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(in_passes, out)
    (out / "layer_1" / "report.json").unlink()
    codes = start(words(out, APART), tmp_path, 2, ("os.rename", "layer_1/report.json", 1), dies=EACH)
    assert sorted(codes) == [-signal.SIGKILL, 2]
    assert not (out / "layer_1" / "report.json").exists()
    assert start(words(out, APART), tmp_path, 2) == [0, 0], processes.said(tmp_path, 2)
    require_equal_layers(out, in_passes)
