"""pair_distance.parquet: kept pairs by distance, on the same few distances for all, for who has no model at hand.

A row for each of the `MOST_PAIRS` most important pairs, fewer where fewer are kept, by head, query and key feature:

    query_feature, key_feature, head    as in pairs.parquet
    mean, low, high                     of M(i-j) within each bin of distances (distance.py), float32
    use                                 share of the bin in the pair's use: where both features are active, weighted by
                                        the squares of their activations; 0 everywhere for a pair that is never active
    average                             M averaged over that use: how strong the pair is where it occurs
    position                            share of its score's mean square that distance explains; null if never active

The first distances are bins of their own, later ones quarters of an octave; the file's metadata has `distances`, where
each bin starts and the last one ends. A bin has its extremes, not only its mean, since a rotation can turn several
times within one. Only layers whose rotary embedding depends on the distance alone have the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..decomposition import Decomposition
from ..errors import UserError
from ..files import write_atomic
from ..pattern import AttentionInputs
from .columns import array, lists
from .distance import DistanceProfiles, distance_profiles

NAME = "pair_distance.parquet"
MOST_PAIRS = 20_000  # about 300 bytes each
BLOCK_ELEMENTS = 1 << 22  # of [pairs, distances] in float64, of which a few are held at a time
STORED: dict[str, Any] = {"row_group_size": 1 << 12, "use_dictionary": False, "compression": "zstd"}  # 0.6 of the size
OCTAVE = 4  # bins


def write_distances(dec: Decomposition, text: Sequence[AttentionInputs], folder: Path) -> None:
    """Write the table of a layer over a text, or remove an earlier one where the layer can have none."""
    (folder / NAME).unlink(missing_ok=True)
    if not dec.shape.rotary or not len(dec.pairs):
        return
    try:
        table = distance_table(dec, text)
    except UserError:  # keys behind the query, or a rotation by more than the distance
        return
    write_atomic(folder / NAME, lambda path: pq.write_table(table, path, **STORED))


def distance_table(dec: Decomposition, text: Sequence[AttentionInputs]) -> pa.Table:
    """The table; `UserError` where `distance_profiles` refuses the layer."""
    length = max(inputs.real_BT.shape[1] for inputs in text)
    starts = bins(length)
    wanted = dec.importance_P.detach().argsort(descending=True, stable=True)[:MOST_PAIRS].sort().values
    parts = []
    for index in wanted.split(max(BLOCK_ELEMENTS // length, 1)):
        part = replace(
            dec,
            pairs=dec.pairs.take(index),
            strength_P=dec.strength_P[index],
            weight_strength_P=dec.weight_strength_P[index],
            importance_P=dec.importance_P[index],
        )
        parts.append(_table(part, distance_profiles(part, text), starts))
    return pa.concat_tables(parts).replace_schema_metadata({"distances": json.dumps([*starts, length])})


def bins(length: int) -> list[int]:
    """Where each bin of the distances 0 … length - 1 starts."""

    def every() -> Iterator[int]:
        yield 0
        step = 0
        while (start := round(2 ** (step / OCTAVE))) < length:
            yield start
            step += 1

    return list(dict.fromkeys(every()))


def binned(values_PT: Tensor, starts: Sequence[int], how: str) -> Tensor:
    """Each bin's "mean", "amin", "amax" or "sum", [P, bins]."""
    lengths = torch.tensor([*starts, values_PT.shape[1]]).diff()
    bin_T = torch.arange(len(starts)).repeat_interleave(lengths).expand_as(values_PT)
    out = torch.zeros(len(values_PT), len(starts), dtype=values_PT.dtype)
    return out.scatter_reduce(1, bin_T, values_PT, how, include_self=False)


def _table(dec: Decomposition, found: DistanceProfiles, starts: list[int]) -> pa.Table:
    p = dec.pairs
    columns = {
        "query_feature": array(p.query_P.where(p.query_P < p.n_query, -1), pa.int32()),
        "key_feature": array(p.key_P.where(p.key_P < p.n_key, -1), pa.int32()),
        "head": array(p.head_P, pa.int16()),
    }
    for name, values_PT, how in (
        ("mean", found.profile_PT, "mean"),
        ("low", found.profile_PT, "amin"),
        ("high", found.profile_PT, "amax"),
        ("use", found.use_PT, "sum"),
    ):
        width_P = torch.full((len(p),), len(starts))
        columns[name] = lists(width_P, array(binned(values_PT, starts, how).flatten(), pa.float32()))
    share_P = found.position_share_P
    columns["average"] = array((found.profile_PT * found.use_PT).sum(1), pa.float32())
    columns["position"] = pa.array(share_P.numpy(), pa.float32(), mask=share_P.isnan().numpy())
    return pa.table(columns)
