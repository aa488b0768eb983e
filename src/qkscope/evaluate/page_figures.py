"""The figures of a layer on report.html: what is lost, by how many pairs, in which heads, and how training went."""

from __future__ import annotations

from typing import Any

from . import charts
from .charts import Bar, Series, finite, legend, number
from .page_parts import NAMES, framed, short
from .stored import SIDES, Layer

CURVE_POINTS = 300  # of a training curve: more cannot be told apart
LOSSES = {
    "ce_increase": ("Cross-entropy increase", "nats a token (log)", "The layer's pattern replaced, values kept. Blue: "
                    "ours; grey: ablations. Shorter is closer to the model."),
    "logit_kl": ("KL of the model's output", "KL(true ‖ patched logits), nats a token (log)", "How far the next-token "
                 "distribution moves when the pattern is replaced. Shorter is better."),
}  # fmt: skip
KINDS = {"map_pruned": "a", "transcoders": "a2", "step1": "a2", "shuffled": "c", "random": "c", "svd": "c"}


def figures(layer: Layer) -> str:
    """Every figure of a layer that there is something to draw for."""
    drawn = [_curve(layer)]
    if layer.report:
        drawn = [_kl_bars(layer), *(_loss_bars(layer, key) for key in LOSSES), _pair_curve(layer), _faithful(layer),
                 *(_histogram(layer, side) for side in SIDES), _heads(layer), *drawn]  # fmt: skip
    return f'<div class="figures">{"".join(drawn)}</div>'


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
        kept, worst, chance, whole = (short(played[name]) for name in ("kept", "adversary", "random", "all"))
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
        f"{width - live:,} of {width:,} never fired and are not drawn; {short(dense, True)} fire on more than 10 % of "
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
