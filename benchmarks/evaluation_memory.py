"""What evaluating one layer holds in memory, at long contexts.

    python benchmarks/evaluation_memory.py --contexts 256 1024 4096

On a model of GPT-2 small's attention shape with random weights, two layers of it, and its last layer's dictionaries and
ranked pairs. For each context, in a process of its own: the most memory beyond what was held before (the model, the
dictionaries, the sample) and seconds, of one batch of held-out text (2,048 tokens, one sequence at least) with all
controls, of the curves of fewer pairs on it, and of two steps of the adversary. Above them: what a run counts for it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from qkscope.config import RunConfig
from qkscope.evaluate.faithful import against_adversary, curve
from qkscope.evaluate.layer import SAMPLE_TOKENS, memory_of
from qkscope.evaluate.measure import Sources, measure
from qkscope.evaluate.speed.measure import most_held
from qkscope.evaluate.speed.world import Size, World, job_of
from qkscope.pairs.importance import rank_pairs
from qkscope.tables.examples import Examples

ADVERSARY_STEPS = 2
RANKED_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rotary", action="store_true", help="a Llama of that shape")
    parser.add_argument("--pairs", type=int, default=20_000)
    args = parser.parse_args()
    if len(args.contexts) == 1:
        one(args.contexts[0], args.pairs, rotary=args.rotary)
        return
    for context in args.contexts:  # each in a process of its own
        options = [*(["--rotary"] if args.rotary else []), "--pairs", str(args.pairs)]
        subprocess.run([sys.executable, sys.argv[0], "--contexts", str(context), *options], check=True)


@torch.no_grad()
def one(context: int, n_pairs: int, *, rotary: bool) -> None:
    """Print one context's rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = Size(context=context, model_layers=2, layers=(1,), sample_tokens=4096, rotary=rotary)
    world = World(size, device)
    bench, statistics = world.workbench(size.sample_tokens), world.statistics([1])[0]
    job = job_of(1, statistics, "default", (size.width, size.width), size.k).eval()
    for side in (job.query, job.key):
        side.calibrate(statistics["query"].x_nD)
    pairs, worth = rank_pairs([bench.sample[0].crop(RANKED_TOKENS)], job.query, job.key, n_pairs)
    dec = bench.decomposition(bench.map_job("map", job, pairs))
    dec.importance_P = worth
    batch = world.text(size.batch_tokens)

    def text() -> None:
        measure(dec, world.site, [batch], Sources.of(dec, bench.sample), Examples(dec, 12, drawn=2, pairs=4))

    parts = {
        "held-out text": text,
        "fewer pairs": lambda: curve(dec, world.site, [batch], 0),
        "adversary": lambda: against_adversary(dec, world.site, [batch], steps=ADVERSARY_STEPS, seed=0),
    }
    pattern = 4 * size.heads * batch.n_tokens * context / 1e6
    print(f"context {context}, {batch.n_tokens} tokens; one pattern of all heads: {pattern:,.0f} MB", flush=True)
    config = RunConfig.model_validate({"data": {"context": context}, "dictionary": {"width": size.width}})
    first = bench.sample[0]
    sample = 4 * SAMPLE_TOKENS * sum(y[0, 0].numel() for y in (first.x_BTD, first.q_BTNH, first.k_BTGH))
    print(f"  {'counted':<14} {(memory_of(world.site, config) - sample) / 1e6:>8,.0f} MB", flush=True)
    for name, part in parts.items():
        began = time.monotonic()
        peak = most_held(part, device)
        seconds = time.monotonic() - began
        print(f"  {name:<14} {(peak or 0) / 1e6:>8,.0f} MB {seconds:>8.1f} s", flush=True)


if __name__ == "__main__":
    main()
