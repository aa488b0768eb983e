"""Which layers and variants share a pass over the text, decided once: as many as fit in memory.

Several processes that each take passes of their own have more of them, each with fewer.

The plan stands in passes.json from before the first pass until the run has ended. A layer's last bits depend on which
others are read beside it, so a run that goes on keeps to its plan, however much memory is free by then and however many
processes there are. And what a layer's folder holds before its pass is done is not what the pass ends with, be there a
checkpoint or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
    wanted = [parts[at : at + most] for at in range(0, len(parts), most)]
    bytes_, short = max(map(need.of, wanted)), len(passes) > len(wanted)
    if short or bytes_ > SAID:
        said = f"training takes about {bytes_ / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free"
        counts = ", ".join(str(len(one)) for one in passes)
        say(said + (f": {len(passes)} passes over the text, of {counts} pairs of dictionaries" if short else ""))
    return passes


@dataclass
class Passes:
    """The plan, and how far it is."""

    passes: list[list[Part]]
    seconds: list[dict[str, float] | None]
    """Of each phase of each pass; None for a pass that is not done."""

    @property
    def left(self) -> list[int]:
        """Passes that are not done."""
        return [n for n, seconds in enumerate(self.seconds) if seconds is None]

    @property
    def seconds_of(self) -> dict[Part, dict[str, float]]:
        """Of each part, those of the pass that it shared with others."""
        return {part: seconds or {} for parts, seconds in zip(self.passes, self.seconds, strict=True) for part in parts}

    @classmethod
    def read(cls, out: Path) -> Passes | None:
        """The plan that stands in a run's folder, and what was noted since; `UserError` for one that is damaged."""
        path, notes = out / FILE, _files(out, NOTE)
        if not path.exists():
            for note in notes.values():  # of a plan that is gone
                note.unlink()
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            passes = [[(int(layer), str(name)) for layer, name in one] for one in values["passes"]]
            seconds = [None if one is None else dict(one) for one in values["seconds"]]
            for number, note in notes.items():
                seconds[number] = json.loads(note.read_text(encoding="utf-8"))
            if len(seconds) != len(passes):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} is damaged; remove it and all checkpoints to begin the run anew") from None
        return cls(passes, seconds)

    def write(self, out: Path) -> None:
        """What was noted is in it by now."""
        write_json(out / FILE, asdict(self))
        for note in _files(out, NOTE).values():
            note.unlink()


def note_done(out: Path, number: int, seconds: dict[str, float]) -> None:
    """Where several processes write in the folder, each says of its own passes when they are done."""
    write_json(out / f"pass_{number}.json", seconds)
    checkpoint_of(out, number).unlink(missing_ok=True)


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
