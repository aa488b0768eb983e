"""One browser a session, pages that fail a test when anything is said on their console, and a run to open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
from pages import hosting, serving, shown

from qkscope.app.export import export

CHROMIUM = Path("/usr/bin/chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
         "--disable-component-update", "--no-first-run", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: the page's tests drive Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=20_000)  # a model is opened meanwhile, on a machine that may be busy
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield found
        found.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A browser's page of its own; the test fails where its console has an error or a warning, or asks elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith("http://127.0.0.1:") else wrong.append(r.url))
    page.wrong = wrong
    yield page
    page.close()
    assert not wrong


MANY = {"pairs.method": "importance", "pairs.count": 1500}  # tune would leave few features of so little training


@pytest.fixture(scope="session")
def run_folder(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run of layer 2 of an embedded model."""
    return small_runs.save_embedded_run(tmp_path_factory.mktemp("page") / "run", "stories-gpt2", MANY)


@pytest.fixture(scope="session")
def rotary_folder(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the one with a rotary embedding."""
    return small_runs.save_embedded_run(tmp_path_factory.mktemp("rotary") / "run", "stories-llama", MANY)


@pytest.fixture(scope="session")
def served(run_folder: Path) -> Iterator[str]:
    with serving(run_folder) as address:
        yield address


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The run's export below a path of a web host."""
    host = tmp_path_factory.mktemp("host")
    export(run_folder, host / "some" / "where")
    with hosting(host) as address:
        yield f"{address}some/where/"


@pytest.fixture
def open_view(tab: Any) -> Callable[..., Any]:
    """Go to an address and wait until its view is there."""

    def go(address: str, hash_: str = "#/") -> Any:
        tab.goto(address + hash_)
        shown(tab, hash_)
        return tab

    return go
