"""What the stories tell: one function a kind of sentence, each with something for attention to do.

Roles are given here where the words alone would not say them; the rest follows from the words (`roles.py`). A scene
that asks for an answer (the indirect object, a closing bracket, a verb's number, the second half of a song, the next
day's date) is written so that the text before it decides the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from . import words as w
from .draft import Draft, Person, Slot

SONG = w.OBJECTS + w.ADJECTIVES + w.ANIMALS


@dataclass
class World:
    """What a document has told so far."""

    people: list[Person]
    town: str
    day: int
    month: int
    dated: bool = False
    song: list[tuple[str, int]] = field(default_factory=list)
    """Its words, and the spans of their last singing."""
    lost: tuple[str, str, str] | None = None
    """Adjective, object and place of what was lost."""
    packed: list[str] = field(default_factory=list)

    def known(self, d: Draft) -> Person:
        """One of those who were mentioned."""
        return d.pick([p for p in self.people if p.number])

    def two(self, d: Draft) -> tuple[Person, Person]:
        first, second = d.some(self.people, 2)
        return first, second

    def next_day(self) -> None:
        self.day += 1
        if self.day > w.MONTH_DAYS[self.month]:
            self.day, self.month = 1, (self.month + 1) % 12

    def date(self) -> tuple[Slot, Slot]:
        """Day and month as they are written; from the second date of a document on they follow from the last one."""
        roles = ("next_day",) if self.dated else ()
        self.dated = True
        return Slot(str(self.day), ("day_number", *roles)), Slot(w.MONTHS[self.month], ("month", *roles))


def person(d: Draft, taken: list[Person]) -> Person:
    """Somebody who is not among those taken."""
    she = d.chance(0.5)
    kind = d.weighted({"first": 0.75, "long": 0.1, "titled": 0.15})
    if kind == "titled":
        known = {p.surname for p in taken}
        title = d.pick(w.TITLES_SHE if she else w.TITLES_HE)
        return Person("", she, title, d.pick([s for s in w.SURNAMES if s not in known]))
    pool = (w.SHE if she else w.HE) if kind == "first" else tuple(w.LONG_SHE if she else w.LONG_HE)
    known = {p.first for p in taken}
    return Person(d.pick([n for n in pool if n not in known]), she)


# --- Scenes ----------------------------------------------------------------------------------------------------------


def opening(d: Draft, s: World) -> None:
    """Where the story is, and its first two people."""
    a, b = s.people[:2]
    start = d.pick(("Once", "Long ago", "Last year", "That summer", "That winter"))
    told = d.pick((
        "{a} and {b} lived in {town}.", "there was a/an {mood} {job} in {town}, {a}, who had a friend, {b}.",
    ))  # fmt: skip
    d.say(f"{start} {told}", a=a, b=b, town=s.town)


def arrival(d: Draft, s: World) -> None:
    """Somebody who was not spoken of yet."""
    new = next((p for p in s.people if p.number == 0), None)
    if new is None:
        return alone(d, s)
    d.say(
        d.pick(("One {time} {c}, a/an {job}, came to the {place}.", "At the {place} they met a/an {job}, {c}.")), c=new
    )


def giving(d: Draft, s: World) -> None:
    """The indirect object: of the two who were named, the one who does not give."""
    a, b = s.two(d)
    giver, other = (a, b) if d.chance(0.5) else (b, a)
    to = d.weighted({"to": 0.7, "for": 0.3})
    where = d.pick((
        "When {a} and {b} {went} to the {place},", "After {a} and {b} met at the {place},",
        "While {a} and {b} were in the {place},", "{a} and {b} {went} to the {place} together, and",
        "{a} had a long talk with {b} at the {place}. Then", "At the {place} {a} sat beside {b}, and",
        "Since {a} and {b} had no work at the {place},",
    ))  # fmt: skip
    what = d.pick(("the {object}", "the {adjective} {object}", "one {object}", "the {object} and the {object}"))
    verb = Slot(d.pick(w.GAVE_TO if to == "to" else w.BOUGHT_FOR), ("verb",))
    spans = d.say(f"{where} {{giver}} {{verb}} {what} {to} {{other}}.", a=a, b=b, giver=giver, other=other, verb=verb)
    named = [i for i in spans if "name" in d.spans[i].roles]
    roles = ("of_two",), ("of_two",), ("giver", "again_of_two"), ("indirect_object", "again_of_two")
    for span, given in zip(named, roles, strict=True):
        d.add_roles(span, *given)


def agreement(d: Draft, s: World) -> None:
    """A verb that agrees with its subject, and not with the noun that stands between them."""
    chosen = d.some(w.OBJECTS + w.ANIMALS, 2)
    many = [d.chance(0.5), d.chance(0.5)]
    subject, noun = (
        Slot(w.plural(word) if several else word, (role + ("_plural" if several else "_singular"),))
        for word, several, role in zip(chosen, many, ("subject", "noun"), strict=True)
    )
    start = d.pick(("The {subject}", "In {town} the {subject}", "Every day the {subject}"))
    between = d.pick(("", " near the {noun}", " behind the {noun}", " under the {noun}", " that stood by the {noun}"))
    spans = d.say(start + between, subject=subject, noun=noun, town=s.town)
    head = next(i for i in spans if d.spans[i].roles & {"subject_plural", "subject_singular"})
    form, roles = int(many[0]), ("verb_plural" if many[0] else "verb_singular",)
    if d.chance(0.5):
        adverb = d.pick(("very", "always", "never", "still"))
        d.say(f"{{verb}} {adverb} {{adjective}}.", verb=Slot(d.pick(w.BE)[form], roles, head))
    else:
        number = d.pick(range(len(w.DOES)))
        d.say(f"{{verb}} {w.ENDINGS[number]}.", verb=Slot(w.DOES[number][form], roles, head))


def dated(d: Draft, s: World) -> None:
    """A date, or the day after the last one."""
    start = "It was {day} {month}, and"
    if s.dated:
        s.next_day()
        start = "The next day, {day} {month},"
    told = d.pick(("{a} {took} the {object}.", "{a} {went} to the {place}."))
    a, (day, month) = s.known(d), s.date()
    d.say(f"{start} {told}", a=a, day=day, month=month)


def aside(d: Draft, s: World) -> None:
    """Brackets: which one closes depends on which one opened."""
    opening, closing = d.pick(w.BRACKETS)
    d.say("{a} {took} the {object} ", a=s.known(d))
    start = d.mark(opening, "bracket_open")
    inner = d.pick((
        "the {adjective} one", "and {number} {objects} too", "from {town}", "on {weekday}", "{number} days ago",
        "it was {adjective} work", "a gift from {b}",
    ))  # fmt: skip
    d.say(inner, joined=True, **({"b": s.known(d)} if "{b}" in inner else {}))
    d.mark(closing, "bracket_close", link=start)
    d.text += "."


def singing(d: Draft, s: World) -> None:
    """A song of words that do not follow from each other; from the second time on it is sung word for word."""
    a = s.known(d)
    again = bool(s.song)
    if again:
        d.say(d.pick(("Then {a} sang", "Later {a} heard", "So {a} read out")), a=a)
        roles = [("song", "repeat_start"), *[("song", "repeat")] * (len(s.song) - 1)]
    else:
        d.say(d.pick(("{a} sang of", "{a} wrote the words")), a=a)
        s.song = [(word, -1) for word in d.some(SONG, d.pick(range(4, 8)))]
        roles = [("song",)] * len(s.song)
    s.song = [
        (word, d.say("{word}", word=Slot(word, role, link))[0])
        for (word, link), role in zip(s.song, roles, strict=True)
    ]
    d.text += "."


def losing(d: Draft, s: World) -> None:
    """Something is lost; later it is looked for and found where it was lost."""
    a = s.known(d)
    template = "{a} lost {possessive} {adjective} {object} in the {place}."
    again = s.lost is not None
    if s.lost is None:
        s.lost = d.pick(w.ADJECTIVES), d.pick(w.OBJECTS), d.pick(w.PLACES)
    else:
        template = d.pick((
            "At last {a} found the {adjective} {object} in the {place}.",
            "But {a} still missed the {adjective} {object} from the {place}.",
        ))  # fmt: skip
    adjective, thing, place = s.lost
    spans = d.say(
        template,
        a=a,
        possessive=Slot(a.possessive, ("pronoun",), a.last),
        adjective=adjective,
        object=thing,
        place=place,
    )
    for span in spans[-3:] if again else ():
        d.add_roles(span, "lost_again")


def feeling(d: Draft, s: World) -> None:
    """Pronouns, which agree with the person they stand for."""
    a, b = s.two(d)
    d.say("{a} was {mood}", a=a)
    end = d.pick((
        "because {pronoun} had no {object}.", "when {pronoun} saw {possessive} {object}.",
        "and {pronoun} asked {b} for {possessive} {object}.", "but {pronoun} did not tell {b}.",
    ))  # fmt: skip
    pronoun, possessive = (Slot(word, ("pronoun",), a.last) for word in (a.pronoun, a.possessive))
    d.say(end, pronoun=pronoun, possessive=possessive, b=b)


def speech(d: Draft, s: World) -> None:
    """Quoted speech."""
    d.text += " "
    start = d.mark('"', "quote_open")
    a, b = s.two(d)
    line = d.pick((
        "I want to see the {object}", "We must go to the {place}", "Where is my {object}",
        "The {object} is {adjective}", "Please come to the {place} on {weekday}", "You are {mood} today",
        "Bring {number} {objects}",
    ))  # fmt: skip
    d.say(line + ",", joined=True)
    d.mark('"', "quote_close", link=start)
    said = d.pick(("said", "asked", "answered", "whispered"))
    d.say(d.pick(("{said} {a}.", "{said} {a} to {b}.")), said=Slot(said, ("verb",)), a=a, b=b)


def packing(d: Draft, s: World) -> None:
    """A list of things; from the second time on it is told over again, in its order."""
    d.say("{a} " + d.pick(("unpacked", "counted") if s.packed else ("packed", "bought")), a=s.known(d))
    roles = ("object", "list_item", "list_again") if s.packed else ("object", "list_item")
    s.packed = s.packed or d.some(w.OBJECTS, d.pick((3, 4)))
    for thing in s.packed[:-1]:
        d.say("a/an {item},", item=Slot(thing, roles))
    d.say("and a/an {item}.", item=Slot(s.packed[-1], roles))


def clause(d: Draft, s: World) -> None:
    """A sentence with a clause inside."""
    a, b = s.two(d)
    template = d.pick((
        "{a}, who was a/an {job}, {did} {adverb}.", "Although {a} was {mood}, {b} {did} {adverb}.",
        "{a} {did} {adverb} until {b} came back from {town}.",
    ))  # fmt: skip
    d.say(template, a=a, b=b, town=s.town)


def alone(d: Draft, s: World) -> None:
    """One person and some things."""
    d.say("{a} {took} {number} {adjective} {objects} in the {place}.", a=s.known(d))


SCENES: dict[Callable[[Draft, World], None], int] = {
    giving: 12, agreement: 4, singing: 4, aside: 3, losing: 3, feeling: 3, dated: 3, speech: 3, packing: 2, clause: 2,
    arrival: 2, alone: 1,
}  # fmt: skip
SHARES = {scene: weight / sum(SCENES.values()) for scene, weight in SCENES.items()}


# --- Documents -------------------------------------------------------------------------------------------------------


def world(d: Draft, count: int) -> World:
    people: list[Person] = []
    for _ in range(count):
        people.append(person(d, people))
    month = d.pick(range(12))
    return World(people, d.pick(w.TOWNS), d.pick(range(1, w.MONTH_DAYS[month] + 1)), month)


def story(d: Draft) -> None:
    """A story of a few people in one town."""
    s = world(d, d.pick((2, 2, 3, 4), free=True))
    opening(d, s)
    for _ in range(d.pick(range(8, 18), free=True)):
        d.weighted(SHARES)(d, s)


def diary(d: Draft) -> None:
    """A dated line a day, each day the next."""
    s = world(d, 2)
    d.say("Diary of {a} in {town}.", a=s.people[0], town=s.town)
    for _ in range(d.pick(range(5, 12), free=True)):
        d.text += "\n"
        line = d.pick(("{who} {took} {number} {objects} at the {place}.", "{who} {went} to the {place}.",
                       "rain, and {who} was {mood}."))  # fmt: skip
        who, (day, month) = d.pick(s.people), s.date()
        d.say("{day} {month}: " + line, who=who, day=day, month=month)
        s.next_day()


def note(d: Draft) -> None:
    """A letter."""
    s = world(d, 2)
    a, b = s.people
    day, month = s.date()
    d.say("To {a}, {day} {month}. This is from {b}.", a=a, b=b, day=day, month=month)
    for _ in range(d.pick(range(4, 9), free=True)):
        d.weighted(SHARES)(d, s)
    d.say("With love from {b} to {a}.", a=a, b=b)


DOCUMENTS: dict[Callable[[Draft], None], float] = {story: 0.75, diary: 0.1, note: 0.15}


def write(d: Draft) -> None:
    """One document."""
    d.weighted(DOCUMENTS)(d)
