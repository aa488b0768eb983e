"""Ideas for step 1 that are not in the product, each measured beside `default` on the same tokens.

    python benchmarks/ideas.py --layers stories-gpt2=3 MODEL=LAYER=TEXT --ideas default k-means channel

- `default`: as it is. `plain`: without its pair penalty.
- `k-means`: directions are centres of clusters of inputs. `whitened`: encoder directions by the inverse covariance.
- `channel`: four linear directions a side that are always on, and k less by as many (no pairs are taken from it).
- `frequency`: what fires on more than a tenth of the tokens is penalised by what is above that, times its size.
- `nested`: the first quarter of the features must do alone as well (Matryoshka).
- `queries`, `keys`: half of the other side's k goes to this side.
- `rows`: rows of the KL count by how much their pattern moves the model's loss. `end`: in the last fifth of the
  training, the KL of the model's output counts too.
- `merged`: features of `default` whose activations have a cosine above 0.9 are made one, and how many these are.

Held-out KL with all pairs, cross-entropy and output KL, dense and dead features, then the KL of 4,000 and 1,000 pairs
after prune and tune; at the end each idea's figures relative to `default`'s, geometric means over layers.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qkscope.attention import AttentionSite
from qkscope.config import DictionaryConfig
from qkscope.dictionary import SparseTranscoder
from qkscope.evaluate.predictions import Predictions
from qkscope.evaluate.quality.bench import LayerBench
from qkscope.evaluate.quality.report import SIZES, kl_of, row_line
from qkscope.kernels.mostly_zero import MostlyZero
from qkscope.kernels.row_kl import exp
from qkscope.training.objective import PatternTarget
from qkscope.training.start import FIT_TOKENS, SideStatistics, _fit_gain
from qkscope.training.step1 import Step1Job
from qkscope.training.stream import Harvest, ModelStream

WIDTH, COUNTS, RANK = 300, (4000, 1000), 4
IDEAS = (
    "default", "plain", "k-means", "whitened", "channel", "frequency", "nested", "queries", "keys", "rows", "end",
    "merged",
)  # fmt: skip
Loss = tuple[Tensor, dict[str, Tensor]]


class Tried(Step1Job):
    """Step 1 that keeps the activations of the step at hand."""

    acts: dict[str, Any]

    def _note(self, side: str, acts: Tensor | MostlyZero) -> Tensor:
        vars(self).setdefault("acts", {})[side] = acts
        return super()._note(side, acts)


class Frequency(Tried):
    def loss(self, target: PatternTarget, autocast: torch.autocast) -> Loss:
        loss, log = super().loss(target, autocast)
        for side, acts in self.acts.items():
            on = torch.bincount(acts.column_L, minlength=acts.n_columns) / len(acts)
            sizes = acts.column_means() * self.side(side).norms()
            loss = loss + ((on - 0.1).clamp(min=0) * sizes / sizes.detach().sum()).sum()
        return loss, log


class Nested(Tried):
    def loss(self, target: PatternTarget, autocast: torch.autocast) -> Loss:
        loss, log = super().loss(target, autocast)
        first = {side: a.take((a.column_L < a.n_columns // 4).nonzero()[:, 0]) for side, a in self.acts.items()}
        kl, _ = target.kl_of(*(self.side(side).decode(acts) for side, acts in first.items()))
        return loss + kl, log


class OfLoss(Tried):
    """Knows the tokens of a batch, and the model."""

    site: AttentionSite
    batches: dict[int, Any]


class Rows(OfLoss):
    def loss(self, target: PatternTarget, autocast: torch.autocast) -> Loss:
        pattern = exp(target.inputs.log_pattern_BNQK).requires_grad_(True)
        batch = self.batches[id(target.inputs)]
        with torch.enable_grad(), self.site.replace_pattern(lambda inputs: pattern):
            logits_BTV = Predictions(self.site, batch).logits_nV.view(*batch.tokens_BT.shape, -1)
            real = batch.real_BT[:, 1:]
            ce = cross_entropy(logits_BTV[:, :-1][real].float(), batch.tokens_BT[:, 1:][real], reduction="sum")
        (slope,) = torch.autograd.grad(ce, pattern)
        mean = (pattern * slope).sum(-1, keepdim=True)
        effect_BQ = (pattern * (slope - mean).square()).sum(-1).mean(1).sqrt().detach() * target.real_BT
        share = effect_BQ / (target.weight_BQ * effect_BQ).sum() * target.weight_BQ.sum()
        target.weight_BQ = target.weight_BQ * (0.5 + 0.5 * share)
        return super().loss(target, autocast)


class End(OfLoss):
    def loss(self, target: PatternTarget, autocast: torch.autocast) -> Loss:
        loss, log = super().loss(target, autocast)
        if self.done < 0.8:
            return loss, log
        q_hat, k_hat = (self.side(side).decode(self.acts[side]) for side in ("query", "key"))
        pattern = exp(target.rule.log_pattern(target.queries(q_hat), target.keys(k_hat)))
        batch = self.batches[id(target.inputs)]
        with torch.no_grad():
            own = Predictions(self.site, batch)
        with self.site.replace_pattern(lambda inputs: pattern):
            output_kl = own.kl(Predictions(self.site, batch))[batch.real_BT].mean()
        return loss + output_kl * (0.2 * log["pattern_kl"] / output_kl.detach().clamp(min=1e-9)), log


class Remembered(ModelStream):
    """Tells a job what tokens its inputs are of."""

    batches: dict[int, Any]

    def __next__(self) -> Harvest:
        harvest = super().__next__()
        self.batches.clear()
        self.batches |= {id(inputs): harvest.origin for inputs in harvest.layers.values()}
        return harvest


class WithChannel(SparseTranscoder):
    """A dictionary and a few linear directions that are always on."""

    A_Dr: nn.Parameter
    B_rM: nn.Parameter
    x: Tensor

    def fire(self, x_nD: Tensor) -> Any:
        self.x = x_nD
        return super().fire(x_nD)

    def encode(self, x_nD: Tensor) -> Tensor:
        self.x = x_nD
        return super().encode(x_nD)

    def decode(self, acts: Any) -> Tensor:
        return super().decode(acts) + (self.x - self.b_in) @ self.A_Dr @ self.B_rM


@torch.no_grad()
def started(job: Step1Job, idea: str, statistics: dict[str, SideStatistics]) -> None:
    """Other first weights, in place."""
    for side in ("query", "key"):
        t, s = job.side(side), statistics[side]
        x = s.x_nD - s.x_nD.mean(0)
        if idea == "k-means":
            rows = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: t.width]]
            for _ in range(20):
                nearest = torch.cdist(x, rows).argmin(1)
                sums = torch.zeros_like(rows).index_add(0, nearest, x)
                counts = torch.bincount(nearest, minlength=t.width)[:, None]
                rows = torch.where(counts > 0, sums / counts.clamp(min=1), rows)
            t.W_enc.copy_((rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)).T)
            t.W_dec.copy_(t.W_enc.T @ s.projection_DM)
        elif idea == "whitened":
            cov = x.T @ x / len(x)
            ridge = 0.01 * cov.diagonal().mean() * torch.eye(len(cov))
            turned = torch.linalg.solve(cov + ridge, t.W_enc)
            t.W_dec.copy_(t.W_enc.T @ s.projection_DM)
            t.W_enc.copy_(turned / turned.norm(dim=0))
        elif idea == "channel":
            t.__class__ = WithChannel
            assert isinstance(t, WithChannel)
            _, _, right = torch.linalg.svd(x @ s.projection_DM, full_matrices=False)
            t.A_Dr, t.B_rM = nn.Parameter(s.projection_DM @ right[:RANK].T), nn.Parameter(right[:RANK].clone())
            t.W_dec.copy_(t.W_enc.T @ (s.projection_DM - t.A_Dr @ t.B_rM))
        if idea in ("k-means", "whitened"):
            _fit_gain(t.train(), s.x_nD[:FIT_TOKENS], s.out_nM[:FIT_TOKENS])


@torch.no_grad()
def merged(job: Step1Job, x_nD: Tensor) -> int:
    """Make features one whose activations have a cosine above 0.9, in place; how many are gone."""
    gone = 0
    for side in ("query", "key"):
        t = job.side(side).eval()
        acts = t.encode(x_nD)
        norms = acts.norm(dim=0)
        cosine = (acts.T @ acts) / (norms[:, None] * norms).clamp(min=1e-9)
        for a in norms.argsort(descending=True).tolist():
            for b in ((cosine[a] > 0.9) & (norms <= norms[a]) & (norms > 0)).nonzero()[:, 0].tolist():
                if b != a:
                    t.W_dec[a] += t.W_dec[b] * (acts[:, a] @ acts[:, b]) / norms[a].square()
                    t.W_dec[b], norms[b] = 0.0, 0.0
                    gone += 1
    return gone


def config_of(idea: str, k: float) -> DictionaryConfig:
    k, k_key = {"queries": (1.5 * k, 0.5 * k), "keys": (0.5 * k, 1.5 * k), "channel": (k - RANK,) * 2}.get(idea, (k, k))
    return DictionaryConfig(width=WIDTH, k=k, k_key=k_key, pair_sparsity=0.0 if idea == "plain" else None)


def trained(bench: LayerBench, idea: str, config: DictionaryConfig, tokens: int) -> tuple[Step1Job, float]:
    kind = {"frequency": Frequency, "nested": Nested, "rows": Rows, "end": End}.get(idea, Step1Job)
    job = bench.step1("job", config)
    started(job, idea, bench.statistics)
    job.__class__ = kind
    own = bench.stream
    if isinstance(job, OfLoss):
        job.site, job.batches = bench.site, {}

        def stream() -> Remembered:
            made = Remembered([bench.site], bench.text("train", repeat=True))
            made.batches = job.batches
            return made

        bench.stream = stream
    seconds = bench.fit([job], tokens)
    bench.stream = own
    job.__class__ = Step1Job  # type: ignore[assignment]
    return job, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", required=True, help="MODEL=LAYER, or MODEL=LAYER=TEXT")
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=IDEAS)
    parser.add_argument("--k", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=150_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for named in args.layers:
        bench = LayerBench.named(named, 0, replace(SIZES["small"], tokens=args.tokens))
        print(f"\n{bench.title}", flush=True)
        for idea in args.ideas:
            job, seconds = trained(bench, idea, config_of(idea, args.k), args.tokens)
            if idea == "merged":
                print(f"merged: {merged(job, bench.x_nD)} features", flush=True)
            row = {"dictionary": idea, "method": "", "seconds": seconds, **bench.judge(job)}
            print(row_line(row), flush=True)
            figures = {"all pairs": kl_of(row), "output KL": row["logit_kl"]["mean"]}
            if idea != "channel":
                for _, count, made, spent in bench.prune(job, COUNTS, args.tokens, ("tune",)):
                    row = {"dictionary": idea, "method": "", "seconds": spent, **bench.judge(made)}
                    print(row_line(row), flush=True)
                    figures[f"{count:,} pairs"] = kl_of(row)
            for name, value in figures.items():
                found.setdefault(name, {}).setdefault(idea, []).append(value)
    print("\nrelative to the first idea's, geometric mean over layers (least to most):")
    for name, by_idea in found.items():
        for idea, values in by_idea.items():
            ratios = [v / first for v, first in zip(values, by_idea[args.ideas[0]], strict=True)]
            middle, ends = statistics.geometric_mean(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{name:<12} {idea:<10} {middle:.3f} ({ends})")


if __name__ == "__main__":
    main()
