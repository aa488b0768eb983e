"""Pieces of an evaluation: what one process can measure without knowing what the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

HELDOUT = "held-out text"

Piece = tuple[str, int, int]
"""What is measured, and on which of how many shares of its text (0 of 1: on all of it)."""


@dataclass(frozen=True)
class Found:
    """What was found for one piece."""

    piece: Piece
    value: Any
    seconds: float


class Evaluation(Protocol):
    """Something that is measured in pieces."""

    def find(self, piece: Piece) -> Found: ...

    def write(self, found: Sequence[Found]) -> str:
        """Write what was found for all pieces, in their order; returns it in brief."""
        ...


def shares_of_text(shares: int) -> list[Piece]:
    """The held-out text in so many shares."""
    return [(HELDOUT, share, shares) for share in range(shares)]
