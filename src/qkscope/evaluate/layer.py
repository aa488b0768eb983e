"""Measuring one layer of a run: in pieces, which several processes may share, and what is written of them.

A layer's folder then holds report.json, features.parquet, examples.parquet, pair_examples.parquet and patterns.json,
with a rotary embedding pair_distance.parquet, on the embedded corpus truth.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from ..attention import AttentionInputs, AttentionSite, harvest
from ..config import RunConfig
from ..data import Batch
from ..data.documents import EMBEDDED, Split
from ..decomposition import Decomposition, load_transcoders
from ..errors import UserError
from ..files import write_json
from ..kernels.row_kl import exp
from ..pattern import block_of
from ..tables.distance_table import write_distances
from ..tables.examples import Examples, token_texts
from ..target import outcome
from ..training.stream import harvest_finite
from .adversary import LARGEST
from .dense import dense_features
from .faithful import ADVERSARY_TOKENS, CURVE_TOKENS, CUTS, SHARES, against_adversary, curve, first_of
from .heads import head_roles
from .labels import StoryLabels
from .measure import Sources, Sums, measure, sample_l0
from .pieces import HELDOUT, Found, Piece, shares_of_text
from .report import figures, in_brief
from .text import BATCH_TOKENS, heldout_share, text_of
from .truth import truth_scores

SAMPLE_TOKENS = 65_536  # training tokens behind the mean pattern and the controls' starts
BESIDE = 1 << 29  # bytes that measuring a layer takes beside what `memory_of` counts
TRUTH_TOKENS = 32_768  # held-out tokens on which features are compared with known roles ...
HEAD_BATCHES = 2  # ... and batches of it for the heads: one to choose what is tried, the rest to measure it
SHOWN_TOKENS = 40  # of the held-out text whose patterns the page shows

ADVERSARY, TRUTH, FEWER = ("adversary", 0, 1), ("known roles", 0, 1), ("fewer pairs", 0, 1)


def pieces_of(config: RunConfig, shares: int, *, has_head: bool) -> list[Piece]:
    """The pieces of measuring one layer, the held-out text in so many shares; long ones that are not shared first."""
    adversary = [ADVERSARY] if config.evaluation.adversary_steps and has_head else []
    truth = [TRUTH] if config.data.source == EMBEDDED else []
    return [*adversary, *truth, *shares_of_text(shares), FEWER]


def memory_of(site: AttentionSite, config: RunConfig) -> int:
    """Bytes that measuring one layer takes beside the model (`benchmarks/evaluation_memory.py` holds it to that)."""
    d, n, g, h = (site.shape[name] for name in "DNGH")
    dictionary, context = config.dictionary, config.data.context
    tokens = max(min(config.training.batch_tokens, BATCH_TOKENS) * 3 // 2, context)
    vocabulary = site.model.get_output_embeddings().weight.shape[0] if site.has_head else 0  # type: ignore[operator]
    sample, mean = SAMPLE_TOKENS * (d + (n + g) * h + context // 4), n * context**2  # with its masks, a byte an entry
    # The model's logits and a variant's; of some heads at a time the true pattern and a variant's, a few times each.
    heldout = 2 * tokens * vocabulary + 12 * max(tokens * context, block_of(next(site.model.parameters()).device))
    if site.layout is not None:  # a phase for each active feature and half of a head, for all curves of fewer pairs
        heldout += len(SHARES) * len(CUTS) * tokens * int(dictionary.k + dictionary.key_k + 2) * h
    gates = n * (dictionary.width + 1) * (dictionary.key_width + 1)
    adversary = 7 * gates * (gates <= LARGEST) + 3 * ADVERSARY_TOKENS * vocabulary
    return 4 * (sample + mean + max(heldout, adversary * bool(config.evaluation.adversary_steps))) + BESIDE


class LayerEvaluation:
    """One layer's decomposition, in its folder, and the model that it is of.

    `seconds`: what its trainings took; None: as an earlier report says.
    """

    def __init__(self, folder: Path, site: AttentionSite, seconds: dict[str, float] | None = None) -> None:
        self.folder, self.site, self.seconds = folder, site, seconds
        self.device = next(site.model.parameters()).device
        self.dec = Decomposition.load(folder).to(self.device)
        self.config = self.dec.config

    def text(self, split: Split, tokens: int) -> Iterable[Batch]:
        """The beginning of one split of the text."""
        return (batch.to(self.device) for batch in text_of(self.site, self.config, split, tokens))

    def heldout(self, most: int) -> list[Batch]:
        """The first tokens of what the figures are of."""
        return list(self.text("heldout", min(most, self.config.evaluation.tokens)))

    @cached_property
    def sample(self) -> list[AttentionInputs]:
        return [harvest_finite(self.site, batch) for batch in self.text("train", SAMPLE_TOKENS)]

    @cached_property
    def sources(self) -> Sources:
        step1 = None
        if (self.folder / "step1.safetensors").exists():
            query, key = load_transcoders(self.folder / "step1.safetensors", self.config, self.dec.shape)
            step1 = replace(self.dec, query=query.to(self.device), key=key.to(self.device))
        return Sources.of(self.dec, self.sample, step1=step1, controls=self.config.evaluation.controls)

    def examples(self, dec: Decomposition) -> Examples:
        wanted = self.config.evaluation
        return Examples(dec, wanted.examples, drawn=wanted.drawn_examples, pairs=wanted.pair_examples)

    @torch.no_grad()
    def find(self, piece: Piece) -> Found:
        """Measure one piece."""
        began = time.monotonic()
        steps, seed = self.config.evaluation.adversary_steps, self.config.training.seed
        if piece == TRUTH:
            value: Any = self._truth()
        elif piece == ADVERSARY:
            value = against_adversary(self.dec, self.site, self.heldout(CURVE_TOKENS), steps=steps, seed=seed)
        elif piece == FEWER:
            value = curve(self.dec, self.site, first_of(self.heldout(CURVE_TOKENS), CURVE_TOKENS), seed)
        else:
            text = (batch.to(self.device) for batch in heldout_share(self.site, self.config, *piece[1:]))
            value = measure(self.dec, self.site, text, self.sources, self.examples(self.dec))
        return Found(piece, value, time.monotonic() - began)

    def _truth(self) -> dict[str, Any]:
        """What the embedded corpus knows of its tokens, compared with what was found."""
        batches = self.heldout(TRUTH_TOKENS)
        labels = StoryLabels(self.site.tokenizer, batches)
        heldout = [(harvest_finite(self.site, batch), labels.of(batch)) for batch in batches]
        l0, controls = sample_l0(self.dec, self.sample), self.config.evaluation.controls
        summary, details = truth_scores(self.dec, self.sample, heldout, labels, l0, with_controls=controls)
        few = [(batch, *seen) for batch, seen in zip(batches[:HEAD_BATCHES], heldout, strict=False)]
        measured = batches[1:HEAD_BATCHES] or batches  # as head_roles does
        return {
            "summary": summary,
            "details": {**details, "heads": head_roles(self.site, few)},
            "tokens": {"truth": _tokens(batches), "heads": _tokens(measured)},
        }

    @torch.no_grad()
    def write(self, found: Sequence[Found]) -> str:
        """Write report.json and the tables of what was found, and the page's example."""
        began = time.monotonic()
        value = {one.piece: one.value for one in found}
        shares = [one.value for one in found if one.piece[0] == HELDOUT]
        sums = shares[0]
        if len(shares) > 1:
            sums = Sums(self.examples(Decomposition.load(self.folder)))  # in main memory, as what was handed over
            for share in shares:
                sums.merge(share)
        report, config = figures(self.dec, sums), self.config
        given = self.dec.shape.reads
        report["tokens"] |= {"trained": 0 if given else config.training.tokens, "reuse": config.training.reuse}
        report |= {
            "model": config.model,
            "recipe": None if given else config.dictionary.recipe,
            "given": given and given.model_dump(),
            "pairs_method": config.pairs.method,
        }
        if config.target.given:
            report["target"] = outcome(config.target, report)
        report["faithful"] = {"curve": value[FEWER], **value.get(ADVERSARY, {})}
        if truth := value.get(TRUTH):
            report["truth"] = truth["summary"]
            report["tokens"] |= truth["tokens"]
            write_json(self.folder / "truth.json", truth["details"])
        sums.examples.write(self.folder, self.site.tokenizer)
        features, kept = (pq.read_table(self.folder / f"{name}.parquet") for name in ("features", "pairs"))
        report["dense_features"] = dense_features(features, kept, sums.tokens, sums.sequences)
        first = self.heldout(CURVE_TOKENS)
        write_distances(
            self.dec, [harvest_finite(self.site, batch) for batch in first if self.dec.shape.rotary], self.folder
        )
        write_json(self.folder / "patterns.json", _shown_patterns(self.dec, self.site, first[0]))
        seconds = self.seconds
        if seconds is None:
            with suppress(UserError):  # it may be what is missing
                seconds = self.dec.report.get("seconds", {})
        took = sum(one.seconds for one in found) + time.monotonic() - began  # of all processes that shared it
        report["seconds"] = {**(seconds or {}), "evaluation": round(took, 1)}
        write_json(self.folder / "report.json", report)
        return in_brief(report)


def _tokens(batches: list[Batch]) -> int:
    return sum(batch.n_tokens for batch in batches)


def _shown_patterns(dec: Decomposition, site: AttentionSite, batch: Batch) -> dict[str, Any]:
    """One held-out text's patterns, true and reconstructed, for the page."""
    length = min(SHOWN_TOKENS, int(batch.real_BT[0].sum()))
    tokens, real = batch.tokens_BT[:1, :length], batch.real_BT[:1, :length]
    inputs: AttentionInputs = harvest([site], tokens, real)[0]
    logs = {"true": inputs.log_pattern_BNQK, "transcoders": dec.log_pattern_all(inputs)}
    logs["pruned"] = dec.log_pattern_kept(inputs)
    patterns = {name: exp(log)[0, :, :, :length].cpu() for name, log in logs.items()}
    heads = [
        {"head": n, **{name: [[round(v, 4) for v in row] for row in p[n].tolist()] for name, p in patterns.items()}}
        for n in range(dec.shape.N)
    ]
    ids = tokens[0].tolist()
    texts = token_texts(site.tokenizer, ids)
    return {"tokens": [texts[t] for t in ids], "heads": heads}
