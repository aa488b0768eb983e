"""The page in a browser: every view of a real run served and exported, every interaction, hostile artefacts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from artefacts import HOSTILE, save_artefact
from pages import hosting, serving, shown

from qkscope.app.export import export

Open = Callable[..., Any]
LAYER = 2


@pytest.fixture(params=["served", "exported"])
def address(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def pairs_of(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / f"layer_{LAYER}" / "pairs.parquet").to_pylist()
    return sorted(rows, key=lambda row: -row["importance"])


def cells(tab: Any, place: int) -> list[str]:
    return tab.locator(f"table.browse tbody tr td:nth-child({place})").all_inner_texts()


def number(text: str) -> float:
    """A number as the page writes it."""
    mantissa, _, exponent = text.removesuffix(" %").replace(",", "").replace("\u2212", "-").partition("\u00d710")
    return float(mantissa) * 10.0 ** int(exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


def test_overview(address: str, open_view: Open, run_folder: Path) -> None:
    tab = open_view(address)
    report = json.loads((run_folder / f"layer_{LAYER}" / "report.json").read_text())
    assert tab.inner_text("h1") == "QK decomposition of stories-gpt2"
    assert f"{report['pairs']['kept']:,}" in tab.inner_text("table.summary tbody tr:first-child")
    titles = tab.locator("h2").all_inner_texts()
    assert {"Pattern KL", "Cross-entropy increase", "Firing frequency", "Each head"} <= set(titles)
    assert tab.locator("section", has_text="Pattern KL").first.locator("svg").count() == 1
    bar = tab.locator("[data-tip^='pruned map:']").first
    bar.hover()
    said = tab.inner_text("#tip").removeprefix("pruned map: ").split(" ")[0]
    assert number(said) == pytest.approx(report["pattern_kl"]["map_pruned"]["mean"], rel=1e-4)
    data = tab.get_by_role("link", name="report.json").get_attribute("href")
    assert tab.request.get(address + data).json()["pairs"] == report["pairs"]


def test_features_are_browsed(address: str, open_view: Open) -> None:
    tab = open_view(address, f"#/layer/{LAYER}/features")
    worth = [number(text) for text in cells(tab, 2)]
    assert worth == sorted(worth, reverse=True) and len(worth) > 2
    tab.get_by_role("link", name="fires on").click()
    shown(tab)
    density = [number(text) for text in cells(tab, 3)]
    assert density == sorted(density, reverse=True) and "sort=density" in tab.url
    tab.get_by_role("link", name="fires on").click()
    tab.wait_for_function("() => location.hash.includes('order=asc')")
    shown(tab)
    assert [number(text) for text in cells(tab, 3)] == sorted(density)
    tab.fill("main input[name=min_density]", "5")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.includes('min_density=0.05')")
    shown(tab)
    kept = [number(text) for text in cells(tab, 3)]
    assert kept == [d for d in sorted(density) if d >= 5] and tab.input_value("input[name=min_density]") == "5"
    tab.evaluate("scrollTo(0, 120)")
    tab.go_back()
    shown(tab)
    assert len(cells(tab, 3)) == len(density)
    tab.go_forward()
    shown(tab)
    assert tab.evaluate("scrollY") == min(120, tab.evaluate("document.documentElement.scrollHeight - innerHeight"))
    tab.go_back()
    shown(tab)
    tab.get_by_role("link", name="key features").click()
    shown(tab)
    assert all(text.startswith("k") for text in cells(tab, 1))


def test_a_feature(address: str, open_view: Open, run_folder: Path) -> None:
    rows = pq.read_table(run_folder / f"layer_{LAYER}" / "examples.parquet").to_pylist()
    row = next(row for row in rows if row["side"] == "key" and row["range"] == -1)
    tab = open_view(address, f"#/layer/{LAYER}/feature/key/{row['feature']}")
    assert tab.inner_text("h1").find(f"key feature {row['feature']}") >= 0
    fires = tab.locator(".example .token.fires.center").first
    fires.hover()
    assert f"activation {row['activation']:.4f}"[:15] in tab.inner_text("#tip")
    assert {"Tokens it fires on", "Query features that look for it"} <= {
        title.split("\n")[0].split(" from ")[0].rsplit(" ", 2)[0] if "pairs" in title else title.split(" from ")[0]
        for title in tab.locator("h2").all_inner_texts()
    }
    heads = tab.locator("table.sortable tbody tr td:nth-child(3)")
    tab.get_by_role("button", name="head").click()
    assert heads.all_inner_texts() == sorted(heads.all_inner_texts(), key=lambda text: int(text[1:]))
    tab.keyboard.press("j")
    shown(tab)
    assert f"key feature {row['feature'] + 1}" in tab.inner_text("h1")
    tab.keyboard.press("k")
    tab.wait_for_function(f"() => location.hash.endsWith('/{row['feature']}')")
    shown(tab)
    tab.locator("table.sortable a.feature").first.click()
    shown(tab)
    assert "query feature" in tab.inner_text("h1")
    tab.go_back()
    shown(tab)
    assert f"key feature {row['feature']}" in tab.inner_text("h1")


def test_pairs_and_a_pair(address: str, open_view: Open, run_folder: Path) -> None:
    tab = open_view(address, f"#/layer/{LAYER}/pairs")
    kept = pairs_of(run_folder)
    assert f"of {len(kept):,}" in tab.inner_text(".pager >> nth=0") and cells(tab, 1)[0] == "1"
    tab.get_by_role("link", name="after").first.click()
    shown(tab)
    assert cells(tab, 1) == [f"{n:,}" for n in range(101, 201)]
    tab.get_by_role("link", name="strength").click()
    shown(tab)
    strongest = sorted(kept, key=lambda row: -row["strength"])
    wanted = [row["strength"] for row in strongest[:100]]
    assert [number(text) for text in cells(tab, 5)] == pytest.approx(wanted, rel=5e-3)
    tab.locator("main input[name=bias]").check()
    tab.wait_for_function("() => location.hash.includes('bias=0')")
    shown(tab)
    two = [row for row in strongest if min(row["query_feature"], row["key_feature"]) >= 0]
    assert cells(tab, 2)[0].split(" ")[0] == f"q{two[0]['query_feature']}"
    tab.locator("table.browse a.open").first.click()
    shown(tab)
    names = f"q{two[0]['query_feature']}", f"k{two[0]['key_feature']}"
    assert all(name in tab.inner_text("h1") for name in names)
    assert tab.locator(".example.pair").count() > 0
    path = tab.locator(".arc path").first.get_attribute("d")
    assert path.startswith("M") and "NaN" not in path
    assert tab.locator(".token.end.query").count() == tab.locator(".token.end.key").count() > 0
    heads = {row["head"] for row in kept if all(row[n] == two[0][n] for n in ("query_feature", "key_feature"))}
    assert tab.locator("table.sortable tbody tr").count() == len(heads)
    tab.locator("h1 a[rel=next]").click()
    shown(tab)
    assert tab.url.rsplit("/pair/", 1)[1] != f"{two[0]['query_feature']}/{two[0]['key_feature']}/{two[0]['head']}"


def test_a_head(address: str, open_view: Open, run_folder: Path) -> None:
    tab = open_view(address, f"#/layer/{LAYER}/head/0")
    patterns = json.loads((run_folder / f"layer_{LAYER}" / "patterns.json").read_text())
    assert tab.locator("figure.map canvas.above").count() == 4
    assert tab.locator("main p.tokens .token").count() == len(patterns["tokens"])
    above = tab.locator("figure.map canvas.above").first
    box, n = above.bounding_box(), len(patterns["tokens"])
    margin = 64 if (box["width"] - 64) / n >= 8.5 else 26
    cell = (box["width"] - margin) / n
    above.hover(position={"x": margin + 0.5 * cell, "y": 3.5 * cell})
    assert tab.locator("main .tip div").first.inner_text().startswith("3 ")
    said = dict(zip(("true", "transcoders", "pruned"), tab.locator(".tip .values b").all_inner_texts(), strict=False))
    for name, value in said.items():
        assert number(value) == pytest.approx(patterns["heads"][0][name][3][0], rel=1e-2)
    tab.wait_for_function("() => !document.body.innerText.includes('being drawn')")
    tab.locator("nav.heads a").nth(1).click()
    shown(tab)
    assert "Head 1" in tab.inner_text("h1")


@pytest.mark.parametrize("kind", ["served", "exported"])
def test_a_pair_by_distance(kind: str, open_view: Open, rotary_folder: Path, tmp_path: Path) -> None:
    stored = pq.read_table(rotary_folder / f"layer_{LAYER}" / "pair_distance.parquet")
    edges = json.loads(stored.schema.metadata[b"distances"])
    rows = {tuple(row[n] for n in ("query_feature", "key_feature", "head")): row for row in stored.to_pylist()}
    pair = next(row for row in pairs_of(rotary_folder) if min(row["query_feature"], row["key_feature"]) >= 0)
    cell = pair["query_feature"], pair["key_feature"], pair["head"]
    own = rows[cell]
    if kind == "exported":
        export(rotary_folder, tmp_path / "site")
    with serving(rotary_folder) if kind == "served" else hosting(tmp_path / "site") as address:
        tab = open_view(address, f"#/layer/{LAYER}/pair/{'/'.join(map(str, cell))}")
        section = tab.locator("section", has=tab.get_by_role("heading", name="By distance"))
        for n in (0, 5, len(own["mean"]) - 1):
            section.locator("svg rect.hit").nth(n).hover()
            said = tab.inner_text("#tip")
            first, last = edges[n], edges[n + 1] - 1
            distances = str(first) if first == last else f"{first}\u2013{last}"
            assert said.startswith(f"distance {distances}: ")
            assert number(said.split(": ")[1].split(",")[0].split(";")[0].lstrip("+")) == pytest.approx(
                own["mean"][n], rel=6e-3
            )
            assert number(said.split("; ")[1].split(" ")[0]) == pytest.approx(100 * own["use"][n], rel=6e-3)
        assert number(section.locator(".note span").inner_text().lstrip("+")) == pytest.approx(own["average"], rel=6e-3)
        path = section.locator("path.line").get_attribute("d")
        assert path.count("L") == len(own["mean"]) - 1 and "NaN" not in path
        data = tab.request.get(address + section.get_by_role("link", name="data").get_attribute("href"))
        text = data.body() if kind == "served" else gzip.decompress(data.body())
        assert own["mean"] == pytest.approx(
            next(r for r in as_records(json.loads(text)) if (r["query"], r["key"], r["head"]) == cell)["distance"][
                "mean"
            ]
        )


def as_records(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One record, or a file of several."""
    return [found] if "query" in found else list(found.values())


def test_without_a_rotary_embedding_no_distance_is_shown(address: str, open_view: Open, run_folder: Path) -> None:
    pair = pairs_of(run_folder)[0]
    tab = open_view(address, f"#/layer/{LAYER}/pair/{pair['query_feature']}/{pair['key_feature']}/{pair['head']}")
    assert tab.locator("h2", has_text="By head").count() == 1
    assert "distance" not in tab.inner_text("main").lower()


def test_keys_search_and_colours(served: str, open_view: Open) -> None:
    tab = open_view(served, f"#/layer/{LAYER}/features")
    tab.keyboard.press("?")
    assert tab.locator("dialog[open]").count() == 1
    tab.keyboard.press("Escape")
    assert tab.locator("dialog[open]").count() == 0
    tab.keyboard.press("j")
    tab.keyboard.press("ArrowDown")
    second = tab.locator("table.browse a.open").nth(1)
    assert second.evaluate("node => node === document.activeElement")
    tab.keyboard.press("k")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.includes('/feature/')")
    shown(tab)
    tab.keyboard.press("/")
    tab.keyboard.type("k3")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => location.hash.endsWith('/feature/key/3')")
    shown(tab)
    tab.keyboard.press("/")
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement === document.body")
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.get_by_title("light or dark").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    tab.reload()
    shown(tab)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    tab.keyboard.press("o")
    tab.wait_for_function("() => location.hash === '#/'")
    shown(tab, "#/")


def test_addresses_that_name_nothing(address: str, tab: Any) -> None:
    for hash_, words in (
        ("#/layer/9/features", "no layer 9"),
        (f"#/layer/{LAYER}/feature/query/99999", "query feature 99999"),
        (f"#/layer/{LAYER}/feature/side/1", "no such page"),
        (f"#/layer/{LAYER}/pair/31/31/99", "keeps no pair"),
        ("#/%E0%A4%A", "no such page"),
    ):
        tab.goto(address + hash_)
        shown(tab, hash_)
        assert words in tab.inner_text("main [role=alert]")
    tab.goto(f"{address}#/layer/{LAYER}/features?text=zzzz")
    tab.wait_for_function("() => document.querySelector('main').innerText.includes('Nothing is like that')")
    tab.wrong[:] = [said for said in tab.wrong if "404" not in said]  # the browser's own line of a failed request


def test_a_small_screen_holds_every_view(served: str, open_view: Open, run_folder: Path, tab: Any) -> None:
    tab.set_viewport_size({"width": 400, "height": 800})
    pair = pairs_of(run_folder)[0]
    cell = f"{pair['query_feature']}/{pair['key_feature']}/{pair['head']}"
    for view in ("features", "pairs", "feature/query/0", "head/0", f"pair/{cell}"):
        open_view(served, f"#/layer/{LAYER}/{view}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400, view
    open_view(served)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_hostile_artefact_is_text(open_view: Open, tmp_path: Path) -> None:
    folder = save_artefact(tmp_path / "run", features=8, pairs=60, words=HOSTILE, layers=(0,))
    pair = pq.read_table(folder / "layer_0" / "pairs.parquet").slice(0, 1).to_pylist()[0]
    cell = f"{pair['query_feature']}/{pair['key_feature']}/{pair['head']}"
    with serving(folder) as address:
        for hash_ in ("#/", "#/layer/0/features", "#/layer/0/feature/key/3", "#/layer/0/pairs",
                      f"#/layer/0/pair/{cell}",
                      "#/layer/0/head/1", "#/layer/0/features?text=%3Cscript%3Ealert(1)%3C%2Fscript%3E"):  # fmt: skip
            tab = open_view(address, hash_)
            assert tab.evaluate("document.scripts.length") == 3, hash_
            assert tab.locator("main script, main img, main iframe, main a[href^='javascript']").count() == 0
            if "feature/" in hash_:
                text = tab.inner_text("main")
                for words in (
                    "<script>alert(1)</script>",
                    "⟨202E⟩gnp.exe",
                    "⟨0000⟩⟨001B⟩[31m",
                    "🧑‍🚀",
                    "javascript:alert(1)",
                ):
                    assert words in text, words
