"""`qkscope trace`: one prompt's attention, and the pairs behind one edge of it, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import unwritable, write_json
from .account import EXPLAINED, Account
from .names import FeatureNames
from .opening import one_layer
from .text import shown
from .trace import KINDS, Trace, Why, trace

KEYS = 8  # of a row, that are listed


def trace_prompt(
    folder: Path,
    prompt: str,
    *,
    layer: int | None = None,
    head: int | None = None,
    query: int = -1,
    key: int | None = None,
    against: tuple[int, ...] = (),
    pairs: Literal["kept", "all"] = "kept",
    top: int = 10,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Trace a prompt, print what was found and write it; without a head, what each head attends to."""
    if json_file is not None and (wrong := unwritable(json_file)):
        raise UserError(f"--json {json_file}: {wrong}; name a file")
    dec, site = one_layer(folder, layer)
    traced = trace(dec, site, prompt, head or 0)
    names = FeatureNames(dec.folder or Path())
    said = list(_tokens(traced.tokens))
    if head is None:
        heads = [traced.of_head(n) for n in range(dec.shape.N)]
        said += _heads(heads, traced.position(query, "query"))
        found: dict[str, Any] = {"heads": [t.to_dict() for t in heads]}
    else:
        why = traced.why(query, key, against or None)
        account = traced.terms(why.query, why.key, pairs)
        said += _row(traced, why.query)
        said += _score(traced, account, why.query, why.key, names, top)
        said += _why(traced, why, names, top)
        found = {
            **traced.to_dict(),
            "query": why.query,
            "key": why.key,
            "score": account.to_dict(),
            "why": {"against": why.against, "weights": why.weights, **why.account.to_dict()},
        }
    print("\n".join(said))
    if json_file is not None:
        write_json(json_file, found)
    return found


def _tokens(tokens: list[str]) -> Iterator[str]:
    """The prompt's tokens with their positions, wrapped at 100 columns."""
    line = ""
    for number, token in enumerate(tokens):
        word = f"{number}{shown(token)} "
        if len(line) + len(word) > 100:
            yield line.rstrip()
            line = ""
        line += word
    yield line.rstrip()


def _at(tokens: list[str], position: int) -> str:
    return "sink" if position == len(tokens) else f"{position}{shown(tokens[position])}"


def _heads(heads: list[Trace], i: int) -> Iterator[str]:
    yield f"\nlayer {heads[0].dec.layer}, query {_at(heads[0].tokens, i)}: most attended keys (true → pruned map)"
    for one in heads:
        true, pruned = one.pattern["true"][i], one.pattern["pruned"][i]
        keys = true.topk(min(4, i + 1)).indices.tolist()
        cells = (f"{_at(one.tokens, j)} {true[j]:.2f} → {pruned[j]:.2f}" for j in keys)
        yield f"  head {one.head:>2}   " + "   ".join(cells)
    yield "name one with --head for the pairs behind an edge"


def _row(traced: Trace, i: int) -> Iterator[str]:
    pattern = {kind: p[i] for kind, p in traced.pattern.items()}
    yield f"\nlayer {traced.dec.layer} head {traced.head}, query {_at(traced.tokens, i)}: attention"
    yield "  " + " " * 20 + "".join(f"{kind:>15}" for kind in KINDS)
    for j in pattern["true"].topk(min(KEYS, len(pattern["true"]))).indices.tolist():
        if float(pattern["true"][j]) > 0:
            yield f"  {_at(traced.tokens, j):<20}" + "".join(f"{float(pattern[kind][j]):>15.3f}" for kind in KINDS)


def _score(traced: Trace, account: Account, i: int, j: int, names: FeatureNames, top: int) -> Iterator[str]:
    edge = f"{_at(traced.tokens, i)} → {_at(traced.tokens, j)}"
    yield f"\nscore of {edge}: {_sum(account)}"
    yield from _terms(account, names, top)


def _why(traced: Trace, why: Why, names: FeatureNames, top: int) -> Iterator[str]:
    others = ", ".join(f"{_at(traced.tokens, c)} ({w:.0%})" for c, w in zip(why.against, why.weights, strict=True))
    yield f"\nwhy {_at(traced.tokens, why.key)} and not {others}"
    yield f"log-odds {_sum(why.account)}"
    few = why.account.fewest()
    those = f"the {few} largest pairs add" if few else "the kept pairs do not add"
    yield f"{those} up to it within {1 - EXPLAINED:.0%}"
    yield from _terms(why.account, names, top)


def _sum(account: Account) -> str:
    """The total as the sum of its parts."""
    rest = "".join(f" {value:+.2f} {name}" for name, value in account.rest.items())
    return f"{account.total:+.2f} = {account.pairs:+.2f} from {len(account)} pairs{rest}"


def _terms(account: Account, names: FeatureNames, top: int) -> Iterator[str]:
    for a, b, value in account.top(top):
        yield f"  {value:+7.2f}  {names.pair(a, b)}"
    if len(account) > top:
        yield f"  {float(account.value_S[top:].sum()):+7.2f}  {len(account) - top} smaller ones"
