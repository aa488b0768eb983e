"""`qkscope run` without a model: the embedded one on its own corpus, scored against what is known of its tokens."""

from __future__ import annotations

from pathlib import Path

from small_runs import read_json

from qkscope.data.stories import NAMES
from qkscope.decomposition import Decomposition
from qkscope.embedded import EMBEDDED_MODELS

CONTROLS = ("shuffled", "random", "svd", "residual")


def test_the_report_compares_with_what_is_known(embedded_run: Path) -> None:
    truth = read_json(embedded_run / "layer_2" / "report.json")["truth"]
    assert set(truth) == {"decomposition", *CONTROLS}
    details = read_json(embedded_run / "layer_2" / "truth.json")
    dec = Decomposition.load(embedded_run / "layer_2")
    assert [len(details["features"][s]) for s in ("query", "key")] == [dec.query.width, dec.key.width]
    assert len(details["pairs"]) == len(dec.pairs) and len(details["heads"]) == dec.shape.N
    for side in ("query", "key"):
        known = [f for f in details["features"][side] if f]
        assert len(known) == truth["decomposition"][side]["live"] > 0
        for f in known:
            words = "“" in f["label"]
            parts = [part.removeprefix("before ").removeprefix("after ") for part in f["label"].split(", ")]
            assert words or all(part in NAMES for part in parts)
            assert 0 <= f["precision"] <= 1 and 0 <= f["recall"] <= 1 and 0 <= f["f1"] <= 1


def test_the_page_says_it(embedded_run: Path) -> None:
    page = (embedded_run / "report.html").read_text(encoding="utf-8")
    assert "Against what is known" in page and "What the heads do" in page and "residual basis" in page


def test_the_run_names_the_model_and_not_its_place(embedded_run: Path) -> None:
    config = (embedded_run / "config.yaml").read_text(encoding="utf-8")
    assert "source: embedded" in config and "model: stories-" in config
    assert str(Path(next(iter(EMBEDDED_MODELS.values()))).parent) not in config
