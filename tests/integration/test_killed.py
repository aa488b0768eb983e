"""A run that is killed at any moment goes on when the same command is given again, and ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Moment, argv, finish, free_memory, kill_at, logged, require_equal, require_like, save_text, tree

STEPS = 6  # of step 1 with the small options: two checkpoints before its end
TUNE_STEPS = 3  # of each stage
LIGHT = {
    "training.tokens": 1100,
    "pairs.tokens": 1080,
    "pairs.count": 40,
    "dictionary.width": 24,
    "evaluation.tokens": 200,
    "evaluation.examples": 2,
}

# Just before the nth time that a file so named is appended to, put in place, or removed.
MOMENTS: dict[str, Moment] = {
    "before the first file": ("os.rename", "config.yaml", 1),
    "before the first checkpoint": ("open", "layer_1/metrics.jsonl", 2),
    "while the first checkpoint is written": ("os.rename", "checkpoint.safetensors", 1),
    "after a checkpoint": ("open", "layer_0/metrics.jsonl", 4),
    "between the layers of step 1's dictionaries": ("os.rename", "layer_1/step1.safetensors", 1),
    "in the first stage": ("open", "layer_1/metrics.jsonl", STEPS + 1),
    "after a checkpoint of the first stage": ("open", "layer_0/metrics.jsonl", STEPS + 3),
    "in the second stage": ("open", "layer_1/metrics.jsonl", STEPS + TUNE_STEPS + 1),
    "between dictionaries and pairs": ("os.rename", "layer_0/pairs.parquet", 1),
    "in the evaluation of the first layer": ("os.rename", "layer_0/features.parquet", 1),
    "in the evaluation of the second layer": ("os.rename", "layer_1/report.json", 1),
    "before the page": ("os.rename", "report.html", 1),
    "before its pass is noted": ("os.rename", "pass_0.json", 1),
    "when its pass is noted": ("os.remove", "checkpoint.safetensors", 1),
    "at the very end": ("os.remove", "passes.json", 1),
}


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that nothing disturbed; each is made once."""
    made: dict[str, Path] = {}

    def folder(words: Callable[..., list[str]], changes: dict[str, Any], model: str) -> Path:
        key = f"{changes} {model}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            finish(words(made[key], changes, model))
        return made[key]

    return folder


@pytest.fixture
def killed(
    words: Callable[..., list[str]], call: Callable, tmp_path: Path, undisturbed: Callable[..., Path]
) -> Callable[..., Path]:
    """Kill a run at these moments in turn, let it go on, and compare it with an undisturbed one."""

    def check(*moments: Moment, changes: dict[str, Any] | None = None, model: str = "gpt2") -> Path:
        out = tmp_path / "run"
        options = {**LIGHT, **(changes or {})}
        command = words(out, options, model)
        for moment in moments:
            kill_at(moment, command)
        said = call(command)
        assert said.status == 0, said.lines
        wanted = undisturbed(words, options, model)
        assert {name.split("/")[-1] for name in tree(out)} == {name.split("/")[-1] for name in tree(wanted)}
        for folder in wanted.rglob("layer_*"):
            require_equal(folder, out / folder.relative_to(wanted))
        return out

    return check


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(killed: Callable[..., Path], moment: str) -> None:
    out = killed(MOMENTS[moment])
    phases = [("step1", n + 1) for n in range(STEPS)]
    phases += [(f"tune{stage}", n + 1) for stage in (1, 2) for n in range(TUNE_STEPS)]
    assert logged(out / "layer_0") == logged(out / "layer_1") == phases


def test_killed_again_and_again(killed: Callable[..., Path]) -> None:
    killed(
        MOMENTS["before the first checkpoint"],
        MOMENTS["while the first checkpoint is written"],
        ("open", "layer_0/metrics.jsonl", 4),
        ("open", "layer_1/metrics.jsonl", 2),
        MOMENTS["between the layers of step 1's dictionaries"],
        ("open", "layer_0/metrics.jsonl", 3),
        ("open", "layer_0/metrics.jsonl", 1),
        MOMENTS["between dictionaries and pairs"],
        ("os.rename", "layer_0/report.json", 1),
        MOMENTS["at the very end"],
    )


@pytest.mark.parametrize(
    ("changes", "model", "moment"),
    [
        ({"pairs.method": "refit"}, "gpt2", ("open", "layer_1/metrics.jsonl", STEPS + 3)),
        ({"pairs.method": "mask"}, "gpt2", ("open", "layer_1/metrics.jsonl", STEPS + 3)),
        ({"pairs.method": "importance"}, "gpt2", ("os.rename", "layer_1/pairs.parquet", 1)),
        ({"dictionary.recipe": "seed"}, "gpt2", ("open", "layer_0/metrics.jsonl", 4)),
        ({"dictionary.activation": "jumprelu"}, "gpt2", ("open", "layer_0/metrics.jsonl", 4)),
        ({"dictionary.dead-after": 150}, "gpt2", ("open", "layer_0/metrics.jsonl", 4)),
        ({"dictionary.width": 150, "dictionary.k": 3}, "gpt2", ("open", "layer_0/metrics.jsonl", 4)),
        ({"dictionary.width": 150, "dictionary.k": 3}, "llama", ("open", "layer_1/metrics.jsonl", STEPS + 3)),
        ({"dictionary.activation": "topk"}, "gpt2", ("open", "layer_0/metrics.jsonl", STEPS + 3)),
        ({"training.dtype": "bfloat16"}, "llama", ("open", "layer_1/metrics.jsonl", STEPS + 3)),
        # Batches that are held are harvested anew.
        ({"training.reuse": 3, "training.held-batches": 2}, "gpt2", ("open", "layer_0/metrics.jsonl", 4)),
        ({"training.reuse": 2}, "llama", ("open", "layer_1/metrics.jsonl", STEPS + 3)),
        # Under a bound, some layers stop at a stage and others go on.
        ({"pairs.max-kl": 0.75}, "gpt2", ("open", "layer_1/metrics.jsonl", STEPS + 2 * TUNE_STEPS + 3)),
        # Under a target, k is found by step 1 and each halving is judged.
        ({"target.max-kl": 1.2}, "gpt2", ("open", "layer_0/metrics.jsonl", 4)),
        ({"target.max-kl": 1.2}, "gpt2", ("os.rename", "layer_1/step1.safetensors", 1)),
        ({"target.max-kl": 1.2}, "gpt2", ("open", "layer_1/metrics.jsonl", STEPS + TUNE_STEPS + 3)),
    ],
)  # fmt: skip
def test_killed_with_another_method(
    killed: Callable[..., Path], changes: dict[str, Any], model: str, moment: Moment
) -> None:
    killed(moment, changes=changes, model=model)


@pytest.mark.parametrize(
    "moment",
    [
        ("os.rename", "seed/config.yaml", 1),
        ("os.rename", "seed/layer_0/report.json", 1),
    ],
)
def test_killed_in_a_sweep(killed: Callable[..., Path], moment: Moment) -> None:
    killed(moment, changes={"sweep.recipe": ("default", "seed")})


SWEEP = {"sweep.k": (2, 3)}
# Bytes that hold one pair of dictionaries at a time; the two of a layer; one more.
ONE, TWO, THREE = 0, 1_175_000, 1_455_000


@pytest.fixture(scope="module")
def in_passes(
    models: Callable[[str], Path], source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of a run that nothing disturbed, in so much memory; each is made once."""

    @cache
    def folder(free: int, swept: bool) -> Path:
        out = tmp_path_factory.mktemp("passes") / "run"
        with free_memory(free):
            finish(argv(out, models("gpt2"), source, {**LIGHT, **(SWEEP if swept else {})}))
        return out

    return folder


@pytest.mark.parametrize("later", [ONE, None])
@pytest.mark.parametrize(
    ("free", "swept", "moment"),
    [
        (ONE, False, ("os.rename", "passes.json", 1)),
        (ONE, False, ("open", "layer_0/metrics.jsonl", STEPS + 2)),
        (ONE, False, ("os.rename", "pass_0.json", 1)),
        (ONE, False, ("os.remove", "checkpoint.safetensors", 1)),
        (ONE, False, ("open", "layer_1/metrics.jsonl", 2)),
        (ONE, False, ("open", "layer_1/metrics.jsonl", STEPS + 2)),
        (ONE, False, ("os.rename", "layer_1/pairs.parquet", 1)),
        (ONE, False, ("os.rename", "pass_1.json", 1)),
        (ONE, False, ("os.rename", "layer_1/report.json", 1)),
        (ONE, False, ("os.remove", "checkpoint_1.safetensors", 1)),
        (ONE, False, ("os.remove", "passes.json", 1)),
        (ONE, False, ("os.remove", "pass_1.json", 1)),  # nothing but what was noted is left
        (TWO, True, ("open", "k3/layer_0/metrics.jsonl", 2)),
        (TWO, True, ("open", "k2/layer_1/metrics.jsonl", STEPS + 2)),
    ],
)
def test_killed_in_one_of_several_passes(
    words: Callable[..., list[str]],
    call: Callable,
    tmp_path: Path,
    in_passes: Callable[..., Path],
    free: int,
    swept: bool,
    moment: Moment,
    later: int | None,
) -> None:
    """Whatever is free by the time it goes on, it keeps to its plan; but for one that it had not written down."""
    planned = moment != ("os.rename", "passes.json", 1)
    kill_at(moment, command := words(tmp_path / "run", {**LIGHT, **(SWEEP if swept else {})}), free=free)
    with free_memory(later if planned else free):
        said = call(command)
    assert said.status == 0, said.lines
    wanted = in_passes(free, swept)
    assert tree(tmp_path / "run").keys() == tree(wanted).keys()
    layers = [path.parent.relative_to(wanted) for path in wanted.rglob("dictionaries.safetensors")]
    assert len(layers) == (4 if swept else 2)
    for layer in layers:
        require_equal(tmp_path / "run" / layer, wanted / layer)


@pytest.mark.parametrize("layer", ["layer_0", "layer_1"])
@pytest.mark.parametrize("free", [ONE, None])
def test_a_file_lost_after_its_pass_is_made_again(
    words: Callable[..., list[str]],
    call: Callable,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
    in_passes: Callable[..., Path],
    free: int | None,
    layer: str,
) -> None:
    kill_at(("os.rename", "layer_1/report.json", 1), command := words(tmp_path / "run", LIGHT), free=free)
    (tmp_path / "run" / layer / "pairs.parquet").unlink()
    said = call(command)
    assert said.status == 0, said.lines
    wanted = undisturbed(words, LIGHT, "gpt2") if free is None else in_passes(free, False)
    for name in ("layer_0", "layer_1"):
        require_equal(tmp_path / "run" / name, wanted / name)


def test_several_passes_find_what_one_does(
    words: Callable[..., list[str]], undisturbed: Callable[..., Path], in_passes: Callable[..., Path]
) -> None:
    """Up to rounding: a layer that nobody reads takes another kernel."""
    require_like(in_passes(ONE, False), undisturbed(words, LIGHT, "gpt2"))


def test_passes_are_said_beforehand(words: Callable[..., list[str]], call: Callable, tmp_path: Path) -> None:
    short = {"training.tokens": 200, "pairs.method": "importance"}
    both = "2 passes over the text, of 1, 1"
    for free, changes, passes, second in (
        (10**9, {}, "", ""),
        (ONE, {}, both, "pass 2 of 2: layer 1"),
        (TWO, SWEEP, "2, 2", "pass 2 of 2: layer 1"),
        (THREE, SWEEP, "3, 1", "pass 2 of 2: layer 1"),
    ):
        with free_memory(free):
            said = call(words(tmp_path / f"{free}", {**short, **changes}))
        assert said.status == 0
        beside = [line for line in said.lines if line.startswith("training takes about")]
        assert len(beside) == bool(passes) and all(f"{passes} pairs of dictionaries" in line for line in beside)
        assert [line for line in said.lines if line.startswith("pass 2 of ")] == [second] * bool(second)
        assert ("pass 1 of 2: layers 0, 1" in said.lines) == (free == THREE)


def test_a_damaged_plan_is_said(words: Callable[..., list[str]], call: Callable, tmp_path: Path) -> None:
    kill_at(("os.remove", "checkpoint.safetensors", 1), command := words(tmp_path / "run", LIGHT), free=ONE)
    (tmp_path / "run" / "passes.json").write_text('{"passes": 3}')
    said = call(command)
    assert said.status == 2 and said.lines[-1].startswith(f"qkscope: {tmp_path / 'run' / 'passes.json'} is damaged; ")


def test_a_text_changed_in_between_is_refused(words: Callable[..., list[str]], call: Callable, tmp_path: Path) -> None:
    source = save_text(tmp_path / "text.parquet")
    command = words(tmp_path / "run", {"data.source": source})
    kill_at(MOMENTS["after a checkpoint"], command)
    save_text(source, n=80)
    before = tree(tmp_path / "run")
    said = call(command)
    assert said.status == 2 and "the checkpoint was made with" in said.lines[-1]
    assert tree(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_said(words: Callable[..., list[str]], call: Callable, tmp_path: Path) -> None:
    command = words(tmp_path / "run")
    kill_at(MOMENTS["after a checkpoint"], command)
    path = tmp_path / "run" / "checkpoint.safetensors"
    whole = path.read_bytes()
    for damage, part in (
        (lambda: path.write_bytes(whole[:-100]), f"{path} is damaged"),
        (lambda: save_file({"a": torch.ones(1)}, path), f"{path} is no checkpoint"),
    ):
        damage()
        said = call(command)
        assert said.status == 2 and said.lines[-1].startswith(f"qkscope: {part}")
        assert said.lines[-1].endswith("; remove it to begin the run anew") and len(said.lines) == 2
    path.unlink()
    assert call(command).status == 0


def test_maps_of_a_run_that_is_begun_anew_are_not_its_last(
    words: Callable[..., list[str]], call: Callable, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    """Under a target every stage leaves what it has; without its checkpoint that is nothing to go on from."""
    changes = {**LIGHT, "target.max-kl": 1.2}
    command = words(tmp_path / "run", changes)
    kill_at(("open", "layer_0/metrics.jsonl", STEPS + 2 * TUNE_STEPS + 1), command)
    assert len(list((tmp_path / "run").rglob("pairs.parquet"))) == 2
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    said = call(command)
    assert said.status == 0 and any(line.startswith("step1 layer 0") for line in said.lines), said.lines
    for layer in ("layer_0", "layer_1"):
        require_equal(tmp_path / "run" / layer, undisturbed(words, changes, "gpt2") / layer)


def test_interrupted(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """A real process: Ctrl-C is said in one line, and a SIGKILL from outside leaves something to go on from."""
    command = words(tmp_path / "run", {"layers": 0, "training.tokens": 400_000})
    # A shell's background jobs ignore SIGINT, and so would all that they start.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = [sys.executable, "-c", f"{heed}; from qkscope.cli import main; main()", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        stood = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
            while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == stood:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1].splitlines()
        assert process.returncode == status
        assert number != signal.SIGINT or said[-1] == "qkscope: interrupted; give the same command again to go on"
    assert any(line.startswith("going on from step1, ") for line in said)
    tensors = load_file(checkpoint)
    assert all(t.isfinite().all() for t in tensors.values())
