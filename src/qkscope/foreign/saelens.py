"""Read a residual-stream SAE as SAELens saves it, or plain directions, into one form.

    a = act((z - b_in) W_enc + b_enc)        z ≈ Σ_f a_f d_f + b_dec        z: the residual stream, rescaled

What is notable:
- A gated SAE is a JumpReLU: its gate x·w + b_gate > 0 opens where its magnitude e^r x·w + b_mag exceeds
  b_mag - e^r b_gate (Rajamanoharan et al. 2024). BatchTopK is saved with a threshold, and is one too.
- `rescale_acts_by_decoder_norm` (TopK, BatchTopK) is folded into the weights; so is a `finetuning_scaling_factor`.
- `layer_norm` and `constant_norm_rescale` are numbers of the token, which are kept (residual.py).
  `expected_average_only_in` is one number of the training text that is not in the files: refused.
- Plain directions have least-squares coordinates, which have signs, and features here have none: direction f is
  feature f where its coordinate is positive and feature F + f, with the opposite direction, where it is negative.

Format: SAELens (github.com/decoderesearch/SAELens), sae_lens/saes and sae_lens/loading, versions 2 to 6.
Shapes: D residual width, F features.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors
from .find import OPTION, Found

ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated")
RESCALES = ("none", "layer_norm", "constant_norm_rescale")
LEAST = 1e-6  # smallest singular value of directions, relative to the largest, that counts as independent


@dataclass
class ResidualSAE:
    """Features of the residual stream; float32 tensors."""

    W_enc: Tensor
    """[D, F]"""
    b_enc: Tensor
    b_in: Tensor
    """[D], taken off z before it is encoded."""
    W_dec: Tensor
    """[F, D], the directions d_f."""
    b_dec: Tensor
    threshold: Tensor | None = None
    """jumprelu: feature f fires where its activation is above this, [F]."""
    k: int | None = None
    """topk: how many of the largest activations are left."""
    rescale: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    centred: bool = False
    hook: str | None = None

    @property
    def activation(self) -> Literal["relu", "topk", "jumprelu"]:
        if self.k is not None:
            return "topk"
        return "relu" if self.threshold is None else "jumprelu"


def read_sae(found: Found, d: int) -> ResidualSAE:
    """The SAE or the directions of a residual stream of width `d`; `UserError` for what cannot be taken as it is."""
    tensors, _ = read_tensors(found.weights)
    where = f"{OPTION} {found.source}"
    if found.config is None:
        return _directions(tensors, d, where)
    return _sae(_config(found.config), {name: t.float() for name, t in tensors.items()}, d, where)


def _config(path: Path) -> dict[str, Any]:
    """cfg.json with the names of its newest layout; what is there called metadata lies beside the rest."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not keys and values")
    values = {**values, **(values.get("metadata") or {})}
    for old, new in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if values.get(new) is None:
            values[new] = values.get(old)
    return values


def _sae(cfg: dict[str, Any], tensors: dict[str, Tensor], d: int, where: str) -> ResidualSAE:
    kind = cfg.get("architecture") or "standard"
    kwargs = cfg.get("activation_fn_kwargs") or {}
    if kind == "standard" and cfg["activation_fn"] == "topk":  # as it was before there was an architecture of the name
        kind = "topk"
    if kind not in ARCHITECTURES:
        raise UserError(f"{where}: its architecture is {kind!r}; one of {', '.join(ARCHITECTURES)} can be read")
    if cfg["activation_fn"] not in (None, "relu", "topk"):
        raise UserError(f"{where}: its activation_fn is {cfg['activation_fn']!r}; relu and topk can be read")
    W_enc = _tensor(tensors, "W_enc", where)
    if W_enc.ndim != 2 or len(W_enc) != d:
        raise UserError(f"{where}: W_enc has shape {tuple(W_enc.shape)}; this model's residual stream has width {d}")
    width = W_enc.shape[1]
    W_dec, b_dec = _tensor(tensors, "W_dec", where, (width, d)), _tensor(tensors, "b_dec", where, (d,))

    def of_features(name: str) -> Tensor:
        return _tensor(tensors, name, where, (width,))

    threshold: Tensor | None = None
    if kind == "gated":
        gain, b_enc = of_features("r_mag").exp(), of_features("b_mag")
        threshold = b_enc - gain * of_features("b_gate")
        W_enc = W_enc * gain
    else:
        b_enc = of_features("b_enc")
    if kind == "jumprelu":
        threshold = of_features("log_threshold").exp() if "log_threshold" in tensors else of_features("threshold")
    if kind in ("topk", "batchtopk", "matryoshka_batchtopk") and cfg.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if "batchtopk" in kind:
        threshold = _tensor(tensors, "topk_threshold", where, ()).expand(width).clone()
    scaling = tensors.get("finetuning_scaling_factor", tensors.get("scaling_factor"))
    if scaling is not None:
        W_dec = W_dec * scaling[:, None]
    applied = cfg.get("apply_b_dec_to_input")
    loaded_with = cfg.get("model_from_pretrained_kwargs") or {}
    return ResidualSAE(
        W_enc,
        b_enc,
        torch.zeros_like(b_dec) if applied is False else b_dec,
        W_dec,
        b_dec,
        threshold,
        _k(cfg.get("k", kwargs.get("k")), where) if kind == "topk" else None,
        _rescale(cfg.get("normalize_activations"), where),
        bool(loaded_with.get("center_writing_weights")) or cfg.get("normalize_activations") == "layer_norm",
        _hook(cfg.get("hook_name"), where),
    )


def _tensor(tensors: dict[str, Tensor], name: str, where: str, shape: tuple[int, ...] | None = None) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise UserError(f"{where}: its weights have no {name}; is it an SAE as SAELens saves it?")
    if shape is not None and tuple(tensor.shape) != shape:
        raise UserError(f"{where}: {name} has shape {tuple(tensor.shape)}, W_enc asks for {shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{where}: {name} holds NaN or infinity")
    return tensor


def _k(k: Any, where: str) -> int:
    if not isinstance(k, int) or k < 1:
        raise UserError(f"{where}: cfg.json says {k!r} for the k of its topk; a whole number above 0 belongs there")
    return k


def _rescale(said: Any, where: str) -> Any:
    found = {None: "none", False: "none", True: "expected_average_only_in"}.get(said, said)
    if found == "expected_average_only_in":
        raise UserError(
            f"{where}: normalize_activations is {found}, by a factor that is not in its files; fold it in "
            "(SAELens: sae.fold_activation_norm_scaling_factor(factor)) and save the SAE again"
        )
    if found not in RESCALES:
        raise UserError(f"{where}: its normalize_activations is {found!r}; one of {', '.join(RESCALES)} can be read")
    return found


def _hook(hook: Any, where: str) -> str:
    if not isinstance(hook, str):
        raise UserError(f"{where}: cfg.json has no hook_name; write into it what the SAE was trained on")
    return hook


def layer_of(hook: str) -> int | None:
    """The layer whose attention reads this point of the residual stream; None for a point that none does.

    A layer's end is the next one's beginning. A module of transformers' by its path stands for what comes out of it.
    """
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook):
        return int(found[1]) + (found[2] == "post")
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|layer|h|blocks)\.(\d+)", hook)
    return int(found[1]) + 1 if found else None


def _directions(tensors: dict[str, Tensor], d: int, where: str) -> ResidualSAE:
    if len(tensors) != 1:
        raise UserError(
            f"{where}: holds {len(tensors)} tensors, {', '.join(sorted(tensors)[:4])}; one matrix is wanted"
        )
    ((name, matrix),) = tensors.items()
    shape = tuple(matrix.shape)
    if matrix.ndim != 2 or d not in shape or not matrix.is_floating_point() or not bool(torch.isfinite(matrix).all()):
        raise UserError(f"{where}: {name} has shape {shape}; finite directions [F, {d}] or [{d}, F] are wanted")
    if shape == (d, d) and name not in ("rows", "columns"):
        raise UserError(f"{where}: {name} is square; name the tensor rows or columns, whichever its directions are")
    d_FD = matrix.double().T if shape[1] != d or name == "columns" else matrix.double()
    values = torch.linalg.svdvals(d_FD)
    if len(d_FD) > d or values[-1] <= LEAST * values[0]:
        raise UserError(
            f"{where}: {len(d_FD)} directions in a residual stream of width {d} depend on each other and have no "
            "unique coordinates; bring an SAE, whose encoder says which are active"
        )
    coordinates_DF, d_FD = torch.linalg.pinv(d_FD).float(), d_FD.float()
    zero_F, zero_D = torch.zeros(2 * len(d_FD)), torch.zeros(d)
    return ResidualSAE(
        torch.cat([coordinates_DF, -coordinates_DF], 1), zero_F, zero_D, torch.cat([d_FD, -d_FD]), zero_D
    )
