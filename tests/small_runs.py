"""Runs small enough for a test: their options, the command line called as a person calls it, runs that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from layers import close
from safetensors.torch import load_file
from texts import BOS, documents_of
from tiny import tiny_model

from qkscope import jobs, memory, pipeline
from qkscope.cli import main
from qkscope.evaluate import measure, report

OPTIONS: dict[str, Any] = {
    "layers": (0, 1),
    "data.context": 24,
    "dictionary.width": 32,
    "dictionary.k": 4,
    "training.tokens": 1200,
    "training.batch-tokens": 200,
    "training.log-steps": 1,
    "training.checkpoint-steps": 2,
    "training.device": "cpu",
    "pairs.count": 60,
    "pairs.tokens": 1600,
    "pairs.stages": 2,
    "pairs.importance-tokens": 300,
    "pairs.validation-tokens": 300,
    "evaluation.tokens": 500,
    "evaluation.adversary-steps": 2,
}
ARTEFACT = (
    "dictionaries.safetensors",
    "pairs.parquet",
    "features.parquet",
    "examples.parquet",
    "pair_examples.parquet",
)


def argv(out: Path, model: Path | str, source: Path | None, changes: dict[str, Any] | None = None) -> list[str]:
    """The words of `qkscope run` with the small options and some changed ones; None leaves an option out."""
    options = {"model": model, "data.source": source, "out": out, **OPTIONS, **(changes or {})}
    words = ["run"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@contextmanager
def small_constants() -> Iterator[None]:
    """Starts are fitted to less text, and less of it is checked pair by pair: most of a small run's time otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "START_TOKENS", 300)
        for module in (measure, report):
            patch.setattr(module, "CHECK_TOKENS", 8)
        yield


@contextmanager
def free_memory(bytes_: int | None) -> Iterator[None]:
    """Trainings, whose steps then take next to nothing, are told that this much is free; None: as much as is."""
    with pytest.MonkeyPatch.context() as patch:
        if bytes_ is not None:
            patch.setattr(pipeline, "free_memory", lambda device: bytes_)
            for name in ("STEP", "AT_START", "AT_END"):
                patch.setattr(memory, name, 0)
        yield


def finish(words: list[str]) -> None:
    """Give a command that succeeds, outside of a test."""
    with small_constants():
        main(words)


def save_embedded_run(out: Path, model: str, changes: dict[str, Any] | None = None) -> Path:
    """A finished small run of layer 2 of an embedded model on its own corpus."""
    options = {"layers": 2, "data.context": 96, "training.batch-tokens": 400, "data.source": None}
    finish(argv(out, model, None, {**options, **(changes or {})}))
    return out


class Said(NamedTuple):
    """What a command did."""

    status: int
    out: str
    lines: list[str]
    """Of standard error."""

    def complaint(self, *parts: str) -> str:
        """The one line that a mistake ends in, with these parts; nothing but `loading` may stand before it."""
        assert self.status == 2, self
        lines = [line for line in self.lines if not line.startswith("loading ")]
        assert len(lines) == 1 and lines[0].startswith("qkscope: "), self.lines
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]


def call(words: list[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """Give a command in this process."""
    capsys.readouterr()
    status = 0
    try:
        main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return Said(status, out, err.splitlines())


def save_model(folder: Path, name: str, **changes: Any) -> Path:
    """A tiny model and a tokenizer of one token a word, as a person would have saved them."""
    model: Any = tiny_model(name, **changes)
    model.save_pretrained(folder)
    BOS.save_pretrained(folder)
    return folder


def save_text(path: Path, n: int = 70, words: int = 40) -> Path:
    pq.write_table(pa.table({"text": documents_of([words] * n), "number": range(n)}), path)
    return path


# Comparing runs


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def report_of(layer: Path) -> dict[str, Any]:
    """A layer's report without the times."""
    return {key: value for key, value in read_json(layer / "report.json").items() if key != "seconds"}


def logged(layer: Path) -> list[tuple[str, int]]:
    """Phase and step of each line of metrics.jsonl."""
    lines = (layer / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["phase"], line["step"]) for line in map(json.loads, lines)]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def require_equal(one: Path, other: Path) -> None:
    """Bit-equal artefacts, equal reports and the same logged steps, for two layers' folders."""
    for name in ARTEFACT:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert report_of(one) == report_of(other)
    assert logged(one) == logged(other)


def require_like(found: Path, wanted: Path, *, positions: bool = True) -> None:
    """The same files; dictionaries, pairs, logs and reports of both layers alike up to rounding.

    Without a rotary embedding (`positions`) nothing says where `key.b_out` is: it adds a constant to each score row.
    """
    assert tree(found).keys() == tree(wanted).keys()
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (found, wanted)]
    assert configs[0]["run"] == configs[1]["run"]
    for layer in ("layer_0", "layer_1"):
        here, there = found / layer, wanted / layer
        for name in ("step1.safetensors", "dictionaries.safetensors"):
            mine, other = load_file(here / name), load_file(there / name)
            assert mine.keys() == other.keys()
            for key in mine:
                if not (positions and key == "key.b_out"):
                    close(mine[key], other[key], 1e-4, floor=1e-2)
        one, two = (pq.read_table(folder / "pairs.parquet").to_pydict() for folder in (here, there))
        for column in ("query_feature", "key_feature", "head"):
            assert one[column] == two[column]
        assert one["strength"] == pytest.approx(two["strength"], rel=1e-3, abs=1e-4)
        assert logged(here) == logged(there)
        kl = [read_json(folder / "report.json")["pattern_kl"]["map_pruned"]["mean"] for folder in (here, there)]
        assert kl[0] == pytest.approx(kl[1], rel=1e-4)


# Killing runs

Moment = tuple[str, str, int]
"""An audit event ("open" to append, "os.rename", "os.remove"), how its file's name ends, and which of those it is."""


def die_at(moment: Moment) -> None:
    wanted, ending, left = moment

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event != wanted or (event == "open" and args[1] != "a"):
            return
        if str(args[1 if event == "os.rename" else 0]).endswith(ending):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _child(words: list[str], moment: Moment, free: int | None) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    die_at(moment)
    with free_memory(free):
        finish(words)


_server = multiprocessing.get_context("forkserver")
# Children are forked from it: no second import of torch.
_server.set_forkserver_preload(["qkscope.pipeline", "transformers.models.gpt2.modeling_gpt2", "qkscope.data.hub"])


def kill_at(moment: Moment, words: list[str], free: int | None = None) -> None:
    """Give a command in a process of its own, which is killed (SIGKILL) just before this moment."""
    child = _server.Process(target=_child, args=(words, moment, free))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, f"{moment} never came (exit code {child.exitcode})"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of that size mounted at the folder; skips where mounting is not allowed."""
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {folder} 2>/dev/null"):
        pytest.skip("no small disk: mounting needs root and its capabilities")
    try:
        yield
    finally:
        os.system(f"umount {folder}")
