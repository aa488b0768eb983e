"""The device that tests pretend to have refuses what a GPU refuses, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pretended import DEVICE, PretendedDevice
from torch import Tensor

Act = Callable[[Tensor, Tensor], object]  # on a vector of the device, and one of the CPU
REFUSED: dict[str, Act] = {
    "a sum": lambda there, here: there + here,
    "into its place": lambda there, here: there.add_(here),
    "a product": lambda there, here: there @ here,
    "joined": lambda there, here: torch.cat([there, here]),
    "its index": lambda there, here: here[there.long()],
    "its mask": lambda there, here: here[there > 0],
    "gathered": lambda there, here: there.gather(0, here.long()),
    "values set": lambda there, here: there.index_put_((there.long(),), here),
    "added up": lambda there, here: there.index_add(0, here.long(), there),
    "a number that is not the CPU's": lambda there, here: here * there.sum(),
    "into a number of the CPU's": lambda there, here: here.sum().add_(there.sum()),
    "chosen": lambda there, here: torch.where(there > 0, there, here),
}
TAKEN: dict[str, Act] = {
    "a number": lambda there, here: there * here.sum(),
    "an index": lambda there, here: there[here.long()],
    "a list": lambda there, here: there[[0, 2]],
    "what it is filled from": lambda there, here: torch.zeros_like(there).copy_(here),
    "moved": lambda there, here: there + here.to(there.device),
    "a number set": lambda there, here: there.masked_fill(there > 1, here.sum()),
    "complex": lambda there, here: torch.view_as_real(torch.complex(there, there + 1).conj().resolve_conj()),
    "without its first dimension": lambda there, here: there[None] @ there.new_tensor([[1.0], [2.0], [3.0]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(name: str) -> None:
    with PretendedDevice(), pytest.raises(RuntimeError, match="same device"):
        REFUSED[name](torch.arange(3.0, device=DEVICE), torch.arange(3.0))


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_gpu_takes(name: str) -> None:
    wanted = TAKEN[name](torch.arange(3.0), torch.arange(3.0))
    with PretendedDevice():
        found = TAKEN[name](torch.arange(3.0, device=DEVICE), torch.arange(3.0))
        assert isinstance(found, Tensor) and found.device == DEVICE
        assert isinstance(wanted, Tensor) and torch.equal(found.cpu(), wanted)


def test_arrays_are_made_on_the_cpu_alone() -> None:
    with PretendedDevice(), pytest.raises(RuntimeError):
        torch.arange(3.0, device=DEVICE).numpy()


def test_gradients_and_an_optimizer() -> None:
    def weight(device: str) -> Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2).to(device)
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.arange(6.0, device=device).view(2, 3)).square().sum().backward()
            optimizer.step()
        return layer.weight.detach().cpu()

    wanted = weight("cpu")
    with PretendedDevice():
        assert torch.equal(weight(DEVICE.type), wanted)


def test_what_the_host_waits_for_is_counted() -> None:
    waits: list[Act] = [
        lambda there, here: float(there.sum()),
        lambda there, here: bool((there > 1).any()),
        lambda there, here: there.tolist(),
        lambda there, here: there.cpu(),
        lambda there, here: there.nonzero(),
        lambda there, here: there[there > 1],
        lambda there, here: there[here.long()],
        lambda there, here: there.new_tensor([1.0]),
        lambda there, here: here.to(there.device),
        lambda there, here: torch.tensor([1.0], device=there.device),
        lambda there, here: here.copy_(there),
        lambda there, here: there.repeat_interleave(there.long()),
    ]
    none: list[Act] = [
        lambda there, here: there * 2 + there.sum(),
        lambda there, here: there[there.long()],
        lambda there, here: here.to(there.device, non_blocking=True),
        lambda there, here: torch.zeros(3, device=there.device),
        lambda there, here: there.topk(2).values,
        lambda there, here: there.masked_fill(there > 1, 0),
        lambda there, here: here.tolist(),
    ]
    for acts, counted in ((waits, True), (none, False)):
        for number, act in enumerate(acts):
            with PretendedDevice() as device:
                there = torch.arange(3.0, device=DEVICE)
                device.waits.clear()
                act(there, torch.arange(3.0))
                assert bool(device.waits) is counted, number
