"""`qkscope study`: which heads do what a prompt set asks for, and by which pairs, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.prompt_sets import READY, ready_set
from ..data.prompts import PromptSet, ask, read_prompts
from ..decomposition import Decomposition
from ..errors import UserError
from ..files import unwritable, write_json
from .names import FeatureNames
from .opening import open_layers
from .stored import pair_examples
from .study import REMOVED, study_layers
from .text import marked
from .trace import KINDS

EXAMPLES = 1  # of a pair, that are printed
HEADS = 6  # that are listed


def study(
    folder: Path,
    prompts: str,
    *,
    layer: int | None = None,
    head: tuple[int, ...] = (),
    heads: int = 2,
    target: str | None = None,
    count: int = 64,
    seed: int = 0,
    top: int = 5,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Study a run's layers on a prompt set, print what was found and write it.

    `prompts`: a ready set or a JSONL file; `target`: another mark than the set's own to look at.
    """
    if json_file is not None and (wrong := unwritable(json_file)):
        raise UserError(f"--json {json_file}: {wrong}; name a file")
    if prompts in READY or not Path(prompts).suffix:
        ready_set(prompts)  # before a model is loaded
    opened = open_layers(folder, layer)
    dec, site = opened[0]
    chosen = _chosen(prompts, target, seed)
    most = getattr(site.model.config, "max_position_embeddings", None)
    asked = ask(chosen, site.tokenizer, dec.config.data, count, most)
    if chosen.target not in asked.marks:
        raise UserError(f"--target {chosen.target}: the prompts' marks are {', '.join(asked.marks) or '(none)'}")
    rows = study_layers(opened, asked, chosen.target, chosen.family, heads=head or heads, top=top)
    found = {"set": prompts, "seed": seed, "target": chosen.target, "family": list(chosen.family), **rows}
    print("\n".join(_all(rows, chosen)))
    decs = {dec.layer: dec for dec, _ in opened}
    for one in rows["details"]:
        print("\n".join(_one(decs[one["layer"]], one)))
    if json_file is not None:
        write_json(json_file, found)
    return found


def _chosen(prompts: str, target: str | None, seed: int) -> PromptSet:
    found = ready_set(prompts, seed) if prompts in READY else read_prompts(Path(prompts), target)
    if target is None or target == found.target:
        return found
    return PromptSet(found.name, found.prompts, target, (target,))


def _all(rows: dict[str, Any], asked: PromptSet) -> Iterator[str]:
    """What was asked, and the heads that look at the target."""
    prompts = rows["prompts"]
    yield f"{asked.name}: {prompts['reported']} prompts reported, {prompts['choosing']} others chose heads and pairs"
    if rows["difference"]:
        yield f"log p(right) - log p(wrong): {_cell(rows['difference'], '.2f')}"
    yield f"\nattention from the last token, model → transcoders → pruned map; without: unable to see {asked.target}"
    for row in rows["heads"][:HEADS]:
        cells = []
        for mark, kinds in row["attention"].items():
            values = " → ".join(f"{kinds[kind]['mean']:.2f}" for kind in KINDS)
            cells.append(f"{mark} {values}")
        lost = f"   without {_cell(row['without_target'], '+.2f')}" if row["without_target"] else ""
        yield f"  layer {row['layer']} head {row['head']:<2}  " + "   ".join(cells) + lost


def _one(dec: Decomposition, found: dict[str, Any]) -> Iterator[str]:
    """One head's pairs, and what ablating them does."""
    names = FeatureNames(dec.folder or Path())
    yield f"\nlayer {found['layer']} head {found['head']}"
    for mark, pairs in found["pairs"].items():
        yield f"  pairs to {mark}, in nats of its log-odds against the rest of the row:"
        yield from (f"    {_pair(p, names)}" for p in pairs)
    if "ablation" in found:
        yield from _ablation(found["ablation"], dec, found["head"], names)


def _examples(dec: Decomposition, head: int, pair: dict[str, Any]) -> Iterator[str]:
    """Where in held-out text the pair draws most attention: the query's and the key's context."""
    try:
        found = pair_examples(dec.folder or Path(), pair["query_feature"], pair["key_feature"], head)
    except UserError:  # a run of a version that had none, or one that gathered none
        return
    for example in [e for e in found if e.effect > 0][:EXAMPLES]:
        sides = (example.query_tokens, example.query_center), (example.key_tokens, example.key_center)
        query, key = (marked(tokens[max(c - 5, 0) : c + 4], min(c, 5)) for tokens, c in sides)
        yield f"            {query.strip()}  →  {key.strip()}"


def _ablation(found: dict[str, Any], dec: Decomposition, head: int, names: FeatureNames) -> Iterator[str]:
    effect, many = found["effect"], len(found["pairs"])
    aim = f"{REMOVED:.0%} of the attention to {', '.join(found['family'])}"
    yield f"  without {many} pair{'s' * (many > 1)}, chosen to take {aim}:"
    for pair in found["pairs"]:
        yield f"    {_pair(pair, names)}"
        yield from _examples(dec, head, pair)
    yield f"    {'':<30}{'attention there':>16}{'taken':>7}{'right over wrong':>18}{'row':>8}{'other rows':>12}"
    before = effect["before"]
    yield _line("before", before["attention"], None, before.get("difference"), None, None)
    rows = {"without them": effect, **{f"control: {name}": c for name, c in found["controls"].items()}}
    for name, e in rows.items():
        yield _line(name, e["attention"], e["removed"], e.get("difference"), e["row"], e["other_rows"])


def _line(name: str, attention: Any, removed: Any, difference: Any, row: Any, others: Any) -> str:
    taken = "" if removed is None else f"{removed:.0%}"
    moved = ["" if figure is None else f"{figure['mean']:.1%}" for figure in (row, others)]
    right = "" if difference is None else _cell(difference, ".2f")
    cells = f"{_cell(attention, '.3f'):>16}{taken:>7}{right:>18}{moved[0]:>8}{moved[1]:>12}"
    return f"    {name:<30}{cells}".rstrip()


def _pair(pair: dict[str, Any], names: FeatureNames) -> str:
    return f"{pair['nats']:+6.2f}  {names.pair(pair['query_feature'], pair['key_feature'])}"


def _cell(figure: dict[str, Any], form: str) -> str:
    """A mean and half its 95 % interval."""
    half = "" if figure["ci95"] is None else f" ±{format(figure['ci95'][1] - figure['mean'], form.lstrip('+'))}"
    return format(figure["mean"], form) + half
