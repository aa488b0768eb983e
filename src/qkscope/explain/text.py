"""Tokens as a person reads them on a terminal: white space visible where it matters, nothing a terminal acts on."""

from __future__ import annotations

from collections.abc import Sequence

_BREAKS = str.maketrans({"\n": "⏎", "\r": "↵", "\t": "⇥"})


def visible(text: str) -> str:
    """Text on one line: ends of lines and tabs as signs, other control characters by number."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text.translate(_BREAKS))


def shown(token: str) -> str:
    """A token in quotation marks, its spaces visible."""
    return f"“{visible(token.replace(' ', '␣'))}”"


def marked(tokens: Sequence[str], center: int) -> str:
    """Tokens as one line of text with one of them in «»; the space before it stays outside."""
    before, token, after = (
        "".join(part) for part in (tokens[:center], tokens[center : center + 1], tokens[center + 1 :])
    )
    bare = token.lstrip(" ") or token
    return visible(f"{before}{token[: len(token) - len(bare)]}«{bare}»{after}")
