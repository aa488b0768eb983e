"""`qkscope heads DIR` on finished runs: what it prints and writes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import Said, read_json


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_heads_of_a_run(
    run: Callable[..., Path], call: Callable[[list[str]], Said], tmp_path: Path, model: str
) -> None:
    folder, path = run(None, model), tmp_path / "heads.json"
    words = ["heads", str(folder), "--json", str(path), "--top", "2"]
    said = call([*words, "--distance"] if model == "llama" else words)
    assert said.status == 0, said.lines
    assert max(map(len, said.out.splitlines())) <= 100
    titles = [line for line in said.out.splitlines() if line.startswith("layer ")]
    assert [title.split(" of ")[0] for title in titles] == ["layer 0", "layer 1"]
    for layer in read_json(path)["layers"]:
        kept = pq.read_table(folder / f"layer_{layer['layer']}" / "pairs.parquet").to_pylist()
        rows = [dict(zip(layer["pairs"], values, strict=True)) for values in zip(*layer["pairs"].values(), strict=True)]
        key = ("query_feature", "key_feature", "head")
        worth = {tuple(row[name] for name in key): row["importance"] for row in kept}
        assert {tuple(row[name] for name in key): row["importance"] for row in rows} == worth
        assert all((row["unit"] == -1) == (min(row["query_feature"], row["key_feature"]) == -1) for row in rows)
        assert ("position" in rows[0]) == ("distance" in layer) == (model == "llama")
        for head in range(4):
            two = [r for r in rows if r["head"] == head and min(r["query_feature"], r["key_feature"]) >= 0]
            shown = [row for row in layer["strongest"] if row["head"] == head]
            assert [row["pair"] for row in shown if row["unit"] >= 0] == [row["pair"] for row in two[:2]]
            assert len(shown) <= 3 and f"\nhead {head}  " in said.out
            if model == "llama":
                assert all(len(row["profile"]) == len(row["use"]) == 24 for row in shown)
        assert all(unit["name"] in said.out or len(unit["name"]) > 80 for unit in layer["units"]["units"])


def test_one_layer_and_its_folder_say_the_same(run: Callable[..., Path], call: Callable[[list[str]], Said]) -> None:
    folder = run()
    chosen = call(["heads", str(folder), "--layer", "1", "--rank", "2", "--top", "0"])
    direct = call(["heads", str(folder / "layer_1"), "--rank", "2", "--top", "0"])
    assert chosen.status == direct.status == 0 and chosen.out == direct.out
    assert "2 units explain" in chosen.out and "strongest pairs" not in chosen.out and "layer 0" not in chosen.out


def test_without_examples_features_go_by_number(run: Callable[..., Path], call: Callable[[list[str]], Said]) -> None:
    folder = run({"layers": 0})
    (folder / "layer_0" / "examples.parquet").unlink()
    said = call(["heads", str(folder), "--rank", "2"])
    assert said.status == 0 and "“" not in said.out


def test_refusals(run: Callable[..., Path], call: Callable[[list[str]], Said], tmp_path: Path) -> None:
    folder = run({"layers": 0})
    call(["heads", str(folder), "--layer", "7"]).complaint("--layer 7", "the run has layers 0")
    call(["heads", str(folder / "layer_0"), "--layer", "1"]).complaint("--layer 1", "leave --layer out")
    call(["heads", str(folder), "--rank", "0"]).complaint("--rank 0", "at least 1")
    call(["heads", str(folder), "--top", "-1"]).complaint("--top -1", "at least 0")
    call(["heads", str(folder), "--distance"]).complaint("layer 0 has no rotary embedding", "by_position")
    call(["heads", str(folder), "--json", str(tmp_path)]).complaint(f"--json {tmp_path}", "is a folder")
    call(["heads", str(tmp_path / "none")]).complaint(str(tmp_path / "none"), "not a qkscope run")
    call(["heads", str(folder), "--tpo", "1"]).complaint("--tpo", "did you mean '--top'?")
    (folder / "checkpoint.safetensors").touch()
    call(["heads", str(folder)]).complaint("is not finished")
    call(["heads", str(folder / "layer_0")]).complaint("is not finished")
    (folder / "checkpoint.safetensors").unlink()
    shutil.rmtree(folder / "layer_0")
    call(["heads", str(folder)]).complaint("layer_0 does not exist")


def test_a_sweep_names_its_members(run: Callable[..., Path], call: Callable[[list[str]], Said]) -> None:
    folder = run({"layers": 0, "sweep.k": (3, 4)})
    call(["heads", str(folder)]).complaint("is a sweep", str(folder / "k3"), str(folder / "k4"))
    assert call(["heads", str(folder / "k3"), "--rank", "2"]).status == 0
