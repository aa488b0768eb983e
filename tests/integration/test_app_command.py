"""`qkscope serve` and `qkscope export` from the command line, on a finished run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from artefacts import save_artefact
from small_runs import Said, read_json

Call = Callable[[list[str]], Said]


def test_a_run_is_exported(run: Callable[..., Path], call: Call, tmp_path: Path) -> None:
    """The tiny model's pairs, features and heads are all there."""
    folder, site = run(), tmp_path / "site"
    said = call(["export", str(folder), "--site", str(site)])
    assert said.status == 0 and "http.server" in said.out
    about = read_json(site / "data" / "run.json")
    assert [layer["layer"] for layer in about["layers"]] == [0, 1] and about["static"]
    for layer in about["layers"]:
        stored = read_json(folder / f"layer_{layer['layer']}" / "report.json")
        assert layer["pairs"] == stored["pairs"]["kept"] and layer["width"] == stored["width"]
        assert (site / "data" / str(layer["layer"]) / "head" / "3.json.gz").is_file()
    call(["export", str(folder), "--site", str(folder)]).complaint("--site", "holds other files")
    call(["export", str(tmp_path / "no"), "--site", str(site)]).complaint("not a qkscope run")
    call(["export", str(folder), "--stie", str(site)]).complaint("did you mean '--site'?")


def test_serving_refuses_in_one_line(call: Call, tmp_path: Path) -> None:
    folder = save_artefact(tmp_path / "run")
    call(["serve", str(tmp_path / "no")]).complaint("not a qkscope run")
    call(["serve", str(folder), "--port", "99999"]).complaint("--port 99999", "65535")
    call(["serve", str(folder), "--host", "no.such.host.invalid"]).complaint("--host no.such.host.invalid")


@pytest.mark.skipif(os.name != "posix", reason="ends the server by a signal")
def test_a_run_is_served_until_interrupted(tmp_path: Path) -> None:
    folder = save_artefact(tmp_path / "run")
    command = [sys.executable, "-c", "from qkscope.cli import main; main()", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            assert found is not None
            with urllib.request.urlopen(found[0] + "data/run.json", timeout=30) as answer:
                assert b'"live"' in answer.read()
        finally:
            server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=30)
    assert "Traceback" not in err and server.returncode in (0, 130), err
