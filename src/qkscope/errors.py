"""What a person got wrong, said in one line.

Every room raises `UserError` for a mistake that the person at the keyboard can mend: it quotes the value and names
the fix. The command line prints the line alone and exits with status 2; any other exception is a bug of ours and
keeps its stack trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the person can mend; the message is one line that quotes the value and names the fix."""


def nearest(word: str, known: Iterable[str], least: float = 0.5) -> str:
    """`' (did you mean ...?)'` for the known word nearest to `word`, or nothing where none is as near as `least`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=least)
    return f" (did you mean {close[0]!r}?)" if close else ""
