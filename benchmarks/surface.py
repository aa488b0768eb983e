"""The surface of a layer: width × active features × pairs against held-out pattern KL.

    python benchmarks/surface.py --layers stories-gpt2=3 MODEL=LAYER=TEXT --json benchmarks/results/surface.json

For each layer every width with every k is trained on the same tokens, each is pruned and tuned to every count, and the
KLs are printed: a block a width, a row a k (the same on both sides), a column a count (`all`: before pruning). What the
JSON file already holds is not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qkscope.config import DictionaryConfig
from qkscope.evaluate.quality.bench import LayerBench
from qkscope.evaluate.quality.report import SIZES, kl_of
from qkscope.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--widths", type=int, nargs="+", default=[75, 150, 300])
    parser.add_argument("--ks", type=float, nargs="+", default=[4, 8, 16])
    parser.add_argument("--counts", type=int, nargs="+", default=[8000, 4000, 2000, 1000, 500])
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {**vars(args), "json": None, "layers": None}
    found: dict[str, Any] = {"settings": settings, "layers": {}}
    if args.json.exists():
        old = json.loads(args.json.read_text(encoding="utf-8"))
        if old["settings"] != json.loads(json.dumps(settings)):
            parser.error(f"{args.json} holds other settings; name another file")
        found = old
    for named in args.layers:
        model, layer, *text = named.split("=")
        name = f"{Path(model).name} layer {layer}"
        if name not in found["layers"]:
            size = replace(SIZES["small"], tokens=args.tokens)
            bench = LayerBench(model, text[0] if text else "embedded", int(layer), args.seed, size)
            found["layers"][name] = {"uniform_kl": bench.bounds()["uniform_kl"], "rows": rows_of(bench, args)}
            write_json(args.json, found)
        show(name, found["layers"][name], args)


def rows_of(bench: LayerBench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every point of one layer's surface."""
    grid = [(width, k) for width in args.widths for k in args.ks if k <= width / 4]
    jobs = {point: bench.step1(str(point), DictionaryConfig(width=point[0], k=point[1])) for point in grid}
    bench.fit(list(jobs.values()), args.tokens)
    rows = []
    for (width, k), job in jobs.items():
        head = {"width": width, "k": k}
        rows.append({**head, "asked": None, **bench.judge(job)})
        for _, count, made, _ in bench.prune(job, args.counts, args.tokens, ("tune",)):
            rows.append({**head, "asked": count, **bench.judge(made)})
    return rows


def show(name: str, layer: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"\n{name}: held-out KL (uniform {kl_of({'pattern_kl': layer['uniform_kl']}):.3f})")
    kls = {(row["width"], row["k"], row["asked"]): kl_of(row) for row in layer["rows"]}
    print(f"{'width':>6} {'k':>5} {'all':>8} " + " ".join(f"{count:>8,}" for count in args.counts))
    for width in args.widths:
        for k in (k for k in args.ks if (width, k, None) in kls):
            cells = " ".join(f"{kls[width, k, count]:>8.4f}" for count in (None, *args.counts))
            print(f"{width:>6} {k:>5g} {cells}", flush=True)


if __name__ == "__main__":
    main()
