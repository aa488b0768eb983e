"""Parts of report.html: a figure as text, a table, a drawing in its frame, and what everything is called."""

from __future__ import annotations

from typing import Any

from . import charts
from .charts import Figure, finite, interval, number, text

NAMES = {"map_pruned": "pruned map", "transcoders": "transcoders", "map_all": "full map", "step1": "before tuning",
         "mean": "mean pattern", "uniform": "uniform", "zero": "zero", "shuffled": "shuffled pairs",
         "random": "random", "svd": "SVD of QK"}  # fmt: skip


def value(figure: Figure | None, scale: float = 1.0, unit: str = "") -> str:
    """A figure's mean with its interval."""
    mean, bounds, _ = interval(figure, scale)
    return f"{mean}{unit}" + (f' <span class="ci">{bounds}</span>' if bounds else "")


def short(figure: Any, percent: bool = False) -> str:
    """A number, or a figure's mean, without its interval."""
    mean = figure.get("mean") if isinstance(figure, dict) else figure
    if not percent:
        return number(mean)
    return f"{number(round(100 * mean, 3))} %" if finite(mean) else charts.DASH


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
