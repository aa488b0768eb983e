"""Time and memory of ways to do something, and what the machine can do at best.

Ways are taken in turns, A B A B, so that what else the machine does falls on all of them alike. A first round that is
not timed warms up, and in it the most memory that each way holds is measured.

A second is one on the wall, but for one thread on a CPU, where it is one of the processor: the same on a machine that
does nothing else, and the same still on one that does.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...config import Dtype

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Timing:
    """Seconds of each repeat, on the wall and of all threads of the process, and the most bytes held."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: int | None = None

    def figures(self, device: torch.device) -> dict[str, Any]:
        all_s = self.processor if by_processor(device) else self.wall
        return {
            "seconds": statistics.median(all_s),
            "seconds_all": all_s,
            "wall_s": statistics.median(self.wall),
            "processor_s": statistics.median(self.processor),
            "peak_bytes": self.peak,
        }


def by_processor(device: torch.device) -> bool:
    """Whether a second is one of the processor."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Every way once to warm up, then `repeats` times in turns."""
    found = {name: Timing() for name in ways}
    for name, way in ways.items():
        found[name].peak = most_held(way, device)
    for _ in range(repeats):
        for name, way in ways.items():
            wall, processor = timed(way, device)
            found[name].wall.append(wall)
            found[name].processor.append(processor)
    return found


def timed(way: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    _finish(device)
    wall, processor = time.perf_counter(), time.process_time()
    way()
    _finish(device)
    return time.perf_counter() - wall, time.process_time() - processor


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def most_held(way: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call holds at the most beyond what was held before; None where the system does not say.

    On a GPU by torch's own account. On a CPU by Linux's high-water mark of the process, which is set back first, after
    what is free has been given back to the system.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        _finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        REFERENCES.write_text("5")
        before = _status("VmRSS")
    except OSError:
        before = None
    way()
    return None if before is None else max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Ceiling:
    """The best of several large products and copies: FLOP/s and bytes/s (read and written)."""

    flops: float
    bytes: float

    @classmethod
    def measured(cls, device: torch.device, dtype: Dtype = "float32", repeats: int = 5) -> Ceiling:
        """A product in this type, with as many threads as everything else here; a copy in float32."""
        large = device.type == "cuda"
        n = 8192 if large else 2048
        left, right = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        source = torch.randn(1 << (30 if large else 27), device=device)  # 4 GB, 512 MB: more than any cache
        target = torch.empty_like(source)
        product, copy = lambda: torch.mm(left, right), lambda: target.copy_(source)
        which = by_processor(device)  # of wall and processor
        best = [min(timed(way, device)[which] for _ in range(1 + repeats)) for way in (product, copy)]
        return cls(2 * n**3 / best[0], 2 * 4 * source.numel() / best[1])

    def over(self, other: Ceiling) -> Ceiling:
        """The higher of two measurements."""
        return Ceiling(max(self.flops, other.flops), max(self.bytes, other.bytes))
