"""`qkscope run` end to end: every kind of attention, every method, and the artefact that others will read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file
from small_runs import read_json, require_equal
from tiny import BIDIRECTIONAL

import qkscope.evaluate.layer as evaluation
from qkscope.config import RunConfig
from qkscope.decomposition import PAIR_COLUMNS, Decomposition

SHAPES = {"gpt2": (4, 4, 8), "llama": (4, 2, 8), "gemma2": (4, 2, 16), "gpt_oss": (4, 2, 8), "bert": (4, 4, 8)}
ROTARY = ("llama", "gemma2", "gpt_oss")
FILES = {
    "dictionaries.safetensors", "pairs.parquet", "features.parquet", "examples.parquet", "metrics.jsonl", "report.json",
    "patterns.json", "pair_examples.parquet",
}  # fmt: skip
FEATURES = {
    "side": pa.string(), "feature": pa.int32(), "density": pa.float32(), "mean_activation": pa.float32(),
    "max_activation": pa.float32(), "live": pa.bool_(), "top_heads": pa.list_(pa.int16()),
}  # fmt: skip
EXAMPLES = {
    "side": pa.string(), "feature": pa.int32(), "rank": pa.int32(), "activation": pa.float32(),
    "document": pa.int64(), "position": pa.int32(), "tokens": pa.list_(pa.string()),
    "activations": pa.list_(pa.float32()),
}  # fmt: skip
PLACES = {
    "query_feature": pa.int32(), "key_feature": pa.int32(), "head": pa.int16(), "rank": pa.int32(),
    "effect": pa.float32(), "pattern": pa.float32(), "document": pa.int64(), "query_position": pa.int32(),
    "key_position": pa.int32(), "query_center": pa.int32(), "key_center": pa.int32(),
    "query_tokens": pa.list_(pa.string()), "key_tokens": pa.list_(pa.string()),
}  # fmt: skip
FIGURES = [
    *(f"{name}.{side}" for name in ("l0", "dead", "dense") for side in ("query", "key")),
    *(f"pattern_kl.{name}" for name in ("transcoders", "map_all", "map_pruned", "uniform")),
    *(f"top1.{name}" for name in ("transcoders", "map_pruned")),
    *(f"controls.{name}.pattern_kl" for name in ("random", "shuffled", "svd")),
    "pairs.active_per_score",
]
WITH_HEAD = [
    f"{metric}.{name}"
    for metric in ("ce", "logit_kl")
    for name in ("model", "transcoders", "map_pruned", "zero", "uniform", "mean")
    if (metric, name) != ("logit_kl", "model")
]
NUMBERS = [*(f"pairs.{name}" for name in ("kept", "total", "total_live")), "tokens.trained", "tokens.evaluated"]


def dig(report: dict[str, Any], key: str) -> Any:
    value: Any = report
    for part in key.split("."):
        value = value[part]
    return value


def figures(value: Any) -> list[dict[str, Any]]:
    """Every figure of a report."""
    if isinstance(value, list):
        return [f for part in value for f in figures(part)]
    if not isinstance(value, dict):
        return []
    inner = [f for part in value.values() for f in figures(part)]
    return [value, *inner] if "mean" in value and "ci95" in value else inner


def require_schema(path: Path, wanted: dict[str, pa.DataType]) -> pa.Table:
    table = pq.read_table(path)
    for name, kind in wanted.items():
        assert table.schema.field(name).type in (kind, *_same(kind)), (name, table.schema.field(name).type)
        assert table[name].null_count == 0
    return table


def _same(kind: pa.DataType) -> list[pa.DataType]:
    return [pa.list_(pa.field("item", kind.value_type))] if pa.types.is_list(kind) else []


def require_artefact(folder: Path, layer: int, model: str, count: int = 60, width: int = 32, D: int = 32) -> None:
    """All that DESIGN.md promises of one layer."""
    N, G, H = SHAPES[model]
    here = folder / f"layer_{layer}"
    names = {p.name for p in here.iterdir()}
    assert names - {"step1.safetensors"} == FILES | ({"pair_distance.parquet"} if model in ROTARY else set())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert RunConfig.model_validate(config["run"]).training.seed == 0
    assert {"versions", "device", "sites"} <= config.keys() and config["versions"].keys() >= {"qkscope", "git_commit"}
    tensors = load_file(here / "dictionaries.safetensors")
    widths = [tensors[f"{side}.W_enc"].shape[1] for side in ("query", "key")]
    tuned = config["run"]["pairs"]["method"] == "tune"  # drops the features that no pair names
    assert all(0 < w <= width if tuned else w == width for w in widths)
    for side, heads, w in (("query", N, widths[0]), ("key", G, widths[1])):
        wanted = {"W_enc": (D, w), "b_enc": (w,), "b_in": (D,), "W_dec": (w, heads * H)}
        wanted |= {"b_out": (heads * H,), "threshold": (w,)}
        assert {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(side)} == {
            f"{side}.{name}": shape for name, shape in wanted.items()
        }
        assert all(str(t.dtype) == "torch.float32" and t.isfinite().all() for t in tensors.values())
    pairs = pq.read_table(here / "pairs.parquet")
    assert {f.name: f.type for f in pairs.schema} == PAIR_COLUMNS
    assert 0 < len(pairs) <= count
    assert pairs["rank"].to_pylist() == list(range(len(pairs)))
    importance = pairs["importance"].to_pylist()
    assert importance == sorted(importance, reverse=True) and importance[-1] >= 0
    assert len({tuple(row[n] for n in ("query_feature", "key_feature", "head")) for row in pairs.to_pylist()}) == len(
        pairs
    )
    features = require_schema(here / "features.parquet", FEATURES)
    assert len(features) == sum(widths)
    examples = require_schema(here / "examples.parquet", EXAMPLES)
    assert 0 < max(examples["rank"].to_pylist()) < 12
    places = require_schema(here / "pair_examples.parquet", PLACES)
    kept_pairs = {tuple(row[n] for n in ("query_feature", "key_feature", "head")) for row in pairs.to_pylist()}
    shown = {tuple(row[n] for n in ("query_feature", "key_feature", "head")) for row in places.to_pylist()}
    assert shown and shown <= kept_pairs and max(places["rank"].to_pylist()) < 4
    require_report(here, model, len(pairs), (width + 1) ** 2 * N, features, N)


def require_report(here: Path, model: str, kept: int, total: int, features: pa.Table, heads: int) -> None:
    report = read_json(here / "report.json")
    head = model not in BIDIRECTIONAL
    for key in FIGURES + (WITH_HEAD if head else []):
        figure = dig(report, key)
        assert figure["ci95"][0] <= figure["mean"] <= figure["ci95"][1], key
    assert all(f["ci95"] is None or f["ci95"][0] <= f["ci95"][1] for f in figures(report))
    assert head or not report.keys() & {"ce", "logit_kl", "ce_increase", "recovered"}
    assert all(dig(report, key) >= 0 for key in NUMBERS)
    assert (report["pairs"]["kept"], report["pairs"]["total"]) == (kept, total)
    kl = report["pattern_kl"]
    assert kl["map_all"]["mean"] == pytest.approx(kl["transcoders"]["mean"], rel=1e-5, abs=1e-7)
    assert report["map_all_check"]["largest_log_pattern_difference"] < 1e-3
    assert all(len(score["per_head"]) == heads for score in kl.values())
    for side in ("query", "key"):
        live = [row["live"] for row in features.to_pylist() if row["side"] == side]
        assert report["live"][side] == sum(live)
        assert report["dead"][side]["mean"] == pytest.approx(1 - sum(live) / len(live))
        density = sum(row["density"] for row in features.to_pylist() if row["side"] == side)
        assert report["l0"][side]["mean"] == pytest.approx(density, rel=1e-4)
        told = report["dense_features"][side]
        assert told["dense"]["count"] / len(live) == pytest.approx(report["dense"][side]["mean"])
        assert told["dense"]["count"] + told["others"]["count"] == sum(live)


@pytest.mark.parametrize(
    ("model", "method"),
    [("gpt2", "tune"), ("llama", "refit"), ("gemma2", "importance"), ("gpt_oss", "mask"), ("bert", "tune")],
)
def test_run(run: Callable[..., Path], model: str, method: str) -> None:
    out = run({"pairs.method": method}, model)
    for layer in (0, 1):
        require_artefact(out, layer, model)
        assert (out / f"layer_{layer}" / "step1.safetensors").exists() == (method == "tune")
    assert (out / "report.html").read_text().lower().startswith("<!doctype html>")
    of_run = {"config.yaml", "layer_0", "layer_1", "report.html", ".lock"}
    assert {p.name for p in out.iterdir()} == (of_run if model in BIDIRECTIONAL else of_run | {"together.json"})


@pytest.mark.parametrize(
    ("model", "method"),
    [("gpt2", "mask"), ("llama", "tune"), ("gemma2", "mask"), ("gpt_oss", "tune"), ("bert", "refit")],
)
def test_run_of_one_layer(run: Callable[..., Path], model: str, method: str) -> None:
    require_artefact(run({"pairs.method": method, "layers": 1}, model), 1, model)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_run_in_bfloat16(run: Callable[..., Path], model: str) -> None:
    out = run({"training.dtype": "bfloat16", "layers": 1}, model)
    require_artefact(out, 1, model)


def test_sweep(run: Callable[..., Path], call: Callable) -> None:
    """Each member is an artefact of its own, and the same as the run that a person asks for alone."""
    sweep = run({"sweep.recipe": ("default", "seed"), "sweep.k": (2, 4)}, name="sweep")
    names = ["default-k2", "default-k4", "seed"]  # k means nothing to ReLU
    assert sorted(p.name for p in sweep.iterdir() if p.is_dir()) == names
    for name in names:
        assert (sweep / name / "report.html").exists()
        for layer in (0, 1):
            require_artefact(sweep / name, layer, "gpt2")
    alone = run({"dictionary.k": 2}, name="k2")
    other = run({"dictionary.recipe": "seed"}, name="seed")
    for layer in ("layer_0", "layer_1"):
        require_equal(sweep / "default-k2" / layer, alone / layer)
        require_equal(sweep / "seed" / layer, other / layer)
    said = call(["evaluate", str(sweep / "seed")])
    assert said.status == 0, said.lines


def test_layers_together_are_as_layers_apart(run: Callable[..., Path]) -> None:
    """Jobs do not know of each other. Layer 1 alone sees layer 0 through another attention kernel: rounding apart."""
    both = run(name="both")
    require_equal(both / "layer_0", run({"layers": 0}, name="only0") / "layer_0")
    one = (run({"layers": 1}, name="only1") / "layer_1", both / "layer_1")
    together = read_json(both / "together.json")
    assert together["layers"] == [0, 1] and together["tokens"] > 0
    assert set(together["ce_increase"]) == {"transcoders", "map_pruned", "zero", "uniform"}
    page = (both / "report.html").read_text()
    assert "All layers at once" in page and "Pairs kept and removed" in page and "An adversary" in page
    assert not (both.parent / "only0" / "together.json").exists()
    found = [read_json(folder / "report.json")["pattern_kl"]["transcoders"]["mean"] for folder in one]
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_all_layers_are_those_that_the_model_has(run: Callable[..., Path]) -> None:
    named = run(name="run")
    for layer in ("layer_0", "layer_1"):
        require_equal(run({"layers": "all"}, name="all") / layer, named / layer)  # the second time it is there
    assert yaml.safe_load((run({}, name="all") / "config.yaml").read_text())["run"]["layers"] == [0, 1]


def test_another_seed_gives_another_artefact(run: Callable[..., Path]) -> None:
    one, other = run({"layers": 0}, name="a"), run({"layers": 0, "training.seed": 1}, name="b")
    with pytest.raises(AssertionError, match="dictionaries"):
        require_equal(one / "layer_0", other / "layer_0")


def test_widths_of_their_own(run: Callable[..., Path]) -> None:
    changes = {"dictionary.width-key": 20, "dictionary.k-key": 2, "layers": 1}
    changes |= {f"evaluation.{name}": 0 for name in ("examples", "drawn-examples", "pair-examples")}
    out = run({**changes, "pairs.method": "importance"}, "llama")
    dec = Decomposition.load(out / "layer_1")
    assert (dec.query.width, dec.key.width) == (32, 20)
    for name in ("examples", "pair_examples"):
        assert len(pq.read_table(out / "layer_1" / f"{name}.parquet")) == 0
    assert read_json(out / "layer_1" / "report.json")["l0"]["key"]["mean"] < 3


@pytest.mark.parametrize("method", ["tune", "importance", "refit"])
def test_bound_on_kl(run: Callable[..., Path], method: str) -> None:
    """A generous bound is met with few pairs; one that cannot be met keeps as many as allowed."""
    loose = run({"pairs.method": method, "pairs.max-kl": 5.0, "layers": 0}, name="loose")
    tight = run({"pairs.method": method, "pairs.max-kl": 1e-6, "layers": 0}, name="tight")
    assert len(Decomposition.load(loose / "layer_0").pairs) < 60 == len(Decomposition.load(tight / "layer_0").pairs)


@pytest.mark.slow
def test_a_real_model(run: Callable[..., Path], shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model on its own kind of text: better than its controls, and far better than uniform with 400 pairs."""
    model, text = shared / "models" / "stories260K", shared / "text" / "stories260K.parquet"
    for path in (model, text):
        if not path.exists():
            pytest.skip(f"no {path}")
    monkeypatch.setattr(evaluation, "SAMPLE_TOKENS", 8000)
    changes = {
        "model": model, "data.source": text, "data.context": 64, "layers": 2, "dictionary.width": 96, "dictionary.k": 8,
        "training.tokens": 30_000, "training.batch-tokens": 1024, "training.log-steps": 20, "pairs.count": 400,
        "training.checkpoint-steps": 100, "pairs.tokens": 10_000, "pairs.importance-tokens": 4000,
        "evaluation.tokens": 4000,
    }  # fmt: skip
    report = read_json(run(changes) / "layer_2" / "report.json")
    kl = {name: report["pattern_kl"][name]["mean"] for name in ("transcoders", "map_pruned", "uniform")}
    controls = {name: report["controls"][name]["pattern_kl"]["mean"] for name in report["controls"]}
    assert kl["transcoders"] < min(0.3 * kl["uniform"], *controls.values())
    assert kl["map_pruned"] < min(0.5 * kl["uniform"], controls["random"], 0.5 * controls["shuffled"])
    assert report["logit_kl"]["map_pruned"]["mean"] < report["logit_kl"]["zero"]["mean"]
    assert report["ce"]["model"]["mean"] < 2.5
