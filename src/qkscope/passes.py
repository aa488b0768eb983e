"""Which layers and variants share a pass over the text: as many as fit in memory, decided once.

The plan stands in passes.json from before the first pass until the run has ended. A layer's last bits depend on which
others are read beside it, so a run that goes on keeps to its plan, however much memory is free by then. And what a
layer's folder holds before its pass is done is not what the pass ends with, be there a checkpoint or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import UserError
from .files import write_json
from .memory import Need, Part

FILE = "passes.json"
SAID = 2e9  # bytes of training beside the model from which on a person is told


def that_fit(parts: Sequence[Part], need: Need, free: int, say: Callable[[str], None]) -> list[list[Part]]:
    """The parts in passes that fit in `free` bytes; what they take is said where it is much."""
    passes, bytes_ = need.passes(parts, free), need.of(parts)
    if len(passes) > 1 or bytes_ > SAID:
        said = f"training takes about {bytes_ / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free"
        counts = ", ".join(str(len(one)) for one in passes)
        several = f": {len(passes)} passes over the text, of {counts} pairs of dictionaries"
        say(said + (several if len(passes) > 1 else ""))
    return passes


@dataclass
class Passes:
    """The plan, and how far it is."""

    passes: list[list[Part]]
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each phase, in the passes that are done."""

    @classmethod
    def read(cls, out: Path) -> Passes | None:
        """The plan that stands in a run's folder; `UserError` for one that is damaged."""
        path = out / FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            passes = [[(int(layer), str(name)) for layer, name in one] for one in values["passes"]]
            return cls(passes, values["done"], values["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; remove it and checkpoint.safetensors to begin the run anew") from None

    def write(self, out: Path) -> None:
        write_json(out / FILE, asdict(self))
