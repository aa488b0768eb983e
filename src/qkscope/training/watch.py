"""What must be finite: flags on the device, read where the host waits anyway.

To look at a number on a GPU the host waits until all that was asked for is done, and the device then stands still until
it is asked for more. So flags are gathered and read together, at log steps and before a checkpoint is written. On a CPU
there is nothing to wait for, and each is read at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError


class Watch:
    """Flags that have not been read yet, and what to say of each that is set."""

    def __init__(self, device: torch.device) -> None:
        self.at_once = device.type == "cpu"
        self.noted: list[tuple[Tensor, Callable[[], str]]] = []

    def note(self, bad: Tensor, say: Callable[[], str]) -> None:
        """`bad`: a bool, on the device. `say` is called if it is set; what it holds stays in memory until then."""
        self.noted.append((bad, say))
        if self.at_once:
            self.read()

    def read(self) -> None:
        """Raise `UserError` of the first flag that is set; afterwards all was well so far."""
        noted, self.noted = self.noted, []
        if not noted:
            return
        for (_, say), bad in zip(noted, torch.stack([bad for bad, _ in noted]).tolist(), strict=True):
            if bad:
                raise UserError(say())
