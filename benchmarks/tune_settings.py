"""What the pair penalty and tune's rates do on one layer: every combination, side by side.

    python benchmarks/tune_settings.py --model stories-gpt2 --layer 3 --k 8.5 --dropped 0 1e-3 3e-3 1e-2
    python benchmarks/tune_settings.py --model stories-gpt2 --layer 3 --k 8.5 --pair-sparsity 0 0.01 0.03 0.1

`default` dictionaries are trained with each weight of the pair penalty; each is then pruned in stages and tuned with
each weight of the penalty on dropped pairs and each (dictionary rate, strength rate). Held-out figures with intervals
over sequences; `all` is the KL of q̂k̂, that is with the dropped pairs too.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from qkscope.config import DictionaryConfig, PairsConfig
from qkscope.evaluate.quality.bench import LayerBench
from qkscope.evaluate.quality.report import SIZES, row_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", default="embedded")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--k", type=float, required=True)
    parser.add_argument("--k-key", type=float, default=None)
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--pair-sparsity", type=float, nargs="+", default=[0.0])
    parser.add_argument("--dropped", type=float, nargs="+", default=[PairsConfig().dropped_sparsity])
    parser.add_argument("--rates", type=float, nargs="+", default=[PairsConfig().learning_rate])
    parser.add_argument("--strength-rates", type=float, nargs="+", default=[PairsConfig().strength_rate])
    parser.add_argument("--counts", type=int, nargs="+", default=[4000, 2000, 1000, 500])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = replace(
        SIZES["small"],
        tokens=args.tokens,
        heldout_tokens=args.heldout,
        batch_tokens=args.batch_tokens,
        width=args.width,
    )
    bench = LayerBench(args.model, args.source, args.layer, args.seed, size)
    for penalty in args.pair_sparsity:
        config = DictionaryConfig(width=args.width, k=args.k, k_key=args.k_key, pair_sparsity=penalty)
        job = bench.step1(f"penalty {penalty:g}", config)
        seconds = bench.fit([job], args.tokens)
        head = {"dictionary": f"penalty {penalty:g}"}
        print(row_line({**head, "method": "all pairs", "seconds": seconds, **bench.judge(job)}), flush=True)
        for dropped in args.dropped:
            for rate in args.rates:
                for strength_rate in args.strength_rates:
                    bench.pairs_config = PairsConfig(
                        dropped_sparsity=dropped, learning_rate=rate, strength_rate=strength_rate
                    )
                    name = f"{dropped:g} {rate:g}/{strength_rate:g}"
                    for _, _, made, seconds in bench.prune(job, args.counts, args.tokens, ("tune",)):
                        row = bench.judge(made)
                        line = row_line({**head, "method": name, "seconds": seconds, **row})
                        print(f"{line}  all {row['all_pairs_kl']['mean']:.4f}", flush=True)


if __name__ == "__main__":
    main()
