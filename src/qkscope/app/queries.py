"""What a person asks of the tables: filters, order and page, from an address's words to a page of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..decomposition import SIDES
from .store import LayerStore
from .tables import PAGE, Table

LONGEST_TEXT = 200
BOUNDS = {"min": np.greater_equal, "max": np.less_equal}


class BadQuery(Exception):
    """A question that has no answer; the message quotes the value."""


def features_page(layer: LayerStore, side: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """A page of a side's features.

    `text` (in label or tokens, or the number), `live=1`, `min_NUMBER` and `max_NUMBER` of any column filter;
    `sort`, `order` (asc or desc) and `page` choose.
    """
    table = layer.features.table(side)
    wanted = _bounded(table, asked)
    if text := asked.get("text", "")[:LONGEST_TEXT]:
        wanted &= layer.features.with_text(side, text)
    if asked.get("live") == "1":
        wanted &= table.columns["density"] > 0
    return table.page(*_place(table, asked, "importance"), wanted)


def pairs_page(layer: LayerStore, asked: Mapping[str, str]) -> dict[str, Any]:
    """A page of the kept pairs.

    `query`, `key` (-1: the bias) and `head` are numbers; `text` is in the label or tokens of either feature; `bias=0`
    leaves out pairs with a bias; bounds and order as for features.
    """
    table = layer.pairs.table
    wanted = _bounded(table, asked)
    for name in (*SIDES, "head"):
        if asked.get(name, "") != "":
            wanted &= table.columns[name] == _whole(name, asked[name])
    if asked.get("bias") == "0":
        wanted &= (table.columns["query"] >= 0) & (table.columns["key"] >= 0)
    if text := asked.get("text", "")[:LONGEST_TEXT]:
        either = np.zeros(len(table), dtype=bool)
        for side in SIDES:
            numbers = layer.features.numbers[side]
            either |= np.isin(table.columns[side], numbers[layer.features.with_text(side, text)])
        wanted &= either
    return layer.pairs.named(table.page(*_place(table, asked, "importance"), wanted))


def _bounded(table: Table, asked: Mapping[str, str]) -> np.ndarray:
    """Rows within all bounds that are named, bool [R]."""
    wanted = np.ones(len(table), dtype=bool)
    for word, value in asked.items():
        bound, _, name = word.partition("_")
        if bound in BOUNDS and value != "":
            if name not in table.sortable:
                raise BadQuery(f"{word}: there is no column {name!r}; choose {', '.join(table.sortable)}.")
            wanted &= BOUNDS[bound](table.columns[name], _number(word, value))
    return wanted


def _place(table: Table, asked: Mapping[str, str], usual: str) -> tuple[str, bool, int]:
    """(column, descending, page)."""
    sort, order = asked.get("sort") or usual, asked.get("order") or "desc"
    if sort not in table.sortable:
        sort_by = ", ".join(table.sortable)
        if asked.get("sort"):
            raise BadQuery(f"sort={sort[:80]!r}: choose {sort_by}.")
        sort = table.sortable[0]
    if order not in ("asc", "desc"):
        raise BadQuery(f"order={order[:80]!r}: choose asc or desc.")
    page = _whole("page", asked.get("page") or "0")
    if not 0 <= page <= max(len(table), 1) // PAGE:
        raise BadQuery(f"page={page}: there are {len(table)} rows, {PAGE} a page.")
    return sort, order == "desc", page


def _whole(name: str, value: str) -> int:
    try:
        return int(value[:12])
    except ValueError:
        raise BadQuery(f"{name}={value[:80]!r} is no whole number.") from None


def _number(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadQuery(f"{name}={value[:80]!r} is no number.")
    return found
