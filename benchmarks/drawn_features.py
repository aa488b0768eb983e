"""How many features the pair penalty must look at in a step, where there are more (training/pair_penalty.py: `DRAWN`).

    python benchmarks/drawn_features.py --layers stories-gpt2=3 MODEL=LAYER=TEXT --drawn 1024 512 256

`default` at `--k` for either side and `--width`, then pruned and tuned; held-out pattern KL with all pairs and with
fewer, and dead features before tune.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from qkscope.config import DictionaryConfig
from qkscope.evaluate.quality.bench import LayerBench
from qkscope.evaluate.quality.report import SIZES, kl_of
from qkscope.training import pair_penalty

COUNTS = (8000, 4000, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--drawn", type=int, nargs="+", default=[1024, 512, 256])
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--k", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=150_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["all pairs", *(f"{count:,}" for count in COUNTS)]
    print(f"{'':<26}{'drawn':>6}" + "".join(f"{c:>11}" for c in columns) + f"{'dead q/k':>12}{'step 1, s':>11}")
    for named in args.layers:
        bench = LayerBench.named(named, 0, replace(SIZES["small"], tokens=args.tokens))
        for drawn in args.drawn:
            pair_penalty.DRAWN = drawn
            job = bench.step1("job", DictionaryConfig(width=args.width, k=args.k))
            seconds = bench.fit([job], args.tokens)
            whole = bench.judge(job)
            kls = [kl_of(whole)]
            kls += [kl_of(bench.judge(made)) for _, _, made, _ in bench.prune(job, COUNTS, args.tokens, ("tune",))]
            dead = "/".join(f"{whole[f'dead_{side}']['mean']:.0%}" for side in ("query", "key"))
            name = bench.title
            print(f"{name:<26}{drawn:>6}{''.join(f'{kl:>11.4f}' for kl in kls)}{dead:>12}{seconds:>11.0f}", flush=True)


if __name__ == "__main__":
    main()
