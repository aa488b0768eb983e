"""The training loop: its rates, its checkpoints, and what it does where numbers stop being finite."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import some_inputs
from texts import BOS, WORDS, data_config, documents_of, stream
from tiny import tiny_model
from torch import Tensor, nn

from qkscope.attention import AttentionSite, open_sites
from qkscope.config import TrainingConfig
from qkscope.data import Batch
from qkscope.data.documents import split_of
from qkscope.dictionary import SparseTranscoder
from qkscope.errors import UserError
from qkscope.training import checkpoint, loop
from qkscope.training.job import Job
from qkscope.training.loop import FLOOR, Logs, rate_at, train
from qkscope.training.objective import Padding, PatternTarget
from qkscope.training.stream import Harvest, ModelStream, Reused, require_finite
from qkscope.training.watch import Watch

# Rates -----------------------------------------------------------------------------------------------


def test_the_rate_rises_stays_and_falls_to_a_hundredth() -> None:
    config = TrainingConfig(warmup=0.1, decay=0.3)
    assert rate_at(0.0, config) == FLOOR == 0.01
    assert rate_at(0.05, config) == pytest.approx(0.5)
    assert [rate_at(x, config) for x in (0.1, 0.4, 0.7)] == pytest.approx([1, 1, 1])
    assert rate_at(0.85, config) == pytest.approx(0.01 + 0.99 / 2)
    assert rate_at(1.0, config) == pytest.approx(0.01)


@settings(max_examples=100, deadline=None)
@given(done=st.floats(0, 1.2), warmup=st.floats(0, 0.99), decay=st.floats(0, 1))
def test_the_rate_is_a_factor(done: float, warmup: float, decay: float) -> None:
    config = TrainingConfig(warmup=warmup, decay=decay)
    assert FLOOR - 1e-12 <= rate_at(done, config) <= 1
    if decay > 1e-6:
        assert rate_at(1.0, config) == pytest.approx(FLOOR)


# A run of a job with a constant gradient -------------------------------------------------------------


class OneNumber(Job):
    """One number with a gradient of 1: Adam then moves it by exactly the learning rate of each step."""

    def __init__(self, layer: int = 0, peak: float = 0.5, broken_at: int = 10**9, loss: float = float("nan")) -> None:
        query, key = (SparseTranscoder(1, 1, 1, "relu", 1).requires_grad_(False) for _ in range(2))
        super().__init__(layer, "", query, key)
        self.peak = peak
        self.broken_at, self.broken_loss, self.calls = broken_at, loss, 0
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def parameter_groups(self) -> list[dict]:
        return [{"params": [self.weight], "lr": self.peak, "peak": self.peak}]

    def loss(self, target: PatternTarget, autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(float(self.weight.detach()))
        self.calls += 1
        broken = self.broken_loss if self.calls > self.broken_at else 0.0
        return self.weight.sum() + broken, {"tokens_seen": torch.tensor(float(target.n_tokens))}


@cache
def sites() -> list[AttentionSite]:
    return open_sites(tiny_model("gpt2"), BOS, [0, 1])


def source(folder: Path, texts: list[str] | None = None) -> Any:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts or documents_of([15] * 60)))
    return data_config(source=str(path), context=16)


def fit(folder: Path, jobs: list[Any], tokens: int = 900, saved: Any = None, **options: Any) -> tuple[Any, list[dict]]:
    said: list[dict] = []
    config = TrainingConfig(**{"checkpoint_steps": 4, "log_steps": 3, "warmup": 0.1, "decay": 0.5, **options})
    names = {j.name: folder / f"{j.layer}.jsonl" for j in jobs}
    at = train(
        "step1", jobs, ModelStream(sites(), stream(source(folder), repeat=True)), tokens, config,
        saved=saved, checkpoint_path=folder / "c.safetensors", logs=Logs(names, said.append),
    )  # fmt: skip
    return at, said


def test_each_step_is_of_the_peak_times_the_factor(tmp_path: Path) -> None:
    job = OneNumber()
    at, _ = fit(tmp_path, [job])
    config = TrainingConfig(warmup=0.1, decay=0.5)
    text, done, steps = stream(source(tmp_path), repeat=True), 0, []
    while done < 900:
        steps.append(0.5 * rate_at(done / 900, config))
        done += next(text).n_tokens
    moved = [b - a for a, b in zip(job.seen, [*job.seen[1:], float(job.weight.detach())], strict=True)]
    assert moved == pytest.approx([-s for s in steps], rel=1e-3)
    assert (at.step, at.tokens, at.done) == (len(steps), done, True)
    assert steps[0] == 0.005 and max(steps) == 0.5 and steps[-1] < 0.1


def test_a_job_trains_on_its_own_layer_only(tmp_path: Path) -> None:
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    class Watching(OneNumber):
        def loss(self, target: PatternTarget, autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
            seen[self.layer].append(target.x_nD)
            return super().loss(target, autocast)

    fit(tmp_path, [Watching(0), Watching(1)], tokens=200)
    assert len(seen[0]) == len(seen[1]) > 2
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in zip(seen[0], seen[1], strict=True))


def test_logs_are_means_since_the_last_line(tmp_path: Path) -> None:
    at, said = fit(tmp_path, [OneNumber(), OneNumber(1)])
    lines = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(3, at.step, 3), at.step]
    text = stream(source(tmp_path), repeat=True)
    sizes = [next(text).n_tokens for _ in range(at.step)]
    for line, first in zip(lines, [0, *(line["step"] for line in lines)], strict=False):
        assert line["tokens_seen"] == pytest.approx(sum(sizes[first : line["step"]]) / (line["step"] - first))
        assert line["tokens"] == sum(sizes[: line["step"]])
    assert len(said) == 2 * len(lines) and all(s["total"] == 900 for s in said)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    class Killed(OneNumber):
        def loss(self, target: PatternTarget, autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
            if self.calls == 11:
                raise KeyboardInterrupt
            return super().loss(target, autocast)

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, killed, again = OneNumber(), Killed(), OneNumber()
    fit(tmp_path / "whole", [whole])
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", [killed])
    saved = checkpoint.load(tmp_path / "broken" / "c.safetensors")
    assert saved is not None and (saved[1].step, saved[1].done) == (8, False)
    fit(tmp_path / "broken", [again], saved=saved)
    assert torch.equal(again.weight, whole.weight)
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "0.jsonl", tmp_path / "broken" / "0.jsonl")
    ]
    assert [line["step"] for line in logs[1]] == sorted({line["step"] for line in logs[1]})  # no line twice
    assert logs[0][-1]["step"] == logs[1][-1]["step"]


# Batches that are learned from more than once --------------------------------------------------------


class Numbered:
    """A stream of numbers that remembers how often it made each."""

    def __init__(self) -> None:
        self.at, self.made = 0, []

    def __next__(self) -> Any:
        self.made.append(self.at)
        self.at += 1
        return Harvest({}, None, 10 + self.at % 3, Padding(None))  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def restore(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@settings(max_examples=100, deadline=None)
@given(times=st.integers(1, 4), held=st.integers(1, 5), tokens=st.integers(1, 120), stop=st.integers(0, 60))
def test_held_batches_come_in_turn_and_are_made_once(times: int, held: int, tokens: int, stop: int) -> None:
    """As often as asked, no more of them than hold the tokens, and the same from wherever it is gone on from."""
    sizes = [10 + (i + 1) % 3 for i in range(20)]
    needed = next(i for i in range(20) if sum(sizes[: i + 1]) >= tokens) + 1
    blocks = [range(first, min(first + held, needed)) for first in range(0, needed, held)]
    wanted = [sizes[i] for block in blocks for _ in range(times) for i in block]
    text = Numbered()
    stream = Reused(text, times, held, tokens)
    stop, seen = min(stop, len(wanted)), []
    for _ in range(stop):
        seen.append(next(stream).n_tokens)
    state, rest = json.loads(json.dumps(stream.state())), Numbered()
    for _ in range(stop, len(wanted)):
        seen.append(next(stream).n_tokens)
    assert seen == wanted and text.made == list(range(needed))
    again = Reused(rest, times, held, tokens)
    again.restore(state)
    assert [next(again).n_tokens for _ in range(stop, len(wanted))] == wanted[stop:]


def test_a_run_learns_from_each_token_as_often_as_asked(tmp_path: Path) -> None:
    class Counting(OneNumber):
        def loss(self, target: PatternTarget, autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
            met.append(tuple(target.x_nD.sum(1).tolist()))
            return super().loss(target, autocast)

    orders = []
    for reuse in (1, 3):
        met: list[tuple[float, ...]] = []
        at, _ = fit(tmp_path, [Counting()], tokens=300 * reuse, reuse=reuse, held_batches=4)
        orders.append(met)
        assert at.tokens == sum(map(len, met)) >= 300 * reuse > sum(map(len, met[:-1])) and at.step == len(met)
    once, thrice = orders
    turns = [one for n in range(0, len(once), 4) for one in once[n : n + 4] * 3]
    assert len(once) > 4 and thrice == turns[: len(thrice)]


@pytest.mark.parametrize("killed_at", [3, 6, 9, 11, 16])
def test_a_run_killed_between_repeats_goes_on_with_the_same_batches(tmp_path: Path, killed_at: int) -> None:
    class Weighing(OneNumber):
        """Its gradient is the batch's, so that another order of batches gives another number."""

        def loss(self, target: PatternTarget, autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
            self.calls += 1
            if self.calls == self.broken_at:
                raise KeyboardInterrupt
            return (self.weight * target.x_nD.sum()).sum(), {}

    again, repeats = {"tokens": 900, "reuse": 3, "held_batches": 2, "checkpoint_steps": 1}, Weighing()
    fit(tmp_path, [whole := Weighing()], **again)
    (tmp_path / "c.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, [Weighing(broken_at=killed_at)], **again)
    saved = checkpoint.load(tmp_path / "c.safetensors")
    assert saved is not None and saved[1].step == killed_at - 1
    fit(tmp_path, [repeats], saved=saved, **again)
    assert torch.equal(repeats.weight, whole.weight)


# What is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stands(tmp_path: Path, loss: float) -> None:
    job = OneNumber(broken_at=10, loss=loss)
    with pytest.raises(UserError) as error:
        fit(tmp_path, [job])
    said = str(error.value)
    assert "\n" not in said and "step 10" in said and str(loss) in said and "learning rate" in said
    assert "run|0" in said  # which job
    assert torch.isfinite(job.weight).all() and float(job.weight.detach()) == job.seen[-1]  # the step was not taken
    saved = checkpoint.load(tmp_path / "c.safetensors")
    assert saved is not None and (saved[1].step, saved[1].done) == (8, False)
    assert float(saved[0]["run|0|weight"]) == job.seen[8]


class Late(Watch):
    """Flags are read as on a GPU: at log steps and before checkpoints."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.at_once = False


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize(("log_steps", "calls"), [(3, 12), (100, 12), (11, 11), (4, 12)])
def test_flags_that_are_read_late_stop_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, log_steps: int, calls: int
) -> None:
    """A checkpoint every 4 steps: the loss of step 10 is noticed with whatever comes first, and never learned from."""
    monkeypatch.setattr(loop, "Watch", Late)
    job = OneNumber(broken_at=10, loss=loss)
    with pytest.raises(UserError, match=rf"run\|0: the loss is {loss} at step 10;"):
        fit(tmp_path, [job], log_steps=log_steps)
    assert job.calls == calls and job.seen[10:] == [job.seen[10]] * (calls - 10)
    assert float(job.weight.detach()) == job.seen[10]
    saved = checkpoint.load(tmp_path / "c.safetensors")
    assert saved is not None and (saved[1].step, saved[1].done) == (8, False)
    assert float(saved[0]["run|0|weight"]) == job.seen[8]
    log = tmp_path / "0.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    assert [json.loads(line)["step"] for line in lines] == [*range(log_steps, 11, log_steps)]


def test_a_run_that_ends_between_two_log_lines_reads_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Watch", Late)
    at, _ = fit(tmp_path, [OneNumber()], checkpoint_steps=1000, log_steps=1000)
    (tmp_path / "c.safetensors").unlink()
    with pytest.raises(UserError, match=f"step {at.step - 1};"):
        fit(tmp_path, [OneNumber(broken_at=at.step - 1)], checkpoint_steps=1000, log_steps=1000)
    assert not (tmp_path / "c.safetensors").exists()


def test_flags_read_late_say_the_first_and_are_read_once() -> None:
    watch = Late(torch.device("cpu"))
    for n, bad in enumerate([False, True, True]):
        watch.note(torch.tensor(bad), lambda n=n: f"flag {n}")
    with pytest.raises(UserError, match="flag 1"):
        watch.read()
    watch.read()


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("late", [False, True])
def test_activations_that_are_not_finite_name_layer_step_document_and_position(
    tmp_path: Path, what: float, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word breaks the model: where it stands is what the error says, and the last checkpoint stands."""
    texts = [t.replace(f"w{WORDS - 1}", "w0") for t in documents_of([15] * 60)]
    number = 0
    while split_of(bad := f"w1 w2 w3 w{number} w{WORDS - 1} w5 w6 w7 w8 w9", 0.1) != "train":
        number += 1
    texts.insert(23, bad)
    text = stream(source(tmp_path, texts), repeat=True)
    step = next(i for i, batch in enumerate(text) if bool((batch.tokens_BT == 5 + WORDS - 1).any()))
    assert step > 0
    model: Any = tiny_model("gpt2")
    opened = open_sites(model, BOS, [0, 1])
    model.transformer.wte.weight.data[5 + WORDS - 1] = what
    job, path = OneNumber(), tmp_path / "c.safetensors"
    config = TrainingConfig(checkpoint_steps=1)
    if late:
        monkeypatch.setattr(loop, "Watch", Late)
    with pytest.raises(UserError) as error:
        train(
            "step1", [job], ModelStream(opened, stream(source(tmp_path, texts), repeat=True)), 2000, config,
            saved=None, checkpoint_path=path, logs=Logs({"run|0": tmp_path / "0.jsonl"}, lambda line: None),
        )  # fmt: skip
    said = str(error.value)
    assert "\n" not in said and "layer 0" in said and f"step {step}," in said
    assert "document 23," in said and "position 4;" in said  # BOS is no token of it
    assert len(job.seen) == step + late
    saved = checkpoint.load(path)
    assert saved is not None and saved[1].step == step
    if not late:
        assert float(saved[0]["run|0|weight"]) == float(job.weight.detach())


def test_nan_at_padding_is_nobodys_business() -> None:
    inputs = some_inputs(1, padding=True)
    number = torch.arange(2)
    batch = Batch(torch.zeros(2, 7, dtype=torch.int64), inputs.real_BT, number, number)
    for values in (inputs.x_BTD, inputs.q_BTNH, inputs.k_BTGH):
        values[~inputs.real_BT] = torch.nan
        require_finite(inputs, 3, batch, 5)
    for name, values in (("inputs", inputs.x_BTD), ("queries", inputs.q_BTNH), ("keys", inputs.k_BTGH)):
        before = values[1, 4].clone()
        values[1, 4] = torch.inf
        with pytest.raises(UserError, match=f"layer 3: .* {name} .* step 5, document 1, position 5"):
            require_finite(inputs, 3, batch, 5)
        values[1, 4] = before
