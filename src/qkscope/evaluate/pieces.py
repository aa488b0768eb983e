"""Pieces of an evaluation: what one process can measure without knowing what the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import torch

from .. import parallel
from ..tables.best import Best
from ..tables.examples import Examples
from ..tables.feature_examples import FeatureExamples
from ..tables.pair_examples import PairExamples
from ..tables.token_counts import TokenCounts
from .figures import Ratio
from .measure import Activity, Sums
from .patched import PatchedScore
from .patterns import KLScore, PatternScore, PatternScores

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


# What a process may send: plain values, tensors and these.
SENT = [
    Found, Sums, Activity, Ratio, PatchedScore, KLScore, PatternScore, PatternScores,
    Examples, FeatureExamples, PairExamples, TokenCounts, Best,
]  # fmt: skip


def handed_over(found: Sequence[Found], to: int) -> list[Found]:
    """What all processes have found, in process `to`, in the order of pieces, tensors in main memory; else nothing."""
    return sorted((one for data in parallel.handed(packed(found), to) for one in unpacked(data)), key=lambda f: f.piece)


def packed(found: Sequence[Found]) -> bytes:
    """As bytes, which `unpacked` reads."""
    written = BytesIO()
    torch.save(list(found), written)
    return written.getvalue()


def unpacked(data: bytes) -> list[Found]:
    """What was packed, tensors in main memory; nothing but `SENT` is made, whatever the bytes say."""
    with torch.serialization.safe_globals(SENT):
        return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
