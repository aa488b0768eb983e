"""Steps of step 1 on a device that is not the CPU are the CPU's, and the host waits for nothing but, now and then, how
many features are dead."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import OFF, close, job_for, some_inputs
from pretended import DEVICE, PretendedDevice
from texts import data_config, documents_of, stream
from tiny import tiny_model
from torch import Tensor

from qkscope.attention import open_sites
from qkscope.config import DictionaryConfig, TrainingConfig
from qkscope.evaluate.speed import bench
from qkscope.evaluate.speed.step import Steps
from qkscope.evaluate.speed.world import Size, World
from qkscope.kernels import pattern_kl
from qkscope.training import pair_penalty, step1
from qkscope.training.objective import PatternTarget
from qkscope.training.recipes import resolved
from qkscope.training.start import side_statistics, start
from qkscope.training.step1 import Step1Job
from qkscope.training.stream import ModelStream

STEPS, KEPT = 12, 3
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("gpt2", {}),
    "default, few drawn": ("gpt2", {"width": 40, "width_key": 24}),
    "default, rotary": ("llama", {}),
    "default, window and cap": ("gemma2", {}),
    "default, many dead": ("gpt2", {"dead_after": 1, "width": 60}),
    "default, topk": ("gpt2", {"activation": "topk"}),
    "default, jumprelu": ("gpt2", {"activation": "jumprelu"}),
    "seed": ("gpt2", {"recipe": "seed"}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Documents of which some are longer than a sequence and some shorter."""
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents_of([15, 40, 9, 12] * 20)))
    return data_config(source=str(path), context=16)


def kernels(device: PretendedDevice) -> Callable[..., Any]:
    """In the place of a GPU's kernels, which nobody waits for."""

    def solve(*args: Any, **options: Any) -> Any:
        waits = device.waits.copy()
        found = pattern_kl.blocked(*args, **options)
        device.waits = waits
        return found

    return solve


@pytest.mark.parametrize("name", WAYS)
def test_nobody_waits_and_steps_are_the_cpus(name: str, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 is learned from and layer 0 only run."""
    model, options = WAYS[name]
    (site,) = open_sites(copy.deepcopy(tiny_model(model)), None, [1])
    dictionary = resolved(DictionaryConfig(**{"width": 16, "k": 3, **options}), TrainingConfig())
    statistics = side_statistics([next(ModelStream([site], stream(text, repeat=True))).layers[1]])
    query, key = (start(dictionary, side, statistics[side], "", 0) for side in ("query", "key"))
    job = Step1Job(1, "", dictionary, query, key)
    monkeypatch.setattr(pair_penalty, "DRAWN", 20)
    monkeypatch.setattr(step1, "KEPT_STEPS", KEPT if dictionary.dead_after > 1 else 1)
    with PretendedDevice() as device:
        monkeypatch.setattr(pattern_kl, "solver", lambda _: kernels(device))
        (far_site,) = open_sites(copy.deepcopy(site.model).to(DEVICE), None, [1])
        far = Steps([copy.deepcopy(job).to(DEVICE)], ModelStream([far_site], stream(text, repeat=True)), DEVICE)
        found, waits = [], []
        for _ in range(STEPS):
            device.waits.clear()
            found.append(far.step()["run|1"]["loss"])
            waits.append(sum(device.waits.values()))
        found = torch.stack(found).cpu()
    monkeypatch.undo()
    monkeypatch.setattr(pair_penalty, "DRAWN", 20)
    near = Steps([job], ModelStream([site], stream(text, repeat=True)), torch.device("cpu"))
    wanted = torch.stack([near.step()["run|1"]["loss"] for _ in range(STEPS)])
    close(found, wanted, 1e-4)
    asks = 2 if dictionary.aux else 0  # how many features of either side are dead
    often = 1 if dictionary.dead_after == 1 else KEPT
    assert waits[KEPT:] == [0 if step % often else asks for step in range(KEPT, STEPS)]


def test_of_features_that_were_dead_those_that_fire_again_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = PatternTarget(some_inputs(3, length=9))
    job = job_for(target.inputs, recipe="default", k=2, dead_after=1).train()
    job.loss(target, OFF)
    dead = {side: job.get_buffer(f"{side}_idle") > 1 for side in ("query", "key")}
    assert all(flags.any() and not flags.all() for flags in dead.values())

    def loss(listed: Callable[[Tensor], Tensor]) -> Tensor:
        monkeypatch.setattr(job, "_to_revive", lambda side, dead: listed(dead))
        return job.loss(target, OFF)[0].detach()

    fresh, stale = loss(lambda dead: dead.nonzero()[:, 0]), loss(lambda dead: torch.arange(len(dead)))
    close(stale, fresh)
    assert abs(float(loss(lambda dead: dead.nonzero()[:0, 0]) - fresh)) > 1e-3


def test_every_part_of_the_speed_benchmark_runs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(
        context=24, width=24, k=3, batch_tokens=48, pairs=30, live=(6, 7), sample_tokens=24, judged_tokens=24, heads=2,
        model_layers=3, layers=(0, 1, 2), vocabulary=61,
    )  # fmt: skip
    monkeypatch.setattr(bench, "AT_ONCE", 2)
    with PretendedDevice():
        world = World(size, DEVICE)
        ways = bench.step1_ways(world) | bench.pair_ways(world)
        for way in ways.values():
            way.act()
        mask = bench._whole_mask(world)
    here = World(size, torch.device("cpu"))
    once = bench.step1_ways(here) | bench.pair_ways(here)
    assert ways.keys() == once.keys() and mask["pairs"] == 25 * 25 * 2
    assert {way.tokens / once[name].tokens for name, way in ways.items()} == {1, 2}
