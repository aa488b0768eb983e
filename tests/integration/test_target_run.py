"""`--target`: nobody says k or how many pairs; the run finds both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_runs import logged, read_json

from qkscope import Decomposition

TARGET = {"layers": 0, "training.tokens": 3000, "pairs.count": 40}


def l0_of(layer: Path) -> float:
    return sum(read_json(layer / "report.json")["l0"][side]["mean"] for side in ("query", "key"))


@pytest.fixture
def reached(run: Callable[..., Path]) -> Callable[[str, float], Path]:
    return lambda name, bound: run({**TARGET, f"target.{name}": bound}, name=f"{name}{bound}") / "layer_0"


def test_a_looser_bound_needs_fewer_features_and_fewer_pairs(reached: Callable[[str, float], Path]) -> None:
    loose, tight = reached("max-kl", 2.0), reached("max-kl", 0.9)
    assert l0_of(loose) < l0_of(tight)
    assert len(Decomposition.load(loose).pairs) < len(Decomposition.load(tight).pairs)
    assert read_json(loose / "report.json")["target"]["reached"]
    assert "a pattern KL of 2: reached" in (loose.parent / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_reached_is_said_and_stays_large(words: Callable, call: Callable, tmp_path: Path) -> None:
    said = call(words(tmp_path / "run", {**TARGET, "target.max-kl": 1e-6}))
    assert said.status == 0
    assert any("NOT under the bound of 1e-06" in line for line in said.lines)
    assert any(line.endswith("the target is NOT reached") for line in said.lines)
    layer = tmp_path / "run" / "layer_0"
    assert {phase for phase, _ in logged(layer)} == {"step1", "tune1"}  # there is nothing larger to fall back to
    assert not read_json(layer / "report.json")["target"]["reached"]


def test_a_bound_on_cross_entropy(words: Callable, call: Callable, tmp_path: Path) -> None:
    """What the model may lose; the map that is kept stays under it on validation text."""
    said = call(words(tmp_path / "run", {**TARGET, "target.max-ce": 2.5}))
    assert said.status == 0, said.lines
    assert any("step 1 is steered to a pattern KL of " in line for line in said.lines)
    judged = [line for line in said.lines if "validation cross-entropy increase" in line]
    assert judged and all(", under the bound of 2.5" in line for line in judged)  # what does not hold is not written
    kept = pq.read_table(tmp_path / "run" / "layer_0" / "pairs.parquet").num_rows
    assert f" {kept:,} pairs" in judged[-1]
    assert read_json(tmp_path / "run" / "layer_0" / "report.json")["target"]["max_ce"] == 2.5


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"target.max-kl": 0}, ("--target.max_kl 0",)),
        ({"target.max-kl": 0.1, "target.share": 1}, ("--target.share 1",)),
        ({"target.max-kl": 0.1, "pairs.max-kl": 0.2}, ("--pairs.max-kl 0.2", "leave one of them out")),
        ({"target.max-kl": 0.1, "pairs.tokens": 0}, ("--pairs.tokens 0", "leave one of them out")),
        ({"target.max-kl": 0.1, "pairs.method": "refit"}, ("--pairs.method refit", "leave one of them out")),
        ({"target.max-kl": 0.1, "dictionary.recipe": "seed"}, ("activation relu (recipe seed)", "finds k")),
        ({"target.max-kl": 0.1, "dictionary.activation": "topk"}, ("activation topk", "finds k")),
        ({"target.max-kl": 0.1, "sweep.k": (2, 4)}, ("--sweep.k 2", "finds k")),
        ({"target.max-kl": 0.1, "sweep.recipe": ("default", "seed")}, ("activation relu (recipe seed)", "finds k")),
    ],
)
def test_what_a_target_does_not_go_with(
    words: Callable, call: Callable, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    call(words(tmp_path / "run", changes)).complaint(*parts)
    assert not (tmp_path / "run").exists()


def test_every_member_of_a_sweep_finds_its_own(run: Callable[..., Path]) -> None:
    out = run({**TARGET, "target.max-kl": 1.2, "sweep.width": (16, 32), "dictionary.activation": "jumprelu"})
    for name in ("w16", "w32"):
        report = read_json(out / name / "layer_0" / "report.json")
        assert report["target"]["max_kl"] == 1.2
        steps = (out / name / "layer_0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        l0 = [line["l0_query"] for line in map(json.loads, steps) if line["phase"] == "step1"]
        assert l0[-1] != pytest.approx(4.0, abs=0.05)  # where k began


@pytest.mark.parametrize("bound", ["target.max-kl", "pairs.max-kl"])
def test_judging_a_map_leaves_its_thresholds(run: Callable[..., Path], bound: str) -> None:
    """As many features are active in the artefact as were in training."""
    layer = run({**TARGET, bound: 5.0}) / "layer_0"
    lines = [json.loads(line) for line in (layer / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = read_json(layer / "report.json")["l0"]
    for side in ("query", "key"):
        assert found[side]["mean"] == pytest.approx(lines[-1][f"l0_{side}"], rel=0.35)
