"""Memory: what is free, what trainings take beside the model, and which of them fit side by side."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import DictionaryConfig, TrainingConfig
from .dictionary import CALIBRATION_TOKENS, chooses_few
from .training.start import FIT_ELEMENTS, FIT_TOKENS

COPIES = 4  # of what is trained: itself, its gradient and Adam's two moments
USED = 0.8  # share of what is free that trainings are planned to take
STEP = 500 << 20  # bytes of the step at hand: a block of the model, the KL's blocks, entries that are not zero
PATTERNS = 4  # of a layer that is read and has another one above it: scores, masked, their logarithm, the pattern
DENSE = 8  # matrices [tokens, features], activations and gradients with their zeros, where these are written down
AT_START, AT_END = 6, 4  # as many, without gradients: when a start's gain is fitted, when thresholds are calibrated
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

Part = tuple[int, str]  # a layer, and a variant of a sweep ('' without one)


def free_memory(device: torch.device) -> int:
    """Bytes that a process can have; on a CPU also what files are cached in, and its share of what processes share."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_free_of_machine(), _free_of_container()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_of_machine() -> int:
    with suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_container() -> int:
    """What a control group leaves; more than there can be without one that has a limit."""
    with suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + next((int(size) for name, size in lines if name == "inactive_file"), 0)
    return 1 << 62


@dataclass(frozen=True)
class Need:
    """Bytes that trainings take."""

    dictionaries: dict[Part, int]
    harvest: dict[int, int]
    """Of each layer: inputs, queries, keys and values of the batches that are held."""
    step: int
    """What a step takes for itself, or what comes before the first and after the last, of the largest dictionary."""

    @classmethod
    def of_training(
        cls, names: Mapping[str, DictionaryConfig], shapes: Mapping[int, Mapping[str, int]],
        config: TrainingConfig, context: int, device: torch.device, *, together: bool = False,
    ) -> Need:  # fmt: skip
        """Of each variant's dictionaries in each layer, whose D, N, G and H are given.

        `together`: several processes train them all, and add up their gradients.
        """
        # The batch before is there while the next one is made; values are held where one product makes q, k and v.
        tokens = config.batch_tokens * (1 + (config.held_batches if config.reuse > 1 else 1))
        dictionaries, harvest = {}, {}
        for layer, shape in shapes.items():
            d, n, g, h = (shape[name] for name in "DNGH")
            harvest[layer] = 4 * tokens * (d + (n + 2 * g) * h)
            for name, one in names.items():
                sides = ((one.width, n * h), (one.key_width, g * h))
                numbers = sum(width * (d + outputs + 1) + d + outputs for width, outputs in sides)
                dictionaries[layer, name] = 4 * COPIES * numbers
        patterns = PATTERNS * context * max(shape["N"] for shape in shapes.values())
        sides = [(one, *side) for one in names.values() for side in ((one.k, one.width), (one.key_k, one.key_width))]
        with_zeros = [w for one, k, w in sides if device.type == "cuda" or not chooses_few(one.activation, k, w)]
        dense = DENSE * max(with_zeros, default=0)
        width = max(w for _, _, w in sides)
        beside = max(AT_START * min(FIT_TOKENS * width, FIT_ELEMENTS), AT_END * CALIBRATION_TOKENS * width)
        summed = max(dictionaries.values()) // COPIES if together else 0  # gradients in one piece
        step = STEP + 4 * config.batch_tokens * (patterns + dense) + summed
        return cls(dictionaries, harvest, max(step, 4 * beside))

    def of(self, parts: Collection[Part]) -> int:
        """What these take in one pass."""
        layers = {layer for layer, _ in parts}
        return self.step + sum(self.dictionaries[part] for part in parts) + sum(self.harvest[layer] for layer in layers)

    def passes(self, parts: Sequence[Part], free: float, most: int) -> list[list[Part]]:
        """The parts in their order, in passes of as many as fit, of `most` at the most and of one at the least."""
        passes: list[list[Part]] = []
        for part in parts:
            if passes and len(passes[-1]) < most and self.of([*passes[-1], part]) <= USED * free:
                passes[-1].append(part)
            else:
                passes.append([part])
        return passes
