"""Step 1 and its pruning in bfloat16 beside float32: the same layers, starts and tokens, judged by the float32 model.

    python benchmarks/precision.py --layers stories-gpt2=3 MODEL=LAYER=TEXT

In bfloat16 the model itself, and with it the patterns that are learned from, is rounded; what is learned is then held
against the true patterns of held-out text. Figures: KL with all pairs and after prune and tune, 95 % over sequences.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

import torch

from qkscope.config import DictionaryConfig, Dtype
from qkscope.evaluate.quality.bench import LayerBench
from qkscope.evaluate.quality.report import SIZES, row_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--k", type=float, default=8)
    parser.add_argument("--counts", type=int, nargs="+", default=[16000, 4000, 1000])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = replace(SIZES["small"], tokens=args.tokens)
    for named in args.layers:
        benches = {dtype: LayerBench.named(named, args.seed, size, dtype=dtype) for dtype in get_args(Dtype)}
        print(f"\n{next(iter(benches.values())).title}, seed {args.seed}", flush=True)
        for dtype, bench in benches.items():
            job = bench.step1(dtype, DictionaryConfig(width=size.width, k=args.k))
            seconds = bench.fit([job], size.tokens)
            judge = benches["float32"].judge
            print(row_line({"dictionary": dtype, "method": "all pairs", "seconds": seconds, **judge(job)}), flush=True)
            for method, count, made, spent in bench.prune(job, args.counts, size.tokens, ("tune",)):
                row = {"dictionary": dtype, "method": method, "asked": count, "seconds": spent, **judge(made)}
                print(row_line(row), flush=True)


if __name__ == "__main__":
    main()
