"""Features from elsewhere: read as SAELens means them, and carried exactly to the queries and keys of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from saes import KINDS, NEED_LAYER_NORM, identity_sae, slow_sae, some_sae, write_sae
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor

from qkscope.attention import AttentionInputs, AttentionSite, harvest
from qkscope.config import DictionaryConfig
from qkscope.errors import UserError
from qkscope.foreign.carry import Sides, explained, given_dictionaries, in_brief
from qkscope.foreign.saelens import layer_of

D = 32
HOOK = "blocks.1.hook_resid_pre"


def site_of(name: str, layer: int = 1) -> AttentionSite:
    return AttentionSite(tiny_model(name), None, layer=layer, residual=True)


def seen_by(site: AttentionSite, seed: int = 0) -> AttentionInputs:
    tokens = torch.randint(5, 55, (2, 9), generator=torch.Generator().manual_seed(seed))
    return harvest([site], tokens, torch.ones_like(tokens, dtype=torch.bool))[0]


def given(path: Path | str, site: AttentionSite, **options: Any) -> Sides:
    return given_dictionaries(DictionaryConfig(features=str(path), **options), site)


def through(name: str, site: AttentionSite, r_nD: Tensor, made_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a reconstruction that comes through the model's norm at the true scale, and 1/σ; float64,
    from the weights by their names."""
    block: Any = site.block
    r, made = r_nD.double(), made_nD.double()
    if name == "gpt2":
        norm = block.ln_1
        scale = (r.var(-1, unbiased=False) + norm.eps).rsqrt()[:, None]
        x = norm.weight.double() * (made - made.mean(-1, keepdim=True)) * scale + norm.bias.double()
        q, k, _ = (x @ block.attn.c_attn.weight.double() + block.attn.c_attn.bias.double()).split(D, dim=1)
    else:
        norm = block.input_layernorm
        eps, gain = (norm.eps, 1 + norm.weight) if name == "gemma" else (norm.variance_epsilon, norm.weight)
        scale = (r.square().mean(-1) + eps).rsqrt()[:, None]
        x = gain.double() * made * scale
        q, k = (x @ p.weight.double().T for p in (block.self_attn.q_proj, block.self_attn.k_proj))
    return q, k, scale


# The mathematics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma", "gemma2", "cohere2", "gpt_oss", "bert"]
)
def test_an_sae_that_loses_nothing_gives_the_models_own_pattern(tmp_path: Path, name: str, layer: int) -> None:
    site = site_of(name, layer)
    sides = given(write_sae(tmp_path, *identity_sae(D, f"blocks.{layer}.hook_resid_pre")), site)
    inputs = seen_by(site)
    q, k = (side(inputs.x_BTD).view_as(true) for side, true in zip(sides, (inputs.q_BTNH, inputs.k_BTGH), strict=True))
    torch.testing.assert_close(q, inputs.q_BTNH, rtol=1e-5, atol=1e-5 * float(inputs.q_BTNH.abs().max()))
    torch.testing.assert_close(k, inputs.k_BTGH, rtol=1e-5, atol=1e-5 * float(inputs.k_BTGH.abs().max()))
    found = inputs.rule.log_pattern(q, k).exp()
    torch.testing.assert_close(found, inputs.log_pattern_BNQK.exp(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", kind) for kind in KINDS]
    + [(name, kind) for name in ("llama", "gemma") for kind in KINDS if kind not in NEED_LAYER_NORM],
)
def test_every_architecture_against_a_slow_reference(tmp_path: Path, name: str, kind: str) -> None:
    """Activations are the SAE's over each token's scale; queries and keys are those of its reconstruction."""
    site = site_of(name)
    cfg, tensors = some_sae(kind, D, 40, HOOK)
    query, key = given(write_sae(tmp_path, cfg, tensors), site)
    r_nD = seen_by(site).x_BTD.flatten(0, 1)
    acts, made = slow_sae(cfg, tensors, r_nD)
    q, k, scale = through(name, site, r_nD, made)
    for side, wanted in ((query, q), (key, k)):
        found = side.encode(r_nD).double()
        torch.testing.assert_close(found[:, :40], acts * scale, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[:, :40] > 0, acts > 0)
        torch.testing.assert_close(side(r_nD).double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert 0 < (acts > 0).double().mean() < 0.9
    assert query.width == 41  # b_dec's is the last
    b_dec_acts = query.encode(r_nD)[:, 40].double()
    rescale = 1.0
    if cfg["normalize_activations"] == "layer_norm":
        rescale = r_nD.double().std(-1)
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        rescale = r_nD.double().norm(dim=-1) / D**0.5
    torch.testing.assert_close(b_dec_acts, scale[:, 0] * rescale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "batchtopk", "standard"])
def test_thresholds_are_the_contracts(tmp_path: Path, kind: str) -> None:
    """A feature fires where relu(pre)·‖W_dec_f‖ > threshold_f, as in any artefact."""
    site = site_of("gpt2")
    query, _ = given(write_sae(tmp_path, *some_sae(kind, D, 40, HOOK)), site)
    r_nD = seen_by(site).x_BTD.flatten(0, 1)
    fires = query.pre(r_nD).relu() * query.W_dec.norm(dim=1) > query.threshold
    assert torch.equal(query.encode(r_nD) > 0, fires)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    site = site_of("llama")
    cfg, tensors = some_sae("jumprelu", D, 40, HOOK)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    query, _ = given(write_sae(tmp_path, cfg, tensors), site)
    assert query.W_enc.dtype == torch.float32
    r_nD = seen_by(site).x_BTD.flatten(0, 1)
    _, made = slow_sae(cfg, tensors, r_nD)
    torch.testing.assert_close(query(r_nD).double(), through("llama", site, r_nD, made)[0], rtol=1e-4, atol=1e-3)


def test_a_model_of_sixteen_bits(tmp_path: Path) -> None:
    """Queries to bfloat16's own precision."""
    site = AttentionSite(tiny_model("llama").to(torch.bfloat16), None, layer=1, residual=True)
    query, _ = given(write_sae(tmp_path, *identity_sae(D, HOOK)), site)
    inputs = seen_by(site)
    q = query(inputs.x_BTD.float()).view_as(inputs.q_BTNH)
    torch.testing.assert_close(q, inputs.q_BTNH, rtol=0, atol=2e-2 * float(inputs.q_BTNH.abs().max()))


def test_centred_by_the_option(tmp_path: Path) -> None:
    """As by cfg.json; and where the files do not say so, a run does, if it fits better."""
    site = site_of("gpt2")
    cfg, tensors = some_sae("centred", D, 40, HOOK)
    r_nD = seen_by(site).x_BTD.flatten(0, 1)
    told = given(write_sae(tmp_path / "told", cfg, tensors), site)[0](r_nD)
    del cfg["model_from_pretrained_kwargs"]
    silent = write_sae(tmp_path / "silent", cfg, tensors)
    assert torch.equal(given(silent, site, centred=True)[0](r_nD), told)
    assert (given(silent, site)[0](r_nD) - told).abs().max() > 1e-2
    with pytest.raises(UserError, match="takes each token's mean off, which the attention of layer 1 sees"):
        given(silent, site_of("llama"), centred=True)


def test_explained_variance(tmp_path: Path) -> None:
    site = site_of("gpt2")
    inputs = seen_by(site)
    cfg, tensors = identity_sae(D, HOOK)
    sides = given(write_sae(tmp_path / "all", cfg, tensors), site)
    assert explained(sides, [inputs]) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert in_brief(sides, [inputs]) == (
        "the features explain 100.0% of the variance of queries and 100.0% of that of keys"
    )
    tensors["b_enc"] = torch.full((2 * D,), -0.2)
    tensors["W_dec"] *= 0.7
    sides = given(write_sae(tmp_path / "less", cfg, tensors), site)
    q = inputs.q_BTNH.flatten(0, 1).flatten(1).double()
    error = q - sides[0](inputs.x_BTD).flatten(0, 1).double()
    wanted = 1 - float(error.square().sum() / (q - q.mean(0)).square().sum())
    assert explained(sides, [inputs])[0] == pytest.approx(wanted, abs=1e-5) and wanted < 0.99


def test_centring_that_fits_better_is_named(tmp_path: Path) -> None:
    """An encoder that answers to the mean as well is right only where there is none."""
    site = site_of("gpt2")
    inputs = seen_by(site)
    cfg, tensors = identity_sae(D, HOOK)
    tensors["b_dec"] -= tensors["b_dec"].mean()
    tensors["W_enc"] = tensors["W_enc"] + 0.5
    sides = given(write_sae(tmp_path, cfg, tensors), site)
    before = sides[0](inputs.x_BTD)
    assert in_brief(sides, [inputs]).endswith("; with --dictionary.centred 100.0% and 100.0%")
    assert torch.equal(sides[0](inputs.x_BTD), before)  # tried and put back
    assert "centred" not in in_brief(given(tmp_path, site, centred=True), [inputs])


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "gemma3_text", "deepseek_v3"])
def test_queries_that_are_not_affine_are_refused(tmp_path: Path, name: str) -> None:
    path = write_sae(tmp_path, *identity_sae(D, HOOK))
    with pytest.raises(UserError, match="of layer 1 are not affine in what its attention reads"):
        given(path, site_of(name))


# Files -----------------------------------------------------------------------------------------------


def test_layouts_of_cfg_json(tmp_path: Path) -> None:
    """The flat one of old, the newer one with metadata."""
    site, (cfg, tensors) = site_of("gpt2"), some_sae("standard", D, 40, HOOK)
    r_nD = seen_by(site).x_BTD.flatten(0, 1)
    wanted = given(write_sae(tmp_path / "flat", cfg, tensors), site)
    nested = given(write_sae(tmp_path / "nested", cfg, tensors, nested=True), site)
    old = {"d_in": D, "d_sae": 40, "hook_point": HOOK, "hook_point_layer": 1, "model_name": "gpt2-small"}
    oldest = given(write_sae(tmp_path / "old", old, tensors), site)
    for sides in (nested, oldest):
        assert torch.equal(sides[0](r_nD), wanted[0](r_nD)) and sides[0].reading.hook == HOOK


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.3.hook_resid_pre", 3),
        ("blocks.3.hook_resid_post", 4),
        ("model.layers.11", 12),
        ("transformer.h.0", 1),
        ("blocks.3.hook_mlp_out", None),
        ("blocks.3.attn.hook_z", None),
        ("blocks.3.hook_resid_mid", None),
        ("hook_embed", None),
    ],
)
def test_layer_of(hook: str, layer: int | None) -> None:
    assert layer_of(hook) == layer


def test_the_layer_in_the_name(tmp_path: Path) -> None:
    for layer in (0, 1):
        write_sae(tmp_path / f"blocks.{layer}.hook_resid_pre", *identity_sae(D, f"blocks.{layer}.hook_resid_pre"))
    write_sae(tmp_path / "blocks.0.hook_resid_post", *identity_sae(D, "blocks.0.hook_resid_post"))
    for layer in (0, 1):
        query, _ = given(f"{tmp_path}/blocks.{{layer}}.hook_resid_pre", site_of("gpt2", layer))
        assert query.reading.hook == f"blocks.{layer}.hook_resid_pre"
    query, _ = given(f"{tmp_path}/blocks.{{layer-1}}.hook_resid_post", site_of("gpt2"))
    assert query.reading.hook == "blocks.0.hook_resid_post"
    with pytest.raises(
        UserError, match=r"is of blocks\.0\.hook_resid_post, layer 1's attention input, and not of what"
    ):
        given(tmp_path / "blocks.0.hook_resid_post", site_of("gpt2", 0))


@pytest.mark.parametrize("folder", ["", "some/where"])
def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """REPO and REPO/FOLDER, out of a cache in the hub's own layout; its commit is noted."""
    cache = tmp_path / "models--someone--saes"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abc", encoding="utf-8")
    write_sae(cache / "snapshots" / "0123abc" / folder, *identity_sae(D, HOOK))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    site = site_of("gpt2")
    query, _ = given(f"someone/saes/{folder}".rstrip("/"), site)
    assert query.reading.revision == "0123abc" and query.reading.hook == HOOK
    with pytest.raises(UserError, match="features someone/saes/else: cannot be had from the Hugging Face hub"):
        given("someone/saes/else", site)


def changed(name: str, value: Any) -> Any:
    return lambda cfg, tensors: cfg.__setitem__(name, value)


WRONG: list[tuple[Any, str]] = [
    (changed("architecture", "skip_transcoder"), "its architecture is 'skip_transcoder'; one of standard, topk"),
    (changed("activation_fn", "tanh-relu"), "its activation_fn is 'tanh-relu'"),
    (
        changed("normalize_activations", "expected_average_only_in"),
        "normalize_activations is expected_average_only_in, by a",
    ),
    (changed("normalize_activations", True), "normalize_activations is expected_average_only_in, by a factor"),
    (changed("normalize_activations", "max"), "its normalize_activations is 'max'"),
    (changed("hook_name", "blocks.1.hook_mlp_out"), "is of blocks.1.hook_mlp_out, none's attention input"),
    (changed("hook_name", "blocks.1.hook_resid_post"), "is of blocks.1.hook_resid_post, layer 2's attention input"),
    (changed("hook_name", None), "cfg.json has no hook_name"),
    (changed("architecture", "topk"), "cfg.json says None for the k of its topk"),
    (changed("architecture", "jumprelu"), "its weights have no threshold"),
    (changed("architecture", "gated"), "its weights have no r_mag"),
    (lambda cfg, tensors: tensors.pop("b_dec"), "its weights have no b_dec"),
    (lambda cfg, tensors: tensors.update(W_enc=torch.zeros(48, 40)), r"W_enc has shape \(48, 40\); this model's .* 32"),
    (lambda cfg, tensors: tensors.update(W_dec=torch.zeros(39, D)), r"W_dec has shape \(39, 32\), W_enc asks for"),
    (lambda cfg, tensors: tensors["b_enc"].fill_(torch.nan), "b_enc holds NaN or infinity"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_with_an_sae(tmp_path: Path, change: Any, said: str) -> None:
    cfg, tensors = some_sae("standard", D, 40, HOOK)
    change(cfg, tensors)
    with pytest.raises(UserError, match=f"^--dictionary.features {tmp_path}: {said}"):
        given(write_sae(tmp_path, cfg, tensors), site_of("gpt2"))


def test_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    site = site_of("gpt2")
    with pytest.raises(UserError, match=r"features nowhere: no such folder or file; name an SAE's folder, REPO"):
        given("nowhere", site)
    with pytest.raises(UserError, match=r"features \./no/where: no such folder or file"):
        given("./no/where", site)
    with pytest.raises(UserError, match=r"has no cfg\.json"):
        given(tmp_path, site)
    write_sae(tmp_path, *identity_sae(D, HOOK))
    (tmp_path / "cfg.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"cfg\.json is damaged"):
        given(tmp_path, site)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"sae_weights\.safetensors is damaged"):
        given(tmp_path, site)


# Plain directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("count", [5, D])
def test_directions(tmp_path: Path, count: int, layout: str) -> None:
    """Least-squares coordinates, each sign a feature of its own; the rest of the stream is not seen."""
    d_FD = torch.randn(count, D, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "directions.safetensors"
    save_file({layout: (d_FD if layout == "rows" else d_FD.T).contiguous()}, path)
    site = site_of("gpt2")
    query, key = given(path, site)
    assert query.width == 2 * count and query.reading.hook is None
    r_nD = seen_by(site).x_BTD.flatten(0, 1)
    coordinates = torch.linalg.lstsq(d_FD.double().T, r_nD.double().T).solution.T
    q, k, scale = through("gpt2", site, r_nD, coordinates @ d_FD.double())
    acts = query.encode(r_nD).double()
    signed = torch.cat([coordinates, -coordinates], 1).clamp(min=0) * scale
    torch.testing.assert_close(acts, signed, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(query(r_nD).double(), q, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(key(r_nD).double(), k, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"d": torch.eye(D)}, "d is square; name the tensor rows or columns"),
        ({"d": torch.ones(5, 31)}, r"d has shape \(5, 31\); finite directions \[F, 32\]"),
        ({"d": torch.ones(5)}, r"d has shape \(5,\)"),
        ({"d": torch.ones(5, D, dtype=torch.int64)}, r"d has shape \(5, 32\); finite"),
        ({"d": torch.ones(2, D)}, "2 directions in a residual stream of width 32 depend on each other"),
        ({"d": torch.randn(40, D)}, "40 directions in a residual stream of width 32 depend on each other"),
        ({"a": torch.ones(2, D), "b": torch.ones(2, D)}, "holds 2 tensors, a, b; one matrix is wanted"),
    ],
)
def test_directions_without_coordinates_are_refused(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    path = tmp_path / "directions.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{path}: {said}"):
        given(path, site_of("gpt2"))
