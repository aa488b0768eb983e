"""`bench speed`: counted operations against torch's counter, turns, memory, ratios, and the command on a tiny shape."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import close, slow_kl, some_inputs, some_sides
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qkscope import cli
from qkscope.errors import UserError
from qkscope.evaluate.speed import bench, measure, published, race, report
from qkscope.evaluate.speed.bench import DEFAULT, MASK, SEED, THEIR_MASK, THEIRS, Way, pair_ways, ratios, step1_ways
from qkscope.evaluate.speed.measure import Ceiling, Timing, in_turns, most_held
from qkscope.evaluate.speed.work import Work, adam, product, seen_share, sparse
from qkscope.evaluate.speed.world import SIZES, RandomText, Size, World, job_of
from qkscope.training.step1 import Step1Job

TINY = Size(
    context=24, width=150, k=2, batch_tokens=50, pairs=300, live=(20, 30), sample_tokens=48, judged_tokens=48,
    heads=2, all_layers=True, vocabulary=200, repeats=2, mask_steps=5,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> World:
    return World(TINY, CPU)


@pytest.fixture(scope="module")
def ways(world: World) -> dict[str, Way]:
    return step1_ways(world) | pair_ways(world)


def counted(way: Way) -> int:
    way.act()  # gradients and layouts that are made once
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        way.act()
    return counter.get_total_flops()


THREE, ALL, TWICE = ", layers 1 2 3", ", all 4", DEFAULT + ", reuse 2"
NAMES = [
    "harvest", DEFAULT, SEED, THEIRS, TWICE, DEFAULT + THREE, THEIRS + THREE, DEFAULT + ALL, THEIRS + ALL,
    "selection, for each count", "refit", THEIR_MASK,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_count_by_hand_is_the_counters(name: str, ways: dict[str, Way]) -> None:
    way = ways[name]
    found, wanted = counted(way), way.work.dense
    steps = getattr(getattr(way.act, "__self__", None), "turn", 1)
    for job in penalised(way):  # the penalty's product is of features that fired; the count is of a batch where all do
        on_q, on_k = (int((job.get_buffer(f"{side}_idle") == 0).sum()) for side in ("query", "key"))
        assert 1 < on_q < TINY.width and 1 < on_k < TINY.width
        every, fired = (product(a, 64, b, TINY.heads).dense for a, b in ((TINY.width, TINY.width), (on_q, on_k)))
        wanted += 3 * (fired - every) * steps
    # Of several steps' features only the last one's are known.
    assert found == pytest.approx(wanted, rel=1e-3 if steps > 1 else 0) and wanted > 1e6


def penalised(way: Way) -> list[Step1Job]:
    jobs = getattr(getattr(way.act, "__self__", None), "jobs", [])
    return [job for job in jobs if isinstance(job, Step1Job) and job.config.pair_sparsity]


@pytest.mark.parametrize(("name", "least", "most"), [
    ("importance and ranking", 1.0, 1.1), ("tune", 0.9, 1.1), ("evaluation", 0.8, 1.0), (MASK, 1.0, 1.2),
])  # fmt: skip
def test_what_depends_on_the_batch_is_counted_nearly(
    name: str, least: float, most: float, ways: dict[str, Way]
) -> None:
    assert least <= ways[name].work.dense / counted(ways[name]) < most


def test_a_causal_blocks_share() -> None:
    assert seen_share(64) == 1.0 and seen_share(256) == (64 + 128 + 192 + 256) / 1024
    assert seen_share(4096) == pytest.approx(0.5, abs=0.01) and seen_share(100) == (64 * 64 + 36 * 100) / 10_000


def test_units_of_work() -> None:
    assert product(2, 3, 5) == Work(dense=60, bytes=4 * (6 + 15 + 10))
    assert (product(2, 3, 5, 4) + adam(10)).bytes == 16 * 31 + 280
    assert (sparse(7, 3) * 2).flops == 84 and sparse(7, 3).dense == 0


def test_both_recipes_start_with_about_k_features(world: World) -> None:
    statistics = world.statistics([3])[0]
    for recipe in ("seed", "default"):
        job = job_of(3, statistics, recipe, (100, 120), 5)
        for side in (job.query, job.key):
            active = (side.encode(statistics["query"].x_nD) > 0).sum(1).float().mean()
            assert float(active) == pytest.approx(5, abs=0.1)


def test_random_text_goes_back(world: World) -> None:
    stream = RandomText(world, [world.site], 48)
    place = json.loads(json.dumps(stream.state()))
    once = next(stream).layers[world.site.layer].x_BTD
    assert not torch.equal(next(stream).layers[world.site.layer].x_BTD, once)
    stream.restore(place)
    assert torch.equal(next(stream).layers[world.site.layer].x_BTD, once)


# Time and memory -------------------------------------------------------------------------------------


def test_ways_take_turns_after_a_round_that_is_not_timed() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    found = in_turns({"slow": slow, "quick": lambda: calls.append("quick")}, 3, CPU)
    assert calls == ["slow", "quick"] * 4
    assert [len(timing.wall) for timing in found.values()] == [3, 3]
    assert min(found["slow"].wall) >= 0.02 > max(found["slow"].processor)  # sleeping takes no processor


def test_figures_are_of_the_processor_for_one_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing([3.0, 1.0, 2.0], [0.3, 0.1, 0.2], 7)
    assert timing.figures(CPU)["seconds"] == 0.2 and timing.figures(CPU)["seconds_all"] == [0.3, 0.1, 0.2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.figures(CPU)["seconds"] == 2.0
    assert timing.figures(CPU)["wall_s"] == 2.0 and timing.figures(CPU)["processor_s"] == 0.2


def test_the_most_held_is_of_the_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not measure.REFERENCES.exists():
        pytest.skip("this system does not say how much memory a process held")
    kept = torch.ones(40_000_000)  # 160 MB before, which do not count
    for megabytes in (200, 50):  # a larger one before does not either
        held = most_held(lambda n=megabytes: torch.ones(n * 250_000).sum(), CPU)
        assert held is not None and 0.95 * megabytes < held / 1e6 < megabytes + 30
    assert len(kept)
    monkeypatch.setattr(measure, "REFERENCES", tmp_path / "nowhere" / "clear_refs")
    assert most_held(lambda: None, CPU) is None


def test_ceilings_are_the_higher_ones() -> None:
    assert Ceiling(2.0, 5.0).over(Ceiling(3.0, 4.0)) == Ceiling(3.0, 5.0)


def test_ratios_are_turn_by_turn_and_of_the_same_layers() -> None:
    def part(*seconds: float, tokens: int = 48) -> dict[str, Any]:
        return {"seconds_all": list(seconds), "tokens": tokens}

    parts = {THEIRS: part(4, 6, 6), SEED: part(2, 2, 4), THEIRS + THREE: part(9, 9, 12), DEFAULT + THREE: part(3, 3, 3)}
    parts[TWICE] = part(6, 6, 6, tokens=48 * 4)
    assert ratios({**parts, MASK: part(1, 1, 1), "refit": part(1, 1, 1)}) == {
        SEED: {"median": 2.0, "range": [1.5, 3.0]},
        TWICE: {"median": 4.0, "range": [pytest.approx(8 / 3), 4.0]},
        DEFAULT + THREE: {"median": 3.0, "range": [3.0, 4.0]},
    }


# The command -----------------------------------------------------------------------------------------


CEILINGS = {"float32": 1e12, "bfloat16": 2e12}


@pytest.mark.parametrize("dtype", list(CEILINGS))
def test_the_command(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SIZES, "small", replace(TINY, repeats=1))
    # The ceiling's own products and copies take seconds.
    monkeypatch.setattr(Ceiling, "measured", classmethod(lambda cls, device, dtype: Ceiling(CEILINGS[dtype], 1e12)))
    settings = replace(race.SETTINGS, width=40, tokens=1024, heldout_tokens=600, sample_tokens=600)
    raced = race.race(5, settings, path=tmp_path / "trained.safetensors")
    assert 0 < min(raced["live"]) <= max(raced["live"]) <= 40
    again = race.race(5, settings, path=tmp_path / "trained.safetensors")  # from the file: nothing is trained
    kept = [(row["pairs"], row["kl"]) for row in raced["rows"]]
    assert [(row["pairs"], row["kl"]) for row in again["rows"]] == kept
    monkeypatch.setattr(bench, "race", lambda steps: raced)
    path = tmp_path / "speed.json"
    cli.main(["bench", "speed", "--size", "small", "--dtype", dtype, "--json", str(path)])
    found = json.loads(path.read_text())
    machine = found["machine"]
    assert (found["benchmark"], found["size"], machine["threads"], machine["dtype"]) == ("speed", "small", 1, dtype)
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "1 of" in said and "150 features a side" in said
    for name, part in found["parts"].items():
        shown = sum(line.startswith(f"{name:<31}") for line in said.splitlines())
        assert shown == 1 + (name in found["ratios"])
        reuse = int(name.partition("reuse ")[2] or 0)
        tokens = 48 * 2 * reuse if reuse else 48  # two batches, as often each
        assert part["tokens"] == tokens and len(part["seconds_all"]) == 1
        assert part["tokens_per_s"] == pytest.approx(tokens / part["seconds"])
        ceiling = CEILINGS["float32" if "published" in name else dtype]
        assert part["of_ceiling_flops"] == pytest.approx(part["flops"] / part["seconds"] / ceiling)
    assert set(NAMES) | {MASK, "importance and ranking", "tune", "evaluation"} <= set(found["parts"])
    assert (
        set(found["ratios"]) == {SEED, DEFAULT, TWICE, DEFAULT + ", reuse 4", DEFAULT + THREE, DEFAULT + ALL, MASK}
        and found["whole_mask"]["pairs"] == 151**2 * 2
        and "measured once" in said
    )
    rows = found["race"]["rows"]
    assert [row["method"] for row in rows] == ["published mask", "ranked, refitted", "ranked, tuned"]
    assert rows[0]["reached"] and rows[0]["steps"] == 5 and rows[0]["pairs"] <= rows[0]["from_pairs"]
    for row in rows[1:]:
        assert row["reached"] == (row["kl"] <= rows[0]["kl"]) and row["pairs"] <= rows[0]["pairs"]
        assert row["steps"] <= 5 and row["processor_s"] > 0


def test_a_mask_that_does_not_fit_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkscope.pairs.mask.free_memory", lambda device: 1000)
    whole = bench._whole_mask(world)
    assert "wall_s" not in whole and "151 x 151 x 2" in whole["skipped"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--size", "huge"], "--size"), (["--json", "nowhere/a.json"], "--json nowhere/a.json: nowhere does not exist")],
)
def test_a_slip_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "speed", *argv])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
    with pytest.raises(UserError, match="--size vast: choose small, batches, medium, wide, large"):
        report.bench_speed("vast", None)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_the_races_mask_reads_dictionaries_as_they_are_at_inference(activation: Any) -> None:
    """A mask of ones has the KL of the transcoders themselves, whatever chooses their features."""
    inputs = some_inputs(70)
    sides = some_sides(inputs, activation=activation)
    query, key = (race.Chosen(side, n) for side, n in zip(sides, (4, 2), strict=True))
    whole = published.pair_map(query, key)
    found = published.mask_loss(torch.ones_like(whole), whole, query, key, inputs, 0.0)
    q, k = sides[0](inputs.x_BTD).view_as(inputs.q_BTNH), sides[1](inputs.x_BTD).view_as(inputs.k_BTGH)
    close(found.detach(), slow_kl(inputs, q, k).detach(), 1e-5)
