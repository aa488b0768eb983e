"""How long one answer takes at the size of GPT-2 small: a prompt traced, its patterns, and the pairs behind an edge.

    python benchmarks/trace_speed.py --width 2400 --pairs 50000 --tokens 256

A model of that shape with random weights, whose speed is that of any, and random dictionaries with k active features a
token. Printed: seconds on the clock (median of some repeats) and of processor time, from the prompt to the true,
reconstructed and pruned patterns of all heads, and from there to one account and to what another head does; loading is
not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qkscope.attention import AttentionSite, harvest
from qkscope.config import DictionaryConfig, RunConfig, TrainingConfig
from qkscope.decomposition import Decomposition, SiteShape
from qkscope.explain.trace import Trace
from qkscope.pairs.pair_map import Pairs
from qkscope.training.recipes import resolved
from qkscope.training.start import side_statistics, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2400)
    parser.add_argument("--k", type=float, default=16)
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    site = AttentionSite(model, layer=args.layer)
    tokens = torch.randint(50_000, (1, args.tokens))
    real = torch.ones_like(tokens, dtype=torch.bool)
    dec = some_decomposition(site, harvest([site], tokens, real), args)

    def traced() -> Trace:
        inputs = harvest([site], tokens, real)[0]
        one = Trace.of_batch(dec, inputs, 0, args.tokens)
        assert one.pattern
        return one

    took = timed(traced, args.repeats)
    print(
        f"GPT-2 small's shape, layer {args.layer}, {args.tokens} tokens, width {args.width}, {args.pairs:,} pairs, ",
        end="",
    )
    print(f"{args.threads} threads, CPU; median of {args.repeats} on the clock, processor time")
    print(f"  prompt to the patterns of all heads   {took[0]:.3f} s, {took[1]:.3f} s")
    one = traced()
    for name, ask in (
        ("why here and not there", lambda: one.why(-1)),
        ("another head's patterns and account", lambda: (one.of_head(5).pattern, one.of_head(5).terms(-1, 3))),
    ):
        took = timed(ask, args.repeats)
        print(f"  {name:<37} {took[0]:.3f} s, {took[1]:.3f} s")


def some_decomposition(site: AttentionSite, sample: list, args: argparse.Namespace) -> Decomposition:
    shape = SiteShape(**site.shape, rotary=False, reads=None)
    config = resolved(DictionaryConfig(width=args.width, k=args.k), TrainingConfig())
    statistics_ = side_statistics(sample)
    sides = [start(config, side, statistics_[side], "speed", 0) for side in ("query", "key")]
    x = sample[0].x_BTD[0].float()
    for transcoder in sides:
        transcoder.calibrate(x)
        transcoder.eval().requires_grad_(False)
    every = (args.width + 1) ** 2 * shape.N
    place = torch.randperm(every, generator=torch.Generator().manual_seed(0))[: args.pairs]
    head, rest = place // (args.width + 1) ** 2, place % (args.width + 1) ** 2
    pairs = Pairs.of(rest // (args.width + 1), rest % (args.width + 1), head, args.width, args.width, shape.N)
    strength = torch.randn(args.pairs) * 0.1
    return Decomposition(args.layer, shape, sides[0], sides[1], pairs, strength, strength, strength.abs(), RunConfig())


def timed(ask: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Medians on the clock and of processor time; the first try warms up."""
    clock, processor = [], []
    for _ in range(repeats + 1):
        began = time.perf_counter(), time.process_time()
        ask()
        clock.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    return statistics.median(clock[1:]), statistics.median(processor[1:])


if __name__ == "__main__":
    main()
