"""Open a finished run's layers with their model: what every command that explains begins with."""

from __future__ import annotations

from pathlib import Path

from ..attention import AttentionSite, open_sites
from ..config import build
from ..decomposition import Decomposition, read_run
from ..errors import UserError
from ..models import load_model
from ..run_folder import layer_folder, require_finished, variants


def open_layers(
    folder: Path, layer: int | None = None, device: str = "cpu"
) -> list[tuple[Decomposition, AttentionSite]]:
    """Each layer of a run (or the one asked for), with its site in one model.

    `folder`: a run's, a sweep member's, or a layer's own. `UserError` for anything else, for a run that is not
    finished, and for a layer that it does not have.
    """
    if folder.name.startswith("layer_") and (folder.parent / "config.yaml").exists():
        own = folder.name.removeprefix("layer_")
        if layer is not None and str(layer) != own:
            raise UserError(f"--layer {layer}: {folder} is another layer; name the run's folder, or leave --layer out")
        folder, layer = folder.parent, int(own) if own.isdecimal() else None
    config = build(read_run(folder)["run"], str(folder / "config.yaml"))
    require_finished(folder)
    members = [name for name in variants(config) if name]
    if members:
        raise UserError(f"{folder} is a sweep; name one of its members, e.g. {folder / members[0]}")
    layers = sorted(config.layers)
    if layer is not None and layer not in layers:
        raise UserError(f"--layer {layer}: {folder} has layers {' '.join(map(str, layers))}")
    chosen = layers if layer is None else [layer]
    decs = [Decomposition.load(layer_folder(folder, number)).to(device) for number in chosen]
    model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device=device)
    return list(zip(decs, open_sites(model, tokenizer, chosen, residual=decs[0].residual), strict=True))


def one_layer(folder: Path, layer: int | None = None, device: str = "cpu") -> tuple[Decomposition, AttentionSite]:
    """`open_layers` where one is wanted; `UserError` where a run has several and none was named."""
    opened = open_layers(folder, layer, device)
    if len(opened) > 1:
        there = " ".join(str(dec.layer) for dec, _ in opened)
        raise UserError(f"--layer is missing; {folder} has layers {there}")
    return opened[0]
