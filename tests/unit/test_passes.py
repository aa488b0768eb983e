"""The plan of passes: what is noted beside it, and what a person hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkscope.errors import UserError
from qkscope.memory import Need, Part
from qkscope.passes import Passes, checkpoint_of, checkpoints, forget, note_done, planned

PARTS: list[Part] = [(0, ""), (1, ""), (2, "")]


def a_plan() -> Passes:
    return Passes([[part] for part in PARTS], {})


def test_a_plan_is_read_with_what_was_noted_since(tmp_path: Path) -> None:
    a_plan().write(tmp_path)
    assert Passes.read(tmp_path) == a_plan() and a_plan().left == [0, 1, 2]
    for number in range(3):
        checkpoint_of(tmp_path, number).touch()
    names = ["checkpoint.safetensors", "checkpoint_1.safetensors", "checkpoint_2.safetensors"]
    assert checkpoints(tmp_path) == [tmp_path / name for name in names]
    note_done(tmp_path, 2, {"step1": 2.5})
    assert checkpoints(tmp_path) == [tmp_path / name for name in names[:2]]
    plan = Passes.read(tmp_path)
    assert plan is not None and plan.left == [0, 1] and plan.seconds == {(2, ""): {"step1": 2.5}}
    plan.undo(tmp_path, 2)
    assert plan.left == [0, 1, 2] and Passes.read(tmp_path) == plan


def test_what_was_noted_is_forgotten_with_the_plan_alone(tmp_path: Path) -> None:
    a_plan().write(tmp_path)
    note_done(tmp_path, 1, {})
    forget(tmp_path)
    assert Passes.read(tmp_path) == Passes(a_plan().passes, {1: {}})
    (tmp_path / "passes.json").unlink()
    assert Passes.read(tmp_path) is None
    forget(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"passes": [0]}', '{"passes": 3}'],
)
def test_a_damaged_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "passes.json").write_text(text)
    with pytest.raises(UserError, match=r"passes.json is damaged; remove it and all checkpoints to begin the run anew"):
        Passes.read(tmp_path)


def test_a_note_of_no_pass(tmp_path: Path) -> None:
    a_plan().write(tmp_path)
    note_done(tmp_path, 3, {})
    with pytest.raises(UserError, match="is damaged"):
        Passes.read(tmp_path)


@pytest.mark.parametrize(
    ("size", "free", "most", "said"),
    [
        (1e9, 10e9, 3, "training takes about 3.1 GB beside the model, and 10.0 GB are free"),
        (1e9, 10e9, 1, ""),  # a pass each, because several processes take them
        (3e9, 10e9, 1, "training takes about 3.1 GB beside the model, and 10.0 GB are free"),
        (1e9, 3e9, 3, "training takes about 3.1 GB beside the model, and 3.0 GB are free: 2 passes over the text, of "
         "2, 1 pairs of dictionaries"),
        (1e8, 1e10, 3, ""),
    ],
)  # fmt: skip
def test_what_is_said_of_a_plan(size: float, free: float, most: int, said: str) -> None:
    lines: list[str] = []
    need = Need(dict.fromkeys(PARTS, int(size)), dict.fromkeys(range(3), 0), int(1e8))
    passes = planned(PARTS, need, int(free), most, lines.append)
    assert lines == ([said] if said else [])
    assert [part for one in passes for part in one] == PARTS and len(passes) == (2 if ": 2" in said else -(-3 // most))
