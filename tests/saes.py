"""Residual-stream SAEs in SAELens's layout, made at random, and what SAELens's classes compute of them, token by token.

The reference follows sae_lens/saes of SAELens 6 (and its loader for older files) in float64 and knows nothing of
qkscope's own form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard-plain-input": {"apply_b_dec_to_input": False},
    "standard-rescaled": {"normalize_activations": "constant_norm_rescale"},
    "topk": {"architecture": "topk", "k": 5},
    "topk-by-size": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "topk-of-old": {"activation_fn": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
    "topk-layer-norm": {"architecture": "topk", "k": 5, "normalize_activations": "layer_norm"},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu-of-old": {"architecture": "jumprelu", "log": True},
    "batchtopk": {"architecture": "batchtopk", "k": 5.5, "rescale_acts_by_decoder_norm": True},
    "gated": {"architecture": "gated"},
    "finetuned": {"finetuning_scaling_factor": True},
    "centred": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
}
NEED_LAYER_NORM = ("topk-layer-norm", "centred")  # they take the mean off


def some_sae(kind: str, d: int, width: int, hook: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """cfg.json and weights of a random SAE."""
    g = torch.Generator().manual_seed(seed)
    cfg: dict[str, Any] = {
        "architecture": "standard",
        "d_in": d,
        "d_sae": width,
        "dtype": "float32",
        "activation_fn": "relu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "hook_name": hook,
        **KINDS[kind],
    }
    size = torch.rand(width, 1, generator=g) + 0.5
    tensors = {
        "W_enc": torch.randn(d, width, generator=g) * d**-0.5,
        "W_dec": torch.randn(width, d, generator=g) * width**-0.5 * size,
        "b_dec": 0.4 * torch.randn(d, generator=g),
        "b_enc": 0.3 * torch.randn(width, generator=g),
    }
    if cfg["architecture"] == "gated":
        del tensors["b_enc"]
        tensors |= {name: 0.4 * torch.randn(width, generator=g) for name in ("b_gate", "b_mag", "r_mag")}
    if cfg["architecture"] == "jumprelu":
        threshold = 0.6 * torch.rand(width, generator=g)
        tensors |= {"log_threshold": threshold.log()} if cfg.pop("log", False) else {"threshold": threshold}
    if cfg["architecture"] == "batchtopk":
        tensors["topk_threshold"] = torch.tensor(0.2, dtype=torch.float64)
    if cfg.get("finetuning_scaling_factor"):
        tensors["finetuning_scaling_factor"] = torch.rand(width, generator=g) + 0.5
    return cfg, tensors


def identity_sae(d: int, hook: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An SAE that loses nothing: both signs of every coordinate, about a b_dec."""
    cfg, tensors = some_sae("standard", d, 2 * d, hook)
    eye = torch.eye(d)
    tensors |= {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), "b_enc": torch.zeros(2 * d)}
    return cfg, tensors


def write_sae(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], *, nested: bool = False) -> Path:
    """The folder that SAELens would save; `nested`: with its newer cfg.json, where the hook is part of the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    if nested:
        cfg = {**cfg, "metadata": {"hook_name": cfg["hook_name"], "sae_lens_version": "6.5.0"}}
        del cfg["hook_name"]
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def slow_sae(cfg: dict[str, Any], tensors: dict[str, Tensor], r_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [n, F] times what the SAE scales its output back by, and the reconstruction [n, D]; float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    acts, made = zip(*(_slow_token(cfg, t, r.double()) for r in r_nD), strict=True)
    return torch.stack(acts), torch.stack(made)


def _slow_token(cfg: dict[str, Any], t: dict[str, Tensor], r: Tensor) -> tuple[Tensor, Tensor]:
    d = len(r)
    scale, mean = 1.0, 0.0
    if (cfg.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        mean = float(r.mean())  # the model that it was trained on has no mean there
        r = r - mean
    z = r
    if cfg["normalize_activations"] == "layer_norm":
        mean = float(r.mean())
        scale = float((r - mean).square().sum() / (d - 1)) ** 0.5
        z = (r - mean) / (scale + 1e-5)
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        scale = float(r.square().sum()) ** 0.5 / d**0.5
        z = r / scale
    if cfg["apply_b_dec_to_input"]:
        z = z - t["b_dec"]
    acts = []
    for f in range(t["W_enc"].shape[1]):
        pre = float(z @ t["W_enc"][:, f])
        if cfg["architecture"] == "gated":
            magnitude = float(t["r_mag"][f].exp()) * pre + float(t["b_mag"][f])
            acts.append(max(magnitude, 0.0) if pre + float(t["b_gate"][f]) > 0 else 0.0)
            continue
        acts.append(pre + float(t["b_enc"][f]))
        if cfg.get("rescale_acts_by_decoder_norm"):
            acts[f] *= float(t["W_dec"][f].norm())
    if cfg["architecture"] == "jumprelu":
        threshold = t["threshold"] if "threshold" in t else t["log_threshold"].exp()
        acts = [a if a > float(threshold[f]) else 0.0 for f, a in enumerate(acts)]
    if cfg["architecture"] == "batchtopk":
        acts = [a if a > float(t["topk_threshold"]) else 0.0 for a in acts]
    if "topk" in (cfg["architecture"], cfg.get("activation_fn_str")):
        first = sorted(range(len(acts)), key=lambda f: -acts[f])[:5]
        acts = [a if f in first else 0.0 for f, a in enumerate(acts)]
    values = torch.tensor([max(a, 0.0) for a in acts], dtype=torch.float64)
    made = t["b_dec"].clone()
    for f, a in enumerate(values):
        row = t["W_dec"][f]
        if cfg.get("rescale_acts_by_decoder_norm"):
            row = row / row.norm()
        if "finetuning_scaling_factor" in t:
            row = row * t["finetuning_scaling_factor"][f]
        made += a * row
    return values * scale, made * scale + mean
