"""Settings of step 1 side by side on the layers of several models: every variant on the same tokens.

    python benchmarks/step1_settings.py --layers stories-gpt2=3 MODEL=LAYER=TEXT --variants "" beta2=0.999 width=600

A variant is `field=value,field=value` of the dictionary's configuration, changed against `--base`; the empty one is the
base itself. Held-out pattern KL with its interval over sequences, dead and dense features, L0; then, over layers and
seeds, the geometric mean of each variant's KL relative to the first variant's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from qkscope.config import DictionaryConfig
from qkscope.evaluate.quality.bench import LayerBench
from qkscope.evaluate.quality.report import SIZES, kl_of, row_line


def values_of(variant: str) -> dict[str, Any]:
    return {name: yaml.safe_load(value) for name, value in (part.split("=") for part in variant.split(",") if part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--base", default="width=300,k=8")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=12_288)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = replace(SIZES["small"], heldout_tokens=args.heldout, batch_tokens=args.batch_tokens, tokens=args.tokens)
    rows: list[dict[str, Any]] = []
    for named in args.layers:
        for seed in args.seeds:
            bench = LayerBench.named(named, seed, size)
            print(f"\n{bench.title}, seed {seed}", flush=True)
            for variant in args.variants:
                job = bench.step1("job", DictionaryConfig(**{**values_of(args.base), **values_of(variant)}))
                seconds = bench.fit([job], args.tokens)
                row = {"dictionary": variant or "base", "method": "", "seconds": seconds, **bench.judge(job)}
                rows.append({"layer": bench.title, "seed": seed, **row})
                print(row_line(row), flush=True)
    print("\nKL relative to the first variant's, geometric mean over layers and seeds, least and most:")
    first = [kl_of(row) for row in rows[:: len(args.variants)]]
    for place, variant in enumerate(args.variants):
        same = rows[place :: len(args.variants)]
        ratios = [kl_of(row) / base for row, base in zip(same, first, strict=True)]
        dead = statistics.fmean(row[f"dead_{side}"]["mean"] for row in same for side in ("query", "key"))
        mean = statistics.geometric_mean(ratios)
        print(f"{variant or 'base':<40} {mean:.3f} ({min(ratios):.3f} to {max(ratios):.3f})  dead {dead:.1%}")
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": {**vars(args), "json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
