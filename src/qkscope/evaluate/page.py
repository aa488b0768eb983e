"""report.html: one self-contained page of a run, or of a folder of runs, made from what lies on disk.

The page fetches nothing and holds its own style, figures and (for the read-out under a heat map) a few lines of script.
Whatever a run lacks is left out: a model without a head has no cross-entropy, a run without controls no controls. Tokens
are text of unknown origin: everything goes through `charts.text`, which escapes it and shows its control characters.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ..errors import UserError
from ..files import write_text
from . import charts
from .charts import Bar, Figure, Series, finite, interval, legend, number, text

PAIRS_SHOWN, DENSEST_SHOWN, SNIPPETS = 30, 6, 2
BEFORE, AFTER = 9, 4  # tokens of an example shown around the one that fires most
CURVE_POINTS = 300  # of a training curve: more cannot be told apart
SIDES = ("query", "key")
NAMES = {"map_pruned": "pruned map", "transcoders": "transcoders", "map_all": "full map", "step1": "before tuning",
         "mean": "mean pattern", "uniform": "uniform", "zero": "zero", "shuffled": "shuffled pairs",
         "random": "random", "svd": "SVD of W_QᵀW_K"}  # fmt: skip
KINDS = {"map_pruned": "a", "transcoders": "a2", "step1": "a2", "shuffled": "c", "random": "c", "svd": "c"}


def write_page(folder: Path) -> Path:
    """Make `folder/report.html` from the run, or the runs, in `folder`; `UserError` where a file is damaged."""
    folder = Path(folder)
    runs = [folder, *sorted(path.parent for path in folder.glob("*/config.yaml"))]
    found = [(run, layer) for run in runs for layer in _layers(run)]
    own = [layer for run, layer in found if run == folder]
    config = _read(folder / "config.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8"))) or {}
    named = (config.get("run") or {}).get("model") or next(
        (n.report["model"] for _, n in found if "model" in n.report), None
    )
    title = "QK decomposition of " + (str(named).rstrip("/").rsplit("/", 1)[-1] if named else "the embedded model")
    links = "".join(f'<a href="#layer-{n.number}">layer {n.number}</a> ' for n in own) if len(own) > 1 else ""
    body = [f"<header><h1>{text(title)}</h1><nav>{links}</nav></header>"]
    if len(found) > 1 or len(runs) > 1:
        body.append(_summary(folder, found))
    body += [layer_section(layer) for layer in own]
    if not found:
        body.append("<p>There is no layer in this folder yet.</p>")
    if config:
        source = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        body.append(f"<details><summary>Configuration of the run</summary><pre>{text(source)}</pre></details>")
    write_text(folder / "report.html", charts.page(title, "\n".join(body)))
    return folder / "report.html"


# Reading


class Layer:
    """What one layer's folder holds; empty where a file is not there."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    @cached_property
    def report(self) -> dict[str, Any]:
        return _read(self.folder / "report.json", lambda path: json.loads(path.read_text(encoding="utf-8"))) or {}

    @cached_property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """The logged steps of each training phase."""
        phases: dict[str, list[dict[str, Any]]] = {}
        for line in _read(self.folder / "metrics.jsonl", _json_lines) or []:
            if finite(line.get("pattern_kl")) and finite(line.get("tokens")):
                phases.setdefault(str(line.get("phase")), []).append(line)
        return phases

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Every kept pair, the most important first."""
        return sorted(self.rows("pairs"), key=lambda row: -row["importance"])

    @cached_property
    def examples(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """The first few examples of each feature."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in self.rows("examples", [("rank", "<", SNIPPETS)]):
            found.setdefault((row["side"], row["feature"]), []).append(row)
        return found

    def rows(self, name: str, filters: list | None = None) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.parquet"
        return _read(path, lambda path: pq.read_table(path, filters=filters).to_pylist()) or []

    def figure(self, *keys: str) -> Any:
        """What stands in the report under these keys, or None."""
        at: Any = self.report
        for key in keys:
            at = at.get(key) if isinstance(at, dict) else None
        return at

    def head_importance(self, head: int) -> float:
        return sum(row["importance"] for row in self.pairs if row["head"] == head)


def _layers(run: Path) -> list[Layer]:
    numbers = [p.name.removeprefix("layer_") for p in run.glob("layer_*") if p.is_dir()]
    return [Layer(run / f"layer_{n}", n) for n in sorted(int(n) for n in numbers if n.isdecimal())]


def _read(path: Path, how: Callable[[Path], Any]) -> Any:
    """The file's content, or None without one; a damaged file is a `UserError`."""
    try:
        return how(path) if path.is_file() else None
    except (ValueError, OSError, pa.ArrowException, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:120]})") from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run can leave half a line


# Words and tables


def _value(figure: Figure | None, scale: float = 1.0, unit: str = "") -> str:
    mean, bounds, _ = interval(figure, scale)
    return f"{mean}{unit}" + (f' <span class="ci">{bounds}</span>' if bounds else "")


def _mean(figure: Figure | None) -> str:
    return interval(figure)[0]


def _percent(share: Any) -> str:
    return f"{number(100 * share)} %" if finite(share) else "–"


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table of HTML cells; the heads are plain text."""
    top = "".join(f"<th>{text(h)}</th>" for h in head)
    heads = [text(h) for h in head]
    body = "".join(
        "<tr>" + "".join(f'<td data-h="{h}">{c}</td>' for h, c in zip(heads, row, strict=False)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, drawing: str, note: str, above: str = "") -> str:
    return f'<figure><figcaption>{text(title)}</figcaption>{above}{drawing}<p class="note">{text(note)}</p></figure>'


def _summary(folder: Path, found: list[tuple[Path, Layer]]) -> str:
    """A row for each layer of each run."""
    head = ["run", "layer", "width q / k", "L0 q / k", "live q / k", "dead q / k", "pairs", "KL transcoders", "KL pruned map",
            "KL uniform", "CE increase"]  # fmt: skip
    rows = []
    for run, layer in found:
        name, at = ("this run" if run == folder else text(run.name)), str(layer.number)
        if run == folder:
            at = f'<a href="#layer-{at}">{at}</a>'
        elif (run / "report.html").is_file():
            name = f'<a href="./{quote(run.name)}/report.html">{name}</a>'
        both = [[layer.figure(key, side) for side in SIDES] for key in ("width", "l0", "live", "dead")]
        cells = [[number(v) for v in both[0]], [_mean(v) for v in both[1]], [number(v) for v in both[2]],
                 [_percent((v or {}).get("mean")) for v in both[3]]]  # fmt: skip
        kl = [_value(layer.figure("pattern_kl", v)) for v in ("transcoders", "map_pruned", "uniform")]
        rows.append([name, at, *(" / ".join(c) for c in cells), number(layer.figure("pairs", "kept")), *kl,
                     _value(layer.figure("ce_increase", "map_pruned"))])  # fmt: skip
    note = "Held-out text. KL in nats a query row; CE increase in nats a token, with the layer's pattern from the pruned map."
    return f'<section><h2>Summary</h2>{_table(head, rows, "summary")}<p class="note">{note}</p></section>'


# One layer: numbers and charts


def layer_section(layer: Layer) -> str:
    """All there is to say about one layer."""
    opening = f'<section id="layer-{layer.number}"><h2>Layer {layer.number}</h2>'
    figures = [_curve(layer)]
    if not layer.report:
        unmeasured = "<p>Not measured yet: <code>qkscope evaluate</code> writes its report.json.</p>"
        return f'{opening}{unmeasured}<div class="figures">{figures[0]}</div>{_pair_table(layer)}</section>'
    figures = [_kl_bars(layer), _loss_bars(layer, "ce_increase"), _loss_bars(layer, "logit_kl"), _pair_curve(layer),
               _histogram(layer, "query"), _histogram(layer, "key"), _heads(layer), *figures]  # fmt: skip
    return "\n".join([opening, _facts(layer), _headline(layer), f'<div class="figures">{"".join(figures)}</div>',
                      _all_figures(layer), _heat(layer), _pair_table(layer), _densest(layer), "</section>"])  # fmt: skip


def _facts(layer: Layer) -> str:
    r, tokens = layer.report, layer.report.get("tokens", {})
    said = [f"{words} {r[key]}" for key, words in (("recipe", "recipe"), ("pairs_method", "pairs by")) if r.get(key)]
    if finite(tokens.get("trained")):
        said.append(f"trained on {number(tokens['trained'])} tokens")
    said.append(
        f"measured on {number(tokens.get('evaluated'))} held-out tokens, {number(tokens.get('sequences'))} sequences"
    )
    if r.get("seconds"):
        said.append("wall time " + ", ".join(f"{phase} {number(s)} s" for phase, s in r["seconds"].items()))
    if finite(check := layer.figure("map_all_check", "largest_log_pattern_difference")):
        said.append(f"all pairs, summed one by one, give the transcoders' log-pattern to within {number(check)}")
    return f'<p class="soft">{text("; ".join(said))}. In brackets: 95 % intervals over sequences.</p>'


def _headline(layer: Layer) -> str:
    kl = {name: _mean(layer.figure("pattern_kl", name)) for name in ("transcoders", "uniform")}
    tiles = [("Pattern KL, pruned map", _value(layer.figure("pattern_kl", "map_pruned")),
              f"nats; transcoders {kl['transcoders']}, uniform {kl['uniform']}")]  # fmt: skip
    if "ce_increase" in layer.report:
        lost = {name: _mean(layer.figure("ce_increase", name)) for name in ("transcoders", "zero")}
        tiles.append(("CE increase, pruned map", _value(layer.figure("ce_increase", "map_pruned")),
                      f"nats a token; transcoders {lost['transcoders']}, zero {lost['zero']}"))  # fmt: skip
    tiles.append(
        ("Top-1, pruned map", _value(layer.figure("top1", "map_pruned"), 100, " %"), "query rows with the same top key")
    )
    for side in SIDES:
        live = f"{number(layer.figure('live', side))} of {number(layer.figure('width', side))} features live"
        note = f"{live}; dead {_value(layer.figure('dead', side), 100, ' %')}"
        tiles.append((f"L0, {side}", _value(layer.figure("l0", side)), note))
    share, of_live = (_percent(layer.figure("pairs", key)) for key in ("share_of_total", "share_of_live"))
    active = _mean(layer.figure("pairs", "active_per_score"))
    tiles.append(("Pairs kept", number(layer.figure("pairs", "kept")),
                  f"{share} of all, {of_live} of those of live features; {active} active a score"))  # fmt: skip
    cells = "".join(f'<div><dt>{text(a)}</dt><dd>{b}</dd><dd class="sub">{c}</dd></div>' for a, b, c in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _rows_of(found: dict[str, Any]) -> list[Bar]:
    return [
        Bar(name, found[key], KINDS.get(key, "g")) for key, name in NAMES.items() if key in found and key != "map_all"
    ]


def _loss_bars(layer: Layer, key: str) -> str:
    if not (found := layer.report.get(key)):
        return ""
    title, what, note = {
        "ce_increase": ("Cross-entropy increase", "nats a token (log)", "The layer's pattern replaced, values kept. Blue: "
                        "ours; grey: ablations. Shorter is closer to the model."),
        "logit_kl": ("KL of the model's output", "KL(true ‖ patched logits), nats a token (log)", "How far the next-token "
                     "distribution moves when the pattern is replaced. Shorter is better."),
    }[key]  # fmt: skip
    return _figure(title, charts.bars(_rows_of(found), title, what, log=True), note)


def _kl_bars(layer: Layer) -> str:
    controls = {name: control.get("pattern_kl") for name, control in (layer.report.get("controls") or {}).items()}
    rows = _rows_of({**layer.report.get("pattern_kl", {}), **controls})
    note = "KL(true ‖ reproduced), mean over query rows and heads; shorter is better. " + (
        "Outlined: controls (key features permuted; untrained dictionaries and SVD at the same L0)."
        if controls else "No controls were measured.")  # fmt: skip
    return _figure("Pattern KL", charts.bars(rows, "Pattern KL", "nats a query row"), note)


def _pair_curve(layer: Layer) -> str:
    curve = [
        (p["kept"], p["pattern_kl"]["mean"], p["pattern_kl"].get("ci95")) for p in layer.figure("pairs", "curve") or []
    ]
    last = [lines[-1] for lines in layer.metrics.values() if finite(lines[-1].get("pairs"))]
    series = [
        Series("held-out", "a", curve),
        Series(
            "training set, end of each phase", "ao", [(n["pairs"], n["pattern_kl"], None) for n in last], joined=False
        ),
    ]
    guides = {NAMES[v]: (layer.figure("pattern_kl", v) or {}).get("mean") for v in ("transcoders", "uniform")}
    title = "Pattern KL by pairs kept"
    drawing = charts.plot(series, title, "pairs kept (log)", "nats (log)", x_log=True, guides=guides)
    note = ("Filled: the final map cut to its most important pairs without retraining, on held-out text. Hollow: training-set "
            "figures where a training phase ended.")  # fmt: skip
    return _figure(title, drawing, note, legend([(s.kind, s.name) for s in series if s.points])) if drawing else ""


def _histogram(layer: Layer, side: str) -> str:
    found = layer.report.get("log10_density")
    if not found:
        return ""
    low = min([-4.0, *(e for s in SIDES for e, n in zip(found["edges"], found[s], strict=False) if n)])
    width, live = layer.figure("width", side), layer.figure("live", side)
    drawing = charts.histogram(found["edges"], found[side], f"Firing frequency, {side} features", side[0] == "q", low,
                               max(max(found[s]) for s in SIDES))  # fmt: skip
    note = f"{number(width - live)} of {number(width)} never fired and are not drawn. Right of the dashed line, on more than 10 %: "
    return _figure(
        f"Firing frequency, {side} features", drawing, note + f"{_percent(layer.figure('dense', side, 'mean'))}."
    )


def _heads(layer: Layer) -> str:
    kinds = {"uniform": "o", "transcoders": "a2", "map_pruned": "a"}
    lists = {v: layer.figure("pattern_kl", v, "per_head") or [] for v in kinds}
    counts = layer.figure("pairs", "per_head") or []
    rows = []
    for head in range(max(map(len, lists.values()))):
        kl = {kinds[v]: heads[head]["mean"] for v, heads in lists.items() if head < len(heads)}
        tops = ((v, layer.figure("top1", v, "per_head") or []) for v in ("transcoders", "map_pruned"))
        top1 = {kinds[v]: heads[head]["mean"] for v, heads in tops if head < len(heads)}
        rows.append((str(head), kl, top1, counts[head] if head < len(counts) else None))
    note = "A row a head. Left, further left is better; right, further right is better. A full dot on a light one: pruning costs nothing."
    marks = legend([(kind, NAMES[v]) for v, kind in kinds.items()])
    return _figure("Each head", charts.head_dots(rows, "Pattern KL and top-1 by head"), note, marks) if rows else ""


def _curve(layer: Layer) -> str:
    series, breaks, before = [], {}, 0.0
    for phase, lines in layer.metrics.items():
        every = lines[:: max(len(lines) // CURVE_POINTS, 1)]
        series.append(Series(phase, "a", [(before + n["tokens"], n["pattern_kl"], None) for n in every], marked=False))
        breaks[phase] = before
        before += lines[-1]["tokens"]
    drawing = charts.plot(series, "Training", "training tokens, all phases", "pattern KL, nats (log)", breaks=breaks)
    return (
        _figure("Training", drawing, "Mean of the logged steps on training text; dashed: where a phase begins.")
        if drawing
        else ""
    )


def _all_figures(layer: Layer) -> str:
    metrics = ("pattern_kl", "top1", "absolute_error")
    found = {v: [layer.figure(m, v) or layer.figure("controls", v, m) for m in metrics] for v in NAMES}
    rows = [[text(NAMES[v]), *(_value(f) + "</td><td>" + _value(f and f.get("without_position_0")) for f in figures)]
            for v, figures in found.items() if any(figures)]  # fmt: skip
    head = [w for m in ("KL, nats", "top-1", "absolute error") for w in (m, f"{m}, without position 0")]
    tables = _table(["pattern", *head], rows)
    if recovered := layer.report.get("recovered"):
        rows = [[text(NAMES.get(v, v)), *(_value(f.get(m), 100, " %") for f in by.values() for m in ("ce", "logit_kl"))]
                for v, by in recovered.items()]  # fmt: skip
        of = [f"{what} of {NAMES.get(a, a)}" for a in next(iter(recovered.values())) for what in ("CE", "logit KL")]
        tables += "<p>Share of an ablation's damage that is recovered</p>" + _table(["pattern", *of], rows)
    bias = [f"{_percent(layer.figure('pairs', f'with_{side}_bias', 'importance'))} on {number(n)} pairs with the {side} bias"
            for side in SIDES if finite(n := layer.figure("pairs", f"with_{side}_bias", "kept"))]  # fmt: skip
    tables += f'<p class="note">Of all importance, {text(" and ".join(bias))}.</p>' if bias else ""
    return f"<details><summary>All figures of this layer</summary>{tables}</details>"


# One layer: tokens


def _token(token: str) -> str:
    """A token with its whitespace visible, in its own direction."""
    marks = {" ": "<i>·</i>", "\n": "<i>⏎</i>", "\t": "<i>⇥</i>", "\r": "<i>␍</i>", "\u00a0": "<i>⍽</i>"}
    lone = "◌" if token and unicodedata.category(token[0]).startswith("M") else ""  # a mark without its letter
    return lone + "".join(marks.get(char) or text(char) for char in token)


def _snippet(row: dict[str, Any]) -> str:
    """An example's tokens around its strongest one, those that fire shaded."""
    parts, center = [], row["center"]
    for place in range(max(center - BEFORE, 0), min(center + AFTER + 1, len(row["tokens"]))):
        token, act = _token(row["tokens"][place]), row["activations"][place]
        if act > 0:
            kind = "f top" if place == center else "f"
            shade = f'style="--s:{min(act / max(row["activation"], 1e-9), 1):.2f}"'
            parts.append(f'<bdi class="{kind}" {shade} title="{act:.6g}">{token}</bdi>')
        else:
            parts.append(f"<bdi>{token}</bdi>")
    where = f"document {row['document']}, position {row['position']}"
    return f'<div class="snip" title="{where}">{"<wbr>".join(parts)}</div>'


def _feature(layer: Layer, side: str, feature: int) -> str:
    """A feature's name and its strongest examples."""
    if feature < 0:
        return f'<div class="{side}"><b>bias</b> <span class="ci">always active</span></div>'
    snippets = "".join(_snippet(row) for row in layer.examples.get((side, feature), []))
    return f'<div class="{side}"><b>{side[0]}{feature}</b>{snippets}</div>'


def _pair_table(layer: Layer) -> str:
    if not layer.pairs:
        return ""
    rows = [[str(place), str(p["head"]), _feature(layer, "query", p["query_feature"]), _feature(layer, "key", p["key_feature"]),
             number(p["strength"]), number(1000 * p["importance"])]
            for place, p in enumerate(layer.pairs[:PAIRS_SHOWN], 1)]  # fmt: skip
    note = ("A head attends from tokens where the query feature fires to tokens where the key feature fires (strength above 0), or "
            "away from them (below 0). Shade: activation within the example; outlined: its maximum; hover for the value. Importance: "
            "what leaving the pair out costs, to second order, in millinats of pattern KL a query row.")  # fmt: skip
    head = ["#", "head", "query feature", "key feature", "strength", "importance, mnat"]
    return f'<h3>Strongest pairs</h3><p class="note">{note}</p>{_table(head, rows, "pairs")}'


def _densest(layer: Layer) -> str:
    features = sorted(layer.rows("features"), key=lambda row: -row["density"])
    rows = []
    for side in SIDES:
        for f in [row for row in features if row["side"] == side and row["live"]][:DENSEST_SHOWN]:
            heads = ", ".join(map(str, f["top_heads"])) or "–"
            rows.append([_percent(f["density"]), _feature(layer, side, f["feature"]), number(f["mean_activation"]),
                         number(f["max_activation"]), heads, number(f["pairs"]), number(1000 * f["importance"])])  # fmt: skip
    head = ["fires on", "feature", "mean", "max", "top heads", "pairs", "importance, mnat"]
    note = "The features that fire on most tokens, query side first; their examples are often unreadable, their pairs are not."
    return f'<h3>Densest features</h3><p class="note">{note}</p>{_table(head, rows, "dense")}' if rows else ""


def _heat(layer: Layer) -> str:
    """The patterns of the most important head on one text; the other heads folded away."""
    found = _read(layer.folder / "patterns.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not found or not found.get("heads"):
        return ""
    heads = sorted(found["heads"], key=lambda h: -layer.head_importance(h["head"]))
    blocks = [charts.heat_maps(h, f"layer-{layer.number}-heat") for h in heads]
    others = f"<details><summary>Other heads</summary>{''.join(blocks[1:])}</details>" if blocks[1:] else ""
    tokens = "<wbr>".join(f'<bdi title="position {i}">{_token(t)}</bdi>' for i, t in enumerate(found["tokens"]))
    note = ("Queries run down, keys across. Colour goes with the square root of the weight; difference is pruned less true, blue "
            "where the map attends too much. Point at a cell to read it.")  # fmt: skip
    data = charts.heat_data(found["tokens"], heads, f"layer-{layer.number}-heat")
    return (f'<h3>Patterns on a held-out text</h3><p class="note">{note}</p><p class="snip">{tokens}</p>'
            f"{blocks[0]}{others}{data}")  # fmt: skip
