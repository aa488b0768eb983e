"""Tiny models and texts as files, made once a session, and the command line to hand them to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
from small_runs import Said

from qkscope.embedded import EMBEDDED_MODELS


@pytest.fixture(autouse=True)
def small_constants() -> Iterator[None]:
    """Small runs stay small."""
    with small_runs.small_constants():
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a saved tiny model, by its name in tiny.py."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = small_runs.save_model(tmp_path_factory.mktemp("models") / name.replace(":", "-"), name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 documents of 40 words."""
    return small_runs.save_text(tmp_path_factory.mktemp("text") / "words.parquet")


@pytest.fixture(scope="session", params=EMBEDDED_MODELS)
def embedded_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run of layer 2 of each embedded model on its own corpus."""
    return small_runs.save_embedded_run(tmp_path_factory.mktemp("embedded") / "run", request.param)


@pytest.fixture
def words(models: Callable[[str], Path], source: Path) -> Callable[..., list[str]]:
    """The words of a small `qkscope run`: words(out, {"dictionary.k": 3}, model="llama")."""

    def make(out: Path, changes: dict[str, Any] | None = None, model: str = "gpt2") -> list[str]:
        return small_runs.argv(out, models(model), source, changes)

    return make


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Said]:
    """Give a command: call(["run", ...]) returns its status and what it said."""
    return lambda words: small_runs.call(words, capsys)


@pytest.fixture
def run(call: Callable[[list[str]], Said], words: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """A finished small run's folder: run({"dictionary.k": 3}, model="llama", name="a")."""

    def finish(changes: dict[str, Any] | None = None, model: str = "gpt2", name: str = "run") -> Path:
        said = call(words(tmp_path / name, changes, model))
        assert said.status == 0, said.lines
        return tmp_path / name

    return finish
