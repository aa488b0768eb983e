"""How many operations and bytes each part needs, counted by hand.

A product [m, k] · [k, n] is 2mkn operations, and moves its two factors and its result once, in float32 (bfloat16 moves
half of that, which is not told apart). Adam moves seven numbers a parameter (reads the weight, its gradient and two
moments; writes three). Element-wise passes and reductions are left out of both: what they cost is what keeps a part
from the ceiling.

Products that take only what is not zero are counted as such (`sparse`), so the share of the ceiling is of operations
that were needed. `dense` is what a counter of dense products sees (tests/unit/test_speed.py holds it against torch's).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.pattern_kl import ROWS
from ...training.pair_penalty import DRAWN


@dataclass(frozen=True)
class Work:
    dense: float = 0.0
    """Operations in dense products."""
    sparse: float = 0.0
    """Operations in products without zeros."""
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.dense + other.dense, self.sparse + other.sparse, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.dense * times, self.sparse * times, self.bytes * times)

    @property
    def flops(self) -> float:
        return self.dense + self.sparse


def product(m: float, k: float, n: float, times: float = 1) -> Work:
    return Work(dense=2 * m * k * n, bytes=4 * (m * k + k * n + m * n)) * times


def sparse(entries: float, n: float) -> Work:
    """Each entry of a sparse matrix takes one row of n numbers, and adds it to another."""
    return Work(sparse=2 * entries * n, bytes=4 * entries * (2 * n + 2))


def adam(parameters: float) -> Work:
    return Work(bytes=4 * 7 * parameters)


@dataclass(frozen=True)
class Shape:
    """n tokens in sequences of T, D wide, N heads of H; Fq and Fk features, k of them active."""

    n: int
    T: int
    D: int
    N: int
    H: int
    Fq: int
    Fk: int
    k: float
    layers: int
    """Of the model."""
    below: int
    """Layers of the model below the one that is read, or below the highest of them."""
    P: int = 0
    """Pairs of a map."""
    used: float = 0
    """Active key features of a token that a head's pairs name, mean over heads."""

    @property
    def B(self) -> float:
        return self.n / self.T

    @property
    def M(self) -> int:
        return self.N * self.H

    def scores(self) -> Work:
        """q kᵀ of every head, all keys; as many take a gradient to q, to k, or a pattern times values."""
        return product(self.T, self.H, self.T, self.B * self.N)


def model(s: Shape, layers: int) -> Work:
    """Blocks of the model: q, k, v and output 4 D², the two of the MLP 8 D², scores and values."""
    return (product(s.n, s.D, s.D, 4) + product(s.n, s.D, 4 * s.D, 2) + s.scores() * 2) * layers


def harvest(s: Shape) -> Work:
    """Forward as far as the layer's queries, keys and values."""
    return model(s, s.below) + product(s.n, s.D, 3 * s.D)


def step1(s: Shape, layers: int, *, default: bool, dense: bool, steps: int = 1) -> Work:
    """Steps of one pair of dictionaries for each of several layers on one harvest; of `default`, or of `seed`.

    `dense`: on a GPU.
    """
    one = s.scores() * (KL_PRODUCTS * seen_share(s.T))
    for F in (s.Fq, s.Fk):
        one += product(s.n, s.D, F)  # encode
        one += product(1, s.D, F, 2)  # what stands for b_in, and its gradient
        if dense:  # decode; gradients of W_dec, of activations, of W_enc
            one += product(s.n, F, s.M, 3) + product(s.D, s.n, F)
        else:
            one += sparse(s.n * s.k, s.M) * 3 + sparse(s.n * s.k, s.D)
        if default:
            one += norms(s, F)
        one += adam(F * (s.D + s.M + 1) + s.D + s.M)
    if default:
        one += pair_penalty(s)
    return harvest(s) + one * (layers * steps)


KL_PRODUCTS = (
    8  # four kinds of scores, the true ones among them, and two of the three KLs have a gradient for each side
)


def seen_share(length: int) -> float:
    """Share of all scores in the blocks of a causal pattern: a block's queries against the keys up to its last one."""
    ends = [min(start + ROWS, length) for start in range(0, length, ROWS)]
    return sum((end - start) * end for start, end in zip(range(0, length, ROWS), ends, strict=True)) / length**2


def norms(s: Shape, F: int) -> Work:
    """Of decoder rows in the metric that sizes are compared in: W C for each head."""
    return product(F, s.H, s.H, s.N)


def pair_penalty(s: Shape) -> Work:
    """Every pair's product, of the features that are drawn, and a gradient for both factors; all fire in a batch."""
    return product(min(s.Fq, DRAWN), s.H, min(s.Fk, DRAWN), s.N) * 3


def encode(s: Shape, *, batchtopk: bool) -> Work:
    """Both sides' activations."""
    work = Work()
    for F in (s.Fq, s.Fk):
        work += product(s.n, s.D, F) + product(1, s.D, F)
        if batchtopk:
            work += norms(s, F)
    return work


def importance(s: Shape, firing: tuple[int, int]) -> Work:
    """For each head, of the features that fire: the variance of keys' activations, its meeting with queries, the map.

    The map is counted whole; rows of it that cannot enter the ranking are not made.
    """
    a, b = firing
    head = product(s.T, s.H, s.T, s.B)  # the true pattern
    head += sparse(s.n * (s.k + 1), s.T) * 2  # second and first moment in it
    head += sparse(s.n * (s.k + 1), b)
    head += product(a, s.H, b)
    return encode(s, batchtopk=True) + head * s.N


def map_scores(s: Shape) -> Work:
    """Scores of the kept pairs: every pair takes a row of all tokens, every key token those of its active features."""
    return sparse(s.P, s.n) + sparse(s.n * s.used, s.T) * s.N


def selection(s: Shape) -> Work:
    """The KL of one candidate map on a sample; Fq and Fk are the features that are encoded for it."""
    return encode(s, batchtopk=True) + s.scores() + map_scores(s)


def refit(s: Shape) -> Work:
    """A step of strengths between frozen dictionaries."""
    return harvest(s) + selection(s) + map_scores(s) + adam(s.P)  # as much to y and from there to the strengths


def tune(s: Shape, *, dense: bool) -> Work:
    """A step of strengths and dictionaries, with the penalty on the dropped pairs."""
    work = refit(s) + pair_penalty(s)
    work += map_scores(s)  # y anew, to the keys' activations
    work += sparse(s.P, s.n)  # to the queries'
    for F in (s.Fq, s.Fk):
        work += product(s.D, s.n, F) if dense else sparse(s.n * s.k, s.D)  # to W_enc
        work += product(1, s.D, F) + adam(F * (s.D + s.M + 1) + s.D + s.M)
    return work


def mask(s: Shape) -> Work:
    """A step of our dense mask between frozen dictionaries, over Fq and Fk features with the bias behind them.

    All of them active on the batch: it leaves out those that are not.
    """
    a, b = s.Fq + 1, s.Fk + 1
    head = product(a, s.H, b)  # the map
    head += product(s.n, a, b) + product(s.T, b, s.T, s.B)  # y, scores
    head += product(s.T, s.T, b, s.B) + product(a, s.n, b)  # to y, to the mask
    return harvest(s) + encode(s, batchtopk=False) + s.scores() + head * s.N + adam(a * b * s.N)


def published_step1(s: Shape) -> Work:
    """A step of one layer with a pass of its own; every product dense, b_in's gradient among them."""
    work = harvest(s) + s.scores() * (4 + 2 + 2)  # scores, and the gradients that autograd is asked for of the KLs
    for F in (s.Fq, s.Fk):
        work += product(s.n, s.D, F) * 3 + product(s.n, F, s.M) * 3 + adam(F * (s.D + s.M + 1) + s.D + s.M)
    return work


def published_mask(s: Shape) -> Work:
    a, b = s.Fq + 1, s.Fk + 1
    work = harvest(s) + s.scores() + product(s.n, s.D, s.Fq) + product(s.n, s.D, s.Fk)
    work += product(s.n, a, b * s.N) + product(s.T * s.N, b, s.T, s.B)  # y of every key feature and head; scores
    return work + product(s.T * s.N, s.T, b, s.B) + product(a, s.n, b * s.N) + adam(a * b * s.N)


def evaluation(s: Shape, vocabulary: int, variants: int, curve: int) -> Work:
    """The report's pass over held-out text, its large products.

    Harvest; the model as it is, from the layer on with each variant, logits of all; activations for each thing that
    reads them; reconstructions with and without the map's rows; the pruned map, the parts of it on the curve, its
    pairs counted.
    """
    work = harvest(s) + model(s, s.layers + (s.layers - s.below) * variants)
    work += product(s.n, s.D, vocabulary) * (1 + variants)
    work += encode(s, batchtopk=True) * (3 + curve)
    work += (product(s.n, s.Fq, s.M) + product(s.n, s.Fk, s.M) + s.scores()) * 2
    return work + map_scores(s) * (2 + curve)
