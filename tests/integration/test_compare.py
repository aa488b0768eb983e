"""`qkscope compare A B` on finished runs, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import Said, read_json


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_run_recurs_in_itself_and_less_in_another(
    run: Callable[..., Path], call: Callable[[list[str]], Said], tmp_path: Path, model: str
) -> None:
    one, other = (run({"training.seed": seed}, model, name=f"run{seed}") for seed in (0, 1))
    path = tmp_path / "same.json"
    assert call(["compare", str(one), str(one), "--json", str(path)]).status == 0
    same = read_json(path)["layers"]
    assert [(row["layer"], row["of"]) for row in same] == [(0, "A in B"), (0, "B in A"), (1, "A in B"), (1, "B in A")]
    for row in same:
        assert row["query"]["recur"] == row["key"]["recur"] == row["pairs"]["recur"] == 1
    said = call(["compare", str(one), str(other), "--json", str(path)])
    assert said.status == 0 and said.out.count("recur query features") == 4
    for row in json.loads(path.read_text())["layers"]:
        assert 0 <= row["pairs"]["recur"] < 1 and row["query"]["cosine"] < 0.999


def test_refusals(run: Callable[..., Path], call: Callable[[list[str]], Said], tmp_path: Path) -> None:
    one, two = run({"layers": 0}, name="zero"), run({"layers": 1}, name="one")
    call(["compare", str(one), str(two)]).complaint(str(two), "has no layer in common with", str(one))
    other = run({"layers": 0}, "llama", name="llama")
    call(["compare", str(one), str(other)]).complaint(str(other), "name runs of one model")
    call(["compare", str(one), str(tmp_path / "none")]).complaint(str(tmp_path / "none"))
    missing = tmp_path / "missing" / "x.json"
    call(["compare", str(one), str(one), "--json", str(missing)]).complaint(str(missing), "name a file")
