"""The embedded corpus: the same document from the same number, roles where its text shows them, splits apart."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkscope.config import DataConfig
from qkscope.data import Sequences, open_documents
from qkscope.data.stories import NAMES, ROLES, story_of, token_roles, words
from qkscope.embedded.tokenizer import make_tokenizer

STORIES = [story_of(i) for i in range(300)]
CLOSING = dict(words.BRACKETS)


def named(story, role: str) -> list[tuple[str, int, int]]:
    """(text, span, link) of the spans of one role."""
    return [(story.text[s.start : s.end], i, s.link) for i, s in enumerate(story.spans) if role in s.roles]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(256)


@settings(max_examples=30, deadline=None)
@given(st.integers(min_value=0, max_value=2**62))
def test_a_number_is_a_document(index: int) -> None:
    first, second = story_of(index), story_of(index)
    assert first == second and first.text and first.nats > 0
    assert all(0 <= s.start < s.end <= len(first.text) and s.link >= -1 for s in first.spans)
    assert all(s.link < i for i, s in enumerate(first.spans))
    assert {role for s in first.spans for role in s.roles} <= set(ROLES)


def test_documents_differ_and_are_long_enough() -> None:
    assert len({s.text for s in STORIES}) == len(STORIES)
    lengths = [len(s.text.split()) for s in STORIES]
    assert 80 < np.mean(lengths) < 200


def test_the_corpus_is_the_one_that_the_embedded_model_learned() -> None:
    """What a number stands for may not change while a model that was trained on it ships."""
    text = "\n\n".join(f"{s.text} {s.nats:.6f}" for s in STORIES)
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "8115d97cbd977021"


def test_every_role_is_given_somewhere(tokenizer) -> None:
    seen = np.zeros(len(NAMES), dtype=bool)
    for story in STORIES:
        offsets = tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        seen |= token_roles(story.text, story.spans, offsets).roles_TR.any(0)
    assert [n for n, there in zip(NAMES, seen, strict=True) if not there] == ["bos"]  # BOS is no token of a document


def test_the_indirect_object_is_the_one_named_once_in_its_sentence() -> None:
    found = 0
    for story in STORIES:
        for text, span, _ in named(story, "indirect_object"):
            end = story.spans[span].end
            start = max(story.text.rfind(p, 0, story.spans[span].start - 60) for p in (". ", "\n", '" '))
            givers = [g for g in named(story, "giver") if start < story.spans[g[1]].start < end]
            names = [t for t, i, _ in named(story, "name") if start < story.spans[i].start < end]
            assert text != givers[-1][0] and story.text[end] == "."
            assert names.count(givers[-1][0]) >= 2, story.text[start:end]
            assert re.search(r"\b(to|for) (\w+ )?$", story.text[: story.spans[span].start])
            found += 1
    assert found > 200


def test_brackets_close_with_their_partner() -> None:
    pairs = Counter()
    for story in STORIES:
        for text, _, link in named(story, "bracket_close"):
            opening = story.text[story.spans[link].start : story.spans[link].end]
            assert text == CLOSING[opening]
            pairs[opening] += 1
    assert set(pairs) == set(CLOSING)


def test_verbs_agree_with_their_subject_and_between_them_stands_either_number() -> None:
    singular = {a for a, _ in (*words.BE, *words.DOES)}
    between = Counter()
    for story in STORIES:
        for number in ("singular", "plural"):
            for text, span, link in named(story, f"verb_{number}"):
                assert (text in singular) == (number == "singular")
                assert f"subject_{number}" in story.spans[link].roles
                inside = {r for s in story.spans[link + 1 : span] for r in s.roles if r.startswith("noun_")}
                between.update((number, r) for r in inside)
    assert set(between) == {(n, f"noun_{m}") for n in ("singular", "plural") for m in ("singular", "plural")}


def test_songs_repeat_word_for_word_and_link_to_the_last_singing() -> None:
    count = 0
    for story in STORIES:
        for text, _, link in named(story, "repeat") + named(story, "repeat_start"):
            assert story.text[story.spans[link].start : story.spans[link].end] == text
            count += 1
    assert count > 300


def test_dates_follow_from_each_other() -> None:
    follows = 0
    for story in STORIES:
        days = named(story, "day_number")
        months = [words.MONTHS.index(m) for m, _, _ in named(story, "month")]
        for (before, month_before), (span, day, month) in zip(
            zip((int(d) for d, _, _ in days), months, strict=True),
            ((i, int(d), m) for (d, i, _), m in zip(days[1:], months[1:], strict=True)),
            strict=False,
        ):
            assert "next_day" in story.spans[span].roles
            last = before == words.MONTH_DAYS[month_before]
            assert (day, month) == ((1, (month_before + 1) % 12) if last else (before + 1, month_before))
            follows += 1
    assert follows > 100


def test_pronouns_agree_with_whom_they_stand_for() -> None:
    for story in STORIES:
        for text, _, link in named(story, "pronoun"):
            first = story.text[story.spans[link].start : story.spans[link].end]
            she, he = first in words.SHE or first in words.LONG_SHE, first in words.HE or first in words.LONG_HE
            if she or he:  # a surname does not say
                assert (text in ("she", "her")) == she


def test_the_choices_cost_what_they_were_worth() -> None:
    """A document of one fixed kind: -log p by hand."""
    from random import Random

    from qkscope.data.stories.draft import Draft

    d = Draft(Random(0))
    d.pick("abcd")
    d.chance(0.25)
    d.some(range(5), 2)
    d.pick("ab", free=True)
    quarter = {True: np.log(4), False: np.log(4 / 3)}
    again = Random(0)
    again.randrange(4)
    yes = again.choices([True, False], [0.25, 0.75])[0]
    assert d.nats == pytest.approx(np.log(4) + quarter[yes] + np.log(5) + np.log(4))


def test_tokens_are_words_and_any_text_comes_back(tokenizer) -> None:
    unknown = tokenizer.unk_token_id
    for story in STORIES[:100]:
        ids = tokenizer(story.text)["input_ids"]
        assert tokenizer.decode(ids) == story.text and unknown not in ids
    assert tokenizer.tokenize(" Mary") == ["ĠMary"]
    assert tokenizer.tokenize(" Bartholomew") == ["ĠBar", "tholo", "mew"]
    for text in ("naïve café\t{x} + 東京", "Mary  and\n\nJohn", "zzz 1999"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for name in (*words.SHE, *words.HE, *words.SURNAMES, *words.MONTHS):
        assert len(tokenizer.tokenize(f" {name}")) == 1, name


def test_roles_stand_on_the_last_token_of_a_long_name(tokenizer) -> None:
    story = next(s for s in STORIES if "Bartholomew" in s.text)
    encoded = tokenizer(story.text, return_offsets_mapping=True)
    roles = token_roles(story.text, story.spans, encoded["offset_mapping"]).roles_TR
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    at = tokens.index("tholo")
    assert tokens[at + 1] == "mew"
    assert roles[at - 1, NAMES.index("part")] and roles[at, NAMES.index("part")]
    assert roles[at + 1, NAMES.index("name")] and not roles[at, NAMES.index("name")]


def test_splits_are_apart_and_the_stream_has_no_end(tokenizer) -> None:
    documents = open_documents(DataConfig(source="embedded"))
    texts = {}
    for split in ("train", "validation", "heldout"):
        stream = documents.stream(split, 3, 0)
        texts[split] = {next(stream).text for _ in range(200)}
    assert not texts["train"] & texts["heldout"] and not texts["train"] & texts["validation"]
    first, other = next(documents.stream(None, 3, 0)), next(documents.stream(None, 3, 1))
    assert first.text != other.text and story_of(first.index).text == first.text
    stream = Sequences(DataConfig(source="embedded"), tokenizer, "train", batch_tokens=512, seed=0, repeat=True)
    batch = next(stream)
    row = tokenizer.decode(batch.tokens_BT[0][batch.real_BT[0]][1:])
    assert story_of(int(batch.document_B[0])).text.startswith(row)
