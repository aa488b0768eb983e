"""Candidates for k and the penalties of sizes.py, on seeds that are not reported and without the truth.

    python benchmarks/planted_settings.py small

1. k: `default` at each k; the held-out KL falls steeply while k is below what the layer needs and slowly after.
   The chosen k is where the curve of log KL against log k bends most (largest second difference), averaged over seeds.
2. `seed`: KL and L0 at each penalty, beside that k. (Its recipe's own stayed: see sizes.py.)
3. Mask: of the penalties tried, the one with the least held-out KL at twice the true number of pairs, on `default` and
   the first seed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import log
from statistics import fmean

from qkscope.config import DictionaryConfig
from qkscope.evaluate.planted.bench import JUDGED, PlantedBench
from qkscope.evaluate.planted.sizes import SIZES
from qkscope.evaluate.planted.world import Planted

SEEDS = (0, 1, 2)
KS = (0.5, 1.0, 2.0, 4.0, 8.0)
SPARSITIES = (0.01, 0.03, 0.1)
MASKS = (1e-5, 1e-4, 1e-3, 1e-2)


def bend(log_kl: Sequence[float]) -> int:
    """Place of the largest second difference."""
    slopes = [b - a for a, b in pairwise(log_kl)]
    return max(range(1, len(log_kl) - 1), key=lambda i: slopes[i] - slopes[i - 1])


def main() -> None:
    size = SIZES[sys.argv[1]]
    benches = [PlantedBench(size, Planted(size.world, seed)) for seed in SEEDS]

    def trained(bench: PlantedBench, config: DictionaryConfig):
        job = bench.step1("settings", config)
        bench.fit([job], size.tokens)
        return job, bench.judge(bench.decomposition(job))

    curve = []
    for k in KS:
        kls = [trained(bench, DictionaryConfig(width=size.width, k=k))[1]["kl"] for bench in benches]
        curve.append(fmean(log(kl) for kl in kls))
        print(f"k {k:g}: KL {fmean(kls):.4f}", [round(kl, 4) for kl in kls], flush=True)
    k = KS[bend(curve)]
    print(f"chosen k {k:g}", flush=True)
    for sparsity in SPARSITIES:
        found = [
            trained(bench, DictionaryConfig(recipe="seed", width=size.width, sparsity=sparsity))[1] for bench in benches
        ]
        l0 = [fmean(f[f"l0_{side}"] for f in found) for side in ("query", "key")]
        print(f"seed λ {sparsity:g}: KL {fmean(f['kl'] for f in found):.4f} L0 {l0[0]:.2f}/{l0[1]:.2f}", flush=True)
    bench = benches[0]
    job, _ = trained(bench, DictionaryConfig(width=size.width, k=k))
    bench.size = replace(size, k=k)
    for sparsity in MASKS:
        for method, count, made, _ in bench.prune(
            job, [JUDGED * len(bench.world.pairs)], size.pair_tokens, methods=(), mask_sparsity=[sparsity]
        ):
            print(f"{method} {count:,} pairs: KL {bench.kl_map(made)['kl']:.4f}", flush=True)


if __name__ == "__main__":
    main()
