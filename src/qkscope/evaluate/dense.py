"""What the dense features are for: features that fire on more than a tenth of the tokens, beside all others.

Told of them is how much of the pairs' importance is theirs, of how many the position alone explains most of the
activation, and what share of their importance is paired with features of the other side that fire on the first token of
a sequence, or with that side's bias. A dense query feature with much of that says "attend to the first token".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ..decomposition import SIDES
from .measure import DENSE

MOSTLY = 0.5  # share of a feature's activation, or of its variance, from which on it is "mostly" that


def dense_features(features: pa.Table, pairs: pa.Table, tokens: int, sequences: int) -> dict[str, dict[str, Any]]:
    """Of each side's dense and other live features: how many, how many mostly follow position, shares of importance.

    Args:
        features, pairs: an artefact's features.parquet and pairs.parquet.
        tokens, sequences: that the features' statistics are of.

    `importance` is a share of all pairs' importance. `first` and `bias` are shares of it: paired with features of the
    other side that fire mostly on the first token of a sequence, and with its bias; None without importance.
    """
    worth = pairs["importance"].to_numpy()
    whole = max(float(worth.sum()), 1e-30)
    sides = np.array(features["side"].to_pylist())
    rows = {side: features.filter(pa.array(sides == side)) for side in SIDES}
    out: dict[str, dict[str, Any]] = {}
    for side, other in (SIDES, SIDES[::-1]):
        own, partner = (pairs[f"{name}_feature"].to_numpy() for name in (side, other))
        at_first = first_share(rows[other], tokens, sequences) > MOSTLY
        to_first = np.append(at_first, False)[partner]  # -1: the bias
        density, live = rows[side]["density"].to_numpy(), rows[side]["live"].to_numpy(zero_copy_only=False)
        positional = rows[side]["by_position"].to_numpy() > MOSTLY
        out[side] = {}
        for name, these in (("dense", density > DENSE), ("others", live & (density <= DENSE))):
            ours = np.append(these, False)[own]
            mine = float(worth[ours].sum())
            shares = {"first": to_first, "bias": partner < 0}
            out[side][name] = {
                "count": int(these.sum()),
                "positional": int((these & positional).sum()),
                "importance": mine / whole,
                **{key: float(worth[ours & to].sum()) / mine if mine > 0 else None for key, to in shares.items()},
            }
    return out


def first_share(rows: pa.Table, tokens: int, sequences: int) -> np.ndarray:
    """Share of each feature's activation that falls on the first token of a sequence, [F]; 0 where it never fired."""
    profile_FR = rows["positions"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    fired = rows["density"].to_numpy() * rows["mean_activation"].to_numpy() * tokens
    return profile_FR[:, 0] * sequences / np.maximum(fired, 1e-30)
