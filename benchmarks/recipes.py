"""The two recipes side by side on one layer, and the ways to prune the pair map, on held-out text.

    python benchmarks/recipes.py --model DIR --source FILE.parquet --layer 2 --json out.json

1. Step 1: `seed` at each sparsity given; then `default` with as many active features a side as each of them has on
   held-out text (k and k_key apart). Same tokens, same order, same context.
2. Pairs: for each of the dictionaries, or those named, pattern KL at several pair counts by importance, importance +
   refit, prune and tune, the trained mask (cut to the count by importance), and mask + refit. Every training sees
   `--pair-tokens`, mask + refit twice that, and tune at a count before its last one less.

Figures are means over held-out tokens with 95 % intervals over sequences; seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from qkscope.attention import AttentionInputs, AttentionSite, harvest
from qkscope.config import DataConfig, DictionaryConfig, TrainingConfig
from qkscope.data import Sequences
from qkscope.decomposition import SiteShape
from qkscope.evaluate.patched import PatchedScore
from qkscope.evaluate.patterns import PatternScore, uniform_log_pattern
from qkscope.evaluate.report import Activity
from qkscope.evaluate.workbench import Workbench
from qkscope.models import load_model
from qkscope.pairs.tune import MapJob
from qkscope.training.step1 import Step1Job
from qkscope.training.stream import ModelStream


class Bench(Workbench):
    """One layer of one model, its text, and what is trained on it."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.model, self.tokenizer = load_model(args.model)
        self.site = AttentionSite(self.model, self.tokenizer, layer=args.layer)
        self.data = DataConfig(source=args.source, context=args.context)
        sample = [harvest([self.site], b.tokens_BT, b.real_BT)[0] for b in self.text("train", repeat=True, most=8192)]
        super().__init__(
            args.layer,
            SiteShape(**self.site.shape, rotary=self.site.layout is not None),
            sample,
            lambda: ModelStream([self.site], self.text("train", repeat=True)),
            TrainingConfig(tokens=args.tokens, seed=seed, checkpoint_steps=10**9),
        )
        self.heldout = list(self.text("heldout", repeat=False, most=args.heldout))

    def text(self, split: Any, *, repeat: bool, most: int | None = None) -> Sequences:
        return Sequences(
            self.data, self.tokenizer, split, batch_tokens=2048, seed=self.seed, repeat=repeat, max_tokens=most
        )

    def inputs(self) -> list[AttentionInputs]:
        return [harvest([self.site], b.tokens_BT, b.real_BT)[0] for b in self.heldout]

    @torch.no_grad()
    def judge(self, job: Any) -> dict[str, Any]:
        """Held-out figures of a step 1 job (through q̂k̂) or of a map."""
        dec = self.decomposition(job)
        kept = isinstance(job, MapJob)
        source = dec.log_pattern_kept if kept else dec.log_pattern_all
        score, patched = PatternScore(), PatchedScore()
        activity = {s: Activity() for s in ("query", "key")}
        for batch, inputs in zip(self.heldout, self.inputs(), strict=True):
            score.add(inputs, source(inputs))
            patched.add(self.site, batch, {"patched": dec.pattern_source("kept" if kept else "all")})
            for s, t in (("query", dec.query), ("key", dec.key)):
                activity[s].add(t.encode(inputs.x_BTD.float()), batch.real_BT)
        found = {s: a.report() for s, a in activity.items()}
        return {
            "pattern_kl": score.kl.figure(),
            "ce_increase": patched.increase("patched"),
            "logit_kl": patched.kl["patched"].figure(),
            **{f"{k}_{s}": found[s][k] for k in ("l0", "dead", "dense", "live") for s in found},
            **({"pairs": len(dec.pairs)} if kept else {}),
        }

    def uniform(self) -> dict[str, Any]:
        score = PatternScore()
        for inputs in self.inputs():
            score.add(inputs, uniform_log_pattern(inputs))
        return score.kl.figure()


class Results:
    """What was measured so far: a printed line and an entry of the JSON file for each row, as soon as it is known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = args.json
        self.found: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}, "step1": [], "pairs": []}

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.found[table].append(row)
        show(row)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def step1_table(bench: Bench, out: Results) -> dict[str, Step1Job]:
    """Train `seed` at each sparsity, `default` at the L0 each reaches; print and collect."""
    args = bench.args
    seeds = {
        f"seed λ={s:g}": bench.step1(
            f"seed λ={s:g}",
            DictionaryConfig(recipe="seed", width=args.width, sparsity=s, learning_rate=args.seed_rate),
        )
        for s in args.sparsity
    }
    took = bench.fit(list(seeds.values()), args.tokens)
    jobs: dict[str, Step1Job] = dict(seeds)
    matches: dict[str, DictionaryConfig] = {}
    for name, job in seeds.items():
        row = {"dictionaries": name, "seed": bench.seed, "seconds": took / len(seeds), **bench.judge(job)}
        out.add("step1", row)
        for width in args.default_width:
            label = f"default w={width} at {name}'s L0"
            matches[label] = DictionaryConfig(
                width=width, k=row["l0_query"]["mean"], k_key=row["l0_key"]["mean"]
            )  # fmt: skip
    defaults = {label: bench.step1(label.replace("/", ""), config) for label, config in matches.items()}
    took = bench.fit(list(defaults.values()), args.tokens)
    for name, job in defaults.items():
        row = {"dictionaries": name, "seed": bench.seed, "seconds": took / len(defaults), **bench.judge(job)}
        out.add("step1", row)
    return jobs | defaults


def pair_table(bench: Bench, name: str, job: Step1Job, out: Results) -> None:
    """Every way to prune one pair of dictionaries; print and collect."""
    args, whole = bench.args, bench.judge(job)
    masks = args.mask_sparsity if bench.seed in args.mask_seeds else ()
    for method, _, made, seconds in bench.prune(job, args.counts, args.pair_tokens, mask_sparsity=masks):
        row = {"dictionaries": name, "seed": bench.seed, "method": method, "seconds": seconds, **bench.judge(made)}
        out.add("pairs", row | {"all_pairs_kl": whole["pattern_kl"]})


def show(row: dict[str, Any]) -> None:
    """One line of a table."""
    kl = row["pattern_kl"]
    parts = [
        f"{row['dictionaries']:<34}",
        f"{row.get('method', 'all pairs (q̂k̂)'):<30}",
        f"pairs {row['pairs']:>7,}" if "pairs" in row else " " * 13,
        f"KL {kl['mean']:.4f} ±{kl['ci95'][1] - kl['mean']:.4f}",
        f"ΔCE {row['ce_increase']['mean']:.4f}",
        f"logit KL {row['logit_kl']['mean']:.4f}",
        f"L0 {row['l0_query']['mean']:.1f}/{row['l0_key']['mean']:.1f}",
        f"live {row['live_query']}/{row['live_key']}",
        f"dead {row['dead_query']['mean']:.0%}/{row['dead_key']['mean']:.0%}",
        f"{row['seconds']:.0f} s",
    ]
    print("  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--width", type=int, default=1200, help="of the seed recipe")
    parser.add_argument("--default-width", type=int, nargs="+", default=[1200, 300])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--seed-rate", type=float, default=None)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--heldout", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs-of", nargs="*", default=[], help="names of dictionaries whose pairs are pruned")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--pair-tokens", type=int, default=200_000)
    parser.add_argument("--mask-sparsity", type=float, nargs="+", default=[1e-6])
    parser.add_argument("--mask-seeds", type=int, nargs="*", default=[0], help="seeds that train the mask too")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    out = Results(args)
    for seed in args.seeds:
        bench = Bench(args, seed)
        out.found["uniform_kl"] = uniform = bench.uniform()
        print(f"seed {seed}: uniform pattern {uniform['mean']:.3f} nats", flush=True)
        jobs = step1_table(bench, out)
        for name in jobs if args.pairs_of == ["all"] else args.pairs_of:
            pair_table(bench, name, jobs[name], out)


if __name__ == "__main__":
    main()
