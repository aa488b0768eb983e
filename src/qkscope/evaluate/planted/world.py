"""A planted world: residual streams made of known features, and an attention layer that reads known pairs of them.

    x = a · directions + offset + noise            a: sparse, non-negative, more features than dimensions
    score_ijh = Σ_pairs of h  strength · a_f(i) · a_g(j) · ⟨u, R(j-i) u⟩ + interference

What is notable:
- Frequencies are Zipf's, exactly: features that fire together (a shared cause, or a child that fires only with its
  parent) keep their own frequency. Most features are irrelevant to every head.
- A head reads a feature through its dual: the readout with gain 1 on the feature and the least second moment of
  everything else, features taken as independent. With more features than dimensions the rest leaks in, so a pattern is
  not the truth's alone; how much is measured (`Planted.log_pattern_true`), not assumed.
- Every pair has its own unit direction u of head space, orthogonal to the head's others. With a rotary embedding these
  lie in slow planes and act at all distances, but for `LOCAL` pairs a head, alone in a plane that turns by about a
  radian and a half within the context.
- Position 0 has a BOS feature beside what it has like any other. Some heads have a sink: a query bias that meets the
  BOS key. (With BOS alone at position 0, that key alone would be free of interference, and every query feature would
  need a pair with BOS that says so.)

Shapes: F features, the BOS feature last; index F stands for a side's bias, as in pair_map.py. P pairs, others as in
attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...pairs.pair_map import Pairs, with_bias
from ...pattern import AttentionInputs, HeadPatterns, PatternRule
from ...rotary import Rotary
from ...training.objective import Padding
from ...training.start import label_seed
from ...training.stream import Harvest

LAYER = 0  # the number that a planted layer goes by
LOCAL = 2  # pairs a head that act at short distances only, with a rotary embedding
ROTARY_BASE = 10_000.0
SLOW = 0.4  # radians within the context: up to this a plane's turn is small
EVENT = (0.6, 1.4)  # one firing's magnitude, uniform, times the feature's scale
SCALE = (0.7, 1.4)  # a feature's scale
CHILDREN = 0.15  # share of features that fire only with a parent
SIBLINGS = 0.3  # share of features that share a cause, in groups of three
CAUSE = 0.6  # correlation of the Gaussians behind such a group
BOS_SIZE = 4.0
# BOS is seen by every query at a size of its own: what leaked from it would be a strong pair with every query feature
# that nobody planted. Readouts of other features are as good as blind to it.
BOS_WEIGHT = 1000.0
SPREADING = 100  # steps in which directions move apart, as those of trained models do; overlaps fall by a quarter
STRENGTH = (4.0, 7.0)  # logits of a pair whose two features fire at their mean magnitude
SINK_STRENGTH = 3.0
LEAST = 1e-3  # ridge of the readouts, relative to the mean second moment of a dimension of x


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of a world."""

    width: int
    """Residual dimensions."""
    features: int
    """Features, the BOS feature not counted."""
    heads: int
    head_width: int
    pairs: int
    """True pairs a head, the sink not counted."""
    pool: int
    """Features that some query (key) may read; the rest is irrelevant to the query (key) side."""
    context: int
    rotary: bool = False
    shared: float = 0.25
    """Share of a head's pairs that the head before it has too."""
    frequency: float = 0.3
    """Of the most frequent feature."""
    exponent: float = 0.6
    noise: float = 0.02
    orthogonal: bool = False
    """Orthogonal directions (features + 1 <= width): nothing leaks."""


@dataclass(frozen=True)
class Origin:
    """Every planted sequence is a document of its own."""

    document_B: Tensor

    def positions(self, row_E: Tensor, at_E: Tensor) -> Tensor:
        return at_E


class Planted:
    """One world; the same for the same configuration and seed."""

    def __init__(self, config: WorldConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        generator = self._generator("world")
        c, n = config, config.features
        self.frequency_F = torch.cat([c.frequency * torch.arange(1.0, n + 1) ** -c.exponent, torch.zeros(1)])
        self.scale_F = torch.cat([_uniform(SCALE, n, generator), torch.tensor([BOS_SIZE])])
        self.parent_F, self.group_F = self._relations(generator)
        self.directions_FD = self._directions(generator)
        self.offset_D = torch.randn(c.width, generator=generator) / c.width**0.5
        self.pairs, self.strength_P = self._pairs(generator)
        self.rotary = _rotary_tables(c.context, c.head_width) if c.rotary else None
        self.rows_q, self.rows_k = self._rows(generator)
        readout_FD, constant_F = self._readouts()
        q, k = self.rows_q.flatten(1), self.rows_k.flatten(1)
        self.W_Q, self.b_Q = readout_FD.T @ q[:-1], constant_F @ q[:-1] + q[-1]
        self.W_K, self.b_K = readout_FD.T @ k[:-1], constant_F @ k[:-1] + k[-1]
        self.readout_FD, self.constant_F = readout_FD, constant_F
        visible = torch.ones(c.context, c.context, dtype=torch.bool).tril()[None]
        self.rule = PatternRule(visible, c.head_width**-0.5, rotary=self.rotary)

    @property
    def bos(self) -> int:
        return self.config.features

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of a SiteShape."""
        c = self.config
        return {"D": c.width, "N": c.heads, "G": c.heads, "H": c.head_width, "rotary": c.rotary}

    def _generator(self, label: str) -> torch.Generator:
        parts = "/".join(str(getattr(self.config, field.name)) for field in fields(self.config))
        return torch.Generator().manual_seed(label_seed(f"planted/{parts}/{label}", self.seed))

    # Features

    def _relations(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Each feature's parent (-1: none; always a more frequent feature without one) and group of siblings (-1)."""
        n = self.config.features
        parent, group = torch.full((n,), -1), torch.full((n,), -1)
        order = torch.randperm(n, generator=generator)
        children = order[: round(CHILDREN * n)]
        siblings = order[len(children) : len(children) + 3 * round(SIBLINGS * n / 3)]
        group[siblings] = torch.arange(len(siblings)) // 3
        free = torch.ones(n, dtype=torch.bool)
        free[children] = False
        for child in children.tolist():
            above = free[:child].nonzero()[:, 0]
            if len(above):
                parent[child] = above[torch.randint(len(above), (1,), generator=generator)]
        return parent, group

    def _directions(self, generator: torch.Generator) -> Tensor:
        c = self.config
        drawn = torch.randn(c.features + 1, c.width, generator=generator)
        if c.orthogonal:
            return torch.linalg.qr(drawn.T)[0].T[: c.features + 1].contiguous()
        directions = drawn / drawn.norm(dim=1, keepdim=True)
        for _ in range(SPREADING):  # down the gradient of the sum of squared cosines
            overlap = directions @ directions.T - torch.eye(c.features + 1)
            directions = directions - 0.1 * (overlap @ directions)
            directions = directions / directions.norm(dim=1, keepdim=True)
        return directions

    def coefficients(self, count: int, generator: torch.Generator) -> Tensor:
        """Feature coefficients of `count` sequences, [count, T, F]."""
        c, n = self.config, self.config.features
        shape = (count, c.context, n)
        groups = int(self.group_F.max()) + 1
        cause = torch.randn(count, c.context, max(groups, 1), generator=generator)[..., self.group_F.clamp(min=0)]
        own = torch.randn(shape, generator=generator)
        both = CAUSE**0.5 * cause + (1 - CAUSE) ** 0.5 * own
        z = torch.where(self.group_F >= 0, both, own)
        # A child's chance, given its parent, makes up for its parent's: its own frequency stays Zipf's.
        child = self.parent_F >= 0
        chance = self.frequency_F[:-1] / torch.where(child, self.frequency_F[self.parent_F.clamp(min=0)], 1.0)
        fires = z < torch.special.ndtri(chance.double()).float()
        fires &= ~child | fires[..., self.parent_F.clamp(min=0)]
        size = EVENT[0] + (EVENT[1] - EVENT[0]) * torch.rand(shape, generator=generator)
        acts = torch.cat([fires * size * self.scale_F[:-1], torch.zeros(count, c.context, 1)], -1)
        acts[:, 0, self.bos] = BOS_SIZE
        return acts

    # Pairs

    def _pairs(self, generator: torch.Generator) -> tuple[Pairs, Tensor]:
        """True pairs, the sinks among them, and their strengths in logits for coefficients of 1."""
        c, n = self.config, self.config.features
        pools = [torch.randperm(n, generator=generator)[: c.pool].tolist() for _ in range(2)]
        heads: list[list[tuple[int, int]]] = []
        for _ in range(c.heads):
            chosen = heads[-1][: round(c.shared * c.pairs)] if heads else []
            while len(chosen) < c.pairs:
                a, b = (pool[int(torch.randint(c.pool, (1,), generator=generator))] for pool in pools)
                if (a, b) not in chosen:
                    chosen = [*chosen, (a, b)]
            heads.append([chosen[i] for i in torch.randperm(c.pairs, generator=generator)])
        bias = n + 1
        sinks = [(bias, self.bos, h) for h in range(c.heads) if h % 2 == 0]
        triples = torch.tensor([(a, b, h) for h, found in enumerate(heads) for a, b in found] + sinks)
        pairs = Pairs.of(triples[:, 0], triples[:, 1], triples[:, 2], n + 1, n + 1, c.heads)
        size = torch.cat([self.scale_F, torch.ones(1)])  # the bias is always 1; events average 1
        strength = _uniform(STRENGTH, len(pairs), generator)
        strength[pairs.query_P == bias] = SINK_STRENGTH
        return pairs, strength / (size[pairs.query_P] * size[pairs.key_P])

    def _rows(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What a feature of coefficient 1 adds to queries and to keys, [F + 1, N, H] each, the bias last."""
        c = self.config
        rows_q = torch.zeros(c.features + 2, c.heads, c.head_width)
        rows_k = torch.zeros_like(rows_q)
        for head in range(c.heads):
            here = self.pairs.of_head(head)
            u = self._head_directions(here.stop - here.start, generator)
            root = (self.strength_P[here] * c.head_width**0.5).sqrt()[:, None]  # scores are divided by √H
            rows_q[:, head].index_add_(0, self.pairs.query_P[here], root * u)
            rows_k[:, head].index_add_(0, self.pairs.key_P[here], root * u)
        return rows_q, rows_k

    def _head_directions(self, count: int, generator: torch.Generator) -> Tensor:
        """Orthonormal directions of one head's pairs, [count, H]."""
        c = self.config
        turn = c.context * _plane_rates(c.head_width)
        if not c.rotary:
            places = torch.arange(c.head_width)
            local = 0
        else:
            half = c.head_width // 2
            slow = (turn <= SLOW).nonzero()[:, 0]
            places, local = torch.cat([slow, slow + half]), LOCAL
        free = count - local
        if free > len(places):
            raise ValueError(f"{count} pairs a head do not fit: head width {c.head_width} has {len(places)} places")
        basis = torch.linalg.qr(torch.randn(len(places), len(places), generator=generator))[0][:free]
        u = torch.zeros(count, c.head_width)
        u[:free, places] = basis
        if local:
            planes = (turn - 1.5).abs().argsort()[:local]  # none of them is slow: those turn by 0.4 at the most
            u[torch.arange(free, count), planes] = 1.0
        return u[torch.randperm(count, generator=generator)]

    def _readouts(self) -> tuple[Tensor, Tensor]:
        """Duals r_f [F, D] and constants c_f [F]: r_f·x + c_f is a_f and interference of mean zero."""
        c = self.config
        mean = self.frequency_F * self.scale_F
        mean[self.bos] = BOS_SIZE / c.context
        spread = (EVENT[1] - EVENT[0]) ** 2 / 12
        second = self.frequency_F * self.scale_F.square() * (1 + spread)
        second[self.bos] = BOS_SIZE**2 / c.context
        second[self.bos] *= BOS_WEIGHT
        d = self.directions_FD.double()
        gram = (d.T * second) @ d
        gram += (LEAST * gram.diagonal().mean() + c.noise**2) * torch.eye(c.width, dtype=gram.dtype)
        dual = torch.linalg.solve(gram, d.T).T
        dual /= (dual * d).sum(1, keepdim=True)
        leak = dual @ d.T
        leak.fill_diagonal_(0)
        return dual.float(), (-(leak @ mean.double()) - dual @ self.offset_D.double()).float()

    # What a layer is handed

    def inputs(self, acts_BTF: Tensor, generator: torch.Generator) -> AttentionInputs:
        """The layer's attention on sequences of these coefficients."""
        c = self.config
        noise = c.noise * torch.randn(*acts_BTF.shape[:2], c.width, generator=generator)
        x = acts_BTF @ self.directions_FD + self.offset_D + noise
        heads = (c.heads, c.head_width)
        q, k = (x @ self.W_Q + self.b_Q).unflatten(2, heads), (x @ self.W_K + self.b_K).unflatten(2, heads)
        return AttentionInputs(x, q, k, self.rule, torch.ones(acts_BTF.shape[:2], dtype=torch.bool))

    def batch(self, split: str, index: int, tokens: int) -> tuple[Tensor, AttentionInputs]:
        """Coefficients and inputs of one batch of a split; the same at every call."""
        generator = self._generator(f"{split}/{index}")
        acts = self.coefficients(max(tokens // self.config.context, 1), generator)
        return acts, self.inputs(acts, generator)

    def log_pattern_true(self, acts_BTF: Tensor, inputs: AttentionInputs) -> HeadPatterns:
        """Log-pattern of the true pairs alone, on the true coefficients: the layer without interference."""
        acts = with_bias(acts_BTF)
        q, k = (torch.einsum("btf,fnh->btnh", acts, rows) for rows in (self.rows_q, self.rows_k))
        return inputs.rule.log_pattern_by_head(q, k)


class PlantedStream:
    """Batches of a world's training split, without the truth; the place in it is a number."""

    def __init__(self, world: Planted, batch_tokens: int, split: str = "train") -> None:
        self.world, self.batch_tokens, self.split = world, batch_tokens, split
        self.at = 0

    def __next__(self) -> Harvest:
        _, inputs = self.world.batch(self.split, self.at, self.batch_tokens)
        count, length = inputs.real_BT.shape
        number = torch.arange(count) + self.at * count
        self.at += 1
        return Harvest({LAYER: inputs}, Origin(number), count * length, Padding(None))

    def state(self) -> dict[str, Any]:
        return {"batch": self.at}

    def restore(self, state: dict[str, Any]) -> None:
        self.at = state["batch"]


def _uniform(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=generator)


def _plane_rates(head_width: int) -> Tensor:
    """Radians a position of each rotary plane, [H/2]."""
    return ROTARY_BASE ** (-torch.arange(0, head_width, 2).double() / head_width)


def _rotary_tables(context: int, head_width: int) -> Rotary:
    """Tables of the half-split layout: dimension d turns with d + H/2."""
    angle = torch.arange(context).double()[:, None] * _plane_rates(head_width)
    cos, sin = angle.cos(), angle.sin()
    half = math.ceil(head_width / 2)
    partner = (torch.arange(head_width) + half) % head_width
    return Rotary(torch.cat([cos, cos], 1).float()[None], torch.cat([-sin, sin], 1).float()[None], partner)
