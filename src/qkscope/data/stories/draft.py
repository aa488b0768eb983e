"""A document being written: its text, the roles of its parts, and what its writer's choices cost.

Every choice that shows in the text is drawn through a `Draft`, which adds up -log(probability). Where the text gives
its choices away, as here nearly everywhere, the sum is the document's own information; where two ways of choosing give
one text it is more. So its mean over documents bounds the corpus's entropy from above, tightly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

from . import words as w

T = TypeVar("T")
_SLOT = re.compile(r"(a/an )?\{(\w+)\}")
# What a template's slots of these names are filled with where nothing else is given: one of the words, drawn anew.
WORDS: dict[str, tuple[str, ...]] = {
    "place": w.PLACES, "object": w.OBJECTS, "adjective": w.ADJECTIVES, "mood": w.MOODS, "job": w.JOBS, "time": w.TIMES,
    "weekday": w.WEEKDAYS, "number": w.NUMBERS, "town": w.TOWNS, "went": w.WENT, "took": w.TOOK, "did": w.DID,
    "adverb": w.ADVERBS, "objects": tuple(w.plural(o) for o in w.OBJECTS),
}  # fmt: skip
VERBS = ("went", "took", "did")


@dataclass(frozen=True)
class Span:
    """A part of the text with a role in it: characters [start, end)."""

    start: int
    end: int
    roles: frozenset[str]
    link: int = -1
    """The earlier span (its index) that this one answers to: a bracket's partner, a verb's subject, a name's last
    mention, the same word in the phrase that is repeated."""


@dataclass(frozen=True)
class Slot:
    """What a template's `{slot}` is filled with."""

    text: str
    roles: tuple[str, ...] = ()
    link: int = -1


@dataclass
class Person:
    """Someone in a story, by the name that the story uses."""

    first: str
    she: bool
    title: str = ""
    surname: str = ""
    number: int = 0
    """1 for the first person that the document mentions, 2 for the second, …; 0: not yet."""
    last: int = -1
    """Span of the last mention."""

    @property
    def pronoun(self) -> str:
        return "she" if self.she else "he"

    @property
    def possessive(self) -> str:
        return "her" if self.she else "his"

    @property
    def objective(self) -> str:
        return "her" if self.she else "him"


@dataclass
class Draft:
    """The document so far."""

    rng: Random
    text: str = ""
    spans: list[Span] = field(default_factory=list)
    nats: float = 0.0
    people: int = 0

    # Choices

    def pick(self, options: Sequence[T], *, free: bool = False) -> T:
        """One of the options. `free`: a choice that the text does not show, not counted."""
        if not free:
            self.nats += math.log(len(options))
        return options[self.rng.randrange(len(options))]

    def weighted(self, options: dict[T, float]) -> T:
        """One of the options, by probabilities that sum to 1."""
        chosen = self.rng.choices(list(options), list(options.values()))[0]
        self.nats -= math.log(options[chosen])
        return chosen

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.weighted({True: probability, False: 1 - probability})

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in a random order."""
        self.nats += sum(math.log(len(options) - i) for i in range(count))
        return self.rng.sample(options, count)

    # Writing

    def say(self, template: str, *, joined: bool = False, **slots: str | Slot | Person) -> list[int]:
        """Write a template with its `{slots}` filled; the spans that were made, in the order of the text.

        A slot that is not given is drawn from `WORDS`; `a/an {slot}` writes the article that fits. `joined`: without a
        space before it.
        """
        made: list[int] = []
        if not joined and self.text and not self.text.endswith("\n"):
            self.text += " "
        at = 0
        for match in _SLOT.finditer(template):
            self.text += template[at : match.start()]
            at = match.end()
            name = match[2]
            value = slots[name] if name in slots else self.pick(WORDS[name])
            if isinstance(value, str):
                value = Slot(value, ("verb" if name in VERBS else "object" if name == "objects" else name,))
            if match[1]:
                self.text += w.article(value.text if isinstance(value, Slot) else "") + " "
            made += self._name(value) if isinstance(value, Person) else self._write(value)
        self.text += template[at:]
        return made

    def mark(self, text: str, *roles: str, link: int = -1) -> int:
        """Write `text` without a space before it, as a span of its own."""
        return self._write(Slot(text, roles, link))[0]

    def _write(self, slot: Slot) -> list[int]:
        start = len(self.text)
        self.text += slot.text
        if not slot.roles:
            return []
        self.spans.append(Span(start, len(self.text), frozenset(slot.roles), slot.link))
        return [len(self.spans) - 1]

    def _name(self, person: Person) -> list[int]:
        new = person.number == 0
        if new:
            self.people += 1
            person.number = self.people
        roles = ("name", f"person_{min(person.number, 3)}", "name_new" if new else "name_again")
        made: list[int] = []
        if person.title:
            made += self._write(Slot(person.title, ("title",)))
            self.text += " "
            made += self._write(Slot(person.surname, (*roles, "surname"), person.last))
        else:
            made += self._write(Slot(person.first, roles, person.last))
        person.last = made[-1]
        return made

    def add_roles(self, span: int, *roles: str) -> None:
        """Give a span further roles."""
        self.spans[span] = replace(self.spans[span], roles=self.spans[span].roles | frozenset(roles))
