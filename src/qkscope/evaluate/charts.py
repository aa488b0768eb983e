"""Figures of the report page as inline SVG, how numbers are written in it, and its style.

Every figure is drawn 400 units wide, so that it can be read at the width of a telephone and several fit side by side on
a screen. Colours are CSS classes, for light and dark: `a` blue (query, or ours), `a2` light blue, `b` vermilion (key),
`g` grey (baselines), `c` outlined (controls), `o` and `ao` hollow; blue and vermilion are Okabe and Ito's, and nothing
is told by colour alone. A heat map is a PNG of one pixel a cell rather than thousands of rectangles.
"""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

WIDTH = 400
MINUS, DASH, TIMES = "\u2212", "\u2013", "\u00d7"
Figure = dict[str, Any]  # {"mean": float or null, "ci95": [low, high] or null}


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any) -> str:
    """Three significant digits; a dash for what was not measured."""
    if not finite(value):
        return DASH
    if abs(value) >= 100:
        return f"{value:,.0f}".replace("-", MINUS)
    if value == 0 or abs(value) >= 1e-4:
        return f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".").replace("-", MINUS)
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return mantissa.replace("-", MINUS) + TIMES + "10" + raised


def short(value: float) -> str:
    """A number for an axis: 2.5k, 10M."""
    size, letter = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= pair[0]), (1, ""))
    return number(value / size) + letter


def bounds(figure: Figure | None) -> list[float] | None:
    """The interval, where there is a finite one."""
    ci = (figure or {}).get("ci95")
    return ci if ci and all(map(finite, ci)) else None


def interval(figure: Figure | None, scale: float = 1.0) -> tuple[str, str, str]:
    """Mean, `[low, high]` and `±half` with as many places as the interval warrants; the last two may be empty."""
    if not figure or not finite(figure.get("mean")):
        return DASH, "", ""
    mean, ci = figure["mean"] * scale, bounds(figure)
    if not ci or ci[1] <= ci[0]:
        return number(mean), f"[{number(ci[0] * scale)}, {number(ci[1] * scale)}]" if ci else "", ""
    low, high = (bound * scale for bound in ci)
    half = (high - low) / 2
    exponent = math.floor(math.log10(half))
    if exponent < -6:
        return number(mean), f"[{number(low)}, {number(high)}]", f"±{number(half)}"
    places = max(-exponent + (half / 10.0**exponent < 3), 0)
    mean, low, high, half = (f"{v:,.{places}f}".replace("-", MINUS) for v in (mean, low, high, half))
    return mean, f"[{low}, {high}]", f"±{half}"


def clean(value: Any) -> str:
    """The text with control and direction characters made visible, so that it can neither hide nor reorder others."""
    return "".join(map(_clean, str(value)))


def _clean(char: str) -> str:
    code, kind = ord(char), unicodedata.category(char)
    if char in "\t\n\r\u200c\u200d" or kind not in (
        "Cc",
        "Cf",
        "Cs",
        "Zl",
        "Zp",
    ):  # joiners belong to scripts and emoji
        return char
    return "\ufffd" if kind == "Cs" else f"⟨{code:04X}⟩"


def text(value: Any) -> str:
    """Anything as harmless HTML."""
    return html.escape(clean(value))


@dataclass(frozen=True)
class Scale:
    """From data to drawing units along one axis; values outside of it land on its ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """A log axis around positive values."""
        return cls(min(values) / 1.2, max(values) * 1.2, start, end, log=True)

    def __call__(self, value: float) -> float:
        value, low, high = min(max(value, self.low), self.high), self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """About `most` round values."""
        if self.log and len(found := self._log_ticks(most)) > 1:
            return found
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= most)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [m * 10.0**d for d in decades for m in factors]
            ticks = [t for t in ticks if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]
            if len(ticks) <= most + 1:
                return ticks
        return ticks[:: math.ceil(len(ticks) / most)]


def svg(height: float, title: str, body: list[str]) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{text(title)}">'
    return opening + "".join(body) + "</svg>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def label(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{text(words)}</text>'


def dot(x: float, y: float, kind: str, words: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{text(words)}</title></circle>'


def rect(x: float, y: float, width: float, height: float, kind: str, words: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {box}><title>{text(words)}</title></rect>'


def x_axis(scale: Scale, top: float, bottom: float, words: str, most: int = 5) -> list[str]:
    out = [label((scale.start + scale.end) / 2, bottom + 29, words, "tick", "middle")]
    for tick in scale.ticks(most):
        x = scale(tick)
        out += [line(x, top, x, bottom, "grid"), label(x, bottom + 14, short(tick), "tick", "middle")]
    return out


def y_axis(scale: Scale, left: float, right: float, words: str) -> list[str]:
    out = [label(0, 10, words, "tick")]
    for tick in scale.ticks(5):
        y = scale(tick)
        out += [line(left, y, right, y, "grid"), label(left - 5, y + 3.5, short(tick), "tick", "end")]
    return out


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(class, words) of each sign, as HTML above a figure."""
    mark = '<svg class="mark" viewBox="0 0 10 10"><circle cx="5" cy="5" r="3.5" class="{}"/></svg>'
    return '<p class="legend">' + "".join(f"<span>{mark.format(k)}{text(w)}</span>" for k, w in entries) + "</p>"


class Bar(NamedTuple):
    label: str
    figure: Figure | None
    kind: str = "g"


def bars(rows: Sequence[Bar], title: str, words: str, *, log: bool = False) -> str:
    """Horizontal bars with 95 % whiskers and their values; of what a log axis cannot show only the value stands."""
    left, right, top, step = 98, 290, 4, 22
    means = [row.figure["mean"] for row in rows if row.figure and finite(row.figure.get("mean"))]
    shown = [m for m in means if m > 0] or [0.1, 1.0]
    low = 10.0 ** math.floor(math.log10(min(shown) / 1.5)) if log else 0.0  # bars start at a whole decade
    high = 1.05 * max([*shown, *(ci[1] for row in rows if (ci := bounds(row.figure)))])
    scale = Scale(low, high, left, right, log)
    bottom = top + step * len(rows)
    out = [*x_axis(scale, top, bottom, words, 4), line(left, top, left, bottom, "rule")]
    for place, row in enumerate(rows):
        out += _bar(row, scale, top + step * (place + 0.5), log)
    return svg(bottom + 34, title, out)


def _bar(row: Bar, scale: Scale, y: float, log: bool) -> list[str]:
    mean, ci = (row.figure or {}).get("mean"), bounds(row.figure)
    value, between, half = interval(row.figure)
    out = [label(scale.start - 6, y + 4, row.label, "", "end")]
    if finite(mean) and (mean > 0 or not log):
        width = max(scale(mean) - scale.start, 1)
        out.append(rect(scale.start, y - 6.5, width, 13, row.kind, f"{row.label}: {value} {between}"))
    if out[1:] and ci:
        low, high = scale(ci[0]), scale(ci[1])
        out += [line(low, y, high, y, "whisker"), *(line(x, y - 3, x, y + 3, "whisker") for x in (low, high))]
    return [*out, label(scale.end + 6, y + 4, f"{value} {half}" if finite(mean) else "not measured", "value")]


def histogram(edges: Sequence[float], counts: Sequence[int], title: str, query: bool, low: float, most: float) -> str:
    """Counts between log10 edges; `low` and `most` are shared by figures that stand side by side."""
    left, right, top, bottom = 34, 392, 18, 150
    x, y = Scale(low, edges[-1], left, right), Scale(0, max(most, 1) * 1.05, bottom, top)
    out = y_axis(y, left, right, "features")
    for tick in range(math.ceil(low), math.floor(edges[-1]) + 1):
        anchor = "end" if tick == edges[-1] else "middle"
        out.append(label(x(tick), bottom + 14, f"{100 * 10.0**tick:g} %", "tick", anchor))
    for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            words = f"{count} features fire on {number(100 * 10**a)} to {number(100 * 10**b)} % of tokens"
            out.append(rect(x(a) + 0.5, y(count), x(b) - x(a) - 1, bottom - y(count), "a" if query else "b", words))
    out += [line(x(-1), top, x(-1), bottom, "dash"), line(left, bottom, right, bottom, "rule")]
    words = "share of tokens on which a feature fires (log)"
    return svg(bottom + 34, title, [*out, label((left + right) / 2, bottom + 29, words, "tick", "middle")])


@dataclass
class Series:
    """Points (x, y, 95 % interval or None) of one kind; those that a log axis cannot show are dropped."""

    name: str
    kind: str
    points: Sequence[tuple[float, float, Sequence[float] | None]]
    joined: bool = True
    marked: bool = True

    def __post_init__(self) -> None:
        shown = [p for p in self.points if finite(p[1]) and p[0] > 0 and p[1] > 0]
        self.points = sorted(shown, key=lambda p: p[0])

    def draw(self, x: Scale, y: Scale) -> list[str]:
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b, _ in self.points)
        out = [f'<path class="line {self.kind}" d="M{path}"/>'] if self.joined and len(self.points) > 1 else []
        for a, b, ci in self.points if self.marked else ():
            out += [line(x(a), y(ci[0]), x(a), y(ci[1]), "whisker")] if ci else []
            out.append(dot(x(a), y(b), self.kind, f"{self.name}: {number(b)} at {number(a)}"))
        return out


def plot(
    series: Sequence[Series], title: str, x_words: str, y_words: str, *, x_log: bool = False,
    guides: Mapping[str, float | None] | None = None, breaks: Mapping[str, float] | None = None,
) -> str:  # fmt: skip
    """Points and lines on a log y axis, with named horizontal guides and vertical breaks; nothing without a point."""
    left, right, top, bottom = 40, 392, 18, 190
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    level = {name: v for name, v in (guides or {}).items() if finite(v) and v > 0}
    y = Scale.around([*(p[1] for p in points), *level.values()], bottom, top)
    xs = [p[0] for p in points]
    x = Scale.around(xs, left, right) if x_log else Scale(0, max(xs) * 1.02, left, right)
    out = [*y_axis(y, left, right, y_words), *x_axis(x, bottom, bottom, x_words)]
    for name, at in level.items():
        out += [line(left, y(at), right, y(at), "dash"), label(left + 4, y(at) - 4, name, "tick halo")]
    for place, (name, at) in enumerate((breaks or {}).items()):
        # On one line the names of short phases would run into each other.
        below = top + 9 + 11 * (place % 5)
        out += [line(x(at), top, x(at), bottom, "dash"), label(x(at) + 3, below, name, "tick halo")]
    out += [part for s in series for part in s.draw(x, y)]
    return svg(bottom + 34, title, [*out, line(left, bottom, right, bottom, "rule")])


def head_dots(rows: Sequence[tuple[str, dict[str, float], dict[str, float], Any]], title: str) -> str:
    """A row a head (its name, pattern KL by circle class, top-1 by circle class, pairs), on two axes."""
    top, step = 26, 15
    bottom = top + step * len(rows)
    values = [v for _, kl, _, _ in rows for v in kl.values() if finite(v) and v > 0] or [0.1, 1.0]
    axes = Scale.around(values, 30, 214), Scale(0, 1, 236, 348)
    out = [*x_axis(axes[0], top, bottom, "", 4), *x_axis(axes[1], top, bottom, "", 2),
           label(30, 12, "pattern KL (log)", "tick"), label(236, 12, "top-1 agreement", "tick"),
           label(396, 12, "pairs", "tick", "end")]  # fmt: skip
    for place, (name, *both, pairs) in enumerate(rows):
        y = top + step * (place + 0.5)
        out += [line(30, y, 348, y, "grid"), label(24, y + 4, name, "", "end")]
        out.append(label(396, y + 4, number(pairs), "value", "end"))
        for scale, found in zip(axes, both, strict=True):
            shown = [(kind, v) for kind, v in found.items() if finite(v) and v >= scale.low]
            out += [dot(scale(v), y, kind, f"head {name}: {number(v)}") for kind, v in shown]
    return svg(bottom + 18, title, out)


HEAT_KINDS = ("true", "transcoders", "pruned")
LESS = r"\u003c"
BLUES = [(255, 255, 255), (158, 202, 225), (33, 113, 181), (8, 48, 107)]
ORANGE_BLUE = [(150, 70, 0), (245, 165, 80), (255, 255, 255), (107, 174, 214), (8, 69, 148)]


def heat_png(values: Sequence[Sequence[float]], *, signed: bool = False) -> str:
    """A matrix of values in 0..1 (signed: -1..1) as a data URI, one pixel a cell; colour goes with the square root."""
    stops, zero = (ORANGE_BLUE, 127.5) if signed else (BLUES, 0.0)
    roots = [[math.copysign(min(abs(v), 1.0) ** 0.5, v) for v in row] for row in values]
    rows = b"".join(b"\0" + bytes(round(zero + (255 - zero) * max(v, -(zero > 0))) for v in row) for row in roots)
    palette = b"".join(bytes(_mix(stops, i / 255)) for i in range(256))
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), 8, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _mix(stops: Sequence[tuple[int, int, int]], share: float) -> list[int]:
    at = share * (len(stops) - 1)
    below = min(int(at), len(stops) - 2)
    return [round(a + (b - a) * (at - below)) for a, b in zip(stops[below], stops[below + 1], strict=True)]


def heat_maps(head: dict[str, Any], name: str) -> str:
    """One head's patterns side by side: true, transcoders, pruned map, and pruned less true."""
    less = [[b - a for a, b in zip(*two, strict=False)] for two in zip(head["true"], head["pruned"], strict=False)]
    maps = {kind: heat_png(head[kind]) for kind in HEAT_KINDS} | {"difference": heat_png(less, signed=True)}
    cells = "".join(f'<div>{kind}<img alt="{kind}" src="{uri}"></div>' for kind, uri in maps.items())
    which = text(head["head"])
    opening = f'<figure class="heat" data-of="{name}" data-head="{which}"><figcaption>Head {which}</figcaption>'
    return f'{opening}<div class="maps">{cells}</div><p class="read note">&nbsp;</p></figure>'


def heat_data(tokens: Sequence[str], heads: Sequence[dict[str, Any]], name: str) -> str:
    """What the script reads out, in thousandths; `<` is written so that no token can end the element."""
    cells = {str(h["head"]): {k: [[round(1000 * v) for v in row] for row in h[k]] for k in HEAT_KINDS} for h in heads}
    data = json.dumps({"tokens": [clean(t) for t in tokens], "heads": cells}, separators=(",", ":"))
    return f'<script type="application/json" id="{name}">{data.replace("<", LESS)}</script>'


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1e23;--soft:#5b6270;--line:#d8dce2;--hair:#eceef1;--a:#0072b2;
--a2:#8cc3e6;--b:#d55e00;--g:#a3a9b3;--qs:0 114 178;--ks:213 94 0}@media(prefers-color-scheme:dark){
:root{--bg:#14171c;--ink:#e4e7ec;--soft:#9aa3b0;--line:#363c46;--hair:#242931;--a:#56b4e9;--a2:#2b6a94;--b:#ee8a3c;
--g:#737b88;--qs:86 180 233;--ks:238 138 60}.maps img{filter:invert(1) hue-rotate(180deg)}}*{box-sizing:border-box}
body{margin:0 auto;padding:20px 16px 60px;max-width:1240px;background:var(--bg);color:var(--ink);
font:14px/1.45 system-ui,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}h1{font-size:22px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 4px;padding-top:10px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:28px 0 2px}a{color:var(--a)}.soft,.note,.ci,.sub,.legend{color:var(--soft)}
.soft{margin:2px 0 14px;font-size:13px}.note,.legend,.sub{font-size:12px;margin:4px 0}
.ci{font-size:.8em;font-weight:400;white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));margin:0 0 22px}
.tiles div{padding:8px 12px 8px 0;border-top:1px solid var(--line)}dt{font-size:12px}
dd{margin:0;font-size:19px;font-weight:600}dd .ci{font-size:12px}dd.sub{font-weight:400}
.figures{display:grid;gap:22px 34px;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr))}
figure{margin:0;min-width:0}figcaption{font-weight:600;margin-bottom:6px}
svg{width:100%;height:auto;display:block;overflow:visible}svg text{font-size:11.5px;fill:var(--ink)}
svg .tick{fill:var(--soft);font-size:10.5px}svg .value{font-size:11px}
.halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px}.a{fill:var(--a)}.a2{fill:var(--a2)}.b{fill:var(--b)}
.g{fill:var(--g)}.c,.o,.ao{fill:var(--bg);stroke:var(--g);stroke-width:1.5}.ao{stroke:var(--a)}path{fill:none}
.line{stroke:var(--a);fill:none;stroke-width:1.5}.line.b{stroke:var(--b)}.line.c,.line.g{stroke:var(--g)}.grid{stroke:var(--hair)}.rule{stroke:var(--soft)}
.whisker{stroke:var(--ink);stroke-width:1.1}.dash{stroke:var(--soft);stroke-dasharray:3 3;stroke-width:.8}
.legend span{margin-right:14px;white-space:nowrap}
.mark{display:inline-block;width:11px;height:11px;margin-right:4px;vertical-align:-1px}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{text-align:left;padding:5px 14px 5px 0;vertical-align:top}
th{font-weight:400;color:var(--soft);font-size:12px;vertical-align:bottom}td{border-top:1px solid var(--hair)}
.plain td,.plain th{white-space:nowrap}details{margin:18px 0}summary{cursor:pointer;color:var(--a)}
pre{overflow-x:auto;font-size:12px}
.snip{font:12px/1.7 ui-monospace,"DejaVu Sans Mono",monospace;direction:ltr;overflow-wrap:anywhere;margin:1px 0}
.snip i{font-style:normal;opacity:.4}.query{--c:var(--qs)}.key{--c:var(--ks)}.query b{color:var(--a)}
.key b{color:var(--b)}.f{background:rgb(var(--c)/calc(var(--s)*.55));border-radius:2px}
.top{outline:1px solid rgb(var(--c))}.heat{margin:12px 0}
.maps{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));font-size:12px;color:var(--soft)}
.maps img{display:block;width:100%;aspect-ratio:1;image-rendering:pixelated;border:1px solid #bbb;margin-top:3px}
.pairs td:nth-child(3),.pairs td:nth-child(4){width:39%}.dense td:nth-child(2){width:55%}@media(max-width:640px){
.tokens thead{display:none}
.tokens tr{display:flex;flex-wrap:wrap;gap:0 14px;padding:8px 0;border-top:1px solid var(--line)}
.tokens td{border:0;padding:1px 0}.tokens td.wide{width:100%;order:1}
.tokens td:not(.wide)::before{content:attr(data-h) " ";color:var(--soft);font-size:12px}}
"""
SCRIPT = """
document.querySelectorAll('.heat').forEach(figure => {
  const all = JSON.parse(document.getElementById(figure.dataset.of).textContent)
  const head = all.heads[figure.dataset.head], tokens = all.tokens, say = figure.querySelector('.read')
  figure.querySelectorAll('img').forEach(map => map.addEventListener('pointermove', at => {
    const cell = d => Math.max(0, Math.min(tokens.length - 1, Math.floor(d / map.clientWidth * tokens.length)))
    const q = cell(at.offsetY), k = cell(at.offsetX), name = i => JSON.stringify(tokens[i]) + ' (' + i + ')'
    const said = Object.keys(head).map(kind => kind + ' ' + ((head[kind][q] || [])[k] || 0) / 1000)
    say.textContent = `query ${name(q)}, key ${name(k)}: ${said.join(', ')}`
  }))
})
"""


def page(title: str, body: str) -> str:
    """The whole document."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{text(title)}</title><style>{STYLE}</style>"
    end = f"<script>{SCRIPT}</script></body></html>\n"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n{end}'
