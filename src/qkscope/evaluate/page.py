"""report.html: one self-contained page of a run, or of a folder of runs, made from what lies on disk.

The page fetches nothing; style, figures and the few lines of script that read out a heat map are in it. Whatever a run
lacks is left out: a model without a head has no cross-entropy, a run without controls no controls. Tokens are text of
unknown origin: everything goes through `charts.text`, which escapes it and makes control characters visible.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ..files import write_text
from . import charts
from .charts import Bar, Figure, Series, finite, interval, legend, number, text
from .stored import SIDES, Layer, layers, read

BEFORE, AFTER = 9, 4  # tokens of an example shown around the one that fires most
HEAD_ROLES = 3  # role pairs of a head that are shown
CURVE_POINTS = 300  # of a training curve: more cannot be told apart
NAMES = {"map_pruned": "pruned map", "transcoders": "transcoders", "map_all": "full map", "step1": "before tuning",
         "mean": "mean pattern", "uniform": "uniform", "zero": "zero", "shuffled": "shuffled pairs",
         "random": "random", "svd": "SVD of QK"}  # fmt: skip
LOSSES = {
    "ce_increase": ("Cross-entropy increase", "nats a token (log)", "The layer's pattern replaced, values kept. Blue: "
                    "ours; grey: ablations. Shorter is closer to the model."),
    "logit_kl": ("KL of the model's output", "KL(true ‖ patched logits), nats a token (log)", "How far the next-token "
                 "distribution moves when the pattern is replaced. Shorter is better."),
}  # fmt: skip
KINDS = {"map_pruned": "a", "transcoders": "a2", "step1": "a2", "shuffled": "c", "random": "c", "svd": "c"}


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


def _value(figure: Figure | None, scale: float = 1.0, unit: str = "") -> str:
    mean, bounds, _ = interval(figure, scale)
    return f"{mean}{unit}" + (f' <span class="ci">{bounds}</span>' if bounds else "")


def _short(value: Any, percent: bool = False) -> str:
    """A number, or a figure's mean, without its interval."""
    value = value.get("mean") if isinstance(value, dict) else value
    if not percent:
        return number(value)
    return f"{number(round(100 * value, 3))} %" if finite(value) else charts.DASH


def table(head: list[str], rows: list[list[str]], kind: str = "plain", wide: tuple[int, ...] = ()) -> str:
    """A table of HTML cells under plain heads; on a telephone the `wide` columns get a line of their own."""
    heads = [text(words) for words in head]
    attributes = [f'class="wide" data-h="{h}"' if n in wide else f'data-h="{h}"' for n, h in enumerate(heads)]
    lines = ("".join(f"<td {a}>{c}</td>" for a, c in zip(attributes, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    top = "".join(f"<th>{h}</th>" for h in heads)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def framed(title: str, drawing: str, note: str, above: str = "") -> str:
    """A drawing under its title, with how to read it in one line; nothing without a drawing."""
    note = f'<p class="note">{text(note)}</p>'
    return drawing and f"<figure><figcaption>{text(title)}</figcaption>{above}{drawing}{note}</figure>"


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
        sides = [" / ".join(_short(layer.figure(w.lower(), side), w == "dead") for side in SIDES) for w in both]
        values = [_value(layer.figure("pattern_kl", v)) for v in kinds]
        increase = _value(layer.figure("ce_increase", "map_pruned"))
        rows.append([name, at, *sides, number(layer.figure("pairs", "kept")), *values, increase])
    note = "Held-out text. KL in nats a query row; CE increase in nats a token, under the pruned map's pattern."
    return f'<section><h2>Summary</h2>{table(head, rows)}<p class="note">{note}</p></section>'


def _together(folder: Path) -> str:
    """What the model loses with the patterns of all of a run's layers replaced at once."""
    found = read(folder / "together.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not found:
        return ""
    rows = [
        [text(NAMES[name]), _value(found["ce_increase"][name]), _value(found["logit_kl"][name])]
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
    figures = [_curve(layer)]
    if layer.report:
        parts += [_facts(layer), _headline(layer)]
        figures = [_kl_bars(layer), *(_loss_bars(layer, key) for key in LOSSES), _pair_curve(layer), _faithful(layer),
                   *(_histogram(layer, side) for side in SIDES), _heads(layer), *figures]  # fmt: skip
    else:
        parts.append("<p>Not measured yet: <code>qkscope evaluate</code> writes its report.json.</p>")
    parts += [f'<div class="figures">{"".join(figures)}</div>', _all_figures(layer) if layer.report else ""]
    return "\n".join([*parts, _truth(layer), _heat(layer), _pair_tables(layer), _densest(layer), "</section>"])


def _facts(layer: Layer) -> str:
    r, tokens = layer.report, layer.report.get("tokens", {})
    evaluated, sequences = (number(tokens.get(key)) for key in ("evaluated", "sequences"))
    said = [f"{words} {r[key]}" for key, words in (("recipe", "recipe"), ("pairs_method", "pairs by")) if r.get(key)]
    said += [f"features of {given['source']}, not trained here"] if (given := r.get("given")) else []
    said += [f"trained on {number(tokens['trained'])} tokens"] if tokens.get("trained") else []
    said.append(f"measured on {evaluated} held-out tokens in {sequences} sequences")
    said += [_asked(target)] if (target := r.get("target")) else []
    if r.get("seconds"):
        said.append("wall time " + ", ".join(f"{phase} {number(s)} s" for phase, s in r["seconds"].items()))
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
    kl, lost = ({v: _short(layer.figure(key, v)) for v in NAMES} for key in ("pattern_kl", "ce_increase"))
    tiles = [("Pattern KL, pruned map", _value(layer.figure("pattern_kl", "map_pruned")),
              f"nats; transcoders {kl['transcoders']}, uniform {kl['uniform']}")]  # fmt: skip
    if "ce_increase" in layer.report:
        note = f"nats a token; transcoders {lost['transcoders']}, zero {lost['zero']}"
        tiles.append(("CE increase, pruned map", _value(layer.figure("ce_increase", "map_pruned")), note))
    top1 = _value(layer.figure("top1", "map_pruned"), 100, " %")
    tiles.append(("Top-1, pruned map", top1, "of query rows have the same top key"))
    for side in SIDES:
        live = f"{number(layer.figure('live', side))} of {number(layer.figure('width', side))} features live"
        note = f"{live}; dead {_value(layer.figure('dead', side), 100, ' %')}{_named(layer, side)}"
        tiles.append((f"L0, {side}", _value(layer.figure("l0", side)), note))
    share, of_live = (_short(layer.figure("pairs", key), True) for key in ("share_of_total", "share_of_live"))
    active = _short(layer.figure("pairs", "active_per_score"))
    note = f"{share} of all, {of_live} of those of live features; {active} active a score"
    tiles.append(("Pairs kept", number(layer.figure("pairs", "kept")), note))
    cells = "".join(f'<div><dt>{text(a)}</dt><dd>{b}</dd><dd class="sub">{c}</dd></div>' for a, b, c in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _named(layer: Layer, side: str) -> str:
    """How many of the features that step 1 trained are in a kept pair; tune has dropped the others by now."""
    trained = layer.figure("width_trained", side)
    named = {pair[f"{side}_feature"] for pair in layer.pairs} - {-1}
    return f"; the kept pairs use {number(len(named))} of the {number(trained)} trained" if named and trained else ""


def _bars(found: dict[str, Any], title: str, words: str, log: bool) -> str:
    rows = [Bar(NAMES[v], found[v], KINDS.get(v, "g")) for v in NAMES if v in found and v != "map_all"]
    return charts.bars(rows, title, words, log=log)


def _loss_bars(layer: Layer, key: str) -> str:
    title, words, note = LOSSES[key]
    return framed(title, _bars(layer.report[key], title, words, True) if layer.report.get(key) else "", note)


def _kl_bars(layer: Layer) -> str:
    controls = {name: control.get("pattern_kl") for name, control in (layer.report.get("controls") or {}).items()}
    drawing = _bars({**layer.report.get("pattern_kl", {}), **controls}, "Pattern KL", "nats a query row", False)
    said = "Outlined: controls (key features permuted; untrained dictionaries and SVD at the same L0)."
    note = "KL(true ‖ reproduced), mean over query rows and heads; shorter is better. "
    return framed("Pattern KL", drawing, note + (said if controls else "No controls were measured."))


def _pair_curve(layer: Layer) -> str:
    title = "Pattern KL by pairs kept"
    curve = [(p["kept"], p["pattern_kl"]) for p in layer.figure("pairs", "curve") or []]
    ends = [lines[-1] for lines in layer.metrics.values() if finite(lines[-1].get("pairs"))]
    trained = [(line["pairs"], line["pattern_kl"], None) for line in ends]
    series = [Series("held-out", "a", [(kept, kl["mean"], charts.bounds(kl)) for kept, kl in curve]),
              Series("training set, end of each phase", "ao", trained, joined=False)]  # fmt: skip
    guides = {NAMES[v]: layer.figure("pattern_kl", v, "mean") for v in ("transcoders", "uniform")}
    drawing = charts.plot(series, title, "pairs kept (log)", "nats (log)", x_log=True, guides=guides)
    note = ("Filled: the final map cut to its most important pairs without retraining, on held-out text. Hollow: "
            "training-set figures where a training phase ended.")  # fmt: skip
    return framed(title, drawing, note, legend([(s.kind, s.name) for s in series if s.points]))


def _faithful(layer: Layer) -> str:
    """Keep-only and remove-only curves, in what the model's output loses where there is one; and the adversary."""
    curve = layer.figure("faithful", "curve") or []
    key = next((k for k in ("logit_kl", "pattern_kl") if curve and k in curve[0]["keep"]), "")
    if not key:
        return ""
    kinds = {"keep": ("only the most important", "a"), "remove": ("without the most important", "b"),
             "keep_random": ("only as many at random", "c")}  # fmt: skip
    series = [
        Series(name, kind, [(p["pairs"], p[cut][key]["mean"], charts.bounds(p[cut][key])) for p in curve])
        for cut, (name, kind) in kinds.items()
    ]
    title = "Pairs kept and removed"
    guides = {NAMES["map_pruned"]: layer.figure(key, "map_pruned", "mean")}
    words = "KL of the model's output, nats (log)" if key == "logit_kl" else "pattern KL, nats (log)"
    drawing = charts.plot(series, title, "pairs (log)", words, x_log=True, guides=guides)
    note = "The kept pairs ranked by importance. A good ranking keeps the first curve low and the other two high."
    if played := layer.figure("faithful", "adversary", "logit_kl"):
        steps = number(layer.figure("faithful", "adversary", "steps"))
        kept, worst, chance, whole = (_short(played[name]) for name in ("kept", "adversary", "random", "all"))
        note += (
            f" An adversary that switches dropped pairs on, each up to its full strength, takes the output's KL from "
            f"{kept} to {worst} in {steps} steps ({chance} at random, {whole} with all of them on; "
            f"{number(layer.figure('faithful', 'adversary_tokens'))} tokens)."
        )
    return framed(title, drawing, note, legend([(s.kind, s.name) for s in series]))


def _histogram(layer: Layer, side: str) -> str:
    if not (found := layer.report.get("log10_density")):
        return ""
    title, edges = f"Firing frequency, {side} features", found["edges"]
    low = min([-4.0, *(edge for s in SIDES for edge, n in zip(edges, found[s], strict=False) if n)])
    drawing = charts.histogram(edges, found[side], title, side[0] == "q", low, max(max(found[s]) for s in SIDES))
    width, live, dense = (layer.figure(key, side) for key in ("width", "live", "dense"))
    note = (
        f"{width - live:,} of {width:,} never fired and are not drawn; {_short(dense, True)} fire on more than 10 % of "
    )
    return framed(title, drawing, note + "tokens (dashed line).")


def _heads(layer: Layer) -> str:
    kinds = {"uniform": "o", "transcoders": "a2", "map_pruned": "a"}
    lists = {key: {v: layer.figure(key, v, "per_head") or [] for v in kinds} for key in ("pattern_kl", "top1")}
    lists["top1"].pop("uniform")  # every key is its top key
    counts = layer.figure("pairs", "per_head") or []
    rows = []
    for head in range(max(map(len, lists["pattern_kl"].values()))):
        values = [{kinds[v]: f[head]["mean"] for v, f in by.items() if f[head:]} for by in lists.values()]
        rows.append((str(head), values[0], values[1], counts[head] if counts[head:] else None))
    note = (
        "A row a head. On the left less is better, on the right more. Full dot over light one: pruning costs nothing."
    )
    drawing = charts.head_dots(rows, "Pattern KL and top-1 by head") if rows else ""
    return framed("Each head", drawing, note, legend([(kind, NAMES[v]) for v, kind in kinds.items()]))


def _curve(layer: Layer) -> str:
    series, breaks, before = [], {}, 0.0
    for phase, lines in layer.metrics.items():
        every = lines[:: max(len(lines) // CURVE_POINTS, 1)]
        series.append(Series(phase, "a", [(before + n["tokens"], n["pattern_kl"], None) for n in every], marked=False))
        breaks[phase] = before
        before += lines[-1]["tokens"]
    drawing = charts.plot(series, "Training", "training tokens, all phases", "pattern KL, nats (log)", breaks=breaks)
    return framed("Training", drawing, "Means of logged steps on training text; dashed: where a phase begins.")


def _all_figures(layer: Layer) -> str:
    """Every pattern figure, what is recovered, and the share of the biases, folded away."""
    metrics = {"KL, nats": "pattern_kl", "top-1": "top1", "absolute error": "absolute_error"}
    rows = []
    for variant, name in NAMES.items():
        figures = [layer.figure(m, variant) or layer.figure("controls", variant, m) for m in metrics.values()]
        if any(figures):
            both = [(f, f and f.get("without_position_0")) for f in figures]
            rows.append([text(name), *(_value(f) for two in both for f in two)])
    tables = table(["pattern", *(w for m in metrics for w in (m, f"{m}, without position 0"))], rows)
    if recovered := layer.report.get("recovered"):
        rows = [[text(NAMES.get(v, v)), *(_value(f.get(m), 100, " %") for f in by.values() for m in ("ce", "logit_kl"))]
                for v, by in recovered.items()]  # fmt: skip
        of = [f"{what} of {NAMES.get(a, a)}" for a in next(iter(recovered.values())) for what in ("CE", "logit KL")]
        tables += "<p>Share of an ablation's damage that is recovered</p>" + table(["pattern", *of], rows)
    for side in SIDES:
        kept, share = (layer.figure("pairs", f"with_{side}_bias", key) for key in ("kept", "importance"))
        tables += (
            f'<p class="note">{number(kept)} pairs with the {side} bias hold {_short(share, True)} of importance.</p>'
        )
    return f"<details><summary>All figures of this layer</summary>{tables}</details>"


def _token(token: str) -> str:
    """A token with its whitespace visible, in its own direction."""
    marks = {" ": "<i>·</i>", "\n": "<i>⏎</i>", "\t": "<i>⇥</i>", "\r": "<i>↵</i>", "\u00a0": "<i>⍽</i>"}
    lone = "◌" if unicodedata.category(token[:1] or " ")[0] == "M" else ""  # a mark without its letter
    return lone + "".join(marks.get(char) or text(char) for char in token)


def _snippet(row: dict[str, Any]) -> str:
    """An example's tokens around its strongest one, those that fire shaded."""
    parts, center = [], row["center"]
    for place in range(max(center - BEFORE, 0), min(center + AFTER + 1, len(row["tokens"]))):
        act, fires = row["activations"][place], ""
        if act > 0:
            shade = min(act / max(row["activation"], 1e-9), 1)
            fires = f' class="{"f top" if place == center else "f"}" style="--s:{shade:.2f}" title="{act:.6g}"'
        parts.append(f"<bdi{fires}>{_token(row['tokens'][place])}</bdi>")
    where = f"document {row['document']}, position {row['position']}"
    return f'<div class="snip" title="{where}">{"<wbr>".join(parts)}</div>'


def _feature(layer: Layer, side: str, feature: int) -> str:
    """A feature's name and its strongest examples."""
    if feature < 0:
        return f'<div class="{side}"><b>bias</b> <span class="ci">always active</span></div>'
    snippets = "".join(_snippet(row) for row in layer.examples.get((side, feature), []))
    known = layer.known(side, feature)
    label = f' <span class="ci">{text(known["label"])}, F1 {number(known["f1"])}</span>' if known else ""
    return f'<div class="{side}"><b>{side[0]}{feature}</b>{label}{snippets}</div>'


def _pair_tables(layer: Layer) -> str:
    return "".join(_pair_table(layer, title, pairs) for title, pairs in layer.shown_pairs.items())


def _pair_table(layer: Layer, title: str, pairs: list[dict[str, Any]]) -> str:
    rows = []
    for pair in pairs:
        features = [_feature(layer, side, pair[f"{side}_feature"]) for side in SIDES]
        numbers = [number(pair["strength"]), number(1000 * pair["importance"])]
        numbers += [number(1000 * layer.linked(pair))] if "links" in title else []
        rows.append([str(pair["place"]), str(pair["head"]), *features, *numbers])
    note = ("Strength multiplies the two activations in a score: above 0 the head attends from where the query feature "
            "fires to where the key feature fires, below 0 it turns away; with a rotary embedding it is a factor on a "
            "product that varies with distance. Importance: what leaving the pair out costs, to second order, in "
            "millinats of KL a query row. Shade: activation within the example, outlined its maximum.")  # fmt: skip
    if "bias" in title:
        note = ("A side's bias is a feature that is always active: with a rotary embedding these pairs carry what a "
                "head does by distance alone, and what it does whatever the other side says.")  # fmt: skip
    head = ["#", "head", "query feature", "key feature", "strength", "importance, mnat"]
    if "links" in title:
        note = ("Pairs through which a token, or the one before it, finds what it answers to; those with the most "
                "importance along such links (last column, on held-out text) first. " + note)  # fmt: skip
        head.append("along links, mnat")
    opening = f'<h3>{title}</h3><p class="note">{note}</p>'
    return opening + table(head, rows, "pairs tokens", (2, 3)) if rows else ""


def _truth(layer: Layer) -> str:
    """On the embedded corpus: the features and pairs beside the controls, and what each head does."""
    if not (found := layer.report.get("truth")):
        return ""
    names = {"decomposition": "this decomposition", "residual": "residual basis"} | NAMES
    rows = []
    for name, scores in found.items():
        cells = [
            " / ".join(_short((scores.get(side) or {}).get(key), key == "named") for side in SIDES)
            for key in ("live", "named", "f1_mean", "f1_by_importance")
        ]
        shares = [_short(scores["pairs"].get(key), True) for key in ("matching", "linked", "mostly_linked")]
        rows.append([text(names.get(name, name)), *cells, *shares])
    head = ["", "live q / k", "named q / k", "mean F1 q / k", "F1 by importance q / k", "between labels",
            "along links", "in linked pairs"]  # fmt: skip
    note = (f"Tokens of the embedded corpus have known roles. On half of {number(layer.figure('tokens', 'truth'))} "
            "held-out tokens a feature gets the label it predicts best: a role, its own or a neighbour's, or a word. "
            "All figures are of the other half. Named: F1 of 0.8 or more. By importance: weighted by what a feature's "
            "pairs matter. Then shares of the pairs' importance (biases left out): between the two features' labels; "
            "along links, to what the query's token, or the next one, answers to (a name's last mention, a bracket's "
            "partner, a verb's subject, the same word of the song); in pairs with most of theirs there.")  # fmt: skip
    opening = f'<h3>Against what is known</h3><p class="note">{note}</p>'
    return opening + table(head, rows) + _head_roles(layer)


def _head_roles(layer: Layer) -> str:
    rows = []
    for head in layer.truth.get("heads", []):
        for place, row in enumerate(head["role_pairs"][:HEAD_ROLES]):
            attention = f"{_short(row['attention'], True)} ({_short(row['uniform'], True)})"
            names = [text(row[side]) for side in SIDES]
            rows.append([str(head["head"]) if not place else "", *names, attention, _value(row.get("ce_increase"))])
    note = ("Between which roles each head attends more than evenly, by what the model's loss gains, in nats a token, "
            f"when the head may not: on {number(layer.figure('tokens', 'heads'))} held-out tokens, not those the roles "
            "were chosen on. Attention: share of all its attention (of uniform attention).")  # fmt: skip
    head = ["head", "from", "to", "attention", "CE increase without"]
    return f'<h3>What the heads do</h3><p class="note">{note}</p>{table(head, rows)}' if rows else ""


def _densest(layer: Layer) -> str:
    rows = []
    for f in layer.densest:
        numbers = [number(f["mean_activation"]), number(f["max_activation"]), number(f["pairs"])]
        numbers += [number(1000 * f["importance"]), _short(f.get("by_position"), True), _partner(layer, f)]
        rows.append([_short(f["density"], True), _feature(layer, f["side"], f["feature"]), *numbers])
    note = ("The features that fire on most tokens, by side. By position: share of its activation's variance that the "
            "place in the sequence alone explains. Where examples say little, its partner may: the other side of its "
            "most important pair.")  # fmt: skip
    head = ["fires on", "feature", "mean", "max", "pairs", "importance, mnat", "by position", "partner"]
    said = "".join(f"<p>{text(words)}</p>" for words in _dense_in_words(layer))
    opening = f'<h3>Densest features</h3>{said}<p class="note">{note}</p>'
    return opening + table(head, rows, "dense tokens", (1,)) if rows else ""


def _dense_in_words(layer: Layer) -> Iterator[str]:
    """A sentence a side on what its dense features are for, beside the others."""
    for side, other in zip(SIDES, SIDES[::-1], strict=True):
        dense, others = (layer.figure("dense_features", side, name) for name in ("dense", "others"))
        if not dense or not dense["count"]:
            continue
        worth, first, bias = (_short(dense[key], True) for key in ("importance", "first", "bias"))
        yield (
            f"{dense['count']} {side} features fire on more than 10 % of tokens and hold {worth} of the importance. "
            f"{first} of theirs is paired with {other} features that fire on the first token (of the others': "
            f"{_short(others['first'], True)}), {bias} with the {other} bias ({_short(others['bias'], True)}). "
            f"{dense['positional']} of them mostly follow position."
        )


def _partner(layer: Layer, feature: dict[str, Any]) -> str:
    """The other side of a feature's most important pair."""
    side, other = (feature["side"], SIDES[feature["side"] == "query"])
    pair = next((p for p in layer.pairs if p[f"{side}_feature"] == feature["feature"]), None)
    if pair is None:
        return charts.DASH
    number_ = pair[f"{other}_feature"]
    known = layer.known(other, number_)
    name = "bias" if number_ < 0 else str(number_)
    return text(f"{other} {name}, head {pair['head']}" + (f": {known['label']}" if known else ""))


def _heat(layer: Layer) -> str:
    """The patterns of the most important head on one text; the other heads folded away."""
    found = layer.patterns
    name = f"layer-{layer.number}-heat"
    if not found or not found.get("heads"):
        return ""
    heads = sorted(found["heads"], key=lambda h: -sum(p["importance"] for p in layer.pairs if p["head"] == h["head"]))
    first, *others = (charts.heat_maps(head, name) for head in heads)
    folded = f"<details><summary>Other heads</summary>{''.join(others)}</details>" if others else ""
    tokens = "<wbr>".join(f'<bdi title="position {i}">{_token(t)}</bdi>' for i, t in enumerate(found["tokens"]))
    note = ("Queries run down, keys across. Colour goes with the square root of the weight; difference is pruned less "
            "true, blue where the map attends too much. Point at a cell to read it.")  # fmt: skip
    opening = f'<h3>Patterns on a held-out text</h3><p class="note">{note}</p><p class="snip">{tokens}</p>'
    return opening + first + folded + charts.heat_data(found["tokens"], heads, name)
