"""How fast should tune learn? The same pruned map of one pair of dictionaries, tuned at several rates side by side.

    python benchmarks/tune_rate.py --model DIR --source FILE.parquet --layer 1 --k 7.0 --k-key 9.7

`default` dictionaries are trained once; then the map is pruned to 8,000, 4,000 and 1,000 pairs and trained for
`--stage-tokens` after each, at each (dictionary rate, strength rate). Held-out figures, intervals over sequences.
"""

from __future__ import annotations

import argparse

from recipes import Bench, show

from qkscope.config import DictionaryConfig
from qkscope.pairs.importance import rank_pairs
from qkscope.pairs.selection import top
from qkscope.pairs.tune import MapJob

RATES = ((1e-3, 1e-2), (4e-3, 1e-2), (8e-3, 1e-2), (4e-3, 3e-2), (8e-3, 3e-2))
COUNTS = (8000, 4000, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--k", type=float, required=True)
    parser.add_argument("--k-key", type=float, required=True)
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--stage-tokens", type=int, default=40_000)
    parser.add_argument("--heldout", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bench = Bench(args, args.seed)
    job = bench.step1("default", DictionaryConfig(width=args.width, k=args.k, k_key=args.k_key))
    took = bench.fit([job], args.tokens)
    show({"dictionaries": f"default w={args.width}", "seconds": took, **bench.judge(job)})
    pairs, _ = rank_pairs(bench.sample, job.query.eval(), job.key.eval(), COUNTS[0])
    jobs = []
    for rate, strength_rate in RATES:
        name = f"rate {rate:g}, strengths {strength_rate:g}"
        sides = bench.copies(job)
        jobs.append(MapJob(args.layer, name, *sides, pairs, dictionary_rate=rate, strength_rate=strength_rate))
    for count in COUNTS:
        for made in jobs:
            made.keep(top(bench.importance(made), count))
            made.train()
        took = bench.fit(jobs, args.stage_tokens)
        for made in jobs:
            show({"dictionaries": made.variant, "method": "prune and tune", "seconds": took / len(jobs)}
                 | bench.judge(made))  # fmt: skip


if __name__ == "__main__":
    main()
