"""One layer of one model and every row of its scoreboard.

1. The baseline: `seed`, the published recipe with its faults mended, and its trained mask. Its held-out L0 on each side
   is what the others get.
2. `default` at that L0, at half and at a quarter of it, and without its pair penalty at that L0 and at half of it; the
   untrained controls at that L0; and `live width`, `default` anew with only as many features as lived.
3. Pairs: the seed's masks, as they are and cut to smaller counts by importance; prune and tune of `default`.
4. What an adversary can do to the maps with what they left out.

All dictionaries read the same training tokens, all ways to prune the same again. Every figure is a mean over held-out
tokens with an interval over sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...attention import AttentionSite, harvest
from ...config import DataConfig, DictionaryConfig, Dtype, RunConfig, TrainingConfig
from ...data import Sequences
from ...data.documents import EMBEDDED, Split
from ...decomposition import SIDES, Decomposition, SiteShape
from ...models import load_model
from ...pairs.tune import MapJob
from ...pattern import AttentionInputs
from ...training.job import Job
from ...training.step1 import Step1Job
from ...training.stream import ModelStream
from ..adversary import adversary
from ..controls import untrained
from ..measure import Activity
from ..patched import PatchedScore, as_source, zero_pattern
from ..patterns import KLScore, PatternScores, uniform_log_pattern
from ..workbench import MASK, Workbench

PLAIN, PLAIN_HALF = "no pair penalty", "no pair penalty, half the L0"
LIVE = "live width"


@dataclass(frozen=True)
class Size:
    """What a layer's rows may cost."""

    width: int
    """Features a side of every dictionary."""
    sparsity: float
    """`seed`'s penalty."""
    tokens: int
    """Training tokens of a dictionary, and of each way to prune its pairs."""
    heldout_tokens: int
    counts: tuple[int, ...]
    """Pair counts, falling; tune starts from twice the first."""
    mask_sparsity: tuple[float, ...]
    """The mask's penalty, one mask for each: weak ones keep most pairs, strong ones cost KL."""
    mask_tokens: int
    """Training tokens of the mask: dense, it takes ten times as long a token as the rest with a rotary embedding."""
    adversary_count: int
    adversary_tokens: int
    adversary_steps: int = 160
    batch_tokens: int = 2048
    sample_tokens: int = 8192
    context: int = 256


class LayerBench(Workbench):
    """One layer of one model, its text, and what is trained on it."""

    def __init__(self, model: str, source: str, layer: int, seed: int, size: Size, *, dtype: Dtype = "float32") -> None:
        self.title, self.seed, self.size = f"{Path(model).name} layer {layer}", seed, size
        self.model, self.tokenizer = load_model(model, dtype=dtype)
        self.site = AttentionSite(self.model, self.tokenizer, layer=layer)
        self.data = DataConfig(source=source, context=size.context)
        super().__init__(
            layer,
            SiteShape(**self.site.shape, rotary=self.site.layout is not None, reads=None),
            [self.inputs(b) for b in self.text("train", repeat=True, most=size.sample_tokens)],
            lambda: ModelStream([self.site], self.text("train", repeat=True)),
            TrainingConfig(
                tokens=size.tokens, batch_tokens=size.batch_tokens, seed=seed, checkpoint_steps=10**9, dtype=dtype
            ),
        )
        self.heldout = list(self.text("heldout", repeat=False, most=size.heldout_tokens))

    @classmethod
    def named(cls, name: str, seed: int, size: Size, *, dtype: Dtype = "float32") -> LayerBench:
        """Of `MODEL=LAYER=TEXT`, or of `MODEL=LAYER` on the embedded corpus."""
        model, layer, *text = name.split("=")
        return cls(model, text[0] if text else EMBEDDED, int(layer), seed, size, dtype=dtype)

    def text(self, split: Split, *, repeat: bool, most: int | None = None) -> Sequences:
        return Sequences(
            self.data, self.tokenizer, split,
            batch_tokens=self.size.batch_tokens, seed=self.seed, repeat=repeat, max_tokens=most,
        )  # fmt: skip

    def inputs(self, batch: Any) -> AttentionInputs:
        return harvest([self.site], batch.tokens_BT, batch.real_BT)[0]

    @torch.no_grad()
    def judge(self, job: Job) -> dict[str, Any]:
        """Held-out figures of a step 1 job (through q̂k̂) or of a map."""
        return self.judge_decomposition(self.decomposition(job), "kept" if isinstance(job, MapJob) else "all")

    @torch.no_grad()
    def judge_decomposition(self, dec: Decomposition, pairs: str) -> dict[str, Any]:
        source = dec.kept_by_head if pairs == "kept" else dec.all_by_head
        scores, whole, patched = PatternScores(), KLScore(), PatchedScore()
        activity = {side: Activity() for side in SIDES}
        for batch in self.heldout:
            inputs = self.inputs(batch)
            log_pattern = source(inputs)
            scores.add(inputs, {"patched": log_pattern})
            if pairs == "kept":
                whole.add(inputs, dec.all_by_head(inputs))
            patched.add(self.site, batch, {"patched": as_source(log_pattern)})
            for side, t in zip(SIDES, (dec.query, dec.key), strict=True):
                activity[side].add(t.encode(inputs.x_BTD.float()), batch.real_BT)
        found = {side: a.report() for side, a in activity.items()}
        kept = {"pairs": len(dec.pairs), "all_pairs_kl": whole.kl.figure()} if pairs == "kept" else {}
        return {
            "pattern_kl": scores["patched"].kl.figure(),
            "top1": scores["patched"].top1.figure(),
            "ce_increase": patched.increase("patched"),
            "logit_kl": patched.kl["patched"].figure(),
            **{f"{name}_{side}": found[side][name] for name in ("l0", "dead", "dense", "live") for side in SIDES},
            **kept,
        }

    @torch.no_grad()
    def bounds(self) -> dict[str, Any]:
        """The pattern's KL from a uniform one, and what the model loses without this attention."""
        score, patched = KLScore(), PatchedScore()
        for batch in self.heldout:
            inputs = self.inputs(batch)
            score.add(inputs, uniform_log_pattern(inputs))
            patched.add(self.site, batch, {"zero": zero_pattern})
        return {
            "uniform_kl": score.kl.figure(),
            "model_ce": patched.ce["model"].figure(),
            "zero_ce_increase": patched.increase("zero"),
        }

    def controls(self, job: Step1Job) -> dict[str, dict[str, Any]]:
        """Untrained dictionaries with as many active features as a job's."""
        dec = self.decomposition(job)
        config = RunConfig(training=self.config, dictionary=job.config)
        dec = Decomposition(**{**vars(dec), "config": config})
        l0 = {"query": job.config.k, "key": job.config.key_k}
        return {name: self.judge_decomposition(made, "all") for name, made in untrained(dec, self.sample, l0).items()}

    def adversary(self, job: MapJob) -> dict[str, Any] | None:
        """What switching dropped pairs on can do to a map."""
        size = self.size
        batches = self.text("heldout", repeat=False, most=size.adversary_tokens)
        return adversary(self.decomposition(job), self.site, batches, steps=size.adversary_steps, seed=self.seed)


def rows_of(bench: LayerBench) -> Iterator[dict[str, Any]]:
    """Every row of one layer's scoreboard."""
    size = bench.size
    seed = bench.step1("seed", DictionaryConfig(recipe="seed", width=size.width, sparsity=size.sparsity))
    seconds = bench.fit([seed], size.tokens)
    baseline = bench.judge(seed)
    yield {"dictionary": "seed", "method": "all pairs", "seconds": seconds, **baseline}
    k, k_key = (max(baseline[f"l0_{side}"]["mean"], 1.0) for side in SIDES)
    configs = {
        "default": DictionaryConfig(width=size.width, k=k, k_key=k_key),
        "default, half the L0": DictionaryConfig(width=size.width, k=k / 2, k_key=k_key / 2),
        "default, a quarter": DictionaryConfig(width=size.width, k=k / 4, k_key=k_key / 4),
        PLAIN: DictionaryConfig(width=size.width, k=k, k_key=k_key, pair_sparsity=0.0),
        PLAIN_HALF: DictionaryConfig(width=size.width, k=k / 2, k_key=k_key / 2, pair_sparsity=0.0),
    }
    jobs = {name: bench.step1(name, config) for name, config in configs.items()}
    seconds = bench.fit(list(jobs.values()), size.tokens) / len(jobs)
    rows = {
        name: {"dictionary": name, "method": "all pairs", "seconds": seconds, **bench.judge(job)}
        for name, job in jobs.items()
    }
    yield from rows.values()
    lived, lived_key = (max(rows["default"][f"live_{side}"], 1) for side in SIDES)
    narrow = bench.step1(LIVE, DictionaryConfig(width=lived, width_key=lived_key, k=k, k_key=k_key))
    seconds = bench.fit([narrow], size.tokens)
    yield {"dictionary": LIVE, "method": "all pairs", "seconds": seconds, **bench.judge(narrow)}
    for name, figures in bench.controls(jobs["default"]).items():
        yield {"dictionary": name, "method": "all pairs", "seconds": 0.0, **figures}
    yield from _pruned(bench, "seed", seed, (), size.mask_sparsity)
    yield from _pruned(bench, "default", jobs["default"], ("tune",), ())


def _pruned(
    bench: LayerBench, name: str, job: Step1Job, methods: Sequence[str], masks: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Rows of every way to prune; the adversary plays against `adversary_count` pairs, not the weakest mask's."""
    size = bench.size
    for method, count, made, seconds in bench.prune(job, size.counts, size.tokens, methods, masks, size.mask_tokens):
        row = {"dictionary": name, "method": method, "asked": count, "seconds": seconds, **bench.judge(made)}
        if count == size.adversary_count and method != f"{MASK}{size.mask_sparsity[0]:g}":
            row["adversary"] = bench.adversary(made)
        yield row


def whole_masks(layer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The row of each trained mask as it is, before it is cut to a count, by its method."""
    masks: dict[str, dict[str, Any]] = {}
    for row in layer["rows"]:
        method = row["method"]
        if method.startswith(MASK) and row["pairs"] > masks.get(method, {"pairs": -1})["pairs"]:
            masks[method] = row
    return masks
