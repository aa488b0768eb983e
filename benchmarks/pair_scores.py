"""The pair map's scores, where only active features meet: with a rotary embedding, without one, and by dense matrices.

    python benchmarks/pair_scores.py --repeats 5

Shapes of an embedded model and of GPT-2 small, with random dictionaries whose features fire as unevenly as trained ones
do (frequencies fall as 1 / √rank) and pairs that favour those that fire often. Printed: processor seconds of one batch
on one thread, forward and forward with backward (median of the repeats), and the most memory that the process of its
own which measures a way has held, PyTorch and the making of the inputs included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qkscope.pairs.pair_map import Pairs, pair_scores
from qkscope.pattern import PatternRule
from qkscope.rotary import Rotary


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    groups: int
    head_width: int
    context: int
    batch: int
    width: int
    k: float
    pairs: int


SHAPES = {
    "stories": Shape("8 heads x 16, 300 features, 40,000 pairs", 8, 4, 16, 256, 8, 300, 8, 40_000),
    "stories-pruned": Shape("the same, 5,000 pairs", 8, 4, 16, 256, 8, 300, 8, 5_000),
    "gpt2": Shape("12 heads x 64, 2,400 features, 25,000 pairs", 12, 12, 64, 256, 2, 2400, 16, 25_000),
}


def dense(pairs: Pairs, leaves: list[Tensor], rule: PatternRule) -> Tensor:
    """Without a rotary embedding, every feature at every token through a dense matrix a head."""
    strength_P, acts_q, acts_k, *_ = leaves
    scores = []
    for head in range(pairs.n_heads):
        here = pairs.of_head(head)
        whole = strength_P.new_zeros(pairs.n_query + 1, pairs.n_key + 1)
        whole = whole.index_put((pairs.query_P[here], pairs.key_P[here]), strength_P[here] * rule.scaling)
        scores.append(acts_q @ whole @ acts_k.transpose(1, 2))
    return torch.stack(scores, 1)


def sparse(pairs: Pairs, leaves: list[Tensor], rule: PatternRule) -> Tensor:
    strength_P, acts_q, acts_k, rows_q, rows_k = leaves
    return pair_scores(pairs, strength_P, acts_q, acts_k, rows_q, rows_k, rule)


WAYS: dict[str, tuple[bool, Callable[[Pairs, list[Tensor], PatternRule], Tensor]]] = {
    "rotary, active only": (True, sparse),
    "plain, dense": (False, dense),
    "plain, active only": (False, sparse),
}


def case(shape: Shape, rotary: bool) -> tuple[Pairs, list[Tensor], PatternRule]:
    g = torch.Generator().manual_seed(0)
    frequency = (torch.arange(shape.width) + 1.0) ** -0.5
    frequency = frequency * (shape.k / frequency.sum())
    often = torch.cat([frequency, torch.ones(1)])  # the bias
    acts = []
    for _ in range(2):
        on = torch.rand(shape.batch, shape.context, shape.width + 1, generator=g) < often
        acts.append(on * (0.5 + torch.rand(on.shape, generator=g)))
    n = shape.width + 1
    chance = (often[:, None] * often).sqrt().flatten()
    drawn = [  # without replacement
        (chance / -torch.rand(len(chance), generator=g).log()).topk(shape.pairs // shape.heads).indices
        for _ in range(shape.heads)
    ]
    head = torch.arange(shape.heads).repeat_interleave(shape.pairs // shape.heads)
    place = torch.cat(drawn)
    pairs = Pairs.of(place // n, place % n, head, shape.width, shape.width, shape.heads)
    rows = [torch.randn(n, m, shape.head_width, generator=g) for m in (shape.heads, shape.groups)]
    leaves = [t.requires_grad_() for t in (torch.randn(len(pairs), generator=g), *acts, *rows)]
    half = shape.head_width // 2
    angle = torch.arange(shape.context)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    table = Rotary(
        torch.cat([angle.cos()] * 2, 1)[None],
        torch.cat([-angle.sin(), angle.sin()], 1)[None],
        torch.arange(shape.head_width).roll(half),
    )
    visible = torch.ones(1, shape.context, shape.context, dtype=torch.bool).tril()
    return pairs, leaves, PatternRule(visible, shape.head_width**-0.5, rotary=table if rotary else None)


def measure(shape: Shape, way: str, repeats: int) -> dict[str, float]:
    """Seconds and megabytes of one way, to be run in a process of its own."""
    torch.set_num_threads(1)
    rotary, scores = WAYS[way]
    pairs, leaves, rule = case(shape, rotary)
    used = leaves if rotary else leaves[:3]

    def forward() -> Tensor:
        return scores(pairs, leaves, rule)

    cotangent = torch.randn(shape.batch, shape.heads, shape.context, shape.context)
    torch.autograd.grad(forward(), used, cotangent)  # also warms up what is made once
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, list[float]] = {"forward": [], "both": []}
    for _ in range(repeats):
        for name, act in (("forward", forward), ("both", lambda: torch.autograd.grad(forward(), used, cotangent))):
            began = time.process_time()
            with torch.set_grad_enabled(name == "both"):
                act()
            found[name].append(time.process_time() - began)
    return {"megabytes": peak / 1024, **{name: statistics.median(values) for name, values in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "WAY"), help="measure this in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(SHAPES[args.one[0]], args.one[1], args.repeats)))
        return
    for name in args.shapes:
        shape = SHAPES[name]
        print(f"\n{shape.name}, {shape.batch} x {shape.context} tokens, {shape.k:g} active features a token")
        print(f"{'':<22}{'forward s':>12}{'with backward s':>18}{'peak MB':>10}", flush=True)
        rows = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--one", name, way, "--repeats", str(args.repeats)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{way:<22}  ended with status {done.returncode}", flush=True)
                continue
            rows[way] = row = json.loads(done.stdout)
            print(f"{way:<22}{row['forward']:>12.3f}{row['both']:>18.3f}{row['megabytes']:>10.0f}", flush=True)
        before, now = "plain, dense", "plain, active only"
        if before in rows and now in rows:
            ratio = [rows[before][key] / rows[now][key] for key in ("forward", "both")]
            print(f"{now} against {before}: {ratio[0]:.1f} x and {ratio[1]:.1f} x as fast", flush=True)


if __name__ == "__main__":
    main()
