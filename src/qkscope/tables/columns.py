"""Parquet columns from tensors."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from .firing import NO_TOKEN


def array(values: Tensor, kind: pa.DataType) -> pa.Array:
    return pa.array(values.cpu().numpy()).cast(kind, safe=False)


def lists(lengths_R: Tensor, values: pa.Array) -> pa.Array:
    """A list column from its flat values."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_R.cpu().cumsum(0)])
    return pa.ListArray.from_arrays(array(offsets, pa.int32()), values)


def token_lists(tokens_RW: Tensor, texts: dict[int, str]) -> pa.Array:
    """The texts of each row's tokens, those outside of the sequence left out."""
    inside_RW = tokens_RW != NO_TOKEN
    strings = pa.array([texts[token] for token in tokens_RW[inside_RW].tolist()], pa.string())
    return lists(inside_RW.sum(1), strings)
