"""Prompts: marks, files of a person's own, ready sets, and what a tokenizer makes of them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import BOS

from qkscope.config import DataConfig
from qkscope.data.prompt_sets import READY, ready_set
from qkscope.data.prompts import Prompt, PromptSet, ask, parse, read_prompts
from qkscope.embedded import EMBEDDED_MODELS
from qkscope.errors import UserError
from qkscope.models import load_model


def test_marks_are_places_in_the_text() -> None:
    prompt = parse("When {IO:Mary} met {S1:Long John}, {{he}} gave {S2:it} to", [" Mary"])
    assert prompt.text == "When Mary met Long John, {he} gave it to"
    assert {name: prompt.text[a:b] for name, (a, b) in prompt.marks.items()} == {
        "IO": "Mary", "S1": "Long John", "S2": "it",
    }  # fmt: skip
    assert prompt.answers == (" Mary",) and prompt.wrong == ()


@given(st.lists(st.one_of(st.text("ab{} ", min_size=1, max_size=4), st.sampled_from(["x", "y z"])), max_size=6))
def test_what_is_written_is_read(parts: list[str]) -> None:
    """Any text with its braces doubled, and marks in between, is the text."""
    marked, plain, marks = "", "", {}
    for number, part in enumerate(parts):
        if part in ("x", "y z"):
            marks[f"M{number}"] = (len(plain), len(plain) + len(part))
            marked += f"{{M{number}:{part}}}"
        else:
            marked += part.replace("{", "{{").replace("}", "}}")
        plain += part
    prompt = parse(marked)
    assert prompt.text == plain and prompt.marks == marks


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {b c", "a brace without"),
        ("a } c", "a brace without"),
        ("{A:x} {A:y}", "the mark A is taken"),
        ("{END:x} y", "the mark END is taken"),
    ],
)
def test_a_slip_in_a_prompt_is_said_in_a_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(text)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("stories-gpt2")[1]


def asked_of(tokenizer, *prompts: Prompt, most: int | None = None, count: int = 9):
    return ask(PromptSet("mine", prompts, "A", ("A",)), tokenizer, DataConfig(), count, most)


def test_a_mark_is_its_last_token(tokenizer) -> None:
    texts = ["Then {A:Bartholomew} slept again", "Then Mary and {A:John Hill} and {B:Mary} met"]
    asked = asked_of(tokenizer, *(parse(text) for text in texts))
    words = [[tokenizer.decode([t]) for t in row] for row in asked.batch.tokens_BT.tolist()]
    assert asked.batch.tokens_BT[0, 0] == tokenizer.bos_token_id and asked.batch.opened
    at = asked.marks["A"].tolist()
    assert words[0][at[0]] == "mew" and words[1][at[1]] == " Hill"
    assert asked.marks["B"].tolist()[0] == -1 and words[1][asked.marks["B"][1]] == " Mary"
    ends = [words[b][end] for b, end in enumerate(asked.end_B.tolist())]
    assert ends == [" again", " met"]
    assert asked.batch.real_BT.sum(1).tolist() == [end + 1 for end in asked.end_B.tolist()]
    one = asked.take(torch.tensor([1]))
    assert len(one) == 1 and one.marks["A"].tolist() == at[1:] and one.end_B.tolist() == asked.end_B.tolist()[1:]


def test_prompts_that_cannot_be_asked_are_left_out(tokenizer) -> None:
    good = parse("Then {A:Mary} slept", [" again"], [" Mary"])
    bad = [parse("Then {A:Mary} slept", [" Bartholomew"]), parse("Then {A:Mary} " + "slept " * 40)]
    asked = asked_of(tokenizer, *bad, good, most=30)
    assert len(asked) == 1 and asked.choices
    assert [tokenizer.decode(ids) for ids in asked.answers + asked.wrong] == [" again", " Mary"]
    for prompt, said in zip(bad, ("not one token", "more than 30"), strict=True):
        with pytest.raises(UserError, match=said):
            asked_of(tokenizer, prompt, most=30)
    assert len(asked_of(tokenizer, good, good, good, count=2)) == 2
    assert not asked_of(tokenizer, good, parse("Then {A:Mary} slept")).choices
    with pytest.raises(UserError, match="every word of 'one zebra'"):
        asked_of(BOS, parse("{A:one} zebra"))


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": "a {X:b} {Y:c}", "answers": ["d"], "wrong": ["e"]}, {"prompt": "{Y:f} g"}]
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_prompts(path)
    assert (found.name, found.target, found.family) == ("mine", "X", ("X",))
    assert [p.text for p in found.prompts] == ["a b c", "f g"]
    assert read_prompts(path, "Y").target == "Y"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", 'has no "prompt"'),
        ('{"prompt": 3}', 'has no "prompt"'),
        ('{"prompt": "a {X:b}", "answer": ["c"]}', "unknown key 'answer'"),
        ('{"prompt": "a {X:b}", "answers": "c"}', "answers is 'c'; give a list"),
        ('{"prompt": "a {X:b} }"}', "line 1: prompt"),
        ('{"prompt": "a b"}', "no mark"),
        ("", "holds no prompt"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_a_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no prompt has the mark 'Z'|mine\.jsonl"):
        read_prompts(path, "Z")
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "other.jsonl")


@pytest.mark.parametrize("name", READY)
def test_ready_sets_go_on_without_end_and_are_the_same_for_a_seed(name: str) -> None:
    made = ready_set(name)
    prompts = list(islice(made.prompts, 200))
    assert prompts == list(islice(ready_set(name).prompts, 200)) != list(islice(ready_set(name, 1).prompts, 200))
    assert len({p.text for p in prompts}) > 150
    for p in prompts:
        assert made.target in p.marks and made.target in made.family and set(made.family) <= set(p.marks)
        assert p.answers and p.wrong and not set(p.answers) & set(p.wrong)
    with pytest.raises(UserError, match="no such set"):
        ready_set(name + "x")


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
@pytest.mark.parametrize("name", [n for n in READY if n != "years"])
def test_the_embedded_models_can_do_them(model: str, name: str) -> None:
    """At least four prompts of five: what a study asks has an answer in the model."""
    running, tokenizer = load_model(model)
    asked = ask(ready_set(name), tokenizer, DataConfig(), 40, 256)
    with torch.no_grad():
        logits = running(input_ids=asked.batch.tokens_BT, attention_mask=asked.batch.real_BT.long()).logits
    rows = logits[torch.arange(40), asked.end_B]
    right = [r[a].logsumexp(0) > r[w].logsumexp(0) for r, a, w in zip(rows, asked.answers, asked.wrong, strict=True)]
    assert sum(map(bool, right)) >= 32


def test_years_need_two_digit_tokens(tokenizer, shared: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(UserError, match="none of its prompts"):
        ask(ready_set("years"), tokenizer, DataConfig(), 4)
    asked = ask(
        ready_set("years"), AutoTokenizer.from_pretrained(shared / "models" / "gpt2-tokenizer"), DataConfig(), 4
    )
    assert len(asked) == 4 and all(len(ids) > 1 for ids in asked.wrong)
