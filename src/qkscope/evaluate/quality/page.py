"""The scoreboard as a page: the scores in a table, every layer's curves against active features and against pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import write_text
from .. import charts
from ..charts import Series, bounds, legend, number, text
from ..page_parts import framed, table
from .bench import PLAIN, whole_masks

CURVES = {  # dictionaries: what is said, circle class
    "seed": ("published recipe, mended", "g"),
    "default": ("default", "a"),
    PLAIN: ("default without its pair penalty", "b"),  # no pairs are taken from it
}
LOSSES = {
    "pattern_kl": ("Pattern KL", "nats a query row (log)"),
    "logit_kl": ("KL of the model's output", "nats a token (log)"),
    "ce_increase": ("Cross-entropy increase", "nats a token (log)"),
}


def write_scoreboard(path: Path, found: dict[str, Any]) -> None:
    """Make the page of a benchmark's figures."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for layer in found["layers"]:
        layers.setdefault(f"{layer['model']} layer {layer['layer']}", []).append(layer)
    budget = found["budget"]
    width, tokens, heldout = (number(budget[key]) for key in ("width", "tokens", "heldout_tokens"))
    about = (
        f"Dictionaries of {width} features a side, trained on {tokens} tokens, pruned on as many, held out: {heldout}; "
        f"{found['device']}. Lower and further left is better. Whiskers: least and most over seeds, or 95 % over "
        "sequences where there is one. What is not above zero has no place on a log axis."
    )
    body = [f'<h1>Quality beside the published recipe</h1><p class="soft">{text(about)}</p>', _scores(found)]
    for name, same in layers.items():
        uniform = statistics.fmean(layer["uniform_kl"]["mean"] for layer in same)
        seeds = ", ".join(str(layer["seed"]) for layer in same)
        said = f"seeds {seeds}; KL of a uniform pattern: {number(uniform)}"
        body.append(f'<section><h2>{text(name)}</h2><p class="soft">{said}</p>')
        body.append(f'<div class="figures">{"".join(_plots(same))}</div></section>')
    write_text(path, charts.page("qkscope: quality", "\n".join(body)))


def _scores(found: dict[str, Any]) -> str:
    places = list(found["scoreboard"][0]["by_layer"])
    rows = [
        [text(score["score"]), f"<b>{number(score['median'])}</b>", *(number(score["by_layer"][p]) for p in places)]
        for score in found["scoreboard"]
    ]
    return table(["score", "median", *places], rows)


def _plots(layers: Sequence[dict[str, Any]]) -> list[str]:
    """By active features in the upper row, by pairs in the lower one."""
    out = []
    for by, words in (("L0", "active features a side (log)"), ("pairs", "pairs kept (log)")):
        for loss, (title, unit) in LOSSES.items():
            curves = {name: curve_of(layers, name, by, loss) for name in CURVES}
            shown = {name: curve for name, curve in curves.items() if curve}
            signs = legend([(CURVES[name][1], CURVES[name][0]) for name in shown])
            series = [Series(*CURVES[name], curve) for name, curve in shown.items()]
            drawing = charts.plot(series, f"{title} by {by}", words, unit, x_log=True)
            out.append(framed(f"{title} by {by}", drawing, "", signs))
    return out


def curve_of(layers: Sequence[dict[str, Any]], name: str, by: str, loss: str) -> list[tuple[float, float, Any]]:
    """One dictionary's curve: a point for each L0 of all its pairs, or for each count of its kept pairs."""
    kept: dict[Any, list[tuple[float, dict[str, Any]]]] = {}
    for layer in layers:
        whole = list(whole_masks(layer).values())
        for row in layer["rows"]:
            pruned, which = "pairs" in row, row["dictionary"]
            same = which == name or (by == "L0" and which.startswith(f"{name}, "))
            if not same or pruned is not (by == "pairs"):
                continue
            x = row["pairs"] if pruned else (row["l0_query"]["mean"] + row["l0_key"]["mean"]) / 2
            # A whole mask leaves its own count each time.
            asked = None if not pruned or any(row is mask for mask in whole) else row["asked"]
            kept.setdefault((which, row["method"], asked), []).append((x, row[loss]))
    points = []
    for same in kept.values():
        values = [figure["mean"] for _, figure in same]
        ends = [min(values), max(values)] if len(values) > 1 else bounds(same[0][1])
        ends = ends if ends and ends[0] > 0 else None
        points.append((statistics.fmean(x for x, _ in same), statistics.fmean(values), ends))
    # Of several masks, each with its own curve, the best at each cost.
    return [p for p in points if not any(cost <= p[0] and value < p[1] for cost, value, _ in points)]
