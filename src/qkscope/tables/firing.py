"""Where features fire in a batch, as sparse entries, and what names a place in the text.

What is notable:
- A batch's activations go by in blocks of features, so nothing beside them has their size; what comes out is as large
  as the number of active features.
- A place in the text has a hash of its own. Samples are drawn and ties are broken by it or by the sequence's number,
  never by the order of arrival: parts of a text that are gathered apart and merged give what one pass gives.

Shapes: B sequences, T positions, F features of a side (f of a block), E entries, W = 2·window + 1 tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.sequences import Batch

BLOCK_ELEMENTS = 1 << 22  # activations of one block of features: 16 MB in float32
NO_TOKEN = -1  # outside of the sequence
OFFSET_BITS = 31


@dataclass(frozen=True)
class Firing:
    """Every activation above zero at an unpadded token, by feature, then by token."""

    feature_E: Tensor
    """int64."""
    token_E: Tensor
    """int64: row · T + position in the row."""
    value_E: Tensor
    """float32."""

    @classmethod
    def cat(cls, parts: list[Firing]) -> Firing:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def blocks(acts_BTF: Tensor, real_BT: Tensor) -> Iterator[tuple[slice, Tensor, Firing]]:
    """A batch's features block by block: which, their activations (float32, zero at padding), and where they fire."""
    length, width = acts_BTF.shape[1:]
    step = max(BLOCK_ELEMENTS // max(real_BT.numel(), 1), 1)
    for start in range(0, width, step):
        here = slice(start, min(start + step, width))
        acts_BTf = acts_BTF[..., here].detach().float().masked_fill(~real_BT[..., None], 0)
        acts_fBT = acts_BTf.permute(2, 0, 1).contiguous()
        feature, row, at = (acts_fBT > 0).nonzero(as_tuple=True)
        yield here, acts_BTf, Firing(feature + start, row * length + at, acts_fBT[feature, row, at])


def sequence_numbers(batch: Batch) -> Tensor:
    """A number of its own for each sequence, int64 [B], that rises with the document and the offset in it."""
    return (batch.document_B << OFFSET_BITS) + batch.offset_B


def hashed(*parts: Tensor | int) -> Tensor:
    """A hash of some numbers, int64 (negative ones too): the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    h = torch.zeros((), dtype=torch.int64)
    for part in parts:
        h = h + part + _signed(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            h = (h ^ (h >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return h


def _signed(number: int) -> int:
    """The signed 64-bit integer with the same bits."""
    return number - (number >> 63 << 64)


def windows(batch: Batch, row_E: Tensor, at_E: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Places of the `window` tokens to either side, clamped into the row [E, W], and which of them are real."""
    length = batch.tokens_BT.shape[1]
    span_EW = at_E[:, None] + torch.arange(-window, window + 1, device=at_E.device)
    inside_EW = (span_EW >= 0) & (span_EW < length)
    span_EW = span_EW.clamp(0, length - 1)
    return span_EW, inside_EW & batch.real_BT[row_E[:, None], span_EW]


def window_tokens(batch: Batch, row_E: Tensor, at_E: Tensor, window: int) -> Tensor:
    """The tokens around each place, int32 [E, W]; NO_TOKEN outside of the sequence."""
    span_EW, inside_EW = windows(batch, row_E, at_E, window)
    return batch.tokens_BT[row_E[:, None], span_EW].int().masked_fill(~inside_EW, NO_TOKEN)
