"""What report.html shows in tokens and tables: pairs and features by their examples, known roles, a text's patterns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from . import charts
from .charts import number, text
from .page_parts import NAMES, short, table, value
from .stored import SIDES, Layer

BEFORE, AFTER = 9, 4  # tokens of an example shown around the one that fires most
HEAD_ROLES = 3  # role pairs of a head that are shown


def evidence(layer: Layer) -> str:
    """All of it."""
    return "\n".join([_truth(layer), _heat(layer), _pair_tables(layer), _densest(layer)])


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
            " / ".join(short((scores.get(side) or {}).get(key), key == "named") for side in SIDES)
            for key in ("live", "named", "f1_mean", "f1_by_importance")
        ]
        shares = [short(scores["pairs"].get(key), True) for key in ("matching", "linked", "mostly_linked")]
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
            attention = f"{short(row['attention'], True)} ({short(row['uniform'], True)})"
            names = [text(row[side]) for side in SIDES]
            rows.append([str(head["head"]) if not place else "", *names, attention, value(row.get("ce_increase"))])
    note = ("Between which roles each head attends more than evenly, by what the model's loss gains, in nats a token, "
            f"when the head may not: on {number(layer.figure('tokens', 'heads'))} held-out tokens, not those the roles "
            "were chosen on. Attention: share of all its attention (of uniform attention).")  # fmt: skip
    head = ["head", "from", "to", "attention", "CE increase without"]
    return f'<h3>What the heads do</h3><p class="note">{note}</p>{table(head, rows)}' if rows else ""


def _densest(layer: Layer) -> str:
    rows = []
    for f in layer.densest:
        numbers = [number(f["mean_activation"]), number(f["max_activation"]), number(f["pairs"])]
        numbers += [number(1000 * f["importance"]), short(f.get("by_position"), True), _partner(layer, f)]
        rows.append([short(f["density"], True), _feature(layer, f["side"], f["feature"]), *numbers])
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
        worth, first, bias = (short(dense[key], True) for key in ("importance", "first", "bias"))
        yield (
            f"{dense['count']} {side} features fire on more than 10 % of tokens and hold {worth} of the importance. "
            f"{first} of theirs is paired with {other} features that fire on the first token (of the others': "
            f"{short(others['first'], True)}), {bias} with the {other} bias ({short(others['bias'], True)}). "
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
