"""report.html: one self-contained page of a run, or of a folder of runs, made from what lies on disk.

The page fetches nothing; style, figures and the few lines of script that read out a heat map are in it. Whatever a run
lacks is left out: a model without a head has no cross-entropy, a run without controls no controls. Tokens are text of
unknown origin: everything goes through `charts.text`, which escapes it and makes control characters visible.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ..files import write_text
from . import charts
from .charts import finite, number, text
from .page_figures import figures
from .page_parts import NAMES, short, table, value
from .page_tokens import evidence
from .stored import SIDES, Layer, layers, read


def write_page(folder: Path) -> Path:
    """Make `folder/report.html` from the run, or the runs, in `folder`; `UserError` where a file is damaged."""
    folder = Path(folder)
    runs = [folder, *sorted(path.parent for path in folder.glob("*/config.yaml"))]
    found = [(run, layer) for run in runs for layer in layers(run)]
    own = [layer for run, layer in found if run == folder]
    config = read(folder / "config.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8"))) or {}
    models = [(config.get("run") or {}).get("model"), *(layer.report.get("model") for _, layer in found)]
    model = next((str(name).rstrip("/").rsplit("/", 1)[-1] for name in models if name), "the embedded model")
    title = f"QK decomposition of {model}"
    links = " ".join(f'<a href="#layer-{n.number}">layer {n.number}</a>' for n in own if len(own) > 1)
    body = [f"<header><h1>{text(title)}</h1><nav>{links}</nav></header>"]
    if len(found) > 1 or len(runs) > 1:
        body.append(_summary(folder, found))
    body.append(_together(folder))
    body += [layer_section(layer) for layer in own]
    body += [] if found else ["<p>There is no layer in this folder yet.</p>"]
    source = text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    body.append(f"<details><summary>Configuration of the run</summary><pre>{source}</pre></details>" if config else "")
    write_text(folder / "report.html", charts.page(title, "\n".join(body)))
    return folder / "report.html"


def _summary(folder: Path, found: list[tuple[Path, Layer]]) -> str:
    """A row for each layer of each run."""
    both, kinds = ("width", "L0", "live", "dead"), ("transcoders", "map_pruned", "uniform")
    head = ["run", "layer", *(f"{w} q / k" for w in both), "pairs", *(f"KL {NAMES[v]}" for v in kinds), "CE increase"]
    rows = []
    for run, layer in found:
        name, at = ("this run" if run == folder else text(run.name)), str(layer.number)
        if run == folder:
            at = f'<a href="#layer-{at}">{at}</a>'
        elif (run / "report.html").is_file():
            name = f'<a href="./{quote(run.name)}/report.html">{name}</a>'
        sides = [" / ".join(short(layer.figure(w.lower(), side), w == "dead") for side in SIDES) for w in both]
        values = [value(layer.figure("pattern_kl", v)) for v in kinds]
        increase = value(layer.figure("ce_increase", "map_pruned"))
        rows.append([name, at, *sides, number(layer.figure("pairs", "kept")), *values, increase])
    note = "Held-out text. KL in nats a query row; CE increase in nats a token, under the pruned map's pattern."
    return f'<section><h2>Summary</h2>{table(head, rows)}<p class="note">{note}</p></section>'


def _together(folder: Path) -> str:
    """What the model loses with the patterns of all of a run's layers replaced at once."""
    found = read(folder / "together.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not found:
        return ""
    rows = [
        [text(NAMES[name]), value(found["ce_increase"][name]), value(found["logit_kl"][name])]
        for name in found["ce_increase"]
    ]
    head = ["pattern", "CE increase, nats a token", "KL of the model's output"]
    numbers = ", ".join(map(str, found["layers"]))
    note = (f"The patterns of layers {numbers} replaced together, values kept, on {number(found['tokens'])} held-out "
            "tokens: each layer reads what the patched layers below it left.")  # fmt: skip
    return f'<section><h2>All layers at once</h2>{table(head, rows)}<p class="note">{note}</p></section>'


def layer_section(layer: Layer) -> str:
    """All there is to say about one layer."""
    parts = [f'<section id="layer-{layer.number}"><h2>Layer {layer.number}</h2>']
    if layer.report:
        parts += [_facts(layer), _headline(layer), figures(layer), _all_figures(layer)]
    else:
        parts += ["<p>Not measured yet: <code>qkscope evaluate</code> writes its report.json.</p>", figures(layer)]
    return "\n".join([*parts, evidence(layer), "</section>"])


def _facts(layer: Layer) -> str:
    r, tokens = layer.report, layer.report.get("tokens", {})
    evaluated, sequences = (number(tokens.get(key)) for key in ("evaluated", "sequences"))
    said = [f"{words} {r[key]}" for key, words in (("recipe", "recipe"), ("pairs_method", "pairs by")) if r.get(key)]
    said += [f"features of {given['source']}, not trained here"] if (given := r.get("given")) else []
    if tokens.get("trained"):
        steps = f", {tokens['reuse']} steps a batch" if tokens.get("reuse", 1) > 1 else ""
        said.append(f"trained on {number(tokens['trained'])} tokens{steps}")
    said.append(f"measured on {evaluated} held-out tokens in {sequences} sequences")
    said += [_asked(target)] if (target := r.get("target")) else []
    if r.get("seconds"):
        said.append("time " + ", ".join(f"{phase} {number(s)} s" for phase, s in r["seconds"].items()))
    if finite(check := layer.figure("map_all_check", "largest_log_pattern_difference")):
        said.append(f"all pairs, summed one by one, give the transcoders' log-pattern to within {number(check)}")
    return f'<p class="soft">{text("; ".join(said))}. In brackets: 95 % intervals over sequences.</p>'


def _asked(target: dict[str, Any]) -> str:
    """What a run was to reach, and whether it did."""
    bounds = (("max_kl", "a pattern KL of {}"), ("max_ce", "a cross-entropy increase of {}"))
    asked = " and ".join(words.format(number(target[key])) for key, words in bounds if target.get(key) is not None)
    return f"k and pairs chosen for at most {asked}: {'reached' if target.get('reached') else 'not reached'}"


def _headline(layer: Layer) -> str:
    """The few numbers that say what the layer's decomposition is worth, as tiles."""
    kl, lost = ({v: short(layer.figure(key, v)) for v in NAMES} for key in ("pattern_kl", "ce_increase"))
    tiles = [("Pattern KL, pruned map", value(layer.figure("pattern_kl", "map_pruned")),
              f"nats; transcoders {kl['transcoders']}, uniform {kl['uniform']}")]  # fmt: skip
    if "ce_increase" in layer.report:
        note = f"nats a token; transcoders {lost['transcoders']}, zero {lost['zero']}"
        tiles.append(("CE increase, pruned map", value(layer.figure("ce_increase", "map_pruned")), note))
    top1 = value(layer.figure("top1", "map_pruned"), 100, " %")
    tiles.append(("Top-1, pruned map", top1, "of query rows have the same top key"))
    for side in SIDES:
        live = f"{number(layer.figure('live', side))} of {number(layer.figure('width', side))} features live"
        note = f"{live}; dead {value(layer.figure('dead', side), 100, ' %')}{_named(layer, side)}"
        tiles.append((f"L0, {side}", value(layer.figure("l0", side)), note))
    share, of_live = (short(layer.figure("pairs", key), True) for key in ("share_of_total", "share_of_live"))
    active = short(layer.figure("pairs", "active_per_score"))
    note = f"{share} of all, {of_live} of those of live features; {active} active a score"
    tiles.append(("Pairs kept", number(layer.figure("pairs", "kept")), note))
    cells = "".join(f'<div><dt>{text(a)}</dt><dd>{b}</dd><dd class="sub">{c}</dd></div>' for a, b, c in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _named(layer: Layer, side: str) -> str:
    """How many of the features that step 1 trained are in a kept pair; tune has dropped the others by now."""
    trained = layer.figure("width_trained", side)
    named = {pair[f"{side}_feature"] for pair in layer.pairs} - {-1}
    return f"; the kept pairs use {number(len(named))} of the {number(trained)} trained" if named and trained else ""


def _all_figures(layer: Layer) -> str:
    """Every pattern figure, what is recovered, and the share of the biases, folded away."""
    metrics = {"KL, nats": "pattern_kl", "top-1": "top1", "absolute error": "absolute_error"}
    rows = []
    for variant, name in NAMES.items():
        figures = [layer.figure(m, variant) or layer.figure("controls", variant, m) for m in metrics.values()]
        if any(figures):
            both = [(f, f and f.get("without_position_0")) for f in figures]
            rows.append([text(name), *(value(f) for two in both for f in two)])
    tables = table(["pattern", *(w for m in metrics for w in (m, f"{m}, without position 0"))], rows)
    if recovered := layer.report.get("recovered"):
        rows = [[text(NAMES.get(v, v)), *(value(f.get(m), 100, " %") for f in by.values() for m in ("ce", "logit_kl"))]
                for v, by in recovered.items()]  # fmt: skip
        of = [f"{what} of {NAMES.get(a, a)}" for a in next(iter(recovered.values())) for what in ("CE", "logit KL")]
        tables += "<p>Share of an ablation's damage that is recovered</p>" + table(["pattern", *of], rows)
    for side in SIDES:
        kept, share = (layer.figure("pairs", f"with_{side}_bias", key) for key in ("kept", "importance"))
        tables += (
            f'<p class="note">{number(kept)} pairs with the {side} bias hold {short(share, True)} of importance.</p>'
        )
    return f"<details><summary>All figures of this layer</summary>{tables}</details>"
