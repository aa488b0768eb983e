"""Tokens on a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qkscope.explain.text import marked, shown, visible

text = st.text(max_size=12)


@given(text, text, text)
def test_no_text_leaves_its_line_or_moves_the_terminal(before: str, token: str, after: str) -> None:
    for line in (shown(token), visible(before + token + after), marked([before, token, after], 1)):
        assert line.isprintable()


@given(text, text, text)
def test_what_can_be_printed_is_printed_as_it_is(before: str, token: str, after: str) -> None:
    whole = before + token + after
    if whole.isprintable():
        assert visible(whole) == whole
        found = marked([before, token, after], 1)
        assert found.replace("«", "", 1).replace("»", "", 1) == whole or "«" in whole or "»" in whole


def test_signs_stand_for_white_space() -> None:
    assert shown(" a\n") == "“␣a⏎”" and shown("\t\r\x1b") == "“⇥↵\\x1b”"
    assert marked(["so ", "the", " end"], 2) == "so the «end»"
