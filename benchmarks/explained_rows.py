"""How many pairs say why a head looks where it looks, on the confident rows of a run's held-out text.

    python benchmarks/explained_rows.py runs/demo runs/other --rows 2000 --json benchmarks/results/explained_rows.json

For each layer of each run: the share of confident rows (src/qkscope/explain/explained.py) whose log-odds against the
strongest competitors at most 1, 3, 5 … pairs add up to within a tenth, of the model's own and of the map's; beside it
the same with the pairs' key features shuffled within each head, as a control.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qkscope.evaluate.controls import shuffled_pairs
from qkscope.evaluate.text import text_of
from qkscope.explain.explained import explained_rows
from qkscope.explain.opening import open_layers

TOKENS = 65_536  # held-out tokens that rows are taken from, at the most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for folder in args.runs:
        for dec, site in open_layers(folder):
            pairs, strength = shuffled_pairs(dec)
            shuffled = replace(
                dec, pairs=pairs, strength_P=strength, weight_strength_P=strength, importance_P=strength.abs()
            )
            for name, one in (("", dec), ("shuffled", shuffled)):
                row = explained_rows(one, site, text_of(site, dec.config, "heldout", TOKENS), args.rows)
                head = {"model": dec.config.model, "layer": dec.layer, "pairs": len(dec.pairs), "control": name}
                found.append({**head, **row})
                print(f"{folder.name} layer {dec.layer}, {len(dec.pairs):,} pairs {name}: {row['rows']:,} rows")
                for of in ("model", "map"):
                    cells = [f"{n} {figure['mean']:.1%}" for n, figure in row[of].items()]
                    print(f"  the {of}'s log-odds, at most … pairs: " + "  ".join(cells), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": args.rows, "layers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
