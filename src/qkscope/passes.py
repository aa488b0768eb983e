"""Which layers and variants share a pass over the text, decided once: as many as fit in memory.

Several processes that each take passes of their own have more of them, each with fewer.

The plan stands in passes.json from before the first pass until the run has ended, and beside it, for each pass that is
done, what it took. A layer's last bits depend on which others are read beside it, so a run that goes on keeps to its
plan, however much memory is free by then and however many processes there are. And what a layer's folder holds before
its pass is done is not what the pass ends with, be there a checkpoint or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .files import write_json
from .memory import Need, Part

FILE = "passes.json"
NOTE, CHECKPOINT = r"pass_(\d+)\.json", r"checkpoint(?:_(\d+))?\.safetensors"
SAID = 2e9  # bytes of training beside the model from which on a person is told


def planned(parts: Sequence[Part], need: Need, free: int, most: int, say: Callable[[str], None]) -> list[list[Part]]:
    """The parts in passes of `most` at the most that fit in `free` bytes; what they take is said where it is much."""
    passes = need.passes(parts, free, most)
    wanted = in_groups(parts, most)
    bytes_, short = max(map(need.of, wanted)), len(passes) > len(wanted)
    if short or bytes_ > SAID:
        said = f"training takes about {bytes_ / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free"
        counts = ", ".join(str(len(one)) for one in passes)
        say(said + (f": {len(passes)} passes over the text, of {counts} pairs of dictionaries" if short else ""))
    return passes


def in_groups(parts: Sequence[Part], most: int) -> list[list[Part]]:
    """Neighbours together, so many at the most."""
    return [list(parts[at : at + most]) for at in range(0, len(parts), most)]


@dataclass
class Passes:
    """The plan, and how far it is."""

    passes: list[list[Part]]
    done: dict[int, dict[str, float]]
    """By the number of each pass that is done, the seconds of its phases."""

    @property
    def left(self) -> list[int]:
        """Passes that are not done."""
        return [number for number in range(len(self.passes)) if number not in self.done]

    @property
    def seconds(self) -> dict[Part, dict[str, float]]:
        """Of each part whose pass is done, those of the pass."""
        return {part: seconds for number, seconds in self.done.items() for part in self.passes[number]}

    @classmethod
    def read(cls, out: Path) -> Passes | None:
        """The plan that stands in a run's folder, and what is done of it; `UserError` for one that is damaged."""
        path = out / FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            passes = [[(int(layer), str(name)) for layer, name in one] for one in values["passes"]]
            notes = _files(out, NOTE).items()
            done = {number: json.loads(note.read_text(encoding="utf-8")) for number, note in notes}
            if not done.keys() <= set(range(len(passes))):
                raise ValueError
            return cls(passes, done)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; remove it and all checkpoints to begin the run anew") from None

    def write(self, out: Path) -> None:
        """The plan alone."""
        write_json(out / FILE, {"passes": self.passes})

    def undo(self, out: Path, number: int) -> None:
        """A file of this pass was lost."""
        _note_of(out, number).unlink()
        del self.done[number]


def note_done(out: Path, number: int, seconds: dict[str, float]) -> None:
    """Say of one pass that it is done, beside the plan: several processes may do so."""
    write_json(_note_of(out, number), seconds)
    checkpoint_of(out, number).unlink(missing_ok=True)


def forget(out: Path) -> None:
    """Remove what was noted of a plan that is there no more."""
    if not (out / FILE).exists():
        for note in _files(out, NOTE).values():
            note.unlink()


def _note_of(out: Path, number: int) -> Path:
    return out / f"pass_{number}.json"


def checkpoint_of(out: Path, number: int) -> Path:
    """Where a pass keeps how far it is."""
    return out / (f"checkpoint_{number}.safetensors" if number else "checkpoint.safetensors")


def checkpoints(out: Path) -> list[Path]:
    """Those that are there."""
    return list(_files(out, CHECKPOINT).values())


def _files(out: Path, name: str) -> dict[int, Path]:
    """Files of passes so named (a pattern), by the pass's number."""
    found = ((re.fullmatch(name, path.name), path) for path in sorted(out.glob("*")))
    return {int(match[1] or 0): path for match, path in found if match}
