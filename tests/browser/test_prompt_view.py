"""The Prompt view as a person uses it: type, pick a head, click an edge, edit a pair, choose competitors, go back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from torch import Tensor

from qkscope.explain.intervene import Pair
from qkscope.explain.opening import one_layer
from qkscope.explain.trace import Trace, prompt_tokens

PROMPT = "Long ago there was a market in Ashford. When Mary and John went to the harbour, John gave the lamp to"
HOSTILE = "<img src=x onerror=alert(1)> \"'& \u202eolleh\u202c 🦊 \x1b[31m <script>alert(2)</script>"
HEAD, QUERY, KEY = 3, 23, 11
MINUS = "\u2212"


@pytest.fixture
def errors() -> list[str]:
    """What the browser complained of; a test that expects a complaint takes it out."""
    return []


@pytest.fixture
def page(browser: Browser, errors: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors


def telling(dec: Any, site: Any) -> tuple[Trace, int, Any, Tensor]:
    """The head whose strongest term at the last token's most attended key moves that edge most when it is off: its
    trace, the key, the pattern without the pair, and the probabilities of the next token without it."""
    tokens = prompt_tokens(dec, site, PROMPT)
    found = []
    for head in range(dec.shape.N):
        one = dec.trace(site, PROMPT, head=head)
        key = one.why(QUERY).key
        a, b, _ = one.terms(QUERY, key).top(1)[0]
        with torch.no_grad(), site.intervene(dec, [Pair(a, b, head=head)]) as watched:
            edited = site.model(input_ids=tokens).logits[0, QUERY].softmax(-1)
        pattern = watched.pattern_BNQK[0, head]
        found.append((one, key, pattern, edited))
    return max(found, key=lambda f: float((f[2] - f[0].pattern["true"])[QUERY, f[1]].abs()))


def signed(value: float) -> str:
    return f"{MINUS if value < 0 else '+'}{abs(value):.2f}"


def click_edge(page: Page, query: int, key: int, length: int) -> None:
    """Click a cell of the first map, whose axes have room for tokens."""
    above = page.locator("figure.map canvas.above").first
    box = above.bounding_box()
    assert box is not None and (box["width"] - 64) / length > 9
    cell = (box["width"] - 64) / length
    above.click(position={"x": 64 + (key + 0.5) * cell, "y": (query + 0.5) * cell})


def shown_values(page: Page) -> dict[str, float]:
    """What the line below the maps says of the chosen edge."""
    parts = [words.rsplit(" ", 1) for words in page.locator(".edge .values > span").all_inner_texts()]
    return {name: float(value.replace(MINUS, "-")) for name, value in parts}


def test_a_prompt_is_traced_and_edited(page: Page, served: str, run_folder: Path) -> None:
    dec, site = one_layer(run_folder)
    one, edge_key, edited_pattern, edited = telling(dec, site)
    page.goto(f"{served}#/layer/2/prompt")
    expect(page.locator("table.next")).to_be_visible()  # a ready prompt is traced at once
    expect(page.locator(".ready button")).to_contain_text(["ioi", "induction"])

    page.get_by_role("textbox", name="Prompt").fill(PROMPT)
    page.keyboard.press("Enter")
    expect(page.locator(".strip .token")).to_have_count(len(one.tokens))
    page.locator("button.head").nth(one.head).click()
    expect(page.locator("button.head").nth(one.head)).to_have_attribute("aria-pressed", "true")

    click_edge(page, QUERY, edge_key, len(one.tokens))
    account = one.terms(QUERY, edge_key)
    terms = page.locator(".accounts article").first.locator(".term")
    expect(terms.first.locator(".number")).to_have_text(signed(account.top(1)[0][2]))
    values = shown_values(page)
    for name, kind in (("model", "true"), ("transcoders", "reconstructed"), ("pruned map", "pruned")):
        assert values[name] == pytest.approx(float(one.pattern[kind][QUERY, edge_key]), abs=6e-4)
    expect(page.locator(".accounts article").first.locator(".sum b")).to_have_text(signed(account.total))
    assert account.rest.keys() == {"dropped", "error"}
    for name in account.rest:
        row = page.locator(".accounts article").first.locator(".term.rest", has_text=name)
        expect(row.locator(".number")).to_have_text(signed(account.rest[name]))
    why = one.why(QUERY, edge_key)
    expect(page.locator(".accounts article").nth(1).locator(".sum b").first).to_have_text(signed(why.account.total))

    terms.first.get_by_role("switch").click()
    expect(page.locator("table.next.edited")).to_be_visible()
    query, key, _ = account.top(1)[0]
    found = shown_values(page)
    assert found["edited"] == pytest.approx(float(edited_pattern[QUERY, edge_key]), abs=6e-4)
    assert abs(found["edited"] - found["model"]) > 0.01
    after = [words.replace(" %", "").replace("<", "") for words in page.locator("td .number").all_inner_texts()[1::2]]
    assert max(map(float, after)) == pytest.approx(100 * float(edited.max()), abs=0.51)
    expect(page.locator("figure.map:visible")).to_have_count(4)
    expect(page.locator("ul.edited li")).to_have_count(1)
    href = f"#/layer/2/pair/{query}/{key}/{one.head}"
    expect(page.locator("ul.edited a")).to_have_attribute("href", href)
    expect(terms.first.locator("a")).to_have_attribute("href", href)

    # The served holds it all: back takes the switch back, forward sets it, a link to it shows the same.
    off = page.url
    assert "edit=2." in off and f"query={QUERY}" in off and f"key={edge_key}" in off
    page.go_back()
    expect(page.locator("ul.edited li")).to_have_count(0)
    expect(page.locator("figure.map:visible")).to_have_count(3)
    page.go_forward()
    expect(page.locator("ul.edited li")).to_have_count(1)
    page.goto("about:blank")
    page.goto(off)
    expect(page.locator("table.next.edited")).to_be_visible()
    assert shown_values(page) == found
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("table.next.edited")).to_have_count(0)
    expect(page.locator("ul.edited li")).to_have_count(0)


def test_the_key_is_held_against_chosen_others(page: Page, served: str, run_folder: Path) -> None:
    dec, site = one_layer(run_folder)
    one = dec.trace(site, PROMPT, head=HEAD)
    page.goto(f"{served}#/layer/2/prompt?prompt={PROMPT}&head={HEAD}&query={QUERY}&key={KEY}")
    total = page.locator(".accounts article").nth(1).locator(".sum b").first
    expect(total).to_have_text(signed(one.why(QUERY, KEY).account.total))
    field = page.get_by_role("textbox", name="Competitors")
    field.fill("4, 9")
    field.press("Enter")
    expect(total).to_have_text(signed(one.why(QUERY, KEY, [4, 9]).account.total))
    expect(page.locator(".strip .token.against")).to_have_count(2)
    assert "against=4.9" in page.url
    for wrong in ("99", str(KEY), "x"):
        field.fill(wrong)
        field.press("Enter")
        expect(field).to_have_value("4 9")
    expect(page.get_by_role("status")).to_contain_text(f"Position {KEY}")
    page.get_by_role("radio", name="competitor").check()
    page.locator(".strip .token").nth(9).click()
    expect(total).to_have_text(signed(one.why(QUERY, KEY, [4]).account.total))
    page.go_back()
    expect(total).to_have_text(signed(one.why(QUERY, KEY, [4, 9]).account.total))
    page.go_forward()
    expect(field).to_have_value("4")
    page.get_by_role("button", name="all others").click()
    expect(total).to_have_text(signed(one.why(QUERY, KEY).account.total))
    assert "against" not in page.url


def test_a_pair_is_scaled(page: Page, served: str, run_folder: Path) -> None:
    dec, site = one_layer(run_folder)
    one, edge_key, _, _ = telling(dec, site)
    query, key, _ = one.terms(QUERY, edge_key).top(1)[0]
    tokens = prompt_tokens(dec, site, PROMPT)
    edge = f"prompt={PROMPT}&head={one.head}&query={QUERY}&key={edge_key}"
    page.goto(f"{served}#/layer/2/prompt?{edge}")
    times = page.locator(".accounts article").first.locator(".term input.times").first
    listed = page.locator("ul.edited input.times")

    def shows(scale: float) -> None:
        part = {Pair(query, key, head=one.head): scale}
        with torch.no_grad(), site.intervene(dec, scale=part) as watched:
            site.model(input_ids=tokens)
        assert watched.pattern_BNQK is not None
        wanted = f"edited {float(watched.pattern_BNQK[0, one.head, QUERY, edge_key]):.3f}"
        expect(page.locator(".edge .values")).to_contain_text(wanted)

    times.fill(f"{MINUS}1,5")
    times.press("Enter")
    shows(-1.5)
    expect(listed).to_have_value(f"{MINUS}1.5")
    assert f"edit=2.{query}.{key}.{one.head}*-1.5" in page.url
    listed.fill("0.25")
    listed.press("Enter")
    shows(0.25)
    expect(times).to_have_value("0.25")
    for wrong in ("much", "1000", ""):
        times.fill(wrong)
        times.press("Enter")
        expect(times).to_have_value("0.25")
    page.go_back()
    expect(times).to_have_value(f"{MINUS}1.5")
    shows(-1.5)
    listed.fill("1")
    listed.press("Enter")
    expect(listed).to_have_count(0)
    expect(page.locator("table.next.edited")).to_have_count(0)


def test_keys_move_the_edge(page: Page, served: str, run_folder: Path) -> None:
    dec, site = one_layer(run_folder)
    one = dec.trace(site, PROMPT, head=HEAD)
    page.goto(f"{served}#/layer/2/prompt?prompt={PROMPT}&head={HEAD}&query={QUERY}&key={KEY}")
    score = page.locator(".accounts article").first
    expect(score.locator("h2")).to_contain_text(f"→ {KEY}")
    page.locator(".maps").focus()
    for pressed in ("ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(pressed)
    expect(page.locator(".accounts")).to_have_class("accounts stale")
    page.keyboard.press("Enter")
    expect(score.locator(".sum b")).to_have_text(signed(one.terms(QUERY - 2, KEY - 1).total))
    assert f"query={QUERY - 2}" in page.url and f"key={KEY - 1}" in page.url
    for _ in range(30):  # a key is never after its query
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(score.locator("h2")).to_contain_text(f"→ {QUERY - 2}")
    page.locator(".strip .token").nth(4).click()
    expect(score.locator("h2")).to_contain_text("→ 4")
    page.get_by_role("radio", name="query").check()
    page.locator(".strip .token").nth(2).click()
    expect(score.locator("h2")).to_contain_text("2")
    expect(score.locator(".sum b")).to_have_text(signed(one.terms(2, 2).total))


def test_late_answers_are_not_shown(page: Page, served: str, run_folder: Path) -> None:
    """What was asked of one prompt and comes when another is shown is of no use any more."""
    short = "Mary gave Tom the"
    dec, site = one_layer(run_folder)
    words = f"Next token after {len(dec.trace(site, short).tokens) - 1} ·the"
    held: list[Any] = []
    page.route("**/api/prompt/edit", lambda route: route.continue_() if held else held.append(route))
    page.goto(f"{served}#/layer/2/prompt?prompt={PROMPT}")
    expect(page.locator(".accounts .term").first).to_be_visible()
    page.get_by_role("textbox", name="Prompt").fill(short)
    page.keyboard.press("Enter")
    expect(page.locator("table.next")).to_be_visible()
    next_token = page.locator("article", has=page.locator("table.next")).locator("h2")
    expect(next_token).to_have_text(words)
    with page.expect_event("requestfinished", lambda request: request == held[0].request):
        held[0].continue_()
    page.wait_for_timeout(100)
    expect(next_token).to_have_text(words)


def test_hostile_text_is_text(page: Page, served: str) -> None:
    page.goto(f"{served}#/layer/2/prompt")
    expect(page.locator("table.next")).to_be_visible()
    page.get_by_role("textbox", name="Prompt").fill(HOSTILE)
    page.keyboard.press("Enter")
    expect(page.locator(".strip")).to_contain_text("<script>")
    assert page.locator("main img, main script").count() == 0
    assert "\u202e" not in page.locator(".traced").inner_text() and "\x1b" not in page.locator(".traced").inner_text()


def test_slips_are_said_and_leave_what_was_shown(page: Page, served: str, errors: list[str]) -> None:
    page.goto(f"{served}#/layer/2/prompt")
    expect(page.locator("table.next")).to_be_visible()
    for text, said in (("", "Type a text first"), ("the " * 300, "at most 256")):
        page.get_by_role("textbox", name="Prompt").fill(text)
        page.get_by_role("button", name="Trace").click()
        expect(page.get_by_role("status")).to_contain_text(said)
        expect(page.locator("table.next")).to_be_visible()
    page.locator(".strip .token").nth(2).click()  # of the prompt that is shown, which still answers
    expect(page.locator(".accounts article").first.locator("h2")).to_contain_text("→ 2")
    expect(page.locator(".said")).to_be_hidden()
    assert len(errors) == 1 and "400" in errors.pop()  # the browser's own line about the refused request


def test_without_a_server_the_view_says_how(page: Page, served: str) -> None:
    def static(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "live": False})

    page.route("**/data/run.json", static)
    page.goto(f"{served}#/layer/2/prompt")
    expect(page.locator("main")).to_contain_text("qkscope serve DIR")
    assert page.locator("main textarea").count() == 0
