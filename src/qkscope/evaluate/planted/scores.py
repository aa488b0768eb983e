"""Scores against the truth: are the features found, and are the pairs the true ones.

All is measured on held-out tokens.

- *Cosine of two features*: of their activations over tokens, ⟨a, b⟩/(‖a‖‖b‖). It asks whether they fire together and as
  strongly, which is what being the same feature means, and needs no common scale. The bias is a true feature too, the
  constant 1, so a learned feature that is always on is the bias.
- *Feature match*: the largest cosine of any learned feature, averaged over the true features that take part in a pair
  (BOS among the keys; not the bias), a side at a time. `match_rows` is the same with weights: the cosine of decoder
  rows with what a unit of the true feature adds to the layer's queries or keys, interference included.
- *Identity*: a learned feature is the true feature (of all, irrelevant ones among them) that it has the largest cosine
  with, if that is at least `SAME`; otherwise it is no feature. A learned bias is the bias.
- *Pairs*: learned pairs that name the same (query, key, head) of the truth are one prediction; every pair with a
  feature that is none is a prediction of its own, and wrong. Importance is a variance of scores, and copies of a
  feature fire together, so a prediction is worth (Σ ±√importance)², the sign that of the pair's strength: copies that
  cancel each other say nothing. Of the predictions the n worth most are taken, n the number of true pairs: precision is
  the share of them that is true, recall the share of the true pairs among them. Splitting a feature thus costs nothing
  by itself and gains nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ...dictionary import SparseTranscoder
from ...pairs.pair_map import Pairs
from ..stability import SAME, Overlap
from .world import Planted


def identities(overlap: Overlap) -> Tensor:
    """The true feature that each learned one is, -1: none; the learned bias stands behind them and is the true one."""
    if not overlap.products.shape[1]:
        return torch.tensor([len(overlap.one) - 1])
    best, index = overlap.cosines().max(0)
    return torch.cat([index.where(best >= SAME, -1), torch.tensor([len(overlap.one) - 1])])


def relevant(world: Planted, side: str) -> Tensor:
    """The true features of one side that take part in a pair, the bias left out."""
    index = (world.pairs.query_P if side == "query" else world.pairs.key_P).unique()
    return index[index <= world.bos]


def match_activations(world: Planted, side: str, overlap: Overlap) -> Tensor:
    """Largest cosine of any learned feature's activations, for each relevant true feature."""
    return _largest(overlap.cosines()[relevant(world, side)])


def match_rows(world: Planted, side: str, transcoder: SparseTranscoder, live_F: Tensor) -> Tensor:
    """Largest cosine of any live learned feature's decoder row with what each relevant true feature adds."""
    added = world.directions_FD[relevant(world, side)] @ (world.W_Q if side == "query" else world.W_K)
    learned = transcoder.W_dec.detach()[live_F]
    norms = added.norm(dim=1)[:, None] * learned.norm(dim=1)
    return _largest((added @ learned.T / norms.clamp(min=1e-12)).double())


def _largest(cosines: Tensor) -> Tensor:
    return cosines.max(1).values if cosines.shape[1] else cosines.new_zeros(len(cosines))


Triple = tuple[int, int, int]


def true_triples(world: Planted) -> set[Triple]:
    p = world.pairs
    return {(a, b, h) for a, b, h in zip(p.query_P.tolist(), p.key_P.tolist(), p.head_P.tolist(), strict=True)}


def predictions(pairs: Pairs, worth_P: Tensor, strength_P: Tensor, query_id: Tensor, key_id: Tensor) -> list[Triple]:
    """What the pairs say, worth most first: triples of true features and a head, -1 in place of what is no feature.

    `worth_P`: their importance in nats; of `strength_P` the sign counts.
    """
    worth: dict[tuple[Triple, int], float] = defaultdict(float)
    named = zip(
        query_id[pairs.query_P].tolist(), key_id[pairs.key_P].tolist(), pairs.head_P.tolist(),
        (worth_P.sqrt() * strength_P.sign()).tolist(),
        strict=True,
    )  # fmt: skip
    for number, (a, b, head, value) in enumerate(named):
        worth[(a, b, head), -1 if a >= 0 and b >= 0 else number] += value
    return [triple for triple, _ in sorted(worth, key=lambda name: -abs(worth[name]))]


def pair_scores(world: Planted, found: list[Triple]) -> dict[str, Any]:
    """Precision, recall and F1 of the n first predictions, n the number of true pairs; and the same head by head.

    `per_head` judges each head by itself: its n_h first predictions against its n_h true pairs.
    """
    truth = true_triples(world)
    heads = range(world.config.heads)
    per_head = [_score([t for t in found if t[2] == h], {t for t in truth if t[2] == h})["f1"] for h in heads]
    return {**_score(found, truth), "per_head": per_head}


def _score(found: list[Triple], truth: set[Triple]) -> dict[str, float]:
    taken = found[: len(truth)]
    right = sum(triple in truth for triple in taken)
    precision, recall = right / max(len(taken), 1), right / max(len(truth), 1)
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total else 0.0}
