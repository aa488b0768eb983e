"""`qkscope heads DIR`: a run's heads as tables for people, and every figure as JSON for programs."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..decomposition import SIDES, Decomposition
from ..errors import UserError
from ..evaluate.text import text_of
from ..files import unwritable, write_json
from ..tables.distance import DistanceProfiles, distance_profiles, no_rotary
from ..training.stream import harvest_finite
from . import heads, units
from .names import FeatureNames
from .opening import layer_folders, with_sites

COLUMNS = 100
POSITIONAL = 0.1  # share of position from which a pair's peak is shown
DISTANCE_TOKENS = 16_384  # held-out tokens over which pairs are followed by distance


def report_heads(
    folder: Path,
    layer: int | None = None,
    *,
    top: int = 5,
    rank: int | None = None,
    distance: bool = False,
    path: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Describe the heads of a run's layers, or of one, print the tables and write the figures.

    `top`: pairs shown of each head; `rank`: units, None for as many as chance allows; `distance`: run the model over
    held-out text and tell content from position (rotary embeddings only). `UserError` for what is no finished run.
    """
    if top < 0:
        raise UserError(f"--top {top}: name a number of pairs of at least 0")
    if path is not None and (wrong := unwritable(path)):
        raise UserError(f"--json {path}: {wrong}; name a file")
    places = layer_folders(folder, layer)
    decs = [Decomposition.load(place).to(device) for place in places]
    profiles = _profiles(decs, device) if distance else [None] * len(decs)
    found: dict[str, Any] = {"run": str(folder), "layers": []}
    for dec, place, profile in zip(decs, places, profiles, strict=True):
        names = FeatureNames(place)
        of_units, unit_P = units.describe(dec, names, rank)
        one = {"layer": dec.layer, "model": dec.config.model, "heads": heads.describe(dec), "units": of_units}
        pairs = heads.pair_heads(dec)
        order = pairs["pair"].to_numpy()
        pairs = pairs.append_column("unit", pa.array(unit_P.numpy()[order]))
        if profile is not None:
            one["distance"] = profile.by_head(dec)
            columns = {"content": profile.content_P, "position": profile.position_share_P, "peak": profile.peak_P}
            for name, values_P in columns.items():  # a pair without use has no share: NaN, null in the table
                pairs = pairs.append_column(name, pa.array(values_P.numpy()[order], from_pandas=True))
        shown = _shown(pairs, dec.shape.N, top)
        if profile is not None:
            for row in shown:
                row["profile"], row["use"] = (t[row["pair"]].tolist() for t in (profile.profile_PT, profile.use_PT))
        print("\n".join(page(one, shown, names)), end="\n\n")
        tables = {"strongest": shown, "pairs": pairs.to_pydict(), "features": heads.feature_heads(dec).to_pydict()}
        found["layers"].append({**one, **tables})
    if path is not None:
        write_json(path, found)
    return found


def _profiles(decs: list[Decomposition], device: str) -> list[DistanceProfiles]:
    for dec in decs:
        if not dec.shape.rotary:
            raise no_rotary(dec.layer)
    found = []
    for dec, site in with_sites(decs, device):
        text = text_of(site, dec.config, "heldout", DISTANCE_TOKENS)
        found.append(distance_profiles(dec, (harvest_finite(site, batch.to(device)) for batch in text)))
    return found


def _shown(pairs: pa.Table, n_heads: int, top: int) -> list[dict[str, Any]]:
    """Each head's strongest pairs: `top` of two features, and one with a bias."""
    query, key, of_head = (pairs[name].to_numpy() for name in ("query_feature", "key_feature", "head"))
    bias = np.minimum(query, key) < 0
    rows = []
    for head in range(n_heads if top else 0):
        two, one = (pairs.filter(pa.array((of_head == head) & kind)) for kind in (~bias, bias))
        rows += [*two.slice(0, top).to_pylist(), *one.slice(0, 1).to_pylist()]
    return rows


# What a person reads


def page(one: dict[str, Any], shown: list[dict[str, Any]], names: FeatureNames) -> list[str]:
    """The tables of one layer, as lines of at most `COLUMNS`."""
    two, whole = one["heads"]["two_features"], one["heads"]["all"]
    bias = 1 - two["importance"] / max(whole["importance"], 1e-30)
    title = f"layer {one['layer']} of {one['model']}: {whole['pairs']:,} pairs in {len(whole['heads'])} heads"
    title += f", {whole['importance']:.3g} nats, {bias:.0%} of them in pairs with a bias"
    return [
        *textwrap.wrap(title, COLUMNS),
        "",
        *_head_table(one),
        "",
        *_strongest(shown, two["heads"], names),
        *_sharing_table(two["sharing"], whole["sharing"]),
        "",
        *_units_table(one["units"]),
    ]


def _head_table(one: dict[str, Any]) -> list[str]:
    two, whole = one["heads"]["two_features"], one["heads"]["all"]
    by_distance = {row["head"]: row["two_features"]["position"] for row in one.get("distance", [])}
    likest = {row["head"]: row for row in two["likeness"]["heads"]}
    head = "head    nats    bias   pairs  effective   top 1/5/20 %   likest head (chance, 95 % up to)"
    lines = ["bias: share of the head's importance in pairs with a bias; what follows is of pairs of two features"]
    lines.append(head + ("   position" if by_distance else ""))
    for row, of_all in zip(two["heads"], whole["heads"], strict=True):
        n, total = row["head"], of_all["importance"]
        bias = 1 - row["importance"] / max(total, 1e-30)
        share = "/".join(f"{100 * row['top'][str(k)]:.0f}" for k in heads.TOP)
        line = f"{n:>4}  {total:6.3f}  {bias:>6.0%}  {row['pairs']:>6,}  {row['effective']:>9.1f}   {share:>12}   "
        beside = likest.get(n)
        if beside and beside["likest"] is not None:
            chance = beside["chance"]["kept"]
            mark = "*" if beside["above"] else " "
            line += f"{beside['likest']:>6}  {beside['similarity']:.2f}{mark}"
            line += f" ({chance['mean']:.2f}, {chance['ci95'][1]:.2f})"
        if by_distance:
            line = f"{line:<88}{_percent(by_distance[n]):>8}"
        lines.append(line)
    groups = [group for group in two["likeness"]["clusters"] if len(group) > 1]
    alike = "; ".join(" ".join(map(str, group)) for group in groups) or "none"
    text = f"* beyond chance; alike beyond chance (average cosine above {two['likeness']['cut']:.2f}): {alike}"
    return [*lines, *textwrap.wrap(text, COLUMNS, subsequent_indent="  ")]


def _strongest(shown: list[dict[str, Any]], of_heads: list[dict[str, Any]], names: FeatureNames) -> list[str]:
    if not shown:
        return []
    lines = ["strongest pairs: share of the head's importance in pairs of two features, and in all"]
    last = None
    for row in shown:
        bias = min(row["query_feature"], row["key_feature"]) < 0
        of_two = "" if bias else _percent(row["importance"] / max(of_heads[row["head"]]["importance"], 1e-30))
        notes = f"in {row['heads']} heads" if row["heads"] > 1 else ""
        if row.get("position") is not None:
            notes += f"{', ' if notes else ''}{row['position']:.0%} position"
            notes += f", peak at {row['peak']}" if row["position"] >= POSITIONAL else ""
        pair = names.pair(row["query_feature"], row["key_feature"])
        label = "" if row["head"] == last else f"head {row['head']}"
        space = COLUMNS - 22 - len(notes)
        lines.append(
            f"{label:<8}{of_two:>5}{_percent(row['share']):>6}  {_clipped(pair, space):<{space}} {notes}".rstrip()
        )
        last = row["head"]
    return [*lines, ""]


def _sharing_table(found: dict[str, Any], with_bias: dict[str, Any]) -> list[str]:
    if not found["chance"]:
        return ["no pair of two features is kept"]
    spans = _spans(len(found["pairs"]))
    header = "".join(f"{f'{a}' if a == b else f'{a}-{b}':>7}" for a, b in spans)
    lines = [f"{'how many heads have a pair':<28}{header}   several   with bias rows"]
    for what in ("pairs", "importance"):
        for null in (None, *found["chance"]):
            values = found[what] if null is None else found["chance"][null][what]["mean"]
            values = [sum(values[a - 1 : b]) for a, b in spans]
            several, of_all = (_several(f, f"shared_{what}", null) for f in (found, with_bias))
            cells = "".join(f"{_percent(v) if what == 'importance' else f'{v:,.0f}':>7}" for v in values)
            label = f"{what}, two features" if null is None else f"  chance, features {null}"
            lines.append(f"{label:<28}{cells}   {several:<14}{of_all}")
    chance = "partners and importances dealt anew among a head's own features (kept) or the layer's (free)"
    return [*lines, f"chance: {chance}"]


def _several(found: dict[str, Any], name: str, null: str | None) -> str:
    """The share of several heads; of a null with the interval of its draws."""
    if null is None:
        return _percent(found[name])
    figure = found["chance"][null][name]
    return f"{_percent(figure['mean'])} ({100 * figure['ci95'][0]:.0f}-{100 * figure['ci95'][1]:.0f})"


def _spans(n: int) -> list[tuple[int, int]]:
    """1, 2, 3-4, 5-8, 9-16, and the rest up to n."""
    lows = [low for low in (1, 2, 3, 5, 9, 17) if low <= n]
    return [(low, after - 1) for low, after in zip(lows, [*lows[1:], n + 1], strict=True)]


def _units_table(found: dict[str, Any]) -> list[str]:
    if not found["units"]:
        return ["no units: no pair of two features is kept"]
    low, high = min(found["chance"]), max(found["chance"])
    text = f"{found['rank']} units explain {found['explained']:.0%} of the {found['total_correlation']:.2f} nats that "
    text += f"features and heads say of each other; of pairs dealt anew (features kept) {low:.0%} to {high:.0%}"
    lines = textwrap.wrap(text, COLUMNS)
    for unit in found["units"]:
        features = [" ".join(f"{side[0]}{f['feature']}" for f in unit[f"{side}_features"]) for side in SIDES]
        of_heads = " ".join(str(h["head"]) for h in unit["heads"])
        count = f"{unit['pairs']:,} pair{'s' * (unit['pairs'] != 1)}"
        text = f"{features[0]} → {features[1]}; heads {of_heads}; {count}; found again {unit['again']:.2f}"
        lines.append(f"{_percent(unit['share']):>5}  {_clipped(unit['name'], COLUMNS - 7)}")
        lines += textwrap.wrap(text, COLUMNS, initial_indent=" " * 7, subsequent_indent=" " * 9)
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
