"""What `--target.max-kl` finds, and at what cost: layers of several models, several bounds.

    python benchmarks/targets.py --folder build/targets --bounds 0.05 0.1 --json benchmarks/results/targets.json

For each model and bound one run over its last layers (it goes on where it was interrupted). Printed by layer: the KL of
step 1 beside what it was steered to, active features, pairs, the pruned map's held-out KL and cross-entropy increase,
and the training tokens of step 2's stages, the last of which was not good enough and is thrown away; then what the
model loses with all of these layers' patterns replaced at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import qkscope as qk
from qkscope.embedded import EMBEDDED_MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories-gpt2=1,2,3"], help="NAME=LAYERS or FOLDER=LAYERS=TEXT")
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--loss", choices=["max_kl", "max_ce"], default="max_kl")
    parser.add_argument("--share", type=float, default=qk.RunConfig().target.share)
    parser.add_argument("--pair-sparsity", type=float, default=None, help="empty: the recipe's")
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--stage-tokens", type=int, default=60_000)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    rows = []
    for named in args.models:
        model, layers, *text = named.split("=")
        for bound in args.bounds:
            config = qk.RunConfig.model_validate({
                "model": model,
                "layers": [int(layer) for layer in layers.split(",")],
                "data": {"source": text[0] if text else "embedded" if model in EMBEDDED_MODELS else None},
                "dictionary": {"width": args.width, "pair_sparsity": args.pair_sparsity},
                "training": {"tokens": args.tokens, "batch_tokens": args.batch_tokens, "seed": args.seed},
                "pairs": {"count": 4000, "stages": 4, "tokens": 4 * args.stage_tokens},
                "target": {args.loss: bound, "share": args.share},
                "evaluation": {"tokens": 16_384, "adversary_steps": 0, "examples": 0},
            })  # fmt: skip
            run = qk.run(config, args.folder / f"{Path(model).name}_{args.loss}_{bound:g}_{args.share:g}_{args.seed}")
            for layer in config.numbers:
                rows.append(row_of(run, layer, {"model": Path(model).name, "layer": layer, args.loss: bound}))
                print(line_of(rows[-1], args.loss), flush=True)
            rows.append(together_of(run, {"model": Path(model).name, args.loss: bound}))
            print(together_line(rows[-1], args.loss), flush=True)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"arguments": vars(args) | {"folder": None, "json": None}, "rows": rows}, indent=1)
        )


def row_of(run: qk.Run, layer: int, head: dict[str, Any]) -> dict[str, Any]:
    """What the report of a layer says."""
    report = run.decomposition(layer).report
    stages = (run.folder / f"layer_{layer}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tuned = {line["phase"]: line["tokens"] for line in map(json.loads, stages) if line["phase"] != "step1"}
    return {
        **head,
        "step1_kl": report["pattern_kl"]["step1"],
        "pattern_kl": report["pattern_kl"]["map_pruned"],
        "uniform_kl": report["pattern_kl"]["uniform"],
        "random_kl": report["controls"]["random"]["pattern_kl"],
        "ce_increase": report["ce_increase"]["map_pruned"],
        "l0": report["l0"],
        "dead": report["dead"],
        "pairs": report["pairs"]["kept"],
        "reached": report["target"]["reached"],
        "stages": len(tuned),
        "step2_tokens": sum(tuned.values()),
        "seconds": report["seconds"],
    }


def together_of(run: qk.Run, head: dict[str, Any]) -> dict[str, Any]:
    """What the model loses with all layers of a run replaced at once."""
    found = json.loads((run.folder / "together.json").read_text(encoding="utf-8"))
    return {**head, **{key: found[key] for key in ("layers", "ce_increase", "logit_kl")}}


def together_line(row: dict[str, Any], loss: str) -> str:
    ce, zero = row["ce_increase"]["map_pruned"], row["ce_increase"]["zero"]["mean"]
    layers = ", ".join(map(str, row["layers"]))
    return (
        f"{row['model']} layers {layers} at once, {loss} {row[loss]:g}: ΔCE {ce['mean']:+.4f} "
        f"±{ce['ci95'][1] - ce['mean']:.4f} (zero {zero:+.3f}), logit KL {row['logit_kl']['map_pruned']['mean']:.4f}"
    )


def line_of(row: dict[str, Any], loss: str) -> str:
    kl, ce = row["pattern_kl"], row["ce_increase"]
    half = kl["ci95"][1] - kl["mean"]
    controls = f"(random {row['random_kl']['mean']:.3f}, uniform {row['uniform_kl']['mean']:.3f})"
    return (
        f"{row['model']} layer {row['layer']}, {loss} {row[loss]:g}: step 1 KL {row['step1_kl']['mean']:.4f}, "
        f"L0 {row['l0']['query']['mean']:.1f}/{row['l0']['key']['mean']:.1f}, {row['pairs']:,} pairs, "
        f"KL {kl['mean']:.4f} ±{half:.4f} {controls}, "
        f"ΔCE {ce['mean']:+.4f}, {'reached' if row['reached'] else 'NOT reached'}; "
        f"{row['stages']} stages, {row['step2_tokens']:,} tokens"
    )


if __name__ == "__main__":
    main()
