"""A batch whose rows lie with two processes: its gradients, choices and counts are those of one that has them all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, OFF, close, job_for, pairs_of, some_inputs, some_of, some_sides
from processes import together
from texts import BOS, WORDS, data_config, documents_of, stream, write
from tiny import tiny_model
from torch import Tensor

from qkscope import parallel
from qkscope.attention import open_sites
from qkscope.config import RunConfig, TrainingConfig
from qkscope.errors import UserError
from qkscope.pairs.mask import MaskJob
from qkscope.pairs.tune import MapJob
from qkscope.pattern import AttentionInputs
from qkscope.pipeline import _idle
from qkscope.runner import shortage_of_rows, spreads
from qkscope.training.job import Job
from qkscope.training.loop import Logs, _update, train
from qkscope.training.objective import PatternTarget
from qkscope.training.start import score_metrics
from qkscope.training.steering import Steering
from qkscope.training.stream import ModelStream, harvest_finite
from qkscope.training.watch import Watch

# Steps of every kind of job on every kind of layer ---------------------------------------------------

STEPS = 3
BATCH = 5  # rows: three here, two there

DICTIONARIES: dict[str, dict[str, Any]] = {
    "relu": {"sparsity": 0.03},
    "topk": {"activation": "topk"},
    "batchtopk": {"recipe": "default", "k": 2.5, "pair_sparsity": 0.1},
    "jumprelu": {"recipe": "default", "activation": "jumprelu"},
    "revival": {"recipe": "default", "k": 0.5, "k_key": 0.7, "dead_after": 40, "aux": 0.5},
    "steered": {"recipe": "default"},
}
MAPS = ["tune", "tune-relu", "refit", "mask"]


def job_of(kind: str, inputs: AttentionInputs) -> Job:
    if kind in DICTIONARIES:
        job = job_for(inputs, **DICTIONARIES[kind])
        if DICTIONARIES[kind].get("recipe") == "default":
            for side, metric in zip((job.query, job.key), score_metrics(inputs), strict=True):
                side.set_metric(metric)
        if kind == "steered":
            job.steering = Steering(0.2, TrainingConfig(tokens=1000, batch_tokens=100))
        return job.train()
    sides = some_sides(inputs, activation="relu" if kind == "tune-relu" else "batchtopk")
    pairs = some_of(pairs_of(inputs, sides), 0.3)
    if kind == "mask":
        live = torch.arange(sides[0].width + 1), torch.arange(sides[1].width + 1)
        return MaskJob(0, "", *sides, live, pairs.n_heads, sparsity=1e-3, rate=0.05)
    rate = 0.0 if kind == "refit" else 0.05
    return MapJob(0, "", *sides, pairs, dictionary_rate=rate, strength_rate=0.05, sparsity=0.02, dropped_sparsity=0.1)


def rows_here(inputs: AttentionInputs) -> AttentionInputs:
    """This process's rows."""
    here = slice(parallel.rank(), None, parallel.size())
    rule, table = inputs.rule, inputs.rule.rotary
    if table is not None and len(table.cos_BTH) > 1:
        rule = replace(rule, rotary=replace(table, cos_BTH=table.cos_BTH[here], sin_BTH=table.sin_BTH[here]))
    if len(rule.visible_BQK) > 1:
        rule = replace(rule, visible_BQK=rule.visible_BQK[here])
    x, q, k, real = (t[here] for t in (inputs.x_BTD, inputs.q_BTNH, inputs.k_BTGH, inputs.real_BT))
    return AttentionInputs(x, q, k, rule, real)


def steps(kind: str, layer: str) -> dict[str, Tensor]:
    """All that a job holds and logs after some steps, and the gradients of the first; plain descent, for Adam makes
    whole steps of rounding errors where a gradient is zero."""
    batches = [some_inputs(seed, batch=BATCH, **LAYERS[layer]) for seed in range(STEPS)]
    job = job_of(kind, batches[0])
    optimizer = torch.optim.SGD(job.parameter_groups(), fused=True)
    found: dict[str, Tensor] = {}
    for number, inputs in enumerate(batches):
        target = PatternTarget(rows_here(inputs))
        job.before_step(0.4 + 0.1 * number)
        with parallel.divided(target.n_tokens, int(inputs.real_BT.sum())):
            log = _update(job, optimizer, target, 1.0, OFF, Watch(torch.device("cpu")), number)
        found |= {f"{number} {name}": torch.as_tensor(value) for name, value in log.items()}
        if number == 0:
            found |= {f"gradient {n}": p.grad.clone() for n, p in job.named_parameters() if p.grad is not None}
    return found | {f"then {name}": value.clone() for name, value in job.state_dict().items()}


CASES = [(kind, layer) for kind in [*DICTIONARIES, *MAPS] for layer in ("causal", "sink-softcap-padded", "all")]


def all_cases() -> dict[str, dict[str, Tensor]]:
    with parallel.joined():
        return {f"{kind} {layer}": steps(kind, layer) for kind, layer in CASES}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What the two processes found in every case."""
    return together(2, all_cases, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_two_processes_step_as_one(both: list[dict[str, dict[str, Tensor]]], kind: str, layer: str) -> None:
    one, two, other = steps(kind, layer), *(found[f"{kind} {layer}"] for found in both)
    assert one.keys() == two.keys() == other.keys() and any(name.startswith("gradient") for name in one)
    for name, wanted in one.items():
        assert torch.equal(two[name], other[name]), name
        close(two[name], wanted, floor=1e-3)


def test_the_cases_have_in_them_what_they_are_there_for() -> None:
    """Rows of unlike numbers of tokens; features that die and that live in one process only; a k that is steered."""
    inputs = some_inputs(0, batch=BATCH, **LAYERS["all"])
    assert int(inputs.real_BT[::2].sum()) / int(inputs.real_BT.sum()) != 3 / 5
    assert inputs.rule.rotary is not None and len(inputs.rule.rotary.cos_BTH) == BATCH
    assert 0 < float(steps("revival", "causal")[f"{STEPS - 1} dead_query"]) < 1
    side = job_of("batchtopk", inputs).query
    acts = side.encode(inputs.x_BTD[inputs.real_BT])
    here, there = (acts[torch.arange(BATCH).expand(7, -1).T[inputs.real_BT] % 2 == r] > 0 for r in (0, 1))
    assert not torch.equal(here.any(0), there.any(0))
    before, after = job_of("steered", inputs).get_buffer("log_k"), steps("steered", "causal")["then log_k"]
    assert not torch.equal(before, after)


# The parts -------------------------------------------------------------------------------------------

SIZES = [(3, 4), (1, 40), (40, 1), (0, 5), (17, 18)]  # values in each process
PLACES = [1, 2, 5, 40]


def values_of(case: int, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case)
    values = [torch.randn(n, generator=generator) for n in SIZES[case]]
    return [v.relu().round(decimals=1) for v in values] if kind == "with ties" else values


def largest() -> dict[str, Tensor]:
    found = {}
    with parallel.joined(), parallel.divided(1, 2):
        for case, sizes in enumerate(SIZES):
            for kind in ("plain", "with ties"):
                values = values_of(case, kind)[parallel.rank()]
                for k in (k for k in PLACES if k <= sum(sizes)):
                    found[f"{case} {kind} {k}"] = parallel.kth_largest(values, k)
    return found


def test_kth_largest(tmp_path: Path) -> None:
    two = together(2, largest, tmp_path)
    assert two[0].keys() == two[1].keys() and len(two[0]) > 30
    for name in two[0]:
        case, kind, k = name.split(" ")[0], " ".join(name.split(" ")[1:-1]), int(name.split(" ")[-1])
        wanted = torch.cat(values_of(int(case), kind)).sort(descending=True).values[k - 1]
        assert two[0][name] == two[1][name] == wanted, name


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=3, max_size=60),
    context=st.integers(10, 40),
    sequences=st.integers(1, 5),
    more=st.integers(0, 39),
)
def test_no_batch_holds_fewer_sequences_than_its_tokens_make(
    lengths: list[int], context: int, sequences: int, more: int
) -> None:
    """What the refusal of too many processes stands on."""
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder) / "a.jsonl", [*documents_of(lengths), *documents_of([40] * 8)])
        config = config.model_copy(update={"context": context})
        batch_tokens = sequences * context + more
        text = stream(config, batch_tokens=batch_tokens, repeat=True)
        assert min(len(next(text).tokens_BT) for _ in range(70)) >= batch_tokens // context


def test_too_few_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_world", parallel.World(None, 0, 3))
    config = RunConfig.model_validate(
        {"layers": [1], "data": {"source": "a.txt", "context": 50}, "training": {"batch_tokens": 150}}
    )
    assert not shortage_of_rows(config)
    short = config.model_copy(update={"training": TrainingConfig(batch_tokens=149)})
    said = "--training.batch-tokens 149: holds too few sequences of 50 tokens for 3 processes; give 150 or more"
    assert shortage_of_rows(short).startswith(said)


@pytest.mark.parametrize(
    ("spread", "size", "passes", "wanted"),
    [
        ("auto", 1, 9, False),
        ("auto", 4, 2, False),
        ("auto", 3, 2, True),
        ("auto", 2, 1, False),
        ("text", 3, 9, False),
        ("layers", 9, 2, True),
        ("layers", 9, 1, False),
        ("layers", 1, 2, False),
    ],
)
def test_when_passes_are_spread(
    monkeypatch: pytest.MonkeyPatch, spread: str, size: int, passes: int, wanted: bool
) -> None:
    monkeypatch.setattr(parallel, "_world", parallel.World(None, 0, size) if size > 1 else None)
    config = RunConfig.model_validate({"layers": [1], "training": {"spread": spread}})
    assert spreads(config, passes) == wanted


def taken() -> dict[str, Tensor]:
    """What is dealt to this process, what all took, and how many processes there are while one works on it."""
    with parallel.joined():
        mine, sizes = [], []
        for index in parallel.dealt("numbers", 7):
            with parallel.alone():
                sizes.append(parallel.size())
            mine.append(index)
        every = parallel.gathered(mine)
    return {
        "mine": torch.tensor(mine),
        "all": torch.tensor([i for one in every for i in one]),
        "sizes": torch.tensor(sizes),
    }


def test_what_is_dealt_is_dealt_once(tmp_path: Path) -> None:
    one, two, three = together(3, taken, tmp_path)
    assert sorted(torch.cat([found["mine"] for found in (one, two, three)]).tolist()) == list(range(7))
    assert sorted(one["all"].tolist()) == list(range(7)) and torch.equal(one["all"], two["all"])
    assert torch.cat([found["sizes"] for found in (one, two, three)]).tolist() == [1] * 7
    assert list(parallel.dealt("numbers", 3)) == [0, 1, 2] and parallel.gathered("a") == ["a"]


def handing_over() -> Tensor:
    """To each process in turn, from all."""
    with parallel.joined():
        got = []
        for to in range(parallel.size()):
            got += parallel.handed(bytes([10 * to + parallel.rank()] * (parallel.rank() + 1)), to)
        return torch.tensor([[len(data), *data, 0, 0][:4] for data in got])


def test_what_is_handed_over_arrives_in_the_order_of_processes(tmp_path: Path) -> None:
    for to, got in enumerate(together(3, handing_over, tmp_path)):
        assert got.tolist() == [[1, 10 * to, 0, 0], [2, *[10 * to + 1] * 2, 0], [3, *[10 * to + 2] * 3]]
    assert parallel.handed(b"a", 0) == [b"a"]


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [parallel.device_name(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    monkeypatch.setattr(parallel, "_world", parallel.World(None, 5, 8))
    assert [parallel.device_name(name) for name in ("cpu", "cuda")] == ["cpu", "cuda:3"]
    with pytest.raises(UserError, match=r"--training.device cuda:1: each of 8 processes"):
        parallel.device_name("cuda:1")


def test_gpus_that_are_left_idle_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    said = "one of 4 GPUs is used; torchrun --nproc-per-node 4 -m qkscope run ... uses all"
    assert [_idle(torch.device(name)) for name in ("cuda", "cuda:1", "cpu")] == [said, "", ""]
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_world", parallel.World(None, 0, 4))
        assert _idle(torch.device("cuda")) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _idle(torch.device("cuda")) == ""


# The loop --------------------------------------------------------------------------------------------


def fit(folder: str, kind: str) -> dict[str, Tensor]:
    """Train two layers of a tiny model on a text with documents of many lengths."""
    with parallel.joined():
        config = data_config(source=str(Path(folder) / "a.jsonl"), context=16)
        sites = open_sites(tiny_model("llama"), BOS, [0, 1])
        text = stream(config, repeat=True, batch_tokens=60)
        sample = next(stream(config, repeat=True, batch_tokens=60))
        jobs = [job_of(kind, harvest_finite(site, sample)) for site in sites]
        for job, site in zip(jobs, sites, strict=True):
            job.layer = site.layer
        names = {j.name: Path(folder) / f"{parallel.size()}-{j.layer}.jsonl" for j in jobs}
        train(
            "step1", jobs, ModelStream(sites, text), 500, TrainingConfig(checkpoint_steps=4, log_steps=3),
            saved=None, checkpoint_path=Path(folder) / f"{parallel.size()}.safetensors",
            logs=Logs(names, lambda line: None),
        )  # fmt: skip
        return {f"{job.name}|{name}": value for job in jobs for name, value in job.state_dict().items()}


def text_in(folder: Path, texts: list[str] | None = None) -> None:
    lines = texts or documents_of([15, 9, 40, 12] * 30)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))


@pytest.mark.parametrize("kind", ["batchtopk", "tune"])
def test_parameters_are_the_same_bits_in_every_process(tmp_path: Path, kind: str) -> None:
    text_in(tmp_path)
    two = together(2, fit, tmp_path, str(tmp_path), kind)
    assert two[0].keys() == two[1].keys()
    for name, value in two[0].items():
        assert torch.equal(value, two[1][name]), name


def twice() -> dict[str, int]:
    sums = []
    for _ in range(2):
        with parallel.joined():
            sums.append(int(parallel.total(torch.tensor(parallel.rank() + 1))))
        sums.append(parallel.size())
    return {"sums": sums[0] + 10 * sums[2], "sizes": sums[1] + sums[3]}


def test_processes_can_join_again(tmp_path: Path) -> None:
    """As a script that makes two runs does."""
    assert together(2, twice, tmp_path) == [{"sums": 33, "sizes": 2}] * 2


def stopped(work: Callable[..., Any]) -> dict[str, list[int]]:
    """What a `UserError` says, as bytes."""
    with pytest.raises(UserError) as error, parallel.joined():
        work()
    return {"said": list(str(error.value).encode())}


def refused_by(rank: int) -> dict[str, list[int]]:
    def work() -> None:
        if parallel.rank() == rank:
            raise UserError("the shelf is empty; fill it")
        parallel.receive() if parallel.rank() else parallel.total(torch.zeros(1))

    return stopped(work)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_processs_mistake_ends_all(tmp_path: Path, rank: int) -> None:
    said = [bytes(found["said"]).decode() for found in together(2, refused_by, tmp_path, rank)]
    assert all(s.startswith("the shelf is empty; fill it") for s in said)
    assert ("(process 1, on " in said[0]) == (rank == 1)  # the machine it is about, where that is another


def ended_by(rank: int) -> dict[str, list[int]]:
    def work() -> None:
        if parallel.rank() == rank:
            os._exit(0)
        parallel.total(torch.zeros(1))

    return stopped(work)


def test_a_process_that_ends_without_a_word_is_missed(tmp_path: Path) -> None:
    for rank in (0, 1):
        torch.save({}, tmp_path / f"{rank}.pt")
    said = together(2, ended_by, tmp_path, 1)[0]["said"]
    assert bytes(said).decode() == "another process of this run has ended; give the same command again to go on"


def broken(folder: str, value: float) -> dict[str, list[int]]:
    """A word that breaks the model, in a row of the second process."""

    def work() -> None:
        model: Any = tiny_model("gpt2")
        opened = open_sites(model, BOS, [0])
        model.transformer.wte.weight.data[5 + WORDS - 1] = value
        config = data_config(source=str(Path(folder) / "a.jsonl"), context=16)
        job = job_of("relu", next(ModelStream(opened, stream(config, repeat=True, batch_tokens=60))).layers[0])
        train(
            "step1", [job], ModelStream(opened, stream(config, repeat=True, batch_tokens=60)), 10**6, TrainingConfig(),
            saved=None, checkpoint_path=Path(folder) / "c.safetensors",
            logs=Logs({job.name: Path(folder) / "0.jsonl"}, lambda line: None),
        )  # fmt: skip

    return stopped(work)


def test_what_is_not_finite_in_one_process_stops_all(tmp_path: Path) -> None:
    texts = [t.replace(f"w{WORDS - 1}", "w0") for t in documents_of([15] * 60)]
    texts[23:23] = [f"w1 w2 w3 w{number} w{WORDS - 1} w5 w6 w7 w8 w9" for number in range(8)]
    text_in(tmp_path, texts)
    said = [bytes(found["said"]).decode() for found in together(2, broken, tmp_path, str(tmp_path), float("nan"))]
    assert all("layer 0: the model's attention inputs hold NaN or infinity at step" in s for s in said), said
