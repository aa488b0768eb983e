"""Features from elsewhere, from the command line to the page and back: an SAE in the place of trained dictionaries."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saes import identity_sae, some_sae, write_sae
from safetensors.torch import save_file
from small_runs import kill_at, read_json, report_of, require_equal

from qkscope import AttentionSite, Decomposition, Feature, UserError
from qkscope.attention import harvest

D = 32
NOTHING_TRAINED = {"dictionary.width": None, "dictionary.k": None}


@pytest.fixture
def saes(tmp_path: Path) -> str:
    """An SAE of each layer of a tiny model, by the name that finds them."""
    for layer in (0, 1):
        hook = f"blocks.{layer}.hook_resid_pre"
        write_sae(tmp_path / "saes" / hook, *some_sae("jumprelu", D, 40, hook, seed=layer), nested=True)
    return f"{tmp_path}/saes/blocks.{{layer}}.hook_resid_pre"


def with_features(features: Path | str, **changes: Any) -> dict[str, Any]:
    return {"dictionary.features": features, **NOTHING_TRAINED, **changes}


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_run_with_given_features(
    run: Callable[..., Path], call: Callable, models: Callable, saes: str, model: str
) -> None:
    out = run(with_features(saes), model)
    shutil.rmtree(Path(saes).parent)  # the artefact needs it no more
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["run"]["pairs"]["method"] == "importance"
    for layer in (0, 1):
        folder = out / f"layer_{layer}"
        report = read_json(folder / "report.json")
        assert report["given"]["hook"] == f"blocks.{layer}.hook_resid_pre" and report["recipe"] is None
        assert report["width"] == report["width_trained"] == {"query": 41, "key": 41}
        assert report["tokens"]["trained"] == 0 and report["pairs"]["kept"] == 60
        assert report["pairs"]["total"] == 42 * 42 * 4
        kl = report["pattern_kl"]
        assert kl["map_all"]["mean"] == pytest.approx(kl["transcoders"]["mean"], rel=1e-3, abs=1e-5)
        assert report["map_all_check"]["largest_log_pattern_difference"] < 1e-3
        assert all(
            math.isfinite(report["controls"][name]["pattern_kl"]["mean"]) for name in ("random", "svd", "shuffled")
        )
        assert not (folder / "metrics.jsonl").exists() and not (folder / "step1.safetensors").exists()
    assert "features of " in (out / "report.html").read_text()
    dec = Decomposition.load(out / "layer_1")
    assert dec.residual and dec.query.width == 41 and dec.shape.reads is not None
    before = report_of(out / "layer_1")
    assert call(["evaluate", str(out)]).status == 0
    assert report_of(out / "layer_1") == before
    for command in (["trace", str(out), "--layer", "1", "--prompt", "w1 w7 w3 w7", "--head", "0"], ["heads", str(out)]):
        said = call([*command, "--distance"] if command[0] == "heads" and model == "llama" else command)
        assert said.status == 0 and said.out, said.lines
    said = call(["run", "--model", str(models(model))])  # nothing of it is left in the process
    assert "--layers is missing" in said.complaint()


def test_controls_read_what_the_attention_reads(run: Callable[..., Path], saes: str, models: Callable) -> None:
    """They are those of an ordinary run: of the normed stream, at the given features' L0."""
    report = read_json(run(with_features(saes)) / "layer_1" / "report.json")
    # Linear through the layer's projections, at this L0, they explain something: better than a uniform pattern.
    uniform = report["pattern_kl"]["uniform"]["mean"]
    assert report["controls"]["svd"]["pattern_kl"]["mean"] < uniform
    assert report["controls"]["random"]["pattern_kl"]["mean"] < uniform


def test_a_perfect_sae_loses_nothing(run: Callable[..., Path], models: Callable, tmp_path: Path) -> None:
    """Pattern and logits are the model's own, whatever the site that it is put into was set to."""
    path = write_sae(tmp_path / "sae", *identity_sae(D, "blocks.1.hook_resid_pre"))
    out = run(with_features(path, layers=1))
    report = read_json(out / "layer_1" / "report.json")
    assert report["pattern_kl"]["transcoders"]["mean"] < 1e-8
    assert abs(report["ce_increase"]["transcoders"]["mean"]) < 1e-5
    dec = Decomposition.load(out / "layer_1")
    site = AttentionSite.load(str(models("gpt2")), layer=1)
    tokens = torch.randint(5, 55, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = site.model(input_ids=tokens).logits
        with site.replace_pattern(dec, pairs="all"):
            torch.testing.assert_close(site.model(input_ids=tokens).logits, plain, rtol=1e-4, atol=1e-4)
        with site.replace_pattern(dec):
            assert (site.model(input_ids=tokens).logits - plain).abs().max() > 1e-3
    traced = dec.trace(site, "w1 w7 w3 w7 w20", head=1)  # opens the stream by itself, as an intervention does
    torch.testing.assert_close(traced.pattern["reconstructed"], traced.pattern["true"], rtol=0, atol=1e-5)
    with torch.no_grad(), site.intervene(dec, base="all") as watched:
        torch.testing.assert_close(site.model(input_ids=tokens).logits, plain, rtol=1e-4, atol=1e-4)
        assert watched.before_BNQK is not None and watched.pattern_BNQK is not None
        torch.testing.assert_close(watched.pattern_BNQK, watched.before_BNQK, rtol=0, atol=1e-5)
    with torch.no_grad(), site.intervene(dec, ablate=[Feature("key", 2 * D)]):
        assert (site.model(input_ids=tokens).logits - plain).abs().max() > 1e-3
    inputs = harvest([site], tokens, tokens > 0)[0]
    with pytest.raises(
        UserError, match=r"reads the residual stream, which the site .* AttentionSite\(..., residual=True\)"
    ):
        dec.log_pattern_kept(inputs)
    site = AttentionSite.load(str(models("gpt2")), layer=1, residual=True)
    inputs = harvest([site], tokens, tokens > 0)[0]
    torch.testing.assert_close(dec.log_pattern_all(inputs).exp(), inputs.log_pattern_BNQK.exp(), rtol=0, atol=1e-5)


def test_a_trained_decomposition_is_handed_what_it_reads(run: Callable[..., Path], models: Callable) -> None:
    """Also by a site that was set to the residual stream."""
    dec = Decomposition.load(run({"layers": 1}) / "layer_1")
    tokens = torch.randint(5, 55, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for residual in (False, True):
        site = AttentionSite.load(str(models("gpt2")), layer=1, residual=residual)
        with torch.no_grad(), site.replace_pattern(dec):
            logits.append(site.model(input_ids=tokens).logits)
    assert torch.equal(*logits)
    with pytest.raises(UserError, match="reads the attention's input"):
        dec.log_pattern_all(harvest([site], tokens, tokens > 0)[0])


@pytest.mark.parametrize("method", ["refit", "mask"])
def test_strengths_are_trained_and_features_are_not(run: Callable[..., Path], saes: str, method: str) -> None:
    ranked = Decomposition.load(run(with_features(saes, layers=1), name="ranked") / "layer_1")
    out = run(with_features(saes, layers=1, **{"pairs.method": method}), name=method)
    trained = Decomposition.load(out / "layer_1")
    for side in ("query", "key"):
        one, other = getattr(ranked, side).state_dict(), getattr(trained, side).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(trained.strength_P, trained.weight_strength_P)
    assert torch.equal(ranked.strength_P, ranked.weight_strength_P)
    assert (out / "layer_1" / "metrics.jsonl").exists()
    kl = [
        read_json(o / "layer_1" / "report.json")["pattern_kl"]["map_pruned"]["mean"]
        for o in (out.parent / "ranked", out)
    ]
    assert method == "mask" or kl[1] < kl[0]


def test_a_killed_refit_ends_with_the_same_bits(
    words: Callable[..., list[str]], call: Callable, saes: str, tmp_path: Path
) -> None:
    changes = with_features(saes, layers=1, **{"pairs.method": "refit"})
    assert call(words(tmp_path / "whole", changes)).status == 0
    killed = words(tmp_path / "killed", changes)
    kill_at(("os.rename", "checkpoint.safetensors", 2), killed)
    assert call(killed).status == 0
    require_equal(tmp_path / "whole" / "layer_1", tmp_path / "killed" / "layer_1")


def test_plain_directions(run: Callable[..., Path], tmp_path: Path) -> None:
    """The same ones at every layer; both signs of each."""
    path = tmp_path / "directions.safetensors"
    save_file({"directions": torch.randn(6, D, generator=torch.Generator().manual_seed(0))}, path)
    out = run(with_features(path))
    for layer in (0, 1):
        dec = Decomposition.load(out / f"layer_{layer}")
        assert dec.query.width == dec.key.width == 12


def test_compared_with_trained_features(run: Callable[..., Path], call: Callable, saes: str, tmp_path: Path) -> None:
    """And with themselves: there everything recurs."""
    given, trained = run(with_features(saes, layers=1), name="given"), run({"layers": 1}, name="trained")

    def compared(one: Path, other: Path) -> list[dict[str, Any]]:
        path = tmp_path / "compared.json"
        said = call(["compare", str(one), str(other), "--json", str(path)])
        assert said.status == 0, said.lines
        return read_json(path)["layers"]

    assert [row["query"]["recur"] for row in compared(given, given)] == [1.0, 1.0]
    forth, back = compared(given, trained)
    assert 0 <= forth["query"]["recur"] < 0.5 and forth["query"]["live"] == 41
    alone, _ = compared(trained, trained)
    for side in ("query", "key"):  # handed the stream and its norm, they fire as they do on the attention's input
        assert back[side]["live"] == alone[side]["live"] > 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"pairs.method": "tune"},
            "pairs.method is 'tune', which trains dictionaries: choose importance, refit or mask",
        ),
        ({"dictionary.k": 4}, "dictionary.k is 4.0: with dictionary.features no dictionary is trained; leave it out"),
        ({"dictionary.recipe": "seed"}, "dictionary.recipe is 'seed': with dictionary.features no dictionary"),
        ({"sweep.recipe": "seed"}, "sweep.recipe: with dictionary.features no dictionary is trained"),
        ({"target.max-kl": 0.1}, "target: with dictionary.features no dictionary is trained"),
        ({"dictionary.features": "/no/where"}, "--dictionary.features /no/where: no such folder or file"),
        ({"dictionary.features": None, "dictionary.centred": ()}, "dictionary.centred is about dictionary.features"),
        ({"layers": (0, 1), "dictionary.features": "one"}, "is of blocks.1.hook_resid_pre, layer 1's attention input"),
    ],
)
def test_what_does_not_go_with_given_features(
    words: Callable[..., list[str]], call: Callable, saes: str, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    changes = {"layers": 1, **with_features(saes), **changes}
    if changes["dictionary.features"] == "one":
        changes["dictionary.features"] = saes.replace("{layer}", "1")
    call(words(tmp_path / "out", changes)).complaint(part)
    assert not (tmp_path / "out").exists()


def test_a_model_they_cannot_be_carried_through(
    words: Callable[..., list[str]], call: Callable, saes: str, tmp_path: Path
) -> None:
    said = call(words(tmp_path / "out", with_features(saes), model="qwen3"))
    said.complaint("--dictionary.features: the queries of layer 0 are not affine in what its attention reads")
    assert not (tmp_path / "out").exists()


def test_a_damaged_artefact(run: Callable[..., Path], saes: str) -> None:
    out = run(with_features(saes, layers=1))
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("rescale: none", "rescale: some"))
    with pytest.raises(UserError, match="layer 1: reads: rescale is 'some'"):
        Decomposition.load(out / "layer_1")
    config.write_text(config.read_text().replace("rescale: some", "rescale: none").replace("width: 41", "width: 42"))
    with pytest.raises(UserError, match=r"query.W_enc has shape \(32, 41\), config.yaml asks for \(32, 42\)"):
        Decomposition.load(out / "layer_1")
