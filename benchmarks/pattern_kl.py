"""Step 1's three pattern KLs with their gradients: from whole patterns, in blocks, and (on a CUDA device) by Triton.

    python benchmarks/pattern_kl.py --contexts 256 1024 4096

Causal attention of GPT-2 small's shape on random queries and keys, a batch of `--tokens` tokens (one sequence at
least). Printed for each context: processor seconds (on a GPU: seconds) of the KLs and gradients, median of the repeats,
which take turns in one process; by how much that grew the most memory that a process of its own had held for its
inputs; how far the gradients are from those made of whole patterns, as a share of the largest; and the ratios of time
and memory to that way. At long contexts some of the heads stand for all, so that a context takes a minute at the most.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from qkscope.kernels.pattern_kl import blocked
from qkscope.kernels.row_kl import exp, row_entropy, row_kl
from qkscope.pattern import PatternRule

PARTS = 3.0, 1.0, 1.0
SCORES = 1 << 25  # of one context, at the most
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """What the KLs are of, in the order in which they are asked for it."""

    q_BTNH: Tensor
    k_BTGH: Tensor
    q_hat_BTNH: Tensor
    k_hat_BTGH: Tensor
    visible_BQK: Tensor
    weight_BQ: Tensor


def case(context: int, args: argparse.Namespace) -> Case:
    g = torch.Generator().manual_seed(0)
    batch, heads = max(args.tokens // context, 1), heads_at(context, args)
    groups = max(args.groups * heads // args.heads, 1)
    q, k = (torch.randn(batch, context, n, args.head_width, generator=g) for n in (heads, groups))
    q, k = 1.5 * q * args.head_width**-0.25, 1.5 * k * args.head_width**-0.25
    hat = [y + 0.3 * torch.randn(y.shape, generator=g) * y.std() for y in (q, k)]
    visible = torch.ones(1, context, context, dtype=torch.bool).tril()
    weight = torch.full((batch, context), 1 / (batch * context * heads))
    return Case(*(y.to(DEVICE) for y in (q, k, *hat, visible, weight)))


def heads_at(context: int, args: argparse.Namespace) -> int:
    """How many heads are measured: all, or on a CPU as many as `SCORES` allow, of which the key heads are a part."""
    if DEVICE == "cuda":
        return args.heads
    most = min(SCORES // (max(args.tokens // context, 1) * context**2), args.heads)
    step = args.heads // args.groups
    return max(most // step, 1) * step


def from_whole_patterns(case: Case) -> tuple[Tensor, Tensor]:
    q, k, q_hat, k_hat, visible, weight = case
    q_hat, k_hat = (y.detach().requires_grad_() for y in (q_hat, k_hat))
    rule = PatternRule(visible, 1.0)
    log_true = rule.log_pattern(q, k)
    true, entropy = exp(log_true), row_entropy(log_true)
    del log_true
    loss = q.new_zeros(())
    for part, one in zip(PARTS, ((q_hat, k_hat), (q_hat, k), (q, k_hat)), strict=True):
        loss = loss + part * (row_kl(rule.masked(rule.scores(*one)), true, entropy) * weight[:, None]).sum()
    grad_q, grad_k = torch.autograd.grad(loss, (q_hat, k_hat))
    return grad_q, grad_k


def in_blocks(case: Case) -> tuple[Tensor, Tensor]:
    _, grad_q, grad_k = blocked(*case, None, None, PARTS, gradients=True)
    assert grad_q is not None and grad_k is not None
    return grad_q, grad_k


def by_triton(case: Case) -> tuple[Tensor, Tensor]:
    from qkscope.kernels.pattern_kl_triton import fused

    _, grad_q, grad_k = fused(*case, None, None, PARTS, gradients=True)
    assert grad_q is not None and grad_k is not None
    return grad_q, grad_k


WAYS: dict[str, Callable[[Case], tuple[Tensor, Tensor]]] = {"whole patterns": from_whole_patterns, "blocks": in_blocks}
if DEVICE == "cuda" and find_spec("triton"):
    WAYS["Triton"] = by_triton


def megabytes(context: int, way: str, args: argparse.Namespace) -> float:
    """By how much this process has to grow to take a way, its inputs once made."""
    small = argparse.Namespace(**{**vars(args), "tokens": 1})
    WAYS[way](case(16, small))  # what is loaded once
    inputs = case(context, args)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](inputs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def seconds(way: Callable[[Case], tuple[Tensor, Tensor]], inputs: Case) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter() if DEVICE == "cuda" else time.process_time()
    way(inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - began
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", metavar="WAY", help="the memory of this way alone, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(megabytes(args.contexts[0], args.one, args)))
        return
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {args.threads} threads"
    print(f"{args.heads} heads x {args.head_width}, {args.groups} key heads, {name}")
    held: dict[tuple[int, str], float] = {}
    for context in args.contexts:  # before this process has grown: a new one starts with the peak of the one it is of
        for way in WAYS:
            command = [sys.executable, *sys.argv, "--contexts", str(context), "--one", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            held[context, way] = json.loads(done.stdout)
    for context in args.contexts:
        inputs = case(context, args)
        wanted = from_whole_patterns(inputs)
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        off = {way: max(_off(*pair) for pair in zip(f(inputs), wanted, strict=True)) for way, f in WAYS.items()}
        for _ in range(args.repeats):
            for way, f in WAYS.items():
                taken[way].append(seconds(f, inputs))
        some = f", {inputs[0].shape[2]} of {args.heads} heads" if inputs[0].shape[2] < args.heads else ""
        title = f"context {context}, {len(inputs[0])} sequences{some}"
        print(f"\n{title:<36}{'seconds':>8}{'MB':>10}{'gradients off by':>20}")
        first = None
        for way in WAYS:
            row = statistics.median(taken[way]), held[context, way]
            first = first or row
            ratios = f"   {first[0] / row[0]:.1f} x as fast, {row[1] / max(first[1], 1):.3f} of the memory"
            print(f"{way:<28}{row[0]:>16.4f}{row[1]:>10.0f}{off[way]:>20.1e}{ratios}", flush=True)


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    main()
