"""A step of step 2 at long contexts: the KL through a map head by head, and through scores of all heads.

    python benchmarks/long_maps.py [--contexts 256 1024 4096] [--rotary]

At GPT-2 small's attention shape (random weights), width 2,400 a side, 20,000 pairs, without the model's own pass:
seconds in turns, the most memory that a step holds beyond what is there anyway, and beside them a step of step 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from itertools import repeat
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from qkscope.evaluate.speed.measure import most_held
from qkscope.evaluate.speed.step import Steps
from qkscope.evaluate.speed.world import RandomText, Size, World, job_of
from qkscope.pairs import tune
from qkscope.pairs.importance import rank_pairs
from qkscope.pairs.pair_map import active_scores
from qkscope.training.objective import PatternTarget

TOKENS, RANKED, PAIRS, TURNS = 2048, 256, 20_000, 5  # of a step at least; of the sequence that pairs are ranked on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rotary", action="store_true")
    args = parser.parse_args()
    if len(args.contexts) == 1:
        one(args.contexts[0], rotary=args.rotary)
        return
    for context in args.contexts:  # each in a process of its own
        rotary = ["--rotary"] if args.rotary else []
        subprocess.run([sys.executable, sys.argv[0], "--contexts", str(context), *rotary], check=True)


def whole(*options: object) -> tuple[Tensor, Tensor]:
    """In the place of `active_kl`: scores of all heads at once; it is handed the target itself."""
    *of_map, target = options
    assert isinstance(target, PatternTarget)
    rows = target.kl_rows(active_scores(*of_map))  # type: ignore[arg-type]
    return target.mean(rows), rows.detach()


def one(context: int, *, rotary: bool) -> None:
    """Print one context's rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = max(context, TOKENS)
    size = Size(context=context, batch_tokens=tokens, model_layers=2, layers=(1,), sample_tokens=tokens, rotary=rotary)
    world = World(size, device)
    bench, statistics = world.workbench(tokens), world.statistics([1])[0]
    job = job_of(1, statistics, "default", (size.width, size.width), size.k).eval()
    for side in (job.query, job.key):
        side.calibrate(statistics["query"].x_nD)
    pairs, _ = rank_pairs([bench.sample[0].crop(RANKED)], job.query, job.key, PAIRS)
    batch = next(RandomText(world, [world.site], tokens))
    jobs = {name: bench.map_job(name, job, pairs, tuned=name == "tune") for name in ("tune", "refit")}
    jobs["tune"].keep(torch.arange(len(pairs), device=device))
    steps = {name: Steps([made], repeat(batch), device) for name, made in jobs.items()}
    steps["step 1"] = Steps([job_of(1, statistics, "default", (size.width, size.width), size.k)], repeat(batch), device)
    print(f"context {context}, {tokens} tokens{', rotary' if rotary else ''}", flush=True)
    for name, taken in steps.items():
        ways = {"head by head": taken.step, "all heads": lambda taken=taken: at_once(taken)}
        if name == "step 1":
            ways = {"": taken.step}
        for step in ways.values():
            step()
        held = {way: most_held(step, device) or 0 for way, step in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(TURNS):
            for way, step in ways.items():
                began = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[way].append(time.perf_counter() - began)
        said = [f"{way} {median(seconds[way]):6.2f} s {held[way] / 1e6:6,.0f} MB" for way in ways]
        if len(ways) > 1:
            each = [b / a for a, b in zip(seconds["head by head"], seconds["all heads"], strict=True)]
            said.append(f"{median(each):.1f} ({min(each):.1f} to {max(each):.1f}) times as fast")
        print(f"  {name:<8} {'   '.join(said)}", flush=True)


def at_once(steps: Steps) -> None:
    with (
        patch.object(tune, "active_kl", whole),
        patch.object(PatternTarget, "by_head", property(lambda target: target)),
    ):
        steps.step()


if __name__ == "__main__":
    main()
