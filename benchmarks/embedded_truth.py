"""What a decomposition of an embedded model finds of what is known, over seeds: the tables of docs/embedded.md.

    python benchmarks/embedded_truth.py --folder build/truth --json benchmarks/results/embedded_truth.json

One run a seed (it goes on where it was interrupted), then

1. by layer: features named (F1 of 0.8 or more on text the label was not chosen on), mean F1 plain and weighted by what
   a feature's pairs matter, and the share of importance in pairs with most of theirs along links; beside the controls.
2. circuits: of the layer's `TOP` most important pairs of two features, those whose labels fit the circuit and that run
   mostly along links where it has any; the one of them whose lesser F1 is largest, with its place by importance.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qkscope as qk

TOP = 200
SIDES = ("query", "key")
PEOPLE = ("name", "person", "surname", "of_two", "giver", "indirect_object")
CIRCUITS: dict[str, tuple[Callable[[str], bool], Callable[[str], bool], bool]] = {
    # query's label, key's label, whether links say which token is meant
    "name mover": (
        lambda label: any(f"before {person}" in label or f"before again_{person}" in label for person in PEOPLE),
        lambda label: label.startswith((*PEOPLE, "again_of_two")),
        True,
    ),
    "induction": (
        lambda label: label.startswith(("song", "repeat")) or "before repeat" in label,
        lambda label: "song" in label or "repeat" in label,
        False,  # links run from a word to the same word before it, not to the one after that
    ),
    "bracket": (
        lambda label: "bracket_close" in label,
        lambda label: label.startswith("bracket_open") or label == "“(”",
        True,
    ),
    "BOS": (lambda label: True, lambda label: label == "bos", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories-gpt2")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--k", type=float, default=6)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--pair-tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    found: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items() if k not in ("folder", "json")}}
    runs = []
    for seed in args.seeds:
        config = qk.RunConfig.model_validate({
            "model": args.model, "layers": args.layers,
            "dictionary": {"width": args.width, "k": args.k},
            "training": {"tokens": args.tokens, "batch_tokens": args.batch_tokens, "seed": seed},
            "pairs": {"count": args.count, "tokens": args.pair_tokens},
            "evaluation": {"tokens": 32_768},
        })  # fmt: skip
        out = args.folder / f"{args.model}_{seed}"
        qk.run(config, out=out)
        runs.append(out)
    for layer in args.layers:
        folders = [out / f"layer_{layer}" for out in runs]
        reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
        details = [json.loads((folder / "truth.json").read_text()) for folder in folders]
        found[f"layer_{layer}"] = {
            "fit": _fit(reports),
            "truth": {name: _scores([r["truth"][name] for r in reports]) for name in reports[0]["truth"]},
            "circuits": {name: [best_pair(truth, *fits) for truth in details] for name, fits in CIRCUITS.items()},
        }
        show(layer, found[f"layer_{layer}"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _fit(reports: list[dict[str, Any]]) -> dict[str, Any]:
    ce = [r["ce"]["map_pruned"]["mean"] - r["ce"]["model"]["mean"] for r in reports]
    dead = {f"dead_{side}": spread([r["dead"][side]["mean"] for r in reports]) for side in SIDES}
    kl = {name: spread([r["pattern_kl"][name]["mean"] for r in reports]) for name in ("map_pruned", "uniform")}
    return {**kl, "ce_increase": spread(ce), **dead}


def _scores(scores: list[dict[str, Any]]) -> dict[str, Any]:
    out = {}
    for side in SIDES:
        if side in scores[0]:
            for key in ("named", "f1_mean", "f1_by_importance"):
                out[f"{key}_{side}"] = spread([s[side][key] for s in scores])
    return out | {key: spread([s["pairs"][key] for s in scores]) for key in ("matching", "mostly_linked")}


def best_pair(
    truth: dict[str, Any], query: Callable[[str], bool], key: Callable[[str], bool], has_links: bool
) -> dict[str, Any] | None:
    """The pair of a circuit whose two features are named best; None where there is none."""
    found = []
    two = [p for p in truth["pairs"] if p["query_feature"] >= 0 and p["key_feature"] >= 0]
    for place, pair in enumerate(two[:TOP]):
        labels = [truth["features"][side][pair[f"{side}_feature"]] for side in SIDES]
        if None in labels or not (query(labels[0]["label"]) and key(labels[1]["label"])):
            continue
        if has_links and pair["linked"] < 0.5 * pair["importance"]:
            continue
        found.append({
            "place": place + 1, "head": pair["head"], "importance": pair["importance"],
            **{side: {"label": one["label"], "f1": one["f1"]} for side, one in zip(SIDES, labels, strict=True)},
        })  # fmt: skip
    return max(found, key=lambda row: min(row[side]["f1"] for side in SIDES), default=None)


def show(layer: int, found: dict[str, Any]) -> None:
    fit = {key: cell(value, 4) for key, value in found["fit"].items()}
    print(f"\nlayer {layer}: KL {fit['map_pruned']} (uniform {fit['uniform']}), CE +{fit['ce_increase']}, "
          f"dead {fit['dead_query']} / {fit['dead_key']}")  # fmt: skip
    for name, scores in found["truth"].items():
        print(f"  {name:<14}", "  ".join(f"{key} {cell(value, 3)}" for key, value in scores.items()))
    for name, pairs in found["circuits"].items():
        for pair in pairs:
            if pair is None:
                print(f"  {name}: none")
                continue
            sides = " and ".join(f"{pair[side]['label']} {pair[side]['f1']:.2f}" for side in SIDES)
            print(f"  {name}: {sides}, head {pair['head']}, pair {pair['place']}")


def cell(figure: dict[str, Any], digits: int) -> str:
    sd = f" ±{figure['sd']:.{digits}f}" if figure["sd"] is not None else ""
    return f"{figure['mean']:.{digits}f}{sd}"


if __name__ == "__main__":
    main()
