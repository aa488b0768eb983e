"""`--help` says all that can be said to a command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qkscope import cli, config
from qkscope.cli import EvaluateCommand, RunCommand
from qkscope.config import known_keys


def fields(kind: type) -> list[str]:
    """Dotted names of a command's fields, groups left out."""
    keys = known_keys(kind)
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def test_help(call: Callable) -> None:
    for words in ([], ["-h"], ["--help"]):
        said = call(words)
        assert said.status == 0 and said.lines == []
        assert all(command in said.out for command in ("qkscope COMMAND", "run", "evaluate"))
    said = call(["--version"])
    assert said.status == 0 and re.fullmatch(r"qkscope \d+\.\d+\.\d+\S*\n", said.out)


@pytest.mark.parametrize(("command", "kind"), [("run", RunCommand), ("evaluate", EvaluateCommand)])
def test_help_names_every_field(call: Callable, monkeypatch: pytest.MonkeyPatch, command: str, kind: type) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = call([command, "--help"])
    assert said.status == 0 and said.lines == []
    assert command == "run" or "PATH" in said.out
    for key in fields(kind):
        assert key == "folder" or re.search(rf"--{re.escape(key.replace('_', '-'))}\b", said.out), key


def test_every_field_says_what_it_means() -> None:
    """Its docstring is what --help shows."""
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (config, cli))
    for key in fields(RunCommand):
        name = key.rsplit(".", 1)[-1]
        assert re.search(rf'^    {name}: .*\n    """', source, re.M) or key.startswith("sweep."), key
