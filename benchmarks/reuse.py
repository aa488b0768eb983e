"""What learning from each batch several times costs and gains: `--training.reuse`, on the layers of several models.

    python benchmarks/reuse.py --layers stories-gpt2=3 MODEL=LAYER=TEXT --reuse 1 2 4 --held 8

For each layer `seed`, then `default` at its held-out L0, without and with its pair penalty, each trained on `--tokens`
tokens, of which the model reads one in `reuse`; then the pairs of the last one, pruned and tuned in the same way.
`--same-text`: the model reads all of the tokens, and as many more steps are taken. Held-out pattern KL, L0, dead
features; at the end, for each recipe, the KL relative to the first reuse's: geometric mean over layers, least and most.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch

from qkscope.config import DictionaryConfig
from qkscope.evaluate.quality.bench import PLAIN, LayerBench
from qkscope.evaluate.quality.report import SIZES, kl_of, row_line
from qkscope.training.job import Job

WIDTH, COUNTS = 300, (16000, 8000, 4000, 2000, 1000, 500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--held", type=int, default=8, help="batches that are held")
    parser.add_argument("--same-text", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=["seed", PLAIN, "default"])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[float]] = {}
    for named in args.layers:
        size = replace(SIZES["small"], tokens=args.tokens)
        bench = LayerBench.named(named, args.seed, size)
        seed = DictionaryConfig(recipe="seed", width=WIDTH, sparsity=size.sparsity)
        base = _row(bench, "seed", *_trained(bench, seed, args.tokens, 1, args.held))
        at_l0 = DictionaryConfig(width=WIDTH, k=base["l0_query"]["mean"], k_key=base["l0_key"]["mean"])
        configs = {"seed": seed, PLAIN: at_l0.model_copy(update={"pair_sparsity": 0.0}), "default": at_l0}
        for reuse in args.reuse:
            print(f"\n{bench.title}, reuse {reuse}", flush=True)
            tokens = args.tokens * (reuse if args.same_text else 1)
            for name in args.recipes:
                job, seconds = _trained(bench, configs[name], tokens, reuse, args.held)
                rows = [_row(bench, name, job, seconds)]
                if name == "default":
                    for _, _, made, seconds in bench.prune(job, COUNTS, tokens, ("tune",)):
                        rows.append(_row(bench, name, made, seconds))
                for row in rows:
                    pairs = "all" if "pairs" not in row else f"{COUNTS[rows.index(row) - 1]:,}"
                    found.setdefault((f"{name}, {pairs} pairs", reuse), []).append(kl_of(row))
                    print(row_line(row), flush=True)
    print(f"\nKL relative to reuse {args.reuse[0]}, geometric mean over layers (least to most):")
    for (name, reuse), kls in found.items():
        ratios = [kl / first for kl, first in zip(kls, found[name, args.reuse[0]], strict=True)]
        middle, ends = statistics.geometric_mean(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:<34} reuse {reuse}: {middle:.3f} ({ends})")


def _trained(bench: LayerBench, config: DictionaryConfig, tokens: int, reuse: int, held: int) -> tuple[Job, float]:
    bench.config = bench.config.model_copy(update={"tokens": tokens, "reuse": reuse, "held_batches": held})
    job = bench.step1("job", config)
    return job, bench.fit([job], tokens)


def _row(bench: LayerBench, name: str, job: Job, seconds: float) -> dict[str, Any]:
    return {"dictionary": name, "method": "", "seconds": seconds, **bench.judge(job)}


if __name__ == "__main__":
    main()
