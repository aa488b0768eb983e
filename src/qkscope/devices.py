"""What a device is to be known by: copies that the host does not wait for, and how fast a type's products are."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .config import Dtype

SIDE, TRIES = 1024, 3  # of the product that types are compared on: some milliseconds on a core


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on this device. What comes from memory that is not pinned, a GPU's host waits for."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def product_seconds(dtype: Dtype) -> float:
    """How long a CPU takes to multiply two matrices of this type, the best of some tries."""
    matrix = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(1 + TRIES):  # the first one prepares
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
