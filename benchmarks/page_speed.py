"""The page's speed on runs of any size: a server that has just started, views in a browser, and the export.

    python benchmarks/page_speed.py                                            # 3 layers of 2,400 features a side
    python benchmarks/page_speed.py --features 100000 --pairs 1000000 --layers 1 --no-export

The run is a synthetic one of tests/artefacts.py: as many rows and numbers as a real one, tokens drawn at random. The
server is a process of its own, started anew, and everything is asked through HTTP; views are opened in headless
Chromium at 1280 × 900, each timed from the click or key to the moment that it is drawn. Printed: milliseconds, the
median and the largest where something is done several times; seconds and megabytes of the export; the machine's load.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
CHROMIUM = "/usr/bin/chromium"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
STEPS = 12  # features that are opened one after another


def main() -> None:
    asked = arguments()
    sys.path.insert(0, str(TESTS))
    from artefacts import save_artefact  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory(dir=asked.work) as place:
        folder = Path(place) / "run"
        save_artefact(folder, features=asked.features, pairs=asked.pairs, heads=12, layers=range(asked.layers),
                      examples=asked.examples)  # fmt: skip
        print(f"{asked.layers} layers, {asked.features:,} features a side, {asked.pairs:,} pairs; load {load()}")
        time_server(folder)
        if asked.browser:
            time_views(folder)
        if asked.export:
            time_export(folder, Path(place) / "site")
        print(f"load at the end {load()}")


def arguments() -> Any:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--features", type=int, default=2400, help="of each side")
    words.add_argument("--pairs", type=int, default=30_000, help="of each layer")
    words.add_argument("--layers", type=int, default=3)
    words.add_argument("--examples", type=int, default=20, help="of each feature; a pair has two")
    words.add_argument("--work", type=Path, default=None, help="folder for the run, deleted at the end")
    words.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True)
    words.add_argument("--export", action=argparse.BooleanOptionalAction, default=True)
    return words.parse_args()


def load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


@contextlib.contextmanager
def started(folder: Path) -> Iterator[str]:
    """A server of its own process that answers nothing yet but is bound; its address."""
    command = [sys.executable, "-c", "from qkscope.cli import main; main()", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+/", server.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            server.terminate()


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def said(name: str, times: list[float]) -> None:
    more = f", at most {max(times):6.0f}" if len(times) > 1 else ""
    print(f"  {name:<44} {statistics.median(times):7.0f} ms{more}")


def fetch(address: str) -> None:
    with urllib.request.urlopen(address, timeout=600) as answer:
        answer.read()


def time_server(folder: Path) -> None:
    print("server, through HTTP, the first question of each kind and then eight more")
    begun = time.perf_counter()
    with started(folder) as address:
        said("command to listening", [1000 * (time.perf_counter() - begun)])
        for name, paths in {
            "run": ["run.json"] * 9,
            "page of features": [f"0/features/query.json?page={n}" for n in range(9)],
            "feature": [f"0/feature/key/{7 * n}.json" for n in range(9)],
            "page of pairs": [f"0/pairs.json?page={n}" for n in range(9)],
            "head": [f"0/head/{n}.json" for n in range(9)],
        }.items():
            times = [timed(lambda path=path: fetch(f"{address}data/{path}")) for path in paths]
            said(f"{name}, first", times[:1])
            said(name, times[1:])


def time_views(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    print("browser, of a server that has just started")
    with sync_playwright() as playwright, started(folder) as address:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        browser.new_page().goto("about:blank")  # the browser itself is there
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(600_000)

        def view(hash_: str) -> Callable[[], None]:
            def go() -> None:
                tab.goto(address + hash_)
                shown(tab)

            return go

        said("first view (overview)", [timed(view("#/"))])
        said("features", [timed(view("#/layer/0/features"))])
        said("first feature", [timed(view("#/layer/0/feature/query/0"))])
        said("feature to feature, key j", [timed(lambda n=n: next_feature(tab, n)) for n in range(1, STEPS)])
        said("feature by its address", [timed(view(f"#/layer/0/feature/key/{11 * n}")) for n in range(1, STEPS)])
        said("pairs", [timed(view("#/layer/0/pairs"))])
        said("pair", [timed(lambda: open_first(tab))])
        said("head", [timed(view("#/layer/0/head/0"))])
        browser.close()


def shown(tab: Any) -> None:
    tab.wait_for_function("() => document.body.dataset.shown === location.hash")


def next_feature(tab: Any, number: int) -> None:
    tab.keyboard.press("j")
    tab.wait_for_function("n => document.body.dataset.shown.endsWith(`/${n}`)", arg=number)


def open_first(tab: Any) -> None:
    tab.locator("a.open").first.click()
    tab.wait_for_function("() => document.body.dataset.shown.includes('/pair/')")


def time_export(folder: Path, site: Path) -> None:
    print("export")
    command = [sys.executable, "-c", "from qkscope.cli import main; main()", "export", str(folder), "--site", str(site)]
    before = processor_seconds()
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True)) / 1000
    files = [path.stat().st_size for path in site.rglob("*") if path.is_file()]
    print(f"  {seconds:.1f} s, of a processor {processor_seconds() - before:.1f} s, the start included")
    print(f"  {sum(files) / 1e6:.1f} MB in {len(files):,} files, the largest {max(files) / 1e3:.0f} kB")


def processor_seconds() -> float:
    """Of all programs that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
