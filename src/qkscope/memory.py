"""Memory: what is free, what trainings take beside the model, and which of them fit side by side."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import DictionaryConfig, TrainingConfig

COPIES = 4  # of what is trained: itself, its gradient and Adam's two moments
USED = 0.8  # share of what is free that trainings are planned to take
STEP = 600 << 20  # bytes of the step at hand: the model's pass, the pattern's blocks, entries that are not zero
DENSE = 8  # on a GPU: matrices [tokens, features] of it, activations and gradients with their zeros
MEMINFO = Path("/proc/meminfo")

Part = tuple[int, str]  # a layer, and a variant of a sweep ('' without one)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had; on a CPU what files are cached in can be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Need:
    """Bytes that trainings take."""

    dictionaries: dict[Part, int]
    harvest: dict[int, int]
    """Of each layer: the inputs, queries and keys of the batches that are held."""
    step: int
    """What a step takes for itself, of the largest dictionary."""

    @classmethod
    def of_training(
        cls, names: Mapping[str, DictionaryConfig], shapes: Mapping[int, Mapping[str, int]],
        config: TrainingConfig, device: torch.device,
    ) -> Need:  # fmt: skip
        """Of each variant's dictionaries in each layer, whose D, N, G and H are given."""
        tokens = config.batch_tokens * (config.held_batches if config.reuse > 1 else 1)
        dictionaries, harvest = {}, {}
        for layer, shape in shapes.items():
            d, n, g, h = (shape[name] for name in "DNGH")
            harvest[layer] = 4 * tokens * (d + (n + g) * h)
            for name, one in names.items():
                sides = ((one.width, n * h), (one.key_width, g * h))
                numbers = sum(width * (d + outputs + 1) + d + outputs for width, outputs in sides)
                dictionaries[layer, name] = 4 * COPIES * numbers
        width = max(max(one.width, one.key_width) for one in names.values())
        dense = 4 * DENSE * config.batch_tokens * width if device.type == "cuda" else 0
        return cls(dictionaries, harvest, STEP + dense)

    def of(self, parts: Collection[Part]) -> int:
        """What these take in one pass."""
        layers = {layer for layer, _ in parts}
        return self.step + sum(self.dictionaries[part] for part in parts) + sum(self.harvest[layer] for layer in layers)

    def passes(self, parts: Sequence[Part], free: float) -> list[list[Part]]:
        """The parts in their order, in passes of as many as fit, and of one at the least."""
        passes: list[list[Part]] = []
        for part in parts:
            if passes and self.of([*passes[-1], part]) <= USED * free:
                passes[-1].append(part)
            else:
                passes.append([part])
        return passes
