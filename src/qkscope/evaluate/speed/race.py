"""Seconds to a sparse map of the same KL: the published mask, and pairs that are ranked and then trained.

On a layer of the embedded model, where KLs mean something and the mask can be trained in the time of a benchmark. All
start from the same dictionaries, without the features that never fire: ReLU ones (`seed`) as published, or those of
`default`, of which nearly all live. The mask trains for a number of steps and leaves as many pairs as it leaves. Then
pairs are ranked by importance; as many are kept and refitted, and a quarter of them tuned, until the KL on held-out
text is no higher than the mask's. Looking at the KL is not timed. benchmarks/wide_race.py runs it at width 2,400.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import DictionaryConfig, Recipe
from ...dictionary import SparseTranscoder
from ...files import read_tensors, write_tensors
from ...pairs.importance import firing_features, rank_pairs
from ...pairs.selection import map_kl, top
from ...pairs.tune import MapJob
from ..quality.bench import LayerBench
from ..quality.bench import Size as QualitySize
from . import published
from .measure import timed
from .step import Steps

LAYER, LEVEL = 3, 0.3  # of stories-gpt2; share of the training at which the learning rate is at its peak
K = 8  # active features of `default`, about as many as `seed` has here
CHUNK = 5  # steps between two looks at the KL
SETTINGS = QualitySize(
    width=300, sparsity=0.01, tokens=60_000, heldout_tokens=4096, sample_tokens=4096, batch_tokens=512,
    mask_sparsity=(3e-6,), mask_tokens=0, counts=(), adversary_count=0, adversary_tokens=0,
)  # fmt: skip


def race(
    mask_steps: int, settings: QualitySize = SETTINGS, recipe: Recipe = "seed", path: Path | None = None
) -> dict[str, Any]:
    """The mask's row first; `kl`: nats on held-out text, `reached`: whether it is no higher than the mask's.

    `path`: where trained dictionaries are kept, and taken from if they are there.
    """
    cpu = torch.device("cpu")  # the layer is small: on a GPU all would be waiting
    bench = LayerBench("stories-gpt2", "embedded", LAYER, 0, settings)
    sparsity = settings.sparsity if recipe == "seed" else None
    # Without the pair penalty, which would give ours dictionaries made for few pairs.
    config = DictionaryConfig(recipe=recipe, width=settings.width, k=K, sparsity=sparsity, pair_sparsity=0.0)
    job = bench.step1(recipe, config)
    if path is not None and path.exists():
        job.load_state_dict(read_tensors(path)[0])
    else:
        bench.fit([job], settings.tokens)
        if path is not None:
            write_tensors(path, job.state_dict())
    job.eval()
    live_q, live_k = firing_features(bench.sample, job.query, job.key)
    job.query.keep(live_q[:-1])  # the last one is the bias
    job.key.keep(live_k[:-1])
    held = [bench.inputs(batch) for batch in bench.heldout]
    side = published.Side if recipe == "seed" else Chosen
    sides = (side(job.query, bench.shape.N), side(job.key, bench.shape.N))
    mask = published.Mask(bench.site, *sides, sparsity=settings.mask_sparsity[0], rate=1e-2)

    def mask_kl() -> float:
        losses = (published.mask_loss(mask.mask_FJN, mask.map_FJN, *sides, inputs, 0.0) for inputs in held)
        with torch.no_grad():
            return sum(float(loss) for loss in losses) / len(held)

    text = bench.text("train", repeat=True)
    spent = [timed(lambda: mask.step(next(text).tokens_BT), cpu) for _ in range(mask_steps)]
    count, bound = int((mask.mask_FJN > 0).sum()), mask_kl()
    rows = [_row("published mask", mask.mask_FJN.numel(), count, mask_steps, spent, bound, bound)]
    ranked: list[Any] = []
    ranking = timed(lambda: ranked.append(rank_pairs(bench.sample, job.query, job.key, count)), cpu)
    pairs, worth = ranked[0]
    for name, kept, tuned in (("ranked, refitted", count, False), ("ranked, tuned", count // 4, True)):
        made: MapJob = bench.map_job(name, job, pairs.take(top(worth, kept)), tuned=tuned)
        steps = Steps([made], bench.stream(), cpu, done=LEVEL)
        spent, kl = [ranking], map_kl(made, held)
        while kl > bound and steps.taken < mask_steps:
            spent += [timed(steps.step, cpu) for _ in range(CHUNK)]
            kl = map_kl(made, held)
        rows.append(_row(name, len(pairs), len(made.pairs), steps.taken, spent, kl, bound))
    return {
        "model": "stories-gpt2", "layer": LAYER, "batch_tokens": settings.batch_tokens, "rows": rows,
        "recipe": recipe, "live": [job.query.width, job.key.width],
    }  # fmt: skip


class Chosen(published.Side):
    """A side whose features may be chosen otherwise than by ReLU."""

    def __init__(self, like: SparseTranscoder, n_heads: int) -> None:
        super().__init__(like, n_heads)
        self.like = [like]  # in a list: its parameters are not this module's

    def encode(self, x_BTD: Tensor) -> Tensor:
        return self.like[0].encode(x_BTD)


def _row(
    name: str, first: int, kept: int, steps: int, spent: list[tuple[float, float]], kl: float, bound: float
) -> dict[str, Any]:
    wall, processor = (sum(column) for column in zip(*spent, strict=True))
    return {
        "method": name, "from_pairs": first, "pairs": kept, "steps": steps, "wall_s": wall, "processor_s": processor,
        "kl": kl, "reached": kl <= bound,
    }  # fmt: skip
