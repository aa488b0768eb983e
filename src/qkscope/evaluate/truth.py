"""Does what was found agree with what is known? Scores on the embedded corpus, whose tokens have known roles.

- Every live feature gets the label (labels.py) that it predicts best, with precision, recall and F1. The label, and the
  share of its largest activation from which the feature counts as on, are chosen on one half of the held-out sequences;
  all figures are those of the other half: the best of thousands of labels flatters any feature where it is chosen.
- Every kept pair gets the part of its importance that runs from tokens with the query feature's label to tokens with
  the key feature's (`matching`), and the part that runs along a link (`linked`): to what the query's token, or the one
  after it, answers to. Right labels match whichever features are paired; links know who belongs to whom.

Controls (random directions, singular vectors of the model's own product, the residual basis, shuffled pairs) are scored
alike. What each head does is in heads.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionInputs
from ..decomposition import SIDES, Decomposition
from ..dictionary import SparseTranscoder
from ..pairs.importance import Seen, rank_pairs, see
from ..pairs.pair_map import Pairs, rows, turn, turned_rows, weight_strength
from .controls import residual_basis, shuffled_pairs, untrained
from .labels import Labelled, StoryLabels

Text = list[tuple[AttentionInputs, Labelled]]

# A feature is on above one of these shares of its largest activation on training text.
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
GOOD = 0.8  # F1 from which a feature counts as named
PAIR_TOKENS = 8192  # held-out tokens over which pairs are followed from query to key
RANK_BATCHES = 4  # of training text behind the ranking of the controls' pairs
ROW_ELEMENTS = 1 << 19  # elements of one block of [rows, keys] with a rotary embedding: 2 MB, near the cache


@dataclass
class FeatureLabels:
    """The best label of each feature of one side."""

    label_F: Tensor
    """int64, index into `StoryLabels.names`; -1: the feature never fired on the half it was chosen on."""
    level_F: Tensor
    """Activation above which the feature counts as on."""
    precision_F: Tensor
    recall_F: Tensor
    f1_F: Tensor

    @property
    def known(self) -> Tensor:
        return self.label_F >= 0

    def summary(self) -> dict[str, Any]:
        """Mean and median F1 over the live features, and the share of them that are named."""
        f1 = self.f1_F[self.known]
        if not len(f1):
            return {"live": 0, "f1_mean": None, "f1_median": None, "named": None}
        return {
            "live": len(f1),
            "f1_mean": float(f1.mean()),
            "f1_median": float(f1.median()),
            "named": float((f1 >= GOOD).double().mean()),
        }


class Counts:
    """How often each feature is on, each label holds, and both, at each level; for two halves of the sequences."""

    def __init__(self, top_F: Tensor, labels: StoryLabels, n_roles: int) -> None:
        self.thresholds_LF = top_F * torch.tensor(LEVELS, device=top_F.device)[:, None]
        shape = 2, len(LEVELS), len(top_F)
        self.on = torch.zeros(*shape, device=top_F.device)
        self.roles = torch.zeros(*shape, n_roles, device=top_F.device)
        self.words = torch.zeros(2, len(LEVELS), 2 * labels.n_words, len(top_F), device=top_F.device)
        self.label_roles = torch.zeros(2, n_roles, device=top_F.device)
        self.label_words = torch.zeros(2, 2 * labels.n_words, device=top_F.device)
        self.n_words = labels.n_words

    def add(self, acts_BTF: Tensor, labelled: Labelled, real_BT: Tensor, first: int) -> None:
        """Count one batch; `first` is the running number of its first sequence."""
        for half in (0, 1):
            rows_B = (torch.arange(len(real_BT), device=real_BT.device) + first) % 2 == half
            real = real_BT & rows_B[:, None]
            acts, roles = acts_BTF[real], labelled.roles_BTR[real].float()
            words = labelled.word_BT[real], labelled.word_before_BT[real] + self.n_words
            self.label_roles[half] += roles.sum(0)
            for index in words:
                self.label_words[half] += torch.bincount(index, minlength=2 * self.n_words)
            for level, threshold_F in enumerate(self.thresholds_LF):
                on = (acts > threshold_F).float()
                self.on[half, level] += on.sum(0)
                self.roles[half, level] += on.T @ roles
                for index in words:
                    self.words[half, level].index_add_(0, index, on)

    def best(self) -> FeatureLabels:
        """Chosen on the first half, scored on the second."""
        both = torch.cat([self.roles, self.words.transpose(2, 3)], -1)  # [half, level, F, label]
        labels = torch.cat([self.label_roles, self.label_words], -1)
        f1 = 2 * both[0] / (self.on[0][..., None] + labels[0]).clamp(min=1)
        n_labels = f1.shape[-1]
        best = f1.transpose(0, 1).flatten(1).max(1)
        level, label = best.indices // n_labels, best.indices % n_labels
        place = torch.arange(len(level), device=level.device)
        hits, on, holds = both[1, level, place, label], self.on[1, level, place], labels[1, label]
        return FeatureLabels(
            torch.where(best.values > 0, label, -1),
            self.thresholds_LF[level, place],
            hits / on.clamp(min=1),
            hits / holds.clamp(min=1),
            2 * hits / (on + holds).clamp(min=1),
        )


@torch.no_grad()
def label_features(
    transcoder: SparseTranscoder,
    sample: list[AttentionInputs],
    heldout: Text,
    labels: StoryLabels,
) -> FeatureLabels:
    """The best label of each feature of one dictionary."""
    top_F = torch.stack([transcoder.encode(i.x_BTD[i.real_BT].float()).amax(0) for i in sample]).amax(0)
    counts: Counts | None = None
    first = 0
    for inputs, labelled in heldout:
        counts = counts or Counts(top_F, labels, labelled.roles_BTR.shape[-1])
        counts.add(transcoder.encode(inputs.x_BTD.float()), labelled, inputs.real_BT, first)
        first += len(inputs.real_BT)
    assert counts is not None
    return counts.best()


def holds(found: FeatureLabels, labelled: Labelled, n_words: int) -> Tensor:
    """Where each feature's label holds, bool [B, T, F + 1]; always for the bias behind them."""
    n_roles = labelled.roles_BTR.shape[-1]
    label = found.label_F
    roles = labelled.roles_BTR[..., label.clamp(0, n_roles - 1)] & (label >= 0) & (label < n_roles)
    word = label - n_roles
    here = labelled.word_BT[..., None] == word
    before = labelled.word_before_BT[..., None] == word - n_words
    # Whatever holds at a padded position, nothing fires there.
    always = torch.ones_like(here[..., :1])
    return torch.cat([roles | here | before, always], -1)


@dataclass
class PairScores:
    """What each pair is worth on held-out text, and along what it runs; nats a query row."""

    pairs: Pairs
    importance_P: Tensor
    matching_P: Tensor
    """The part of it between tokens with the two features' labels."""
    linked_P: Tensor
    """The part of it along links."""


@torch.no_grad()
def score_pairs(
    dec: Decomposition,
    pairs: Pairs,
    strength_P: Tensor,
    found: dict[str, FeatureLabels],
    heldout: Text,
    labels: StoryLabels,
) -> PairScores:
    """Importance of each pair, and its parts between labels and along links, on the sequences labels are scored on.

    Importance is ½ Σ_ij P_ij δ_ij (δ_ij - mean_i), split by (i, j): what does not fire has no part in it. (The same sum
    as ½ Σ_ij P_ij (δ_ij - mean_i)², which would give the most to the keys that are *not* attended to where the attended
    one holds nearly all of the row.) A key at which a pair fires, but less than its row's mean, has a negative part.
    Soft caps are left out of it.
    """
    total, matched, linked = (torch.zeros(len(pairs), device=strength_P.device) for _ in range(3))
    count = first = 0
    for inputs, labelled in heldout:
        if count >= PAIR_TOKENS:
            break
        item = see(inputs, dec.query, dec.key)
        scored = [b for b in range(len(inputs.real_BT)) if (first + b) % 2]
        first += len(inputs.real_BT)
        count += int(inputs.real_BT[scored].sum())
        q_holds, k_holds = (holds(found[side], labelled, labels.n_words) for side in SIDES)
        links_BQK = linked_edges(labelled.link_BT)
        for head in range(pairs.n_heads):
            pattern = item.weights(head)[0]
            in_head = torch.arange(*pairs.of_head(head).indices(len(pairs))[:2], device=strength_P.device)
            for b in scored:
                fires = (item.acts_q_BTF[b] > 0).any(0)[pairs.query_P[in_head]]
                fires &= (item.acts_k_BTF[b] > 0).any(0)[pairs.key_P[in_head]]
                here = in_head[fires]
                text = pattern[b], q_holds[b], k_holds[b], links_BQK[b]
                if inputs.rule.rotary is None:
                    parts = _plain(pairs, strength_P, item, head, b, here, *text)
                else:
                    parts = _rotary(dec, pairs, strength_P, item, head, b, here, *text)
                for sums, part in zip((total, matched, linked), parts, strict=True):
                    sums[here] += part
    return PairScores(pairs, *(sums / (2 * max(count, 1)) for sums in (total, matched, linked)))


def linked_edges(link_BT: Tensor) -> Tensor:
    """Bool [B, Q, K]: key j is what query i, or the token after it, answers to."""
    following_BT = torch.cat([link_BT[:, 1:], torch.full_like(link_BT[:, :1], -1)], 1)
    j = torch.arange(link_BT.shape[1], device=link_BT.device)
    return (link_BT[..., None] == j) | (following_BT[..., None] == j)


def _plain(
    pairs: Pairs, strength_P: Tensor, item: Seen, head: int, b: int, here: Tensor,
    pattern_QK: Tensor, q_holds_TF: Tensor, k_holds_TF: Tensor, links_QK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Σ_ij P_ij δ_ij (δ_ij - mean_i) of pairs of one head in one sequence, δ = s a_q a_k: whole, between labels, along
    links."""
    used, column = pairs.key_P[here].unique(return_inverse=True)
    a_k, holds_k = item.acts_k_BTF[b][:, used], k_holds_TF[:, used]
    mean_QK = pattern_QK @ a_k

    def part(pattern_QK: Tensor, a_KF: Tensor) -> Tensor:
        return (pattern_QK @ a_KF.square() - mean_QK * (pattern_QK @ a_KF))[:, column]

    scale = (strength_P[here] * item.inputs.rule.scaling).square()
    squares = item.acts_q_BTF[b][:, pairs.query_P[here]].square()
    labelled = squares * q_holds_TF[:, pairs.query_P[here]]
    return (
        scale * (squares * part(pattern_QK, a_k)).sum(0),
        scale * (labelled * part(pattern_QK, a_k * holds_k)).sum(0),
        scale * (squares * part(pattern_QK * links_QK, a_k)).sum(0),
    )


def _rotary(
    dec: Decomposition, pairs: Pairs, strength_P: Tensor, item: Seen, head: int, b: int, here: Tensor,
    pattern_QK: Tensor, q_holds_TF: Tensor, k_holds_TF: Tensor, links_QK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with a rotary embedding, where δ has each pair's own M(i-j): row by row of the queries that fire."""
    rule, length = item.inputs.rule, len(pattern_QK)
    assert rule.rotary is not None
    order, phase = rule.rotary.phases()
    phase_Th = phase[b if len(phase) > 1 else 0, :length]
    rows_q, rows_k = rows(dec.query, dec.shape.N)[:, head], rows(dec.key, dec.shape.G)
    rows_q, rows_k = rows_q[:, order], rows_k[:, head * dec.shape.G // dec.shape.N, order]
    acts_QF, acts_FK = item.acts_q_BTF[b], item.acts_k_BTF[b].T
    sums = strength_P.new_zeros(3, len(here))
    by_key = pairs.key_P[here].argsort(stable=True)  # a product serves all rows that meet the same keys
    n_rows = (acts_QF > 0).sum(0)[pairs.query_P[here[by_key]]]
    n_rows[1:] += rows_k.shape[1] * (pairs.key_P[here[by_key]].diff() != 0)  # what a key itself takes
    blocks = (n_rows.cumsum(0) // max(ROW_ELEMENTS // length, 1)).unique_consecutive(return_counts=True)[1]
    for place_p in by_key.split(blocks.tolist()):
        query_p, key_p = pairs.query_P[here[place_p]], pairs.key_P[here[place_p]]
        pair_R, at_R = (acts_QF[:, query_p].T > 0).nonzero(as_tuple=True)
        query_R, strength_p = query_p[pair_R], strength_P[here[place_p]] * rule.scaling
        left_RH = turned_rows(rows_q, query_R, acts_QF[at_R, query_R] * strength_p[pair_R], phase_Th[at_R])
        used_f, column_p = key_p.unique_consecutive(return_inverse=True)
        right_fKH = turn((rows_k[used_f, None] * acts_FK[used_f, :, None])[:, :, None], phase_Th[None])[:, :, 0]
        column_R = column_p[pair_R]
        of_key = left_RH.split(torch.bincount(column_R, minlength=len(used_f)).tolist())
        delta = torch.cat([left @ right.T for left, right in zip(of_key, right_fKH, strict=True)])
        weighted = pattern_QK[at_R] * delta
        worth = delta.sub_(weighted.sum(-1, keepdim=True)).mul_(weighted)
        matched_R = (worth * k_holds_TF.T[used_f][column_R]).sum(-1) * q_holds_TF[at_R, query_R]
        parts = torch.stack([worth.sum(-1), matched_R, (worth * links_QK[at_R]).sum(-1)])
        sums.index_add_(1, place_p[pair_R], parts)
    whole, matched, linked = sums
    return whole, matched, linked


@torch.no_grad()
def truth_scores(
    dec: Decomposition,
    sample: list[AttentionInputs],
    heldout: Text,
    labels: StoryLabels,
    l0: dict[str, float],
    *,
    with_controls: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of a decomposition and its controls (for the report), and the label of each feature and pair.

    `sample` is training text, `l0` the active features a side that controls get.
    """
    found, pairs = _scored(dec, dec.pairs, dec.strength_P, sample, heldout, labels)
    summary: dict[str, Any] = {"decomposition": _summary(found, pairs)}
    if with_controls:
        summary |= _controls(dec, sample, heldout, labels, l0, found)
    return summary, {"features": {s: _feature_rows(found[s], labels.names) for s in SIDES}, "pairs": _pair_rows(pairs)}


def _controls(
    dec: Decomposition,
    sample: list[AttentionInputs],
    heldout: Text,
    labels: StoryLabels,
    l0: dict[str, float],
    found: dict[str, FeatureLabels],
) -> dict[str, Any]:
    """The same scores of shuffled pairs, random and SVD directions, and the residual basis."""
    _, mixed = _scored(dec, *shuffled_pairs(dec), sample, heldout, labels, found)
    summary: dict[str, Any] = {"shuffled": {"pairs": _summary(found, mixed)["pairs"]}}
    controls = {**untrained(dec, sample, l0), "residual": residual_basis(dec, sample, l0)}
    for name, control in controls.items():
        ranked, _ = rank_pairs(sample[:RANK_BATCHES], control.query, control.key, len(dec.pairs))
        weights = weight_strength(ranked, rows(control.query, dec.shape.N), rows(control.key, dec.shape.G))
        strength = torch.ones_like(weights) if dec.shape.rotary else weights
        summary[name] = _summary(*_scored(control, ranked, strength, sample, heldout, labels))
    return summary


def _scored(
    dec: Decomposition,
    pairs: Pairs,
    strength_P: Tensor,
    sample: list[AttentionInputs],
    heldout: Text,
    labels: StoryLabels,
    found: dict[str, FeatureLabels] | None = None,
) -> tuple[dict[str, FeatureLabels], PairScores]:
    found = found or {s: label_features(getattr(dec, s), sample, heldout, labels) for s in SIDES}
    return found, score_pairs(dec, pairs, strength_P, found, heldout, labels)


def _summary(found: dict[str, FeatureLabels], scores: PairScores) -> dict[str, Any]:
    """Of features: as `FeatureLabels.summary`, and F1 weighted by what their pairs matter. Of pairs: shares of their
    importance between labels, along links, and in pairs with most of theirs along links; those with a bias are left
    out, half of what they say is always true."""
    pairs, worth = scores.pairs, scores.importance_P.double()
    out: dict[str, Any] = {}
    for side, feature_P, width in (("query", pairs.query_P, pairs.n_query), ("key", pairs.key_P, pairs.n_key)):
        by_feature = torch.zeros(width + 1, dtype=torch.float64, device=worth.device).index_add(0, feature_P, worth)
        weights = by_feature[:-1]
        weighted = float((weights * found[side].f1_F).sum() / weights.sum().clamp(min=1e-30))
        out[side] = {**found[side].summary(), "f1_by_importance": weighted}
    two = (pairs.query_P < pairs.n_query) & (pairs.key_P < pairs.n_key)
    total = worth[two].sum().clamp(min=1e-30)
    mostly = two & (scores.linked_P > 0.5 * scores.importance_P)
    out["pairs"] = {
        "kept": len(pairs),
        "matching": float(scores.matching_P[two].sum() / total),
        "linked": float(scores.linked_P[two].sum() / total),
        "mostly_linked": float(worth[mostly].sum() / total),
    }
    return out


def _feature_rows(found: FeatureLabels, names: list[str]) -> list[dict[str, Any] | None]:
    """For each feature its label and figures; null for one that never fired."""
    columns = (found.label_F, found.level_F, found.precision_F, found.recall_F, found.f1_F)
    return [
        {"label": names[label], "level": level, "precision": precision, "recall": recall, "f1": f1}
        if label >= 0
        else None
        for label, level, precision, recall, f1 in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _pair_rows(scores: PairScores) -> list[dict[str, Any]]:
    """Pairs, the most important on held-out text first; the bias is -1."""
    pairs = scores.pairs
    order = scores.importance_P.argsort(descending=True)
    query = pairs.query_P.where(pairs.query_P < pairs.n_query, -1)[order].tolist()
    key = pairs.key_P.where(pairs.key_P < pairs.n_key, -1)[order].tolist()
    rest = (c[order].tolist() for c in (pairs.head_P, scores.importance_P, scores.matching_P, scores.linked_P))
    names = ("query_feature", "key_feature", "head", "importance", "matching", "linked")
    return [dict(zip(names, row, strict=True)) for row in zip(query, key, *rest, strict=True)]
