"""Step 2 at width: seconds and memory of ranking, of a step of refit and of tune, and of judging a pruned map.

    python benchmarks/wide_pairs.py --widths 2400 8192 24576
    python benchmarks/wide_pairs.py --widths 2400 8192 24576 --rotary

GPT-2 small's attention (12 heads x 64, context 256), or a Llama's of that shape, with random weights, on random text;
dictionaries as step 1 leaves them in shape: BatchTopK with k active features a token, every width the same. Each figure
is of a process of its own: seconds of the processor on one thread, without the model's own pass, and the most memory
that the process ever held (MB are 2^20 bytes), PyTorch, the model and the dictionaries included. `model` is a process
that makes these and stops. Then how time grows with tokens and with k, at `--grown` features a side, each row in one
process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qkscope.config import RunConfig
from qkscope.decomposition import Decomposition
from qkscope.dictionary import SparseTranscoder
from qkscope.evaluate.patterns import KLScore
from qkscope.evaluate.speed.step import Steps
from qkscope.evaluate.speed.world import Size, World
from qkscope.pairs.importance import rank_pairs
from qkscope.pairs.pair_map import Pairs, rows, weight_strength
from qkscope.pairs.tune import MapJob
from qkscope.training.objective import Padding
from qkscope.training.start import SideStatistics, side_statistics
from qkscope.training.stream import Harvest

CPU, PAIRS, BATCH, DROPPED = torch.device("cpu"), 20_000, 2048, 1e-3
BIAS = 0.2  # of the mean query or key in the bias: more, and all pairs would have the query's
LIKE = 0.5  # how far a feature's direction is that of a token that was seen: then some fire often, and most seldom
# Rank is the first of those with pairs, for it leaves them for the others; tune the last, for it changes dictionaries.
WAYS = ("model", "rank", "refit", "evaluate", "tune")


class Case:
    """A layer, what it saw, and its dictionaries; ranked pairs go to `path`, where other processes have them from."""

    def __init__(self, width: int, k: float, tokens: int, path: Path, rotary: bool) -> None:
        self.width, self.path = width, path
        self.world = World(Size(width=width, k=k, vocabulary=8192, rotary=rotary), CPU)
        self.sample = [self.world.read(self.world.text(BATCH)) for _ in range(tokens // BATCH)]
        known = side_statistics(self.sample[:1])
        self.query, self.key = (dictionary(known[side], width, k, seed) for seed, side in enumerate(("query", "key")))
        self.step_tokens = tokens

    def seconds(self, way: str, repeats: int) -> float:
        """Of the processor for one call: the median of the repeats, after a step that makes what is made once."""
        act = self.rank if way == "rank" else self.step(way)
        if way != "rank":
            act()
        spent = []
        for _ in range(repeats):
            began = time.process_time()
            act()
            spent.append(time.process_time() - began)
        return statistics.median(spent)

    def rank(self) -> None:
        pairs, _ = rank_pairs(self.sample, self.query, self.key, PAIRS)
        save_file({name: getattr(pairs, name) for name in ("query_P", "key_P", "head_P")}, self.path)

    def step(self, way: str) -> Callable[[], object]:
        """A step of refit or of tune, or the KL of the pruned map, on all tokens as one batch."""
        world, query, key = self.world, self.query, self.key
        shape, layer = world.shape, world.site.layer
        pairs = Pairs(**load_file(self.path), n_query=self.width, n_key=self.width, n_heads=shape.N)
        batch = world.text(self.step_tokens)
        inputs = world.read(batch)
        if way == "evaluate":
            s_P = weight_strength(pairs, rows(query, shape.N), rows(key, shape.G)).detach()
            dec = Decomposition(layer, shape, query, key, pairs, s_P, s_P, s_P.abs(), RunConfig())
            return lambda: KLScore().add(inputs, dec.kept_by_head(inputs))
        rate = 1e-3 if way == "tune" else 0.0
        job = MapJob(
            layer, way, query, key, pairs, dictionary_rate=rate, strength_rate=1e-3, dropped_sparsity=DROPPED
        )  # fmt: skip
        job.keep(torch.arange(len(pairs)))  # as a run does: tune drops the features that no pair names
        job.train()
        # What a step costs without the model.
        again = repeat(Harvest({layer: inputs}, batch, batch.n_tokens, Padding.of(batch.real_BT)))
        return Steps([job], again, CPU).step


@torch.no_grad()
def dictionary(known: SideStatistics, width: int, k: float, seed: int) -> SparseTranscoder:
    """Random directions and what the layer's own projection makes of them, in no more memory than they take."""
    x_nD = known.x_nD[:256]
    side = SparseTranscoder(x_nD.shape[1], width, known.out_nM.shape[1], "batchtopk", k).eval()
    g = torch.Generator().manual_seed(seed)
    side.W_enc.normal_(generator=g).div_(side.W_enc.norm(dim=0))
    like = (known.x_nD - known.x_nD.mean(0))[torch.randint(len(known.x_nD), (width,), generator=g)]
    side.W_enc.add_(like.div_(like.norm(dim=1, keepdim=True)).T, alpha=LIKE).div_(side.W_enc.norm(dim=0))
    side.b_in.copy_(known.x_nD.mean(0))
    side.b_out.copy_(known.out_nM.mean(0) * BIAS)
    torch.mm(side.W_enc.T, known.projection_DM, out=side.W_dec)
    side.set_metric(known.metric_NHH)
    side.calibrate(x_nD)
    moved, wanted = side.encode(x_nD) @ side.W_dec, known.out_nM[:256] - side.b_out
    gain = float(wanted.norm() / moved.norm())  # random directions overlap, and overshoot
    side.W_dec.mul_(gain)
    side.threshold.mul_(gain)
    return side


def in_process(ways: str, width: int, k: float, tokens: int, path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of these ways and the most megabytes held, from a new process."""
    one = ["--one", ways, str(width), str(k), str(tokens), str(path), "--repeats", str(args.repeats)]
    one += ["--rotary"] if args.rotary else []
    done = subprocess.run([sys.executable, __file__, *one], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="*", type=int, default=[2400, 8192, 24_576])
    parser.add_argument("--grown", type=int, default=2400, help="width at which tokens and k grow; 0: not measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rotary", action="store_true", help="with a rotary embedding")
    parser.add_argument("--one", nargs=5, metavar=("WAYS", "WIDTH", "K", "TOKENS", "PAIRS"), help="as JSON, in here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        ways, width, k, tokens, path = args.one
        case = Case(int(width), float(k), int(tokens), Path(path), args.rotary)
        found = {way: case.seconds(way, args.repeats) for way in ways.split(",") if way != "model"}
        print(json.dumps({**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    print(
        f"12 heads x 64{', rotary' if args.rotary else ''}, context 256, {PAIRS:,} pairs, one thread of "
        f"{platform.machine()}; torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.safetensors"
        print(f"\n2,048 tokens, k 16{'model':>16}" + "".join(f"{way:>20}" for way in WAYS[1:]))
        for width in args.widths:
            print(f"width {width:<14,}", end="")
            for way in WAYS:
                found = in_process(way, width, 16, BATCH, path, args)
                seconds = f"{found[way]:>8.2f} s" if way in found else ""
                print(f"{seconds}{found['megabytes']:>{7 if seconds else 11},.0f} MB", end="", flush=True)
            print()
        if args.grown:
            print(f"\nwidth {args.grown:<14,}" + "".join(f"{way:>14}" for way in WAYS[1:]))
            for k, tokens in ((16, 2048), (16, 4096), (16, 8192), (8, 2048), (32, 2048)):
                found = in_process(",".join(WAYS[1:]), args.grown, k, tokens, path, args)
                cells = "".join(f"{found[way]:>12.2f} s" for way in WAYS[1:])
                print(f"{tokens:,} tokens, k {k:<5}{cells}", flush=True)


if __name__ == "__main__":
    main()
