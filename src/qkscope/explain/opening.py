"""Open a finished run's layers: what every command that explains begins with."""

from __future__ import annotations

from pathlib import Path

from ..attention import AttentionSite, open_sites
from ..config import build
from ..decomposition import Decomposition, read_run
from ..errors import UserError
from ..models import load_model
from ..run_folder import layer_folder, require_finished, variants


def layer_folders(folder: Path, layer: int | None = None) -> list[Path]:
    """The folders of a run's layers (or of the one asked for); `folder` is a run's, a sweep member's, or a layer's own.

    `UserError` for anything else, for a run that is not finished, and for a layer that it does not have.
    """
    if folder.resolve().name.startswith("layer_") and not (folder / "config.yaml").exists():
        require_finished(folder.parent)
        if layer is not None and folder.resolve().name != f"layer_{layer}":
            raise UserError(f"--layer {layer}: {folder} is another layer's folder; leave --layer out")
        return [folder]
    config = build(read_run(folder)["run"], str(folder / "config.yaml"))
    require_finished(folder)
    if members := [name for name in variants(config) if name]:
        raise UserError(f"{folder}: is a sweep; name one of its members: {', '.join(str(folder / m) for m in members)}")
    layers = config.numbers
    if layer is not None and layer not in layers:
        raise UserError(f"--layer {layer}: the run has layers {', '.join(map(str, layers))}")
    return [layer_folder(folder, n) for n in ([layer] if layer is not None else layers)]


def open_layers(
    folder: Path, layer: int | None = None, device: str = "cpu"
) -> list[tuple[Decomposition, AttentionSite]]:
    """Each of `layer_folders` as a decomposition with its site, all in one model."""
    return with_sites([Decomposition.load(place).to(device) for place in layer_folders(folder, layer)], device)


def with_sites(decs: list[Decomposition], device: str = "cpu") -> list[tuple[Decomposition, AttentionSite]]:
    """Decompositions of one run with their sites in its model."""
    config = decs[0].config
    model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device=device)
    sites = open_sites(model, tokenizer, [dec.layer for dec in decs], residual=decs[0].residual)
    return list(zip(decs, sites, strict=True))


def one_layer(folder: Path, layer: int | None = None, device: str = "cpu") -> tuple[Decomposition, AttentionSite]:
    """`open_layers` where one is wanted; `UserError` where a run has several and none was named."""
    places = layer_folders(folder, layer)
    if len(places) > 1:
        numbers = " ".join(place.name.removeprefix("layer_") for place in places)
        raise UserError(f"--layer is missing: {folder} has layers {numbers}")
    return open_layers(folder, layer, device)[0]
