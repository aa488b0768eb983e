"""The scoreboard: its arithmetic, what it refuses, and a whole small run of it that goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qkscope import cli
from qkscope.errors import UserError
from qkscope.evaluate.quality import report
from qkscope.evaluate.quality.bench import LIVE, PLAIN, PLAIN_HALF, Size
from qkscope.evaluate.quality.page import curve_of
from qkscope.evaluate.quality.report import bench_quality, least, scoreboard, scores_of

TINY = Size(
    width=24, sparsity=0.03, tokens=2048, heldout_tokens=1024, counts=(60, 30),
    mask_sparsity=(1e-6, 1e-2), mask_tokens=512, adversary_count=60, adversary_tokens=128,
    adversary_steps=3, batch_tokens=512,
    sample_tokens=512, context=64,
)  # fmt: skip


def test_the_least_cost_lies_between_the_points_around_it() -> None:
    curve = [(100.0, 0.4), (400.0, 0.1), (1600.0, 0.05)]
    assert least(curve, 0.2) == pytest.approx(200.0)  # half way in both logarithms
    assert least(curve, 0.1) == pytest.approx(400.0)
    assert least(curve, 0.5) == 100.0  # cheaper than the cheapest was not tried
    assert least(curve, 0.01) is None
    assert least(list(reversed(curve)), 0.2) == pytest.approx(200.0)


def figure(value: float) -> dict[str, Any]:
    return {"mean": value, "ci95": [value - 0.01, value + 0.01]}


def row(dictionary: str, method: str, kl: float, l0: float, pairs: int | None = None, **more: Any) -> dict[str, Any]:
    sides = {f"{n}_{s}": figure(v) for n, v in (("l0", l0), ("dead", 0.02), ("dense", 0.1)) for s in ("query", "key")}
    kept = {} if pairs is None else {"pairs": pairs, "asked": pairs}
    return {
        "dictionary": dictionary, "method": method, "pattern_kl": figure(kl), "ce_increase": figure(kl / 10),
        "logit_kl": figure(kl / 5), "seconds": 1.0, **sides, **kept, **more,
    }  # fmt: skip


def layer_of(seed: int = 0, pruned: float = 0.1) -> dict[str, Any]:
    played = {"adversary": {"logit_kl": {"adversary": figure(0.7)}}}
    rows = [
        row("seed", "all pairs", 0.2, 8.0), row("default", "all pairs", 0.1, 8.0),
        row("default, half the L0", "all pairs", 0.2, 4.0), row("default, a quarter", "all pairs", 0.4, 2.0),
        row(PLAIN, "all pairs", 0.1, 8.0), row(PLAIN_HALF, "all pairs", 0.4, 4.0), row(LIVE, "all pairs", 0.11, 8.0),
        row("random", "all pairs", 0.9, 8.0), row("svd", "all pairs", 0.6, 8.0),
        row("seed", "mask λ=1e-06", 0.2, 8.0, 10_000), row("seed", "mask λ=1e-06", 0.3, 8.0, 4000),
        row("seed", "mask λ=1e-05", 0.25, 8.0, 5000), row("seed", "mask λ=1e-05", 0.28, 8.0, 4000),
        row("default", "prune and tune", pruned, 8.0, 4000, **played), row("default", "prune and tune", 0.2, 8.0, 1000),
    ]  # fmt: skip
    return {"model": "m", "layer": 1, "seed": seed, "rows": rows}


def test_scores_are_ratios_to_the_baseline() -> None:
    scores = scores_of(layer_of())
    assert scores["KL ÷ seed's, at seed's L0"] == pytest.approx(0.5)
    assert scores["L0 ÷ seed's, at seed's KL"] == pytest.approx(0.5)
    assert scores["KL ÷ seed's, at seed's L0, no pair penalty"] == pytest.approx(0.5)
    assert scores["L0 ÷ seed's, at seed's KL, no pair penalty"] == pytest.approx(0.5**0.5)
    assert scores["pairs ÷ those of mask λ=1e-06, at its KL"] == pytest.approx(0.1)
    assert scores["pairs ÷ those of mask λ=1e-05, at its KL"] == pytest.approx(0.2)  # no fewer were tried
    assert scores["KL ÷ the best mask's cut to 4,000 pairs"] == pytest.approx(0.1 / 0.28)
    assert scores["KL at the live width ÷ KL, default"] == pytest.approx(1.1) and scores[
        "dead, default"
    ] == pytest.approx(0.02)
    layer = layer_of(pruned=0.1)
    layer["rows"][-1] = row("default", "prune and tune", 0.4, 8.0, 1000)  # half way in both logarithms
    assert scores_of(layer)["pairs ÷ those of mask λ=1e-06, at its KL"] == pytest.approx(0.2)
    assert scores["random's KL ÷ the largest map's"] == pytest.approx(9.0)
    assert scores["adversary, default"] == pytest.approx(0.7) and scores.get("adversary, seed") is None


def test_the_scoreboard_is_a_median_over_layers_of_means_over_seeds() -> None:
    layers = [
        {**layer_of(seed, pruned), "layer": layer} for layer in (1, 2, 3) for seed, pruned in ((0, 0.1), (1, 0.3))
    ]
    table = {score["score"]: score for score in scoreboard(layers)}
    assert table["KL of the largest map"]["median"] == pytest.approx(0.2)
    assert table["KL of the largest map"]["spread"]["m 1"] == pytest.approx(0.2 / 2**0.5)
    assert list(table["KL ÷ seed's, at seed's L0"]["by_layer"]) == ["m 1", "m 2", "m 3"]
    for layer in layers:
        if layer["layer"] == 3:  # no point of default's reaches the baseline there
            layer["rows"][0] = row("seed", "all pairs", 0.05, 8.0)
    missed = {score["score"]: score for score in scoreboard(layers)}["L0 ÷ seed's, at seed's KL"]
    assert missed["by_layer"]["m 3"] is None and missed["median"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seeds", "1", "1"], "--seeds 1 1"),
        (["--models", "elsewhere"], "--models elsewhere: name its text too"),
        (["--layers", "9"], "--layers 9: stories-gpt2 has layers 0 to 3"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json"),
    ],
)
def test_a_slip_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "quality", *argv])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two seeds of one layer; the second call finds the first in the file and runs the other alone."""
    monkeypatch.setitem(report.SIZES, "small", TINY)
    ran: list[int] = []

    class Here:  # a pool that runs its tasks in this process, where the small size is known
        def __init__(self, *args: Any, **options: Any) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *args: object) -> None: ...
        def map(self, run: Any, tasks: Any, sizes: Any) -> Any:
            for task, size in zip(tasks, sizes, strict=True):
                ran.append(task[3])
                yield run(task, size)

    monkeypatch.setattr(report, "worker_pool", Here)
    path = tmp_path / "quality.json"
    bench_quality("small", ["stories-gpt2"], [1], [0], path, 1)
    both = bench_quality("small", ["stories-gpt2"], [1], [0, 1], path, 1)
    assert ran == [0, 1]
    assert [layer["seed"] for layer in both["layers"]] == [0, 1]
    assert json.loads(path.read_text()) == json.loads(json.dumps(both))
    again = bench_quality("small", ["stories-gpt2"], [1], [1], path, 1)
    assert ran == [0, 1] and len(again["layers"]) == 2  # what was not asked for this time is not lost
    rows = both["layers"][0]["rows"]
    maps = {(r["dictionary"], r["method"], r.get("asked")): r for r in rows if "pairs" in r}
    assert {
        ("seed", "mask λ=1e-06", 30),
        ("seed", "mask λ=0.01", 30),
        ("default", "prune and tune", 60),
        ("default", "prune and tune", 30),
    } <= set(maps)
    assert all(r["pairs"] <= r["asked"] for r in maps.values())
    assert maps["default", "prune and tune", 60]["adversary"]["logit_kl"]["adversary"]["mean"] > 0
    for name in ("default", "default, half the L0", LIVE, PLAIN, PLAIN_HALF, "random", "svd"):
        assert sum(r["dictionary"] == name and r["method"] == "all pairs" for r in rows) == 1
    printed = capsys.readouterr().out
    assert "KL ÷ seed's, at seed's L0" in printed and "stories-gpt2 layer 1, seed 1" in printed
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "stories-gpt2 layer 1" in page and page.count("<figure>") == 6 and "seeds 0, 1; KL of" in page
    by_l0 = ["without its pair penalty" in figure for figure in page.split("<figure>")[1:]]
    assert by_l0 == [True] * 3 + [False] * 3  # no pairs are taken from it
    path.write_text(json.dumps({"benchmark": "planted"}))
    with pytest.raises(UserError, match="something other"):
        bench_quality("small", ["stories-gpt2"], [1], [0], path, 1)


def test_the_curves_of_the_page_are_the_rows() -> None:
    layers = [layer_of(0, pruned=0.1), layer_of(1, pruned=0.3)]
    by_pairs = sorted(curve_of(layers, "default", "pairs", "pattern_kl"))
    assert by_pairs == [(1000, pytest.approx(0.2), [0.2, 0.2]), (4000, pytest.approx(0.2), [0.1, 0.3])]
    layers[1]["rows"][9] = row("seed", "mask λ=1e-06", 0.22, 8.0, 12_000)  # the mask as it is leaves another count
    masks = sorted(curve_of(layers, "seed", "pairs", "pattern_kl"))  # at 4,000 pairs the stronger mask's
    assert [x for x, _, _ in masks] == [4000, 5000, 11_000]
    assert [y for _, y, _ in masks] == pytest.approx([0.28, 0.25, 0.21])
    by_l0 = sorted(curve_of(layers[:1], "default", "L0", "pattern_kl"))
    assert [(x, y) for x, y, _ in by_l0] == [(2, pytest.approx(0.4)), (4, pytest.approx(0.2)), (8, pytest.approx(0.1))]
    assert [ends for _, _, ends in by_l0] == [pytest.approx([y - 0.01, y + 0.01]) for _, y, _ in by_l0]
