"""How the gap between the recipes changes with the length of training: step 1 alone, the same tokens for both.

    python benchmarks/training_length.py --layers stories-gpt2=3 MODEL=LAYER=TEXT --tokens 300000 1200000

For each layer and length: `seed`, the same from `default`'s start, and `default` without its pair penalty, which `seed`
has none of, at each one's held-out L0 on either side. Held-out pattern KL, L0, dead and dense features; then the KL
relative to `seed`'s at its L0.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from qkscope.config import DictionaryConfig
from qkscope.evaluate.quality.bench import PLAIN, LayerBench
from qkscope.evaluate.quality.report import SIZES, kl_of, row_line

WIDTH = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--tokens", type=int, nargs="+", default=[300_000, 1_200_000])
    parser.add_argument("--sparsity", type=float, default=0.01, help="seed's penalty")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = DictionaryConfig(recipe="seed", width=WIDTH, sparsity=args.sparsity)
    baselines = {"seed": seed, "seed, default's start": seed.model_copy(update={"start": "projection"})}
    ratios: list[str] = []
    for named in args.layers:
        for tokens in args.tokens:
            bench = LayerBench.named(named, args.seed, replace(SIZES["small"], tokens=tokens))
            where = f"{bench.title}, {tokens:,} tokens"
            print(f"\n{where}", flush=True)
            cells = []
            for name, config in baselines.items():
                base = _row(bench, name, config, tokens)
                k, k_key = base["l0_query"]["mean"], base["l0_key"]["mean"]
                plain = DictionaryConfig(width=WIDTH, k=k, k_key=k_key, pair_sparsity=0.0)
                ours = _row(bench, f"{PLAIN}, L0 of {name}", plain, tokens)
                cells.append(f"{kl_of(ours) / kl_of(base):.3f} of {name}")
            ratios.append(f"{where}: {PLAIN}, KL is " + ", ".join(cells))
    print("", *ratios, sep="\n")


def _row(bench: LayerBench, name: str, config: DictionaryConfig, tokens: int) -> dict[str, Any]:
    job = bench.step1(name, config)
    seconds = bench.fit([job], tokens)
    row = {"dictionary": name, "method": "", "seconds": seconds, **bench.judge(job)}
    print(row_line(row), flush=True)
    return row


if __name__ == "__main__":
    main()
