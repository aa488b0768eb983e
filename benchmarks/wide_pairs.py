"""Step 2 at width: seconds and memory of ranking, of a step of refit and of tune, and of judging a pruned map.

    python benchmarks/wide_pairs.py --widths 2400 8192 24576

GPT-2 small's attention (12 heads x 64, context 256) with random weights, on random text; dictionaries as step 1 leaves
them in shape: BatchTopK with k active features a token, every width the same. Each figure is of a process of its own:
seconds of the processor on one thread, without the model's own pass, and the most memory that the process ever held,
PyTorch, the model and the dictionaries included. `model` is a process that makes these and stops. Then how time grows
with tokens and with k, at `--grown` features a side.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qkscope.decomposition import Decomposition, SiteShape
from qkscope.evaluate.patterns import KLScore
from qkscope.evaluate.speed.step import Steps
from qkscope.evaluate.speed.world import Size, World, job_of
from qkscope.pairs.importance import rank_pairs
from qkscope.pairs.pair_map import Pairs, rows, weight_strength
from qkscope.pairs.tune import MapJob
from qkscope.training.start import side_statistics
from qkscope.training.stream import Harvest

CPU, PAIRS, BATCH, DROPPED = torch.device("cpu"), 20_000, 2048, 1e-3
WAYS = ("model", "rank", "refit", "tune", "evaluate")  # rank first of those with pairs: it leaves them for the others


class Again:
    """The same harvest again and again: what a step costs without the model."""

    def __init__(self, harvest: Harvest) -> None:
        self.harvest = harvest

    def __next__(self) -> Harvest:
        return self.harvest

    def state(self) -> dict:
        raise NotImplementedError

    def restore(self, state: dict) -> None:
        raise NotImplementedError


def measure(way: str, width: int, k: float, tokens: int, repeats: int, path: Path) -> dict[str, float]:
    """One way in this process; ranked pairs go to `path`, and the other ways have them from there."""
    torch.set_num_threads(1)
    size = Size(width=width, k=k, vocabulary=8192, pairs=PAIRS)
    world = World(size, CPU)
    batches = [world.text(BATCH) for _ in range(tokens // BATCH)]
    sample = [world.read(batch) for batch in batches]
    known = side_statistics(sample[:1])
    job = job_of(world.last.layer, known, "default", (width, width), k).eval()
    for side in (job.query, job.key):
        side.calibrate(known["query"].x_nD[: size.context])
    found: dict[str, float] = {}
    if way == "rank":
        acts = [side.encode(sample[0].x_BTD[0]) for side in (job.query, job.key)]
        found |= {f"l0_{i}": float((a > 0).sum(1).float().mean()) for i, a in enumerate(acts)}
        act: Callable[[], object] = lambda: ranked.append(rank_pairs(sample, job.query, job.key, PAIRS))  # noqa: E731
        ranked: list[tuple[Pairs, torch.Tensor]] = []
    elif way != "model":
        pairs = Pairs(*load_file(path).values(), width, width, size.heads)
        whole = batches[0] if tokens == BATCH else world.text(tokens)
        seen = sample[0] if tokens == BATCH else world.read(whole)
        act = step_of(way, world, job.query, job.key, pairs, Harvest({world.last.layer: seen}, whole, tokens))
    if way != "model":
        spent = []
        for _ in range(repeats + (way != "rank")):  # the first step makes what is made once
            began = time.process_time()
            act()
            spent.append(time.process_time() - began)
        found["seconds"] = statistics.median(spent[way != "rank" :])
    if way == "rank":
        save_file(dict(zip(("0", "1", "2"), ordered(ranked[0][0]), strict=True)), path)
    return {**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def ordered(pairs: Pairs) -> list[torch.Tensor]:
    return [pairs.query_P, pairs.key_P, pairs.head_P]


def step_of(way: str, world: World, query, key, pairs: Pairs, harvest: Harvest) -> Callable[[], object]:
    shape = SiteShape(**world.last.shape, rotary=False, reads=None)
    if way == "evaluate":
        strength = weight_strength(pairs, rows(query, shape.N), rows(key, shape.G)).detach()
        from qkscope.config import RunConfig

        dec = Decomposition(world.last.layer, shape, query, key, pairs, strength, strength, strength.abs(), RunConfig())
        (inputs,) = harvest.layers.values()
        return lambda: KLScore().add(inputs, dec.log_pattern_kept(inputs))
    rate = 1e-3 if way == "tune" else 0.0
    job = MapJob(
        world.last.layer, way, query, key, pairs, dictionary_rate=rate, strength_rate=1e-3, dropped_sparsity=DROPPED
    )  # fmt: skip
    job.keep(torch.arange(len(pairs)))  # as a run does: tune drops the features that no pair names
    job.train()
    return Steps([job], Again(harvest), CPU).step


def in_process(way: str, width: int, k: float, tokens: int, repeats: int, path: Path) -> dict[str, float]:
    one = ["--one", way, str(width), str(k), str(tokens), str(path), "--repeats", str(repeats)]
    done = subprocess.run([sys.executable, __file__, *one], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def case(width: int, k: float, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.safetensors"
        return {way: in_process(way, width, k, tokens, repeats, path) for way in WAYS}


def line(name: str, found: dict[str, dict[str, float]]) -> str:
    cells = [f"{found[way].get('seconds', 0):>8.2f} s{found[way]['megabytes']:>7,.0f} MB" for way in WAYS[1:]]
    return f"{name:<28}{found['model']['megabytes']:>7,.0f} MB" + "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="*", type=int, default=[2400, 8192, 24_576])
    parser.add_argument("--grown", type=int, default=8192, help="width at which tokens and k grow; 0: not measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=5, metavar=("WAY", "WIDTH", "K", "TOKENS", "PAIRS"), help="this alone, as JSON")
    args = parser.parse_args()
    if args.one:
        way, width, k, tokens, path = args.one
        print(json.dumps(measure(way, int(width), float(k), int(tokens), args.repeats, Path(path))))
        return
    print(f"12 heads x 64, context 256, {PAIRS:,} pairs, one thread; torch {torch.__version__}")
    print(f"\n{'':<28}{'model':>10}" + "".join(f"{way:>20}" for way in WAYS[1:]))
    for width in args.widths:
        print(line(f"width {width:,}, 2,048 tokens", case(width, 16, 2048, args.repeats)), flush=True)
    if args.grown:
        for tokens in (2048, 4096, 8192):
            found = case(args.grown, 16, tokens, args.repeats)
            print(line(f"width {args.grown:,}, {tokens:,} tokens", found), flush=True)
        for k in (8, 16, 32):
            print(line(f"width {args.grown:,}, k {k}", case(args.grown, k, 2048, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
