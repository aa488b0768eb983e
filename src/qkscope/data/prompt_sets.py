"""Ready prompt sets, written for this project: what attention is known to do, asked in many words.

    ioi           "… When Mary and John went to the harbour, John gave the lamp to"            → Mary
    dates         "Diary of Mary … 29 May: Mary went to the harbour. ↵ 30 May: John was tired. ↵"  → 31
    years         "The war lasted from the year 1732 to the year 17"                           → a number above 32
    induction     "Mary sang of lion banner hard flute. … Then John sang of lion banner"       → hard
    brackets      "Mary kept the chain [it was light work"                                     → ]
    agreement     "… the map under the stones"                                                 → is, was

Words are those of the embedded corpus, which any model of English knows as well; a set goes on without end, by seed,
and `ask` takes the prompts that a tokenizer has whole words for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from ..errors import UserError, nearest
from .prompts import Prompt, PromptSet, parse
from .stories import words as w

NAMES = (*w.SHE, *w.HE)
OPENINGS = (
    "Long ago there was a market in {town}.", "That summer the harbour of {town} was quiet.",
    "Every day the station of {town} is very loud.",
)  # fmt: skip


def _opening(r: Random) -> str:
    return r.choice(OPENINGS).format(town=r.choice(w.TOWNS))


def _ioi(r: Random) -> Prompt:
    a, b = r.sample(NAMES, 2)
    first, second = (f"{{IO:{a}}}", f"{{S1:{b}}}") if r.random() < 0.5 else (f"{{S1:{b}}}", f"{{IO:{a}}}")
    place, thing, went, gave = r.choice(w.PLACES), r.choice(w.OBJECTS), r.choice(w.WENT), r.choice(w.GAVE_TO)
    where = r.choice((
        f"When {first} and {second} {went} to the {place},", f"After {first} and {second} met at the {place},",
        f"While {first} and {second} were in the {place},", f"Since {first} and {second} had no work at the {place},",
    ))  # fmt: skip
    return parse(f"{_opening(r)} {where} {{S2:{b}}} {gave} the {thing} to", [f" {a}"], [f" {b}"])


def _dates(r: Random) -> Prompt:
    month = r.randrange(12)
    day = r.randrange(2, w.MONTH_DAYS[month] - 1)
    a, b = r.sample(NAMES, 2)
    lines = (
        f"Diary of {a} in {r.choice(w.TOWNS)}.",
        f"{day - 1} {w.MONTHS[month]}: {a} {r.choice(w.WENT)} to the {r.choice(w.PLACES)}.",
        f"{{DAY:{day}}} {{MONTH:{w.MONTHS[month]}}}: {b} was {r.choice(w.MOODS)}.",
        "",
    )
    return parse("\n".join(lines), [str(day + 1)], [str(day - 1), str(day), str(day + 2)])


def _years(r: Random) -> Prompt:
    century, year = r.randrange(11, 20), r.randrange(3, 98)
    what = r.choice(("war", "journey", "project", "strike", "exhibition", "dispute", "siege", "reign"))
    text = f"The {what} lasted from the year {century}{{YEAR:{year:02d}}} to the year {century}"
    above, below = range(year + 1, 100), range(2, year + 1)
    return parse(text, [f"{n:02d}" for n in above], [f"{n:02d}" for n in below])


def _induction(r: Random) -> Prompt:
    a, b = r.sample(NAMES, 2)
    song = r.sample((*w.OBJECTS, *w.ADJECTIVES, *w.ANIMALS), 6)
    at = r.randrange(1, 5)
    first = " ".join(
        f"{{NEXT:{word}}}" if n == at + 1 else f"{{SAME:{word}}}" if n == at else word for n, word in enumerate(song)
    )
    again = " ".join(song[: at + 1])
    text = f"{_opening(r)} {a} sang of {first}. {b} went to the {r.choice(w.PLACES)}. Then {a} sang {again}"
    return parse(text, [f" {song[at + 1]}"], [f" {word}" for n, word in enumerate(song) if n not in (at, at + 1)])


def _brackets(r: Random) -> Prompt:
    opening, closing = r.choice(w.BRACKETS)
    a, took, thing, soft = r.choice(NAMES), r.choice(w.TOOK), r.choice(w.OBJECTS), r.choice(w.ADJECTIVES)
    mark = f"{{OPEN:{opening}}}" if opening != "{" else None
    inner = r.choice((f"the {soft} one", f"it was {soft} work", f"two {w.plural(thing)} too"))
    before = f"{_opening(r)} {a} {took} the {thing} "
    others = [c for _, c in w.BRACKETS if c != closing]
    if mark is not None:
        return parse(f"{before}{mark}{inner}", [closing], others)
    whole = parse(f"{before}{{{{{inner}", [closing], others)  # a mark's words can't hold a brace
    return Prompt(whole.text, {"OPEN": (len(before), len(before) + 1)}, whole.answers, whole.wrong)


def _agreement(r: Random) -> Prompt:
    subject, other = r.sample((*w.OBJECTS, *w.ANIMALS), 2)
    many, others = r.random() < 0.5, r.random() < 0.5
    said, beside = w.plural(subject) if many else subject, w.plural(other) if others else other
    between = r.choice(("near", "behind", "under"))
    answers, wrong = (tuple(f" {forms[n]}" for forms in w.BE) for n in (int(many), int(not many)))
    return parse(f"{_opening(r)} Every day the {{SUBJECT:{said}}} {between} the {{OTHER:{beside}}}", answers, wrong)


_SETS: dict[str, tuple[Callable[[Random], Prompt], str, tuple[str, ...]]] = {
    "ioi": (_ioi, "IO", ("IO", "S1", "S2")),
    "dates": (_dates, "DAY", ("DAY", "MONTH")),
    "years": (_years, "YEAR", ("YEAR",)),
    "induction": (_induction, "NEXT", ("NEXT",)),
    "brackets": (_brackets, "OPEN", ("OPEN",)),
    "agreement": (_agreement, "SUBJECT", ("SUBJECT",)),
}
READY = tuple(_SETS)


def ready_set(name: str, seed: int = 0) -> PromptSet:
    """A ready set, without end; the same for the same seed. `UserError` for a name that is none."""
    if name not in _SETS:
        raise UserError(
            f"--prompts {name}: no such set{nearest(name, READY)}; choose {', '.join(READY)}, or name a .jsonl file"
        )
    make, target, family = _SETS[name]
    return PromptSet(name, _without_end(make, Random(f"{name}/{seed}")), target, family)


def _without_end(make: Callable[[Random], Prompt], r: Random) -> Iterator[Prompt]:
    while True:
        yield make(r)
