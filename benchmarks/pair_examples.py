"""Examples of pairs: what leaving out the terms that cannot become an example saves.

    python benchmarks/pair_examples.py runs/demo runs/other --tokens 16384

For each layer of each run: seconds of gathering the examples of features and pairs on held-out text, with the bound on
what a row can hold and without it (all terms are made), in turns, batch by batch; the ratio; and whether the examples
are the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from qkscope.attention import open_sites
from qkscope.config import build
from qkscope.decomposition import SIDES, read_run
from qkscope.evaluate.layer import LayerEvaluation
from qkscope.evaluate.text import text_of
from qkscope.models import load_model
from qkscope.run_folder import layer_folder
from qkscope.tables import pair_examples
from qkscope.training.stream import harvest_finite

WAYS = {"bound": pair_examples.WORTH, "all terms": 0}  # what a bound may cost, in terms that it saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of finished runs without a sweep")
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.tokens:,} held-out tokens")
    for folder in args.folders:
        config = build(read_run(folder)["run"], str(folder / "config.yaml"))
        model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device="cpu")
        for site in open_sites(model, tokenizer, config.numbers):
            one(LayerEvaluation(layer_folder(folder, site.layer), site), args.tokens)


@torch.no_grad()
def one(layer: LayerEvaluation, tokens: int) -> None:
    """Print one layer's row."""
    dec = layer.dec
    gathered = {way: layer.examples(dec) for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for batch in text_of(layer.site, layer.config, "heldout", tokens):
        inputs = harvest_finite(layer.site, batch)
        acts = {s: t.encode(inputs.x_BTD.float()) for s, t in zip(SIDES, (dec.query, dec.key), strict=True)}
        for way, worth in WAYS.items():
            pair_examples.WORTH = worth
            began = time.monotonic()
            gathered[way].add(batch, acts, inputs)
            seconds[way] += time.monotonic() - began
    best, other = (examples.pairs.best.payload for examples in gathered.values())
    same = all(torch.equal(values, other[name]) for name, values in best.items())
    largest = float((best["effect"] - other["effect"]).abs().max())
    print(
        f"{layer.config.model} layer {dec.layer}, {len(dec.pairs):,} pairs: {seconds['bound']:.1f} s, all terms "
        f"{seconds['all terms']:.1f} s, {seconds['all terms'] / seconds['bound']:.1f} times as fast; "
        f"{'the same' if same else f'effects differ by at most {largest:.1e}'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
