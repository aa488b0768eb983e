"""The embedded corpus: short English stories, diaries and letters without end, whose every token has known roles.

    story = story_of(index)          # the document of that number, always the same one: text, spans, nats

Documents are written by a grammar (`grammar.py`) from its own words (`words.py`), and a document follows from its
number alone. A split follows from the text, as for every source, so no document stands on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from ..documents import Document, Documents, Split, split_of
from .draft import Draft, Span
from .grammar import write
from .roles import NAMES, ROLES, TokenRoles, token_roles

__all__ = ["NAMES", "ROLES", "Span", "Story", "StoryDocuments", "TokenRoles", "story_of", "token_roles"]

EPOCH_DOCUMENTS = 1 << 36  # numbers set aside for each (seed, epoch); all of them fit an int64


@dataclass(frozen=True)
class Story:
    """One document."""

    index: int
    text: str
    spans: tuple[Span, ...]
    nats: float
    """-log probability of the choices that wrote it; its mean bounds the corpus's entropy from above, see draft.py."""


def story_of(index: int) -> Story:
    """The document of this number."""
    draft = Draft(Random(index))
    write(draft)
    return Story(index, draft.text, tuple(draft.spans), draft.nats)


@lru_cache(maxsize=1 << 15)  # some 40 MB: the phases of a run begin their text anew, and writing takes a millisecond
def _text_of(index: int) -> str:
    return story_of(index).text


class StoryDocuments(Documents):
    """The corpus as a source of text: every (seed, epoch) has documents of its own, without end."""

    source, count, size = "embedded", None, None

    def __init__(self, heldout: float) -> None:
        self._heldout = heldout

    def stream(self, split: Split | None, seed: int, epoch: int, start: int = 0) -> Iterator[Document]:
        first = (seed % 2**20 * 64 + epoch % 64) * EPOCH_DOCUMENTS
        position = start
        while True:
            text = _text_of(first + position)
            found = split_of(text, self._heldout)
            if split is None or split == found:
                yield Document(position, first + position, found, text)
            position += 1
