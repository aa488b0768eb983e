"""`qkscope trace` and `qkscope study` on a finished run, as a person gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import close
from small_runs import Said, read_json

import qkscope as qk
from qkscope.explain.opening import one_layer

PROMPT = "Long ago there was a market in Ashford. When Mary and John went to the harbour, John gave the lamp to"
Call = Callable[[list[str]], Said]


def test_a_trace_prints_what_python_says(embedded_run: Path, call: Call, tmp_path: Path) -> None:
    found = tmp_path / "trace.json"
    said = call(["trace", str(embedded_run), "--prompt", PROMPT, "--head", "3", "--json", str(found)])
    assert said.status == 0, said.lines
    dec, site = one_layer(embedded_run)
    traced = dec.trace(site, PROMPT, head=3)
    values = read_json(found)
    assert values["tokens"] == traced.tokens and traced.tokens[-1] == " to"
    close(torch.tensor(values["pattern"]["true"]), traced.pattern["true"])
    why = traced.why()
    assert (values["query"], values["key"], values["why"]["against"]) == (why.query, why.key, why.against)
    assert values["why"]["total"] == pytest.approx(why.account.total, abs=1e-5)
    score = values["score"]
    assert score["pairs"] + sum(score["rest"].values()) == pytest.approx(score["total"], abs=1e-4)
    assert f"layer 2 head 3, query {why.query}“␣to”" in said.out
    assert f"{why.account.total:+.2f} = " in said.out and "from " in said.out
    assert max(map(len, said.out.splitlines())) <= 120


def test_without_a_head_every_head_is_listed(embedded_run: Path, call: Call) -> None:
    said = call(["trace", str(embedded_run / "layer_2"), "--prompt", PROMPT, "--query", "11"])
    assert said.status == 0 and all(f"head {n:>2}" in said.out for n in range(8))


def test_hostile_text_is_shown_as_text(embedded_run: Path, call: Call) -> None:
    said = call(["trace", str(embedded_run), "--prompt", "Mary \x1b[31m\tand\n<b>日‮", "--head", "0"])
    assert said.status == 0 and "\x1b" not in said.out and "‮" not in said.out and "<b>" not in said.out.split("\n")


def test_a_study_says_the_same_in_words_and_in_json(embedded_run: Path, call: Call, tmp_path: Path) -> None:
    found = tmp_path / "study.json"
    words = ["study", str(embedded_run), "--prompts", "ioi", "--count", "12", "--heads", "1", "--json", str(found)]
    said = call(words)
    assert said.status == 0, said.lines
    values = read_json(found)
    assert (values["target"], values["family"]) == ("IO", ["IO", "S1", "S2"])
    assert values["prompts"] == {"choosing": 6, "reported": 6} and len(values["heads"]) == 8
    (one,) = values["details"]
    assert set(one["pairs"]) == {"IO", "S1", "S2"} and one["head"] == values["heads"][0]["head"]
    assert f"layer 2 head {one['head']}" in said.out and f"{values['difference']['mean']:.2f}" in said.out
    assert max(map(len, said.out.splitlines())) <= 120
    assert call(words).out == said.out


def test_prompts_of_a_persons_own(embedded_run: Path, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": f"Then {{A:{name}}} met {{B:Tom}} and {name} slept"} for name in ("Mary", "Alice", "Luke", "Emma")
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    said = call(["study", str(embedded_run), "--prompts", str(path), "--target", "B"])
    assert said.status == 0, said.lines
    assert said.out.startswith("mine: 2 prompts reported") and "p(right)" not in said.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trace", "{run}", "--prompt", PROMPT, "--head", "8"], ("head 8", "0 to 7")),
        (["trace", "{run}", "--prompt", PROMPT, "--layer", "1"], ("--layer 1", "layers 2")),
        (["trace", "{run}/layer_2", "--prompt", PROMPT, "--layer", "1"], ("--layer 1", "another layer")),
        (["trace", "{run}", "--prompt", "", "--head", "1"], ("holds no text",)),
        (["trace", "{run}", "--prompt", "the " * 300, "--head", "1"], ("at most 256",)),
        (["trace", "{run}", "--prompt", PROMPT, "--head", "1", "--query", "99"], ("query 99", "positions 0 to")),
        (["trace", "{run}", "--prompt", PROMPT, "--json", "{run}"], ("--json",)),
        (["trace", "{run}"], ("prompt",)),
        (["trace", "{run}/nowhere", "--prompt", PROMPT], ("nowhere", "not a qkscope run")),
        (["study", "{run}", "--prompts", "ioj"], ("--prompts ioj", "did you mean 'ioi'")),
        (["study", "{run}", "--prompts", "years"], ("--prompts years", "none of its prompts")),
        (["study", "{run}", "--prompts", "nowhere.jsonl"], ("nowhere.jsonl",)),
        (["study", "{run}", "--prompts", "ioi", "--target", "X"], ("--target X", "IO")),
        (["study", "{run}", "--prompts", "ioi", "--head", "9"], ("head 9",)),
        (["study", "{run}", "--prompts", "ioi", "--count", "3"], ("count", "3")),
    ],
)
def test_slips_end_in_one_line(embedded_run: Path, call: Call, words: list[str], parts: tuple[str, ...]) -> None:
    said = call([word.replace("{run}", str(embedded_run)) for word in words])
    said.complaint(*parts)
    assert not said.out


def test_public_names_are_there() -> None:
    assert all(hasattr(qk, name) for name in qk.__all__)


def test_values_are_plain(embedded_run: Path) -> None:
    dec, site = one_layer(embedded_run, 2)
    account: Any = dec.trace(site, PROMPT, head=1).why(-1).account.to_dict()
    assert json.loads(json.dumps(account)) == account
