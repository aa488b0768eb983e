"""What a model loses with the patterns of all layers of a run replaced at once: together.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..attention import AttentionSite
from ..decomposition import Decomposition
from ..files import write_json
from ..pattern import HeadSource
from ..run_folder import layer_folder
from .patched import PatchedScore, zero_pattern
from .patterns import uniform_pattern
from .pieces import Found, Piece
from .text import heldout_share

NAME = "together.json"


class Together:
    """All layers of a run's folder, and the model that they are of."""

    def __init__(self, folder: Path, sites: Sequence[AttentionSite]) -> None:
        self.folder, self.sites = folder, sites
        self.device = next(sites[0].model.parameters()).device
        self.decs = [Decomposition.load(layer_folder(folder, site.layer)).to(self.device) for site in sites]

    @torch.no_grad()
    def find(self, piece: Piece) -> Found:
        """Scores on one share of the held-out text, and its tokens."""
        began = time.monotonic()
        variants: dict[str, Sequence[HeadSource]] = {
            "transcoders": [dec.head_source("all") for dec in self.decs],
            "map_pruned": [dec.head_source("kept") for dec in self.decs],
            "zero": [zero_pattern] * len(self.sites),
            "uniform": [uniform_pattern] * len(self.sites),
        }
        score, tokens = PatchedScore(), 0
        for batch in heldout_share(self.sites[0], self.decs[0].config, *piece[1:]):
            score.add_together(self.sites, batch.to(self.device), variants)
            tokens += batch.n_tokens
        return Found(piece, (score, tokens), time.monotonic() - began)

    def write(self, found: Sequence[Found]) -> str:
        """Write together.json."""
        score = PatchedScore()
        for one in found:
            score.merge(one.value[0])
        tokens = sum(one.value[1] for one in found)
        layers = [site.layer for site in self.sites]
        write_json(self.folder / NAME, {"layers": layers, "tokens": tokens, **score.report()})
        return f"cross-entropy {score.increase('map_pruned')['mean']:+.4f}"
