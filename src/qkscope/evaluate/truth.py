"""Does what was found agree with what is known? Scores on the embedded corpus, whose tokens have known roles.

- Every live feature gets the label (labels.py) that it predicts best, with precision, recall and F1. The label, and the
  share of its largest activation from which the feature counts as on, are chosen on one half of the held-out sequences;
  the figures are those of the other half: the best of thousands of labels flatters any feature where it is chosen.
- Every kept pair gets the share of its importance that runs from tokens with the query feature's label to tokens with
  the key feature's.

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
from ..pairs.pair_map import Pairs, rows, weight_strength
from .controls import residual_basis, shuffled_pairs, untrained
from .labels import Labelled, StoryLabels

Text = list[tuple[AttentionInputs, Labelled]]

LEVELS = (0.0, 0.2, 0.4, 0.6)  # a feature is on above this share of its largest activation on training text
GOOD = 0.8  # F1 from which a feature counts as named
PAIR_TOKENS = 8192  # held-out tokens over which pairs are followed from query to key
RANK_BATCHES = 4  # of training text behind the ranking of the controls' pairs
PAIR_ELEMENTS = 1 << 24  # elements of one block of [pairs, queries, keys]


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
    # A padded position has the padding token, which no label of a live feature is.
    always = torch.ones_like(here[..., :1])
    return torch.cat([roles | here | before, always], -1)


@torch.no_grad()
def matching_share(
    dec: Decomposition,
    pairs: Pairs,
    strength_P: Tensor,
    found: dict[str, FeatureLabels],
    heldout: Text,
    labels: StoryLabels,
) -> tuple[Tensor, Tensor]:
    """Importance of each pair on held-out text (nats [P]) and the share of it between matching labels [P].

    Importance is Σ_ij P_ij (δ_ij - mean_i)², split by (i, j). Soft caps are left out of it.
    """
    total, matched = (torch.zeros(len(pairs), device=strength_P.device) for _ in range(2))
    count = 0
    for inputs, labelled in heldout:
        if count >= PAIR_TOKENS:
            break
        item = see(inputs, dec.query, dec.key)
        count += item.n_tokens
        q_holds, k_holds = (holds(found[side], labelled, labels.n_words) for side in SIDES)
        for head in range(pairs.n_heads):
            pattern = item.weights(head)[0]
            in_head = torch.arange(*pairs.of_head(head).indices(len(pairs))[:2], device=strength_P.device)
            for b in range(len(pattern)):
                fires = (item.acts_q_BTF[b] > 0).any(0)[pairs.query_P[in_head]]
                fires &= (item.acts_k_BTF[b] > 0).any(0)[pairs.key_P[in_head]]
                here = in_head[fires]
                part = _plain if inputs.rule.rotary is None else _rotary
                whole, both = part(dec, pairs, strength_P, item, pattern[b], head, b, here, q_holds[b], k_holds[b])
                total[here] += whole
                matched[here] += both
    return total / (2 * max(count, 1)), matched / total.clamp(min=1e-30)


def _plain(
    dec: Decomposition, pairs: Pairs, strength_P: Tensor, item: Seen, pattern_QK: Tensor, head: int, b: int,
    here: Tensor, q_holds_TF: Tensor, k_holds_TF: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Σ_ij P_ij (δ_ij - mean_i)² of pairs of one head in one sequence, whole and between labels; δ = s a_q a_k."""
    used, column = pairs.key_P[here].unique(return_inverse=True)
    a_k, holds_k = item.acts_k_BTF[b][:, used], k_holds_TF[:, used].float()
    mean = pattern_QK @ a_k
    second = pattern_QK @ a_k.square() - (2 - pattern_QK.sum(1, keepdim=True)) * mean.square()
    within = pattern_QK @ (a_k.square() * holds_k) - 2 * mean * (pattern_QK @ (a_k * holds_k))
    within += mean.square() * (pattern_QK @ holds_k)
    scale = (strength_P[here] * item.inputs.rule.scaling).square()
    squares = item.acts_q_BTF[b][:, pairs.query_P[here]].square()
    whole = scale * (squares * second[:, column]).sum(0)
    return whole, scale * (squares * q_holds_TF[:, pairs.query_P[here]] * within[:, column]).sum(0)


def _rotary(
    dec: Decomposition, pairs: Pairs, strength_P: Tensor, item: Seen, pattern_QK: Tensor, head: int, b: int,
    here: Tensor, q_holds_TF: Tensor, k_holds_TF: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with a rotary embedding, where δ has each pair's own M(i-j): block by block of [pairs, Q, K]."""
    rule, length = item.inputs.rule, len(pattern_QK)
    assert rule.rotary is not None
    table = rule.rotary.of_sequence(b, length)
    rows_q, rows_k = rows(dec.query, dec.shape.N)[:, head], rows(dec.key, dec.shape.G)
    rows_k = rows_k[:, head * dec.shape.G // dec.shape.N]
    whole, both = [], []
    for block in here.split(max(PAIR_ELEMENTS // length**2, 1)):
        query, key = pairs.query_P[block], pairs.key_P[block]
        left, right = (
            table.rotate(row.expand(1, length, -1, -1))[0].transpose(0, 1) * acts.T[..., None]
            for row, acts in ((rows_q[query], item.acts_q_BTF[b][:, query]), (rows_k[key], item.acts_k_BTF[b][:, key]))
        )
        delta = (strength_P[block] * rule.scaling)[:, None, None] * (left @ right.transpose(1, 2))
        squares = pattern_QK * (delta - (pattern_QK * delta).sum(-1, keepdim=True)).square()
        whole.append(squares.sum((1, 2)))
        both.append((squares * (q_holds_TF[:, query].T[:, :, None] & k_holds_TF[:, key].T[:, None])).sum((1, 2)))
    return (torch.cat(whole), torch.cat(both)) if whole else (strength_P[here], strength_P[here])


@torch.no_grad()
def truth_scores(
    dec: Decomposition, sample: list[AttentionInputs], heldout: Text, labels: StoryLabels, l0: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of a decomposition and its controls (for the report), and the label of each feature and pair.

    `sample` is training text, `l0` the active features a side that controls get.
    """
    found, pairs = _scored(dec, dec.pairs, dec.strength_P, sample, heldout, labels)
    summary: dict[str, Any] = {"decomposition": _summary(found, pairs)}
    _, mixed = _scored(dec, *shuffled_pairs(dec), sample, heldout, labels, found)
    summary["shuffled"] = {"pairs": _summary(found, mixed)["pairs"]}
    controls = {**untrained(dec, sample, l0), "residual": residual_basis(dec, sample, l0)}
    for name, control in controls.items():
        ranked, _ = rank_pairs(sample[:RANK_BATCHES], control.query, control.key, len(dec.pairs))
        weights = weight_strength(ranked, rows(control.query, dec.shape.N), rows(control.key, dec.shape.G))
        strength = torch.ones_like(weights) if dec.shape.rotary else weights
        summary[name] = _summary(*_scored(control, ranked, strength, sample, heldout, labels))
    return summary, {"features": {s: _feature_rows(found[s], labels.names) for s in SIDES}, "pairs": _pair_rows(pairs)}


@dataclass
class PairScores:
    """Held-out importance of each pair, and the share of it between matching labels."""

    pairs: Pairs
    importance_P: Tensor
    matching_P: Tensor


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
    return found, PairScores(pairs, *matching_share(dec, pairs, strength_P, found, heldout, labels))


def _summary(found: dict[str, FeatureLabels], scores: PairScores) -> dict[str, Any]:
    """Of features: as `FeatureLabels.summary`, and F1 weighted by what their pairs matter. Pairs with a bias are left
    out of the pairs' figures: half of what they say is always true."""
    pairs, worth = scores.pairs, scores.importance_P.double()
    out: dict[str, Any] = {}
    for side, feature_P, width in (("query", pairs.query_P, pairs.n_query), ("key", pairs.key_P, pairs.n_key)):
        by_feature = torch.zeros(width + 1, dtype=torch.float64, device=worth.device).index_add(0, feature_P, worth)
        weights = by_feature[:-1]
        weighted = float((weights * found[side].f1_F).sum() / weights.sum().clamp(min=1e-30))
        out[side] = {**found[side].summary(), "f1_by_importance": weighted}
    two = (pairs.query_P < pairs.n_query) & (pairs.key_P < pairs.n_key)
    total = worth[two].sum().clamp(min=1e-30)
    out["pairs"] = {"kept": len(pairs), "matching": float((worth * scores.matching_P)[two].sum() / total)}
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
    rest = (c[order].tolist() for c in (pairs.head_P, scores.importance_P, scores.matching_P))
    return [
        {"query_feature": a, "key_feature": b, "head": head, "importance": worth, "matching": share}
        for a, b, head, worth, share in zip(query, key, *rest, strict=True)
    ]
