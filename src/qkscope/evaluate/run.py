"""Evaluate a run's artefacts and write what a person reads: report.json, features, examples, the page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from .. import parallel
from ..attention import AttentionInputs, AttentionSite, harvest, open_sites
from ..config import RunConfig, build
from ..data import Batch, Sequences
from ..data.documents import EMBEDDED, Split
from ..decomposition import Decomposition, load_transcoders, read_run
from ..errors import UserError
from ..files import remove_leftovers, write_json
from ..kernels.row_kl import exp
from ..memory import Part
from ..models import load_model
from ..pattern import PatternSource
from ..progress import Reporter, title
from ..run_folder import claimed, layer_folder, require_finished, variants
from ..tables.distance_table import write_distances
from ..tables.examples import Examples, token_texts
from ..target import outcome
from ..training.stream import harvest_finite
from .dense import dense_features
from .faithful import CURVE_TOKENS, faithfulness
from .heads import head_roles
from .labels import StoryLabels
from .page import write_page
from .patched import PatchedScore, zero_pattern
from .patterns import uniform_pattern
from .report import in_brief, measure, sample_l0
from .truth import truth_scores

SAMPLE_TOKENS = 65_536  # training tokens behind the mean pattern and the controls' starts
BESIDE = 1 << 30  # bytes that measuring a layer takes beside what it saw of them
TRUTH_TOKENS = 32_768  # held-out tokens on which features are compared with known roles ...
HEAD_BATCHES = 2  # ... and batches of it for the heads: one to choose what is tried, the rest to measure it
SHOWN_TOKENS = 40  # of the held-out text whose patterns the page shows


def evaluate_folder(folder: Path, *, device: str = "cpu", quiet: bool = False) -> None:
    """Measure every layer of a finished run again and write its report anew.

    Raises `UserError` for a run that is not finished, or while another process writes in its folder.
    """
    values = read_run(folder)
    config = build(values["run"], str(folder / "config.yaml"))
    with claimed(folder, ""), Reporter(quiet) as reporter:
        require_finished(folder)
        remove_leftovers(folder)
        model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device=device)
        given = config.dictionary.features is not None
        sites = open_sites(model, tokenizer, config.numbers, residual=given)
        folders = {name: folder / name for name in variants(config)}
        evaluate_run(folders, sites, reporter, again=True)


def evaluate_run(
    folders: dict[str, Path],
    sites: Sequence[AttentionSite],
    reporter: Reporter,
    *,
    seconds: Mapping[Part, dict[str, float]] | None = None,
    again: bool = False,
) -> None:
    """Measure each layer of each variant that has no report yet (`again`: all), then write the pages.

    `seconds`: what its trainings took. Several processes measure different layers.
    """
    layers = [
        (name, site.layer, (seconds or {}).get((site.layer, name), {}))
        for name, folder in folders.items()
        for site in sites
        if again or not (layer_folder(folder, site.layer) / "report.json").exists()
    ]
    parallel.send({"do": "evaluate", "layers": layers})
    take_layers(folders, layers, sites, reporter, again=again)
    parallel.gathered(None)  # once all have measured theirs, and left the folder
    for folder in folders.values():
        together = folder / "together.json"
        if len(sites) > 1 and sites[0].has_head and not together.exists():
            _evaluate_together(together, folder, sites)
        write_page(folder)
    if "" not in folders:
        write_page(next(iter(folders.values())).parent)


def memory_of(site: AttentionSite) -> int:
    """Bytes that measuring one layer takes beside the model."""
    d, n, g, h = (site.shape[name] for name in "DNGH")
    return 4 * SAMPLE_TOKENS * (d + (n + 2 * g) * h) + BESIDE


def take_layers(
    folders: dict[str, Path],
    layers: Sequence[tuple[str, int, dict[str, float]]],
    sites: Sequence[AttentionSite],
    reporter: Reporter,
    *,
    again: bool = False,
) -> None:
    """Measure some of these layers of variants, each with its seconds, while other processes measure the rest."""
    for index in parallel.dealt("evaluation", len(layers)):
        name, layer, seconds = layers[index]
        reporter.message(f"evaluating {title(layer, name)} on held-out text")
        with parallel.alone():
            (folders[name] / "together.json").unlink(missing_ok=True)  # it was of another decomposition of this layer
            site = next(site for site in sites if site.layer == layer)
            report = _evaluate_layer(layer_folder(folders[name], layer), site, seconds, again)
        reporter.message(f"{title(layer, name)}: {in_brief(report)}")


def text_of(site: AttentionSite, config: RunConfig, split: Split, tokens: int) -> Sequences:
    """The beginning of one split of a run's text, as its own training would cut it."""
    return Sequences(
        config.data, site.tokenizer, split,
        batch_tokens=config.training.batch_tokens, seed=config.training.seed, repeat=False, max_tokens=tokens,
    )  # fmt: skip


@torch.no_grad()
def _evaluate_layer(target: Path, site: AttentionSite, seconds: dict[str, float], again: bool) -> dict[str, Any]:
    device = next(site.model.parameters()).device
    dec = Decomposition.load(target).to(device)
    config = dec.config

    def text(split: Split, tokens: int) -> Sequences:
        return text_of(site, config, split, tokens)

    began = time.monotonic()
    sample = [harvest_finite(site, batch.to(device)) for batch in text("train", SAMPLE_TOKENS)]
    wanted = config.evaluation
    examples = Examples(dec, wanted.examples, drawn=wanted.drawn_examples, pairs=wanted.pair_examples)
    step1 = None
    if (target / "step1.safetensors").exists():
        sides = load_transcoders(target / "step1.safetensors", config, dec.shape)
        step1 = replace(dec, query=sides[0].to(device), key=sides[1].to(device))
    heldout = (b.to(device) for b in text("heldout", config.evaluation.tokens))
    report = measure(dec, site, heldout, sample, examples, step1=step1, controls=config.evaluation.controls)
    given = dec.shape.reads
    report["tokens"] |= {"trained": 0 if given else config.training.tokens, "reuse": config.training.reuse}
    report |= {
        "model": config.model,
        "recipe": None if given else config.dictionary.recipe,
        "given": given and given.model_dump(),
        "pairs_method": config.pairs.method,
    }
    if config.target.given:
        report["target"] = outcome(config.target, report)
    first = [b.to(device) for b in text("heldout", min(CURVE_TOKENS, config.evaluation.tokens))]
    report["faithful"] = faithfulness(
        dec, site, first, steps=config.evaluation.adversary_steps, seed=config.training.seed
    )
    if config.data.source == EMBEDDED:
        batches = [b.to(device) for b in text("heldout", min(TRUTH_TOKENS, config.evaluation.tokens))]
        report["truth"], details = _truth(dec, site, sample, batches)
        measured = batches[1:HEAD_BATCHES] or batches  # as head_roles does
        report["tokens"] |= {"truth": _tokens(batches), "heads": _tokens(measured)}
        write_json(target / "truth.json", details)
    if again:
        with suppress(UserError):  # it may be what is missing
            seconds = dec.report.get("seconds", {})
    report["seconds"] = {**seconds, "evaluation": round(time.monotonic() - began, 1)}
    examples.write(target, site.tokenizer)
    features, kept = (pq.read_table(target / f"{name}.parquet") for name in ("features", "pairs"))
    tokens = report["tokens"]
    report["dense_features"] = dense_features(features, kept, tokens["evaluated"], tokens["sequences"])
    write_distances(dec, [harvest_finite(site, batch) for batch in first if dec.shape.rotary], target)
    write_json(target / "patterns.json", _shown_patterns(dec, site, first[0]))
    write_json(target / "report.json", report)
    return report


@torch.no_grad()
def _evaluate_together(target: Path, folder: Path, sites: Sequence[AttentionSite]) -> None:
    """What the model loses with the patterns of all layers of a run replaced at once."""
    device = next(sites[0].model.parameters()).device
    decs = [Decomposition.load(layer_folder(folder, site.layer)).to(device) for site in sites]
    config, score, tokens = decs[0].config, PatchedScore(), 0
    variants: dict[str, Sequence[PatternSource]] = {
        "transcoders": [dec.pattern_source("all") for dec in decs],
        "map_pruned": [dec.pattern_source("kept") for dec in decs],
        "zero": [zero_pattern] * len(sites),
        "uniform": [uniform_pattern] * len(sites),
    }
    for batch in text_of(sites[0], config, "heldout", config.evaluation.tokens):
        score.add_together(sites, batch.to(device), variants)
        tokens += batch.n_tokens
    write_json(target, {"layers": [s.layer for s in sites], "tokens": tokens, **score.report()})


def _tokens(batches: list[Batch]) -> int:
    return sum(batch.n_tokens for batch in batches)


def _truth(
    dec: Decomposition, site: AttentionSite, sample: list[AttentionInputs], batches: list[Batch]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the embedded corpus knows of its tokens, compared with what was found: summary and details."""
    labels = StoryLabels(site.tokenizer, batches)
    heldout = [(harvest_finite(site, batch), labels.of(batch)) for batch in batches]
    controls = dec.config.evaluation.controls
    summary, details = truth_scores(dec, sample, heldout, labels, sample_l0(dec, sample), with_controls=controls)
    few = [(batch, *seen) for batch, seen in zip(batches[:HEAD_BATCHES], heldout, strict=False)]
    return summary, {**details, "heads": head_roles(site, few)}


def _shown_patterns(dec: Decomposition, site: AttentionSite, batch: Any) -> dict[str, Any]:
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
