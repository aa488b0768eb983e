"""Where given features are: a folder or a file here, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..data.files import one_line
from ..errors import UserError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OPTION = "--dictionary.features"


@dataclass(frozen=True)
class Found:
    """Files of given features; plain directions have no `config`."""

    source: str
    weights: Path
    config: Path | None = None
    revision: str | None = None
    """Commit of a repository on the hub."""


def find(features: str, layer: int) -> Found:
    """The files of one layer's features; `UserError` where they are not there."""
    source = features.replace("{layer}", str(layer)).replace("{layer-1}", str(layer - 1))
    path = Path(source).expanduser()
    if path.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise UserError(f"{OPTION} {source}: has no {name}; name the folder of an SAE as SAELens saves it")
        return Found(source, path / WEIGHTS, path / CONFIG)
    if path.is_file():
        return Found(source, path)
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 2:
        raise UserError(
            f"{OPTION} {source}: no such folder or file; name an SAE's folder, REPO or REPO/FOLDER on the Hugging Face "
            "hub, or a .safetensors file of directions"
        )
    repo, rest = "/".join(parts[:2]), "/".join(parts[2:])
    if rest.endswith(".safetensors"):
        weights = _download(repo, rest, source)
        return Found(source, weights, None, _revision(weights))
    weights, config = (_download(repo, f"{rest}/{name}".lstrip("/"), source) for name in (WEIGHTS, CONFIG))
    return Found(source, weights, config, _revision(weights))


def _download(repo: str, name: str, source: str) -> Path:
    try:
        return Path(hf_hub_download(repo, name))
    except LocalEntryNotFoundError as error:
        reason = f"cannot be had from the Hugging Face hub ({one_line(error)}); check name and network"
    except EntryNotFoundError:
        reason = f"{repo} on the Hugging Face hub has no {name}; name the folder of an SAE as SAELens saves it"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"is not here and cannot be had from the Hugging Face hub ({one_line(error)}); check the name"
    raise UserError(f"{OPTION} {source}: {reason}")


def _revision(path: Path) -> str | None:
    """The commit in the path of a file in the hub's cache."""
    found = re.search(r"/models--[^/]+/snapshots/([^/]+)/", path.as_posix())
    return found and found[1]
