"""The report page, made from small fake runs: what stands in it, and that nothing in it can harm or reach out."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from qkscope.errors import UserError
from qkscope.evaluate import charts
from qkscope.evaluate.page import write_page
from qkscope.evaluate.stored import PAIR, Layer

WIDTH, HEADS, KEPT = 120, 6, 400
EDGES = [-6 + 0.25 * i for i in range(25)]
PROSE = (
    ' When Mary and John went to the store, John gave a drink to Mary. "It\'s cold," said Mr Green on 14 March;'
    " the café in Zürich was closed.\nBut they followed the sign-up page, and it offered them a free month."
)
HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onmouseover='x' & <b>", "]]>", "<!--",
    "\u202eevil\u202c", "\u0000\u0007", " שלום", " مرحبا", "👩\u200d💻", "\u0301", "\t", "\r\n", "\u00a0", "\u2028", "",
]  # fmt: skip
VOID = {"meta", "img", "wbr", "br"}


def figure(mean: float, spread: float = 0.03) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean * (1 - spread), mean * (1 + spread)]}


def pattern_metric(values: dict[str, float], top: float = math.inf) -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        heads = [figure(min(value * 2 ** math.sin(3 * h + 1), top)) for h in range(HEADS)]
        out[name] = {**figure(value), "per_head": heads, "without_position_0": figure(min(1.3 * value, top))}
    return out


def fake_report(layer: int, *, head: bool = True, controls: bool = True) -> dict[str, Any]:
    kl = {"transcoders": 0.161, "map_pruned": 0.203, "step1": 0.17, "uniform": 1.94, "mean": 0.912, "map_all": 0.161}
    density = [0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 5, 9, 14, 19, 22, 17, 11, 8, 4, 2, 1, 0, 0, 0]
    report: dict[str, Any] = {
        "layer": layer,
        "model": "openai-community/gpt2",
        "recipe": "default",
        "pairs_method": "tune",
        "tokens": {"evaluated": 65536, "sequences": 256, "trained": 2_000_000, "reuse": 2},
        "seconds": {"step1": 412.3, "tune": 230.0, "evaluate": 61.5},
        "l0": {"query": figure(8.13, 0.01), "key": figure(7.9, 0.01)},
        "dead": {"query": {"mean": 0.033, "ci95": [0.0, 0.071]}, "key": figure(0.12, 0.2)},
        "dense": {"query": figure(0.05, 0.2), "key": figure(0.07, 0.2)},
        "live": {"query": 116, "key": 106},
        "width": {"query": WIDTH, "key": WIDTH},
        "width_trained": {"query": 2400, "key": 600},
        "log10_density": {"edges": EDGES, "query": density, "key": [*density[3:], 0, 0, 0]},
        "pairs": {
            "kept": KEPT, "total": 87846, "total_live": 75114, "share_of_total": 0.00455, "share_of_live": 0.0053,
            "active_per_score": figure(2.4), "with_query_bias": {"kept": 31, "importance": 0.11},
            "with_key_bias": {"kept": 0, "importance": 0.0}, "per_head": [67] * 5 + [65],
            "curve": [{"kept": KEPT >> i, "pattern_kl": figure(0.203 * 1.45**i)} for i in range(5)],
        },
        "map_all_check": {"largest_log_pattern_difference": 2.1e-6, "positions": 24},
        "pattern_kl": pattern_metric(kl),
        "top1": pattern_metric({name: min(0.95, 0.9 - v / 3) for name, v in kl.items()}, 0.99),
        "absolute_error": pattern_metric({name: v / 100 for name, v in kl.items()}),
        "controls": {},
    }  # fmt: skip
    if controls:
        for name, value in (("random", 1.42), ("svd", 0.66), ("shuffled", 2.6)):
            report["controls"][name] = {"pattern_kl": pattern_metric({name: value})[name], "top1": figure(0.4)}
    if head:
        lost = {"transcoders": 0.0041, "map_pruned": 0.0068, "step1": 0.004}
        lost |= {"zero": 0.31, "uniform": 0.12, "mean": 0.05}
        report["ce"] = {"model": figure(3.31), **{name: figure(3.31 + v) for name, v in lost.items()}}
        report["ce_increase"] = {name: figure(v, 0.2) for name, v in lost.items()}
        report["logit_kl"] = {name: figure(1.2 * v, 0.1) for name, v in lost.items()}
        both = {"ce": figure(0.978, 0.003), "logit_kl": figure(0.981, 0.002)}
        each = dict.fromkeys(("zero", "uniform", "mean"), both)
        report["recovered"] = {name: each for name in ("transcoders", "map_pruned")}
    return report


def fake_features(folder: Path, tokens: list[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    features, examples = [], []
    for side in ("query", "key"):
        density = (10 ** (torch.rand(WIDTH, generator=generator) * 3 - 3.5)).tolist()
        for f in range(WIDTH):
            live = f % 11 != 10
            features.append({"side": side, "feature": f, "density": density[f] * live, "mean_activation": 0.8 * live,
                             "max_activation": 3.1 * live, "live": live, "top_heads": [f % HEADS, 0], "pairs": f % 9,
                             "importance": 0.002 / (f + 1)})  # fmt: skip
            for rank in range(3 * live):
                center = (7 * f + 11 * rank) % len(tokens)
                acts = [3.1 - rank / 3 if t == center else 1.2 * (abs(t - center) == 2) for t in range(len(tokens))]
                low = max(center - 16, 0)
                examples.append({"side": side, "feature": f, "rank": rank, "activation": acts[center],
                                 "document": 9 * f, "position": center, "center": center - low,
                                 "tokens": tokens[low : center + 17],
                                 "activations": acts[low : center + 17]})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(features), folder / "features.parquet")
    pq.write_table(pa.Table.from_pylist(examples), folder / "examples.parquet")


def fake_pairs(folder: Path) -> None:
    rows = []
    for rank in range(KEPT):
        query, key = (rank * 7) % WIDTH, (rank * 13) % WIDTH
        key -= key % 6 == 5  # so 100 of 120 key features are in a pair
        rows.append({"query_feature": -1 if rank == 3 else query, "key_feature": -1 if rank == 5 else key,
                     "head": (rank * 5) % HEADS, "strength": (-1) ** rank * (2.0 - rank / KEPT), "weight_strength": 1.0,
                     "importance": 0.012 / (rank + 1), "rank": rank})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")


def fake_metrics(folder: Path) -> None:
    lines = []
    phases = {"step1": (1.9, 0.16, None), "tune-1": (0.30, 0.172, 3200), "tune-2": (0.26, 0.181, 1600),
              "tune-3": (0.27, 0.192, 800), "tune-4": (0.29, 0.199, 400)}  # fmt: skip
    for phase, (start, end, pairs) in phases.items():
        count = 1000 if pairs is None else 60
        for step in range(1, count + 1):
            noise = 1 + 0.02 * math.sin(step * 12.9898)
            kl = end + (start - end) * math.exp(-6 * step / count) * noise
            line = {"phase": phase, "step": 20 * step, "tokens": 2000 * step, "loss": kl, "pattern_kl": kl}
            lines.append(json.dumps(line if pairs is None else {**line, "pairs": float(pairs)}))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"phase": "tune-4", "st']), encoding="utf-8")


def fake_patterns(folder: Path, tokens: list[str]) -> None:
    length = min(len(tokens), 48)
    heads = []
    for head in range(HEADS):
        torch.manual_seed(head)
        scores = 1.7 * torch.randn(length, length) - 0.15 * (torch.arange(length)[:, None] - torch.arange(length))
        scores[:, 0] += 2
        causal = torch.ones(length, length).triu(1).bool()
        made = {}
        for name, noise in (("true", 0.0), ("transcoders", 0.4), ("pruned", 0.8)):
            noisy = scores + noise * torch.randn(length, length)
            made[name] = noisy.masked_fill(causal, -torch.inf).softmax(-1).tolist()
        heads.append({"head": head, **made})
    (folder / "patterns.json").write_text(json.dumps({"tokens": tokens[:length], "heads": heads}), encoding="utf-8")


def fake_run(folder: Path, layers: tuple[int, ...] = (10,), tokens: list[str] | None = None, **report: bool) -> Path:
    tokens = ["<|endoftext|>", *re.findall(r"\s?\w+|\s?[^\w\s]|\s", PROSE)] if tokens is None else tokens
    for layer in layers:
        place = folder / f"layer_{layer}"
        place.mkdir(parents=True)
        (place / "report.json").write_text(json.dumps(fake_report(layer, **report)), encoding="utf-8")
        fake_features(place, tokens)
        fake_pairs(place)
        fake_metrics(place)
        fake_patterns(place, tokens)
    run = {"model": "openai-community/gpt2", "layers": list(layers), "dictionary": {"width": WIDTH, "k": 8.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": run, "versions": {"torch": "2.6"}}), encoding="utf-8")
    return folder


class Checker(HTMLParser):
    """Every element closed in order; attributes and text kept."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def checked(folder: Path) -> tuple[str, Checker]:
    """The page, after the checks that every page must pass."""
    path = write_page(folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    checker = Checker(page)
    for tag, attrs in checker.found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")  # type: ignore[union-attr]
        assert (attrs.get("href") or "#").startswith(("#", "./"))
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp", page)
    assert "NaN" not in page and "None" not in checker.text and "nan" not in checker.text.split()
    return page, checker


def test_every_part_of_a_full_run(tmp_path: Path) -> None:
    page, checker = checked(fake_run(tmp_path / "run", (2, 10)))
    for words in (
        "QK decomposition of gpt2", "Summary", "Layer 2", "Layer 10", "Pattern KL, pruned map", "0.203 [0.197, 0.209]",
        "CE increase, pruned map", "0.0068 [0.0054, 0.0082]", "116 of 120 features live", "Pairs kept 400",
        "the kept pairs use 120 of the 2,400 trained", "the kept pairs use 100 of the 600 trained",
        "Cross-entropy increase", "KL of the model's output", "shuffled pairs", "SVD of QK", "before tuning",
        "Firing frequency, query features", "4 of 120 never fired", "training set, end of each phase", "tune-4",
        "Each head", "Strongest pairs", "Densest features", "bias always active", "Patterns on a held-out text",
        "Other heads", "trained on 2,000,000 tokens, 2 steps a batch",
        "step1 412 s", "31 pairs with the query bias hold 11 % of importance",
        f"to within 2.1{charts.TIMES}10⁻⁶",
    ):  # fmt: skip
        assert words in checker.text, words
    pairs = page[page.index("Strongest pairs") :].split("</table>")[0]
    assert pairs.count("<tr>") == 31
    assert "<i>·</i>Mary" in page and "<i>⏎</i>" in page
    assert 'title="3.1"' in page
    assert page.count("data:image/png") == 2 * 4 * 6
    assert page.index("Head 0</figcaption>") < page.index("Other heads")  # the head of the largest importance first
    assert len(page) < 2_000_000


def test_pairs_along_links_stand_first_where_they_are_known(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", (2,))
    assert "along links" not in checked(folder)[1].text
    rows = pq.read_table(folder / "layer_2" / "pairs.parquet").to_pylist()
    parts = {40: 0.0002, 10: 0.0005, 3: 0.01, 20: -0.02}  # nats; the third is a bias's
    known = [{**{key: rows[at][key] for key in PAIR}, "linked": part} for at, part in parts.items()]
    (folder / "layer_2" / "truth.json").write_text(json.dumps({"pairs": known}), encoding="utf-8")
    layer = Layer(folder / "layer_2", 2)
    shown = layer.shown_pairs["Strongest pairs along links"]
    assert shown[0]["place"] == 11 and 41 in [pair["place"] for pair in shown]
    assert all(pair["query_feature"] >= 0 <= pair["key_feature"] for pair in shown)
    worth = [layer.linked(pair) for pair in shown]
    assert worth == sorted(worth, reverse=True) and min(worth) > 0
    page, _ = checked(folder)
    linked = page[page.index("Strongest pairs along links") :].split("</table>")[0]
    assert linked.count("<tr>") == 1 + len(shown) and "0.5</td>" in linked and "0.2</td>" in linked
    assert page.index("Strongest pairs along links") < page.index("Strongest pairs</h3>")


def test_tokens_cannot_harm(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "<run>", tokens=HOSTILE)
    report = json.loads((run / "layer_10" / "report.json").read_text())
    report["recipe"] = "<script>alert(2)</script>"
    (run / "layer_10" / "report.json").write_text(json.dumps(report))
    page, checker = checked(run)
    assert [tag for tag, _ in checker.found].count("script") == 2
    assert "<img src=x" not in page and "<b>&" not in page
    assert "\u202e" not in page and "\0" not in page and "\u2028" not in page
    assert "⟨202E⟩evil" in checker.text and "⟨0000⟩⟨0007⟩" in checker.text and "◌\u0301" in page
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert data["tokens"][0] == HOSTILE[0]


def test_a_model_without_a_head_and_without_controls(tmp_path: Path) -> None:
    _, checker = checked(fake_run(tmp_path, head=False, controls=False))
    assert "No controls were measured." in checker.text
    assert not re.search("cross-entropy|CE increase|patched logits|recovered|shuffled pairs", checker.text, re.I)


def test_null_figures(tmp_path: Path) -> None:
    """One sequence gives no intervals, and no tokens no means; an increase can be negative."""
    folder = fake_run(tmp_path) / "layer_10"

    def blank(value: Any) -> Any:
        if isinstance(value, dict) and "mean" in value and "ci95" in value:
            return {**value, "ci95": None, **({"per_head": []} if "per_head" in value else {})}
        return {k: blank(v) for k, v in value.items()} if isinstance(value, dict) else value

    report = blank(fake_report(10))
    report["ce_increase"]["map_pruned"] = {"mean": -0.0004, "ci95": [-0.002, 0.001]}
    report["logit_kl"]["mean"] = report["pattern_kl"]["mean"] = {"mean": None, "ci95": None}
    report["recovered"]["transcoders"]["zero"]["ce"] = None
    report["pairs"]["curve"] = []
    (folder / "report.json").write_text(json.dumps(report))
    _, checker = checked(tmp_path)
    assert "not measured" in checker.text and f"{charts.MINUS}0.0004" in checker.text


def test_folders_that_hold_little(tmp_path: Path) -> None:
    assert "no layer in this folder yet" in checked(tmp_path)[1].text
    folder = fake_run(tmp_path) / "layer_10"
    for name in ("examples.parquet", "features.parquet", "patterns.json", "metrics.jsonl"):
        (folder / name).unlink()
    text = checked(tmp_path)[1].text
    assert "Strongest pairs" in text and "Densest" not in text and "Patterns on" not in text
    (folder / "report.json").unlink()
    assert "Not measured yet" in checked(tmp_path)[1].text


@pytest.mark.parametrize("name", ["report.json", "pairs.parquet", "examples.parquet", "patterns.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = fake_run(tmp_path) / "layer_10" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        write_page(tmp_path)


def test_a_sweep_has_a_row_for_each_run(tmp_path: Path) -> None:
    for name in ("seed k=8", "default&k=8"):
        fake_run(tmp_path / name)
    write_page(tmp_path / "seed k=8")
    page, checker = checked(tmp_path)
    assert '<a href="./seed%20k%3D8/report.html">seed k=8</a>' in page and "default&amp;k=8" in page
    assert "Strongest pairs" not in page and checker.text.count("0.203 [0.197, 0.209]") == 2


def test_numbers() -> None:
    values = (0, 0.0312, 12345.6, 1.24e-5, -0.5, None, math.nan, 100, 30, 1_500_000)
    small, half, none = f"1.2{charts.TIMES}10⁻⁵", f"{charts.MINUS}0.5", charts.DASH
    wanted = ["0", "0.0312", "12,346", small, half, none, none, "100", "30", "1,500,000"]
    assert [charts.number(v) for v in values] == wanted
    assert charts.interval({"mean": 0.2031, "ci95": [0.199, 0.2072]}) == ("0.203", "[0.199, 0.207]", "±0.004")
    assert charts.interval({"mean": 12.0, "ci95": [12.0, 12.0]}) == ("12", "[12, 12]", "")
    assert charts.interval({"mean": 0.5, "ci95": None}, 100) == ("50", "", "")


@pytest.mark.parametrize("low", [1e-5, 0.003, 0.7, 40.0, 9e5])
@pytest.mark.parametrize("ratio", [1.01, 1.5, 7.0, 300.0, 1e7])
def test_axes_have_some_ticks_and_not_many(low: float, ratio: float) -> None:
    for log in (True, False):
        ticks = charts.Scale(low, low * ratio, 0, 100, log).ticks(5)
        assert 2 <= len(ticks) <= 7
        assert all(low * (1 - 1e-6) <= t <= low * ratio * (1 + 1e-6) for t in ticks)


def test_heat_map_is_a_png_of_one_pixel_a_cell() -> None:
    data = base64.b64decode(charts.heat_png([[0, 1, 0.25], [1, 0, 0]]).split(",")[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (3, 2)
    at = data.index(b"IDAT")
    rows = zlib.decompress(data[at + 4 : at + 4 + struct.unpack(">I", data[at - 4 : at])[0]])
    assert list(rows) == [0, 0, 255, 128, 0, 255, 0, 0]
    signed = base64.b64decode(charts.heat_png([[-1.0, 1.0]], signed=True).split(",")[1])
    at = signed.index(b"IDAT")
    assert list(zlib.decompress(signed[at + 4 : at + 4 + struct.unpack(">I", signed[at - 4 : at])[0]])) == [0, 0, 255]
