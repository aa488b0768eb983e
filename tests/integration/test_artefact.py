"""What a finished run is good for: loaded, measured again, put into the running model, given again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import read_json, report_of, tree
from torch import Tensor

from qkscope import AttentionSite, Decomposition, UserError, one_pass
from qkscope.attention import harvest
from qkscope.kernels.row_kl import exp
from qkscope.pairs.pair_map import pair_scores, rows, with_bias

KINDS = ["gpt2", "llama", "gemma2"]


def tokens_for(site: AttentionSite, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 55, (3, 20), generator=generator)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 13:] = False
    return tokens, real


def logits(site: AttentionSite, tokens: Tensor, real: Tensor) -> Tensor:
    with torch.no_grad():
        return site.model(input_ids=tokens, attention_mask=real.long()).logits[real]


@pytest.mark.parametrize("model", KINDS)
def test_loaded_is_what_was_in_memory(
    run: Callable[..., Path], models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Same scores and pattern as the job at the end of its training; same logits as its pattern source says."""
    jobs: list[Any] = []
    write = one_pass.OnePass._write

    def keep(self: Any, job: Any) -> None:
        write(self, job)
        jobs.append(job.eval())

    monkeypatch.setattr(one_pass.OnePass, "_write", keep)
    out = run({"layers": 1}, model)
    dec, job = Decomposition.load(out / "layer_1"), jobs[-1]
    site = AttentionSite.load(str(models(model)), layer=1)
    tokens, real = tokens_for(site)
    seen = harvest([site], tokens, real)[0]
    with torch.no_grad():
        acts_q, acts_k = (with_bias(side.encode(seen.x_BTD)) for side in (job.query, job.key))
        rows_q, rows_k = rows(job.query, dec.shape.N), rows(job.key, dec.shape.G)
        wanted = pair_scores(job.pairs, job.strengths(seen.rule), acts_q, acts_k, rows_q, rows_k, seen.rule)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(dec.scores(seen), wanted)
    assert (dec.query.encode(seen.x_BTD) > 0).any() and dec.pairs.query_P.shape == job.query_P.shape
    require_patched(dec, site, tokens, real)


def require_patched(dec: Decomposition, site: AttentionSite, tokens: Tensor, real: Tensor) -> None:
    """Logits with the decomposition in the model's place are those of its own pattern handed in by hand."""
    plain = logits(site, tokens, real)
    seen = harvest([site], tokens, real)[0]
    found = {}
    for pairs, log_pattern in (("kept", dec.log_pattern_kept), ("all", dec.log_pattern_all)):
        pattern = exp(log_pattern(seen))
        torch.testing.assert_close(dec.pattern_source(pairs)(seen), pattern)
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        with site.replace_pattern(dec, pairs=pairs):
            found[pairs] = logits(site, tokens, real)
        with site.replace_pattern(lambda inputs, pattern=pattern: pattern):
            torch.testing.assert_close(logits(site, tokens, real), found[pairs], rtol=1e-4, atol=1e-4)
        assert (found[pairs] - plain).abs().max() > 1e-3
    assert (found["kept"] - found["all"]).abs().max() > 1e-3
    torch.testing.assert_close(logits(site, tokens, real), plain, rtol=0, atol=0)


@pytest.mark.parametrize(("model", "count"), [("gpt2", 150), ("llama", 150)])
def test_tuned_dictionaries_hold_what_pairs_name(
    run: Callable[..., Path], call: Callable, models: Callable[[str], Path], model: str, count: int
) -> None:
    """Fewer features than were trained, each in a pair; step 1's dictionaries stay whole beside them."""
    out = run({"layers": 1, "pairs.count": count, "dictionary.width-key": 28}, model)
    folder = out / "layer_1"
    dec = Decomposition.load(folder)
    for side, feature_P, trained in ((dec.query, dec.pairs.query_P, 32), (dec.key, dec.pairs.key_P, 28)):
        assert 0 < side.width < trained
        named = feature_P[feature_P < side.width].unique()
        assert named.tolist() == list(range(side.width))
    step1 = load_file(folder / "step1.safetensors")
    assert (step1["query.W_enc"].shape[1], step1["key.W_dec"].shape[0]) == (32, 28)
    report = read_json(folder / "report.json")
    assert report["width"] == {"query": dec.query.width, "key": dec.key.width}
    assert report["width_trained"] == {"query": 32, "key": 28}
    assert report["pairs"]["share_of_total"] == len(dec.pairs) / (33 * 29 * dec.shape.N)
    assert f"the kept pairs use {dec.query.width} of the 32 trained" in (out / "report.html").read_text()
    site = AttentionSite.load(str(models(model)), layer=1)
    seen = harvest([site], *tokens_for(site))[0]
    (out / "copy").mkdir()
    shutil.copy(out / "config.yaml", out / "copy")
    dec.save(out / "copy" / "layer_1")
    again = Decomposition.load(out / "copy" / "layer_1")
    shutil.rmtree(out / "copy")
    assert torch.equal(again.log_pattern_kept(seen), dec.log_pattern_kept(seen))
    assert torch.equal(again.log_pattern_all(seen), dec.log_pattern_all(seen))
    before = report_of(folder)
    assert call(["evaluate", str(out)]).status == 0
    assert report_of(folder) == before and before["pattern_kl"].keys() >= {"step1", "map_pruned"}


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("dictionaries", lambda t: wider(t, "query", 40), "query.W_enc has shape (32, 40), config.yaml asks for"),
        ("dictionaries", lambda t: t.update({"key.b_enc": t["key.b_enc"][:-1].clone()}), "key.W_enc ask for"),
        ("dictionaries", lambda t: t.update({"key.W_enc": t["key.W_enc"][:, :-1].clone()}), "key.b_enc has shape"),
        ("dictionaries", lambda t: t.update({"key.W_dec": torch.zeros(40, 32)}), "key.W_dec has shape (40, 32)"),
        ("dictionaries", lambda t: wider(t, "key", 0), "key.W_enc has shape (32, 0)"),
        ("dictionaries", lambda t: wider(t, "key", 3), "names a feature or head that the dictionaries do not have"),
        ("step1", lambda t: wider(t, "key", 20), "key.W_enc has shape (32, 20), config.yaml asks for (32, 32)"),
    ],
)  # fmt: skip
def test_tuned_dictionaries_of_a_wrong_width(
    tuned: Path, call: Callable, tmp_path: Path, name: str, change: Callable, part: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    path = out / "layer_0" / f"{name}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if name == "dictionaries":
        with pytest.raises(UserError) as error:
            Decomposition.load(out / "layer_0")
        assert part in str(error.value) and "\n" not in str(error.value), str(error.value)
    before = tree(out)
    said = call(["evaluate", str(out)])
    assert said.status == 2 and part in said.lines[-1] and said.lines[-1].startswith("qkscope: "), said.lines
    assert tree(out) == before


def wider(tensors: dict[str, Tensor], side: str, width: int) -> None:
    """Give a side another width in all its tensors."""
    for name, dim in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0), ("threshold", 0)):
        old = tensors[f"{side}.{name}"]
        size = list(old.shape)
        size[dim] = width
        tensors[f"{side}.{name}"] = torch.zeros(size)


def test_lost_dictionaries_are_trained_and_measured_anew(
    run: Callable[..., Path], words: Callable[..., list[str]], call: Callable
) -> None:
    """The report that stands is of the ones that are lost."""
    changes = {"layers": 0, "pairs.method": "importance"}
    out = run(changes)
    report = report_of(out / "layer_0")
    (out / "layer_0" / "dictionaries.safetensors").unlink()
    (out / "layer_0" / "report.json").write_text("{}")
    assert call(words(out, changes)).status == 0
    assert report_of(out / "layer_0") == report


@pytest.fixture(scope="module")
def tuned(models: Callable[[str], Path], source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one layer, to be copied."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    small_runs.finish(small_runs.argv(out, models("gpt2"), source, {"layers": 0}))
    return out


@pytest.mark.parametrize(("model", "method"), [("gpt2", "tune"), ("llama", "importance"), ("bert", "mask")])
def test_evaluated_again(run: Callable[..., Path], call: Callable, model: str, method: str) -> None:
    """`qkscope evaluate` finds the same figures, and writes what is missing."""
    out = run({"pairs.method": method}, model)
    before, report = tree(out), [report_of(out / f"layer_{layer}") for layer in (0, 1)]
    seconds = read_json(out / "layer_1" / "report.json")["seconds"]
    (out / "layer_0" / "report.json").unlink()
    (out / "layer_0" / "examples.parquet").unlink()
    (out / "report.html").unlink()
    said = call(["evaluate", str(out)])
    assert said.status == 0, said.lines
    assert [report_of(out / f"layer_{layer}") for layer in (0, 1)] == report
    again = read_json(out / "layer_1" / "report.json")["seconds"]
    assert {k: v for k, v in again.items() if k != "evaluation"} == {
        k: v for k, v in seconds.items() if k != "evaluation"
    }
    after = tree(out)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert {name.split("/")[-1] for name in changed} <= {"report.json", "report.html"}


def test_given_again(run: Callable[..., Path], words: Callable[..., list[str]], call: Callable) -> None:
    """A finished run says so and nothing is written, not even read anew; what may differ is no other run."""
    changes = {"layers": 0, "pairs.method": "importance"}
    out = run(changes)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")}
    for more in ({}, {"training.log-steps": 7, "training.checkpoint-steps": 3, "training.device": "auto"}):
        said = call(words(out, {**changes, **more}))
        assert said.status == 0
        assert said.lines == [f"{out} is already finished; its report is {out / 'report.html'}"]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.rglob("*")} == before


def test_a_run_of_before_an_option_is_the_same_run(
    run: Callable[..., Path], words: Callable[..., list[str]], call: Callable
) -> None:
    changes = {"layers": 0, "pairs.method": "importance", "training.seed": 7}
    out = run(changes)
    path = out / "config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["run"]["training"]["reuse"], values["run"]["training"]["held_batches"]
    path.write_text(yaml.safe_dump(values))
    said = call(words(out, changes))
    assert said.status == 0 and "is already finished" in said.lines[-1]
    call(words(out, {**changes, "training.reuse": 2})).complaint("training.reuse is 1 there, 2 here")


def test_a_lost_report_is_made_anew(run: Callable[..., Path], words: Callable[..., list[str]], call: Callable) -> None:
    """Without training again: the dictionaries and pairs stay the files they were."""
    changes = {"layers": 0, "pairs.method": "importance", "training.seed": 5}
    out = run(changes)
    kept = [out / "layer_0" / name for name in ("dictionaries.safetensors", "pairs.parquet", "metrics.jsonl")]
    before = [(p.stat().st_mtime_ns, p.read_bytes()) for p in kept]
    report = report_of(out / "layer_0")
    (out / "layer_0" / "report.json").unlink()
    assert call(words(out, changes)).status == 0
    assert [(p.stat().st_mtime_ns, p.read_bytes()) for p in kept] == before
    assert report_of(out / "layer_0")["pattern_kl"] == report["pattern_kl"]
