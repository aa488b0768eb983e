"""What recurs from seed to seed, and from one half of a text to the other: dictionaries and pairs, beside chance.

    python benchmarks/stability.py --folder build/stability --models stories-gpt2=1,2,3 FOLDER=LAYERS=TEXT

For each model two runs that differ in their seed (and so in the order of the text; the embedded corpus has other
stories for each seed), and, where its text is a file, two with one seed on its documents of even and of odd number.
Then `qkscope compare` of each two. Runs go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import qkscope as qk
from qkscope.config import DataConfig
from qkscope.data.documents import EMBEDDED, open_documents
from qkscope.evaluate.compare import compare_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories-gpt2=1,2,3"], help="NAME=LAYERS or FOLDER=LAYERS=TEXT")
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--k", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs and the halves of texts go")
    args = parser.parse_args()

    def run(model: str, layers: str, source: str, name: str, seed: int) -> Path:
        config = qk.RunConfig.model_validate({
            "model": model,
            "layers": [int(layer) for layer in layers.split(",")],
            "data": {"source": source},
            "dictionary": {"width": args.width, "k": args.k},
            "training": {"tokens": args.tokens, "batch_tokens": args.batch_tokens, "seed": seed},
            "pairs": {"count": args.count, "tokens": args.tokens},
            "evaluation": {"tokens": 4096, "controls": False, "adversary_steps": 0, "examples": 0},
        })  # fmt: skip
        out = args.folder / f"{Path(model).name}_{name}_{seed}"
        qk.run(config, out)
        return out

    for named in args.models:
        model, layers, *text = named.split("=")
        source = text[0] if text else EMBEDDED
        print(f"\n{Path(model).name}: two seeds", flush=True)
        compare_runs(run(model, layers, source, "whole", 0), run(model, layers, source, "whole", 1))
        if text:
            print(f"\n{Path(model).name}: two halves of the text", flush=True)
            even, odd = halves(source, args.folder)
            compare_runs(run(model, layers, str(even), "even", 0), run(model, layers, str(odd), "odd", 0))


def halves(source: str, folder: Path) -> tuple[Path, Path]:
    """The documents of even and of odd number, each in a file of its own."""
    documents = open_documents(DataConfig(source=source))
    even, odd = (folder / f"{Path(source).stem}_{name}.jsonl" for name in ("even", "odd"))
    folder.mkdir(parents=True, exist_ok=True)
    with even.open("w", encoding="utf-8") as evens, odd.open("w", encoding="utf-8") as odds:
        for document in sorted(documents.stream(None, 0, 0), key=lambda d: d.index):
            (odds if document.index % 2 else evens).write(json.dumps({"text": document.text}) + "\n")
    return even, odd


if __name__ == "__main__":
    main()
