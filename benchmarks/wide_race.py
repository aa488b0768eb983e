"""Seconds to a sparse map of the published mask's KL, at the published width: 2,400 features a side.

    python benchmarks/wide_race.py --recipes seed default --folder trained

The race of `qkscope bench speed` (evaluate/speed/race.py) on layer 3 of `stories-gpt2`, with dictionaries of `--width`
features that are trained for `--tokens` tokens and kept in `--folder`, so that they are trained once. Their dead
features are dropped first, for the mask as for ours. The mask is dense over what is left: its steps take minutes in all
and some gigabytes. Processor seconds on one thread, all of one process.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from pathlib import Path

import torch

from qkscope.evaluate.speed.race import SETTINGS, race
from qkscope.evaluate.speed.report import race_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=["seed", "default"], default=["seed", "default"])
    parser.add_argument("--width", type=int, default=2400)
    parser.add_argument("--tokens", type=int, default=120_000, help="training tokens of the dictionaries")
    parser.add_argument("--mask-steps", type=int, default=160)
    parser.add_argument("--folder", type=Path, required=True, help="where dictionaries are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = replace(SETTINGS, width=args.width, tokens=args.tokens)
    print(f"{args.width:,} features a side, one thread of {platform.machine()}, torch {torch.__version__}", flush=True)
    for recipe in args.recipes:
        path = args.folder / f"{recipe}_{args.width}_{args.tokens}.safetensors"
        found = race(args.mask_steps, settings, recipe, path)
        print("\n" + "\n".join(race_lines(found)), flush=True)


if __name__ == "__main__":
    main()
