"""`qkscope compare A B`: what of one run's features and pairs recurs in another's, layer by layer, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..attention import AttentionSite
from ..config import RunConfig, build
from ..decomposition import Decomposition, read_run
from ..errors import UserError
from ..files import unwritable, write_json
from ..models import load_model
from ..run_folder import layer_folder, require_finished
from ..training.stream import harvest_finite
from .stability import SAME, recurrence
from .text import text_of

SAMPLE_TOKENS = 16_384  # training tokens to which the random dictionaries are fitted
HELDOUT_TOKENS = 32_768


def compare_runs(one: Path, other: Path, path: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Compare the layers that both runs have, print a table and write its figures; `UserError` where there is none."""
    configs = [_config(folder) for folder in (one, other)]
    if configs[0].model != configs[1].model:
        raise UserError(f"{other}: is of {configs[1].model} and {one} of {configs[0].model}; name runs of one model")
    layers = sorted(set(configs[0].numbers) & set(configs[1].numbers))
    if not layers:
        raise UserError(f"{other}: has no layer in common with {one}; name runs of the same layers")
    if path is not None and (wrong := unwritable(path)):
        raise UserError(f"--json {path}: {wrong}; name a file")
    model, tokenizer = load_model(str(configs[0].model), dtype=configs[0].training.dtype, device=device)
    found: dict[str, Any] = {"runs": [str(one), str(other)], "same": SAME, "layers": []}
    print(f"cosine {SAME:g} or more: the same feature; A is {one}, B is {other}; in brackets: chance")
    for layer in layers:
        decs = [Decomposition.load(layer_folder(folder, layer)).to(device) for folder in (one, other)]
        norm = next((dec.query.input_norm for dec in decs if dec.residual), None)
        for dec in decs:
            if not dec.residual:  # trained features beside given ones are handed the residual stream as well
                dec.query.input_norm = dec.key.input_norm = norm
        site = AttentionSite(model, tokenizer, layer=layer, residual=norm is not None)
        for label, a, b in (("A in B", *decs), ("B in A", *reversed(decs))):
            heldout = (batch.to(device) for batch in text_of(site, a.config, "heldout", HELDOUT_TOKENS))
            sample = [harvest_finite(site, b.to(device)) for b in text_of(site, a.config, "train", SAMPLE_TOKENS)]
            row = {"layer": layer, "of": label, **recurrence(a, b, site, heldout, sample)}
            found["layers"].append(row)
            print(_line(row))
    if path is not None:
        write_json(path, found)
    return found


def _config(folder: Path) -> RunConfig:
    values = read_run(folder)
    require_finished(folder)
    return build(values["run"], str(folder / "config.yaml"))


def _line(row: dict[str, Any]) -> str:
    sides = [
        f"{side} features {row[side]['recur']:.0%} of {row[side]['live']:,} ({row[side]['chance']:.0%})"
        for side in ("query", "key")
    ]
    pairs = row["pairs"]
    share = f"importance of the {pairs['kept']:,} pairs {pairs['recur']:.0%} ({pairs['chance']:.0%})"
    return f"layer {row['layer']}, {row['of']}: recur {', '.join([*sides, share])}"
