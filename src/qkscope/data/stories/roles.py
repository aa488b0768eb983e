"""What each token of a story is there for: the roles its writer gave it, and those its word has anyway.

A role is a column of a boolean matrix, and a token may have several or none. A span of several tokens (a long name) has
its role on its last token, where the whole of it has been read; the tokens before are `part`. For what comes next,
`starts_TR` has a span's roles on its first token, a person's on the title where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .draft import Span

ROLES: dict[str, str] = {
    "bos": "the first token of a sequence",
    "sentence_start": "the first word of a sentence",
    "sentence_end": "the full stop",
    "comma": "a comma",
    "part": "an earlier token of a word of several tokens",
    "name": "a person's name",
    "name_new": "a person's first mention",
    "name_again": "a later mention of a person",
    "person_1": "the person mentioned first in the document",
    "person_2": "the person mentioned second",
    "person_3": "the third person or a later one",
    "title": "a title before a surname",
    "surname": "a surname",
    "of_two": "one of two people, one of whom is about to give the other something",
    "again_of_two": "one of those two, named for the second time: the giver or the indirect object",
    "giver": "the one who gives, named for the second time in the sentence",
    "indirect_object": "the one given to: of two named, the one who does not give",
    "pronoun": "a pronoun that stands for a person",
    "town": "a town",
    "place": "a place such as the market",
    "object": "a thing",
    "adjective": "an adjective of things",
    "mood": "an adjective of people",
    "job": "a profession",
    "number": "a number word",
    "weekday": "a day of the week",
    "time": "a time of day",
    "month": "a month",
    "day_number": "the day of a date",
    "next_day": "day or month of a date that follows from the last one",
    "bracket_open": "an opening bracket",
    "bracket_close": "a closing bracket",
    "quote_open": "an opening quotation mark",
    "quote_close": "a closing quotation mark",
    "subject_singular": "a singular subject whose verb is to agree",
    "subject_plural": "a plural subject whose verb is to agree",
    "noun_singular": "a singular noun between subject and verb",
    "noun_plural": "a plural noun between subject and verb",
    "verb_singular": "a verb that agrees with a singular subject",
    "verb_plural": "a verb that agrees with a plural subject",
    "verb": "another verb",
    "adverb": "an adverb",
    "list_item": "a thing in a list",
    "list_again": "a thing in a list that is told over again",
    "lost_again": "part of what is told again of a lost thing: its adjective, itself, its place",
    "song": "a word of a song",
    "repeat_start": "the first word of a song that is sung again",
    "repeat": "a later word of a song that is sung again",
    "determiner": "the, a, an, one",
    "preposition": "a preposition",
    "conjunction": "a conjunction",
    "newline": "the end of a line",
}
NAMES = list(ROLES)
NUMBER = {name: i for i, name in enumerate(NAMES)}
WORD_ROLES = {
    "determiner": "the a an one every that",
    "preposition": "to for in at of from with near behind under by beside on over until",
    "conjunction": "and but because when while after since although so who then",
    "verb": (
        "was were lived had met came sat lost found missed sang heard read wrote asked tell saw unpacked counted "
        "packed bought is see go come bring said"
    ),
    "pronoun": "she he her his my i we you they it this there",
}
_BY_WORD = {word: NUMBER[role] for role, text in WORD_ROLES.items() for word in text.split()}
_MARKS = {".": "sentence_end", ",": "comma", "\n": "newline"}


@dataclass(frozen=True)
class TokenRoles:
    """Roles of the tokens of one document."""

    roles_TR: np.ndarray
    """bool [T, R], columns as in `NAMES`."""
    starts_TR: np.ndarray
    """The same, with the roles of several tokens on the first of them."""
    link_T: np.ndarray
    """int64 [T]: the earlier token that this one answers to (a bracket's partner, a verb's subject, a name's last
    mention, the same word of the song), -1 where there is none. All tokens of a name have its link, its title too."""


def token_roles(text: str, spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> TokenRoles:
    """Roles of a document's tokens, given where each token stands in the text (BOS not among them)."""
    roles, first_roles = (np.zeros((len(offsets), len(NAMES)), dtype=bool) for _ in range(2))
    link = np.full(len(offsets), -1, dtype=np.int64)
    starts = np.array([_word_start(text, a, b) for a, b in offsets], dtype=np.int64)
    last_of_span = np.full(len(spans), -1, dtype=np.int64)
    for number, span in enumerate(spans):
        inside = np.flatnonzero((starts >= span.start) & (starts < span.end))
        if not len(inside):
            continue  # beyond the tokens that were kept
        last = inside[-1]
        last_of_span[number] = last
        begins = inside[0]
        if number and "title" in spans[number - 1].roles and spans[number - 1].end + 1 == span.start:
            begins = last_of_span[number - 1]
        roles[inside[:-1], NUMBER["part"]] = first_roles[inside[:-1], NUMBER["part"]] = True
        given = [NUMBER[r] for r in span.roles]
        roles[last, given] = True
        first_roles[begins, given] = True
        if span.link >= 0:
            link[begins : last + 1] = last_of_span[span.link]
    new_sentence = True
    for t, (start, (_, end)) in enumerate(zip(starts, offsets, strict=True)):
        word = text[start:end]
        own = []
        if new_sentence and word != "\n":
            own.append(NUMBER["sentence_start"])
        new_sentence = word in (".", "\n")
        if word in _MARKS:
            own.append(NUMBER[_MARKS[word]])
        elif not roles[t].any() and word.lower() in _BY_WORD:
            own.append(_BY_WORD[word.lower()])
        roles[t, own] = first_roles[t, own] = True
    return TokenRoles(roles, first_roles, link)


def _word_start(text: str, start: int, end: int) -> int:
    """Where a token's word begins: a token may have the space before it."""
    return start + 1 if end - start > 1 and text[start] == " " else start
