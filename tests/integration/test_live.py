"""The live view's endpoints against traces and interventions made directly, and what they refuse."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from layers import close
from starlette.applications import Starlette
from starlette.testclient import TestClient
from torch import Tensor

from qkscope.app import live
from qkscope.app.prompts import STEPS
from qkscope.explain.intervene import Feature, Pair
from qkscope.explain.names import FeatureNames
from qkscope.explain.opening import one_layer, open_layers
from qkscope.explain.trace import Trace, prompt_tokens

PROMPT = "Long ago there was a market in Ashford. When Mary and John went to the harbour, John gave the lamp to"
HEAD = 2


def client_of(folder: Path) -> TestClient:
    return TestClient(Starlette(routes=live.routes(folder)))


@pytest.fixture
def client(embedded_run: Path) -> TestClient:
    return client_of(embedded_run)


def ask(client: TestClient, what: str, **body: Any) -> Any:
    answer = client.post(f"/api/prompt/{what}", json={"prompt": PROMPT, "layer": 2, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def unpacked(packed: dict[str, Any], length: int, causal: bool) -> Tensor:
    """A pattern [Q, K] (and the sink's column), cell by cell."""
    cells = iter(np.frombuffer(base64.b64decode(packed["cells"]), "<u2").tolist())
    rows = [[next(cells) if j <= i or not causal else 0 for j in range(length)] for i in range(length)]
    assert next(cells, None) is None
    if packed["sink"] is not None:
        sink = np.frombuffer(base64.b64decode(packed["sink"]), "<u2").tolist()
        rows = [[*row, last] for row, last in zip(rows, sink, strict=True)]
    return torch.tensor(rows) / STEPS


def within_a_step(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 0.5 / STEPS + 1e-5


def test_a_trace_is_what_python_says(client: TestClient, embedded_run: Path) -> None:
    dec, site = one_layer(embedded_run)
    one = dec.trace(site, PROMPT, head=HEAD)
    found = ask(client, "trace", head=HEAD)
    length = len(one.tokens)
    assert found["tokens"] == one.tokens and found["special"] == [0] and found["causal"]
    for kind, pattern in one.pattern.items():
        within_a_step(unpacked(found["pattern"][kind], length, True), pattern)
    for head, summary in enumerate(found["heads"]):
        pattern = {kind: p.double() for kind, p in one.of_head(head).pattern.items()}
        terms = [
            float(p) * (math.log(float(p)) - math.log(float(pattern["pruned"][i, j])))
            for (i, j), p in np.ndenumerate(pattern["true"].numpy())
            if p > 0
        ]
        assert summary["kl"] == pytest.approx(sum(terms) / length, abs=1e-4)
        assert summary["size"] == length  # short prompts are shown cell by cell
        cells = np.frombuffer(base64.b64decode(summary["thumbnail"]), "u1").reshape(length, length)
        assert np.abs(cells / 255 - pattern["true"].numpy()).max() <= 0.5 / 255 + 1e-6
    tokens = prompt_tokens(dec, site, PROMPT)
    probability = site.model(input_ids=tokens).logits[0, -1].float().softmax(-1)
    close(torch.tensor([row["probability"] for row in found["next"]["tokens"]]), probability.topk(10).values)
    best = site.tokenizer.decode(int(probability.argmax()))
    assert found["next"]["tokens"][0]["token"].strip() == best.strip() and found["next"]["position"] == length - 1


def test_a_thumbnail_shows_the_strongest_of_what_it_merges(client: TestClient, embedded_run: Path) -> None:
    found = ask(client, "trace", prompt=" ".join([PROMPT] * 5), head=HEAD)
    length = len(found["tokens"])
    pattern = unpacked(found["pattern"]["true"], length, True).numpy()
    size = found["heads"][HEAD]["size"]
    assert size == 48 < length
    cells = np.frombuffer(base64.b64decode(found["heads"][HEAD]["thumbnail"]), "u1").reshape(size, size)
    for i, j in np.ndindex(size, size):
        rows, columns = (slice(n * length // size, -(-(n + 1) * length // size)) for n in (i, j))
        assert abs(cells[i, j] / 255 - pattern[rows, columns].max()) <= 1 / 255


@pytest.mark.parametrize("edge", [{"query": -1, "key": 11}, {"query": 14}, {"query": 9, "key": 0, "against": [3, 4]}])
def test_an_edge_is_what_python_says(client: TestClient, embedded_run: Path, edge: dict[str, Any]) -> None:
    dec, site = one_layer(embedded_run)
    one = dec.trace(site, PROMPT, head=HEAD)
    why = one.why(edge["query"], edge.get("key"), edge.get("against"))
    score = one.terms(why.query, why.key)
    found = ask(client, "edge", head=HEAD, **edge)
    assert (found["query"], found["key"]) == (why.query, why.key)
    assert found["pattern"]["true"] == pytest.approx(float(one.pattern["true"][why.query, why.key]), abs=1e-6)
    assert [c["key"] for c in found["why"]["against"]] == why.against
    assert [c["weight"] for c in found["why"]["against"]] == pytest.approx(why.weights, abs=1e-6)
    names = FeatureNames(dec.folder or Path())
    rows = pq.read_table(embedded_run / "layer_2" / "pairs.parquet").to_pylist()
    stored = {(r["query_feature"], r["key_feature"]): r for r in rows if r["head"] == HEAD}
    here = {(a, b): value for a, b, value in score.top(len(score))}
    for account, given in ((score, found["score"]), (why.account, found["why"])):
        assert given["total"] == pytest.approx(account.total, abs=1e-5)
        assert given["rest"] == pytest.approx(dict(account.rest), abs=1e-5)
        assert (given["count"], given["fewest"]) == (len(account), account.fewest())
        top = account.top(40)
        assert [(t["query"], t["key"]) for t in given["terms"]] == [(a, b) for a, b, _ in top]
        assert [t["value"] for t in given["terms"]] == pytest.approx([v for *_, v in top], abs=1e-5)
        left = given["smaller"]["value"] + sum(t["value"] for t in given["terms"])
        assert left == pytest.approx(account.pairs, abs=1e-4) and given["smaller"]["count"] == max(len(account) - 40, 0)
        for term in given["terms"]:
            row = stored[term["query"], term["key"]]
            for name in ("strength", "importance", "rank"):
                assert term[name] == pytest.approx(row[name], rel=1e-6)
            assert term["query_name"] == names.of("query", term["query"])
            assert term["key_name"] == names.of("key", term["key"])
    for term in found["why"]["terms"]:
        assert term["here"] == pytest.approx(here.get((term["query"], term["key"]), 0.0), abs=1e-5)
    acts = [t.encode(dec.x_of(one.inputs))[0] for t in (dec.query, dec.key)]
    for term in found["score"]["terms"]:
        for side, place, act in (("query", why.query, acts[0]), ("key", why.key, acts[1])):
            wanted = 1.0 if term[side] < 0 else float(act[place, term[side]])
            assert term[f"{side}_activation"] == pytest.approx(wanted, rel=1e-5)
    assert ask(client, "edge", head=HEAD, query=0)["why"] is None  # it sees itself alone


def strongest(dec: Any, count: int) -> list[tuple[int, int]]:
    """The most important pairs of `HEAD`, as the artefact names them."""
    here = dec.pairs.of_head(HEAD)
    index = dec.importance_P[here].topk(count).indices + here.start
    query, key = (t[index].tolist() for t in (dec.pairs.query_P, dec.pairs.key_P))
    widths = dec.query.width, dec.key.width
    return [
        tuple(f if f < n else -1 for f, n in zip(pair, widths, strict=True)) for pair in zip(query, key, strict=True)
    ]  # type: ignore[misc]


@pytest.mark.parametrize("scales", [(0.0, 0.0, 0.0, 0.0), (2.5, 0.0, -1.0, 0.5)])
def test_an_edit_is_what_python_says(client: TestClient, embedded_run: Path, scales: tuple[float, ...]) -> None:
    dec, site = one_layer(embedded_run)
    tokens = prompt_tokens(dec, site, PROMPT)
    pairs = [Pair(*pair, head=HEAD) for pair in strongest(dec, 3)]
    with torch.no_grad():
        plain = site.model(input_ids=tokens).logits[0, 14].softmax(-1)
        factors = dict(zip([*pairs, Feature("key", 1)], scales, strict=True))
        with site.intervene(dec, scale=factors) as watched:
            edited = site.model(input_ids=tokens).logits[0, 14].softmax(-1)
    parts: list[dict[str, Any]] = [{"query": p.query, "key": p.key, "head": HEAD} for p in pairs]
    parts.append({"side": "key", "feature": 1})
    edits = [{**part, "scale": scale} if scale else part for part, scale in zip(parts, scales, strict=True)]
    found = ask(client, "edit", head=HEAD, position=14, edits=edits)
    assert watched.pattern_BNQK is not None and watched.before_BNQK is not None
    pattern = unpacked(found["pattern"], tokens.shape[1], True)
    within_a_step(pattern, watched.pattern_BNQK[0, HEAD])
    assert float((pattern - watched.before_BNQK[0, HEAD]).abs().max()) > 0.01
    rows = found["next"]["tokens"]
    ids = [site.tokenizer.convert_tokens_to_ids(row["token"].replace(" ", "Ġ")) for row in rows]
    close(torch.tensor([row["probability"] for row in rows]), plain[ids])
    close(torch.tensor([row["edited"] for row in rows]), edited[ids])
    assert set(plain.topk(10).indices.tolist()) | set(edited.topk(10).indices.tolist()) == set(ids)
    nothing = ask(client, "edit", head=HEAD, position=14)
    assert nothing["pattern"] is None and "edited" not in nothing["next"]["tokens"][0]
    assert [r["probability"] for r in nothing["next"]["tokens"]] == pytest.approx(
        plain.topk(10).values.tolist(), abs=1e-5
    )


def test_edits_of_several_layers_are_open_at_once(run: Callable[..., Path]) -> None:
    folder = run()
    prompt = "w3 w7 w9 w3 w7 w1 w4"
    opened = open_layers(folder)
    tokens = prompt_tokens(*opened[0], prompt)
    parts = [Feature("query", int(dec.pairs.query_P[dec.pairs.query_P < dec.query.width][0])) for dec, _ in opened]
    with ExitStack() as stack, torch.no_grad():
        watched = [
            stack.enter_context(site.intervene(dec, [part])) for (dec, site), part in zip(opened, parts, strict=True)
        ]
        logits = opened[0][1].model(input_ids=tokens).logits
    edits = [{"layer": n, "side": "query", "feature": part.feature} for n, part in enumerate(parts)]
    with_both = ask(client_of(folder), "edit", prompt=prompt, layer=1, head=2, edits=edits)
    within_a_step(unpacked(with_both["pattern"], tokens.shape[1], True), watched[1].pattern_BNQK[0, 2])  # type: ignore[index]
    edited = max(row["edited"] for row in with_both["next"]["tokens"])
    assert edited == pytest.approx(float(logits[0, -1].softmax(-1).max()), abs=1e-5)
    # An edit below moves what a layer above does that is not edited itself.
    below = ask(client_of(folder), "edit", prompt=prompt, layer=1, head=2, edits=edits[:1])
    plain = ask(client_of(folder), "trace", prompt=prompt, layer=1, head=2)["pattern"]["true"]
    assert below["pattern"] not in (with_both["pattern"], plain)


@pytest.mark.parametrize(("model", "causal", "predicts"), [("bert", False, False), ("gpt_oss", True, True)])
def test_encoders_and_sinks(run: Callable[..., Path], model: str, causal: bool, predicts: bool) -> None:
    folder = run(model=model)
    prompt = "w3 w7 w9 w3 w7 w1"
    dec, site = one_layer(folder, 1)
    client = client_of(folder)
    found = ask(client, "trace", prompt=prompt, layer=1, head=1)
    one: Trace = dec.trace(site, prompt, head=1)
    assert found["causal"] is causal and (found["next"] is not None) is predicts
    for kind, pattern in one.pattern.items():
        within_a_step(unpacked(found["pattern"][kind], len(one.tokens), causal), pattern)
    assert ask(client, "edge", prompt=prompt, layer=1, head=1, query=0)["why"] is not None
    pair = {"query": -1, "key": -1, "head": 1}
    kept = ((dec.pairs.query_P == dec.query.width) & (dec.pairs.key_P == dec.key.width) & (dec.pairs.head_P == 1)).any()
    if not kept:
        pair = {"side": "key", "feature": 0}
    edited = ask(client, "edit", prompt=prompt, layer=1, head=1, edits=[pair])
    assert (edited["next"] is not None) is predicts
    assert unpacked(edited["pattern"], len(one.tokens), causal).shape == one.pattern["true"].shape


def test_ready_prompts_are_those_that_the_tokenizer_takes(client: TestClient, embedded_run: Path) -> None:
    found = client.get("/api/prompt/examples").json()
    names = [one["name"] for one in found["prompts"]]
    assert "ioi" in names and "induction" in names and "years" not in names  # its numbers are several tokens
    (layer,) = found["layers"]
    rows = pq.read_table(embedded_run / "layer_2" / "pairs.parquet").to_pylist()
    sums = [sum(r["importance"] for r in rows if r["head"] == head) for head in range(8)]
    assert layer == {"layer": 2, "importance": pytest.approx(sums, rel=1e-4)}
    assert found["most_tokens"] == 256
    assert ask(client, "trace", prompt=found["prompts"][0]["prompt"])["tokens"]


HOSTILE = "Mary <script>alert(1)</script> \"'& \x00\x1b[31m\u202eolleh\u202c 🦊\r\n\u2028 <|endoftext|>"


def test_hostile_text_is_traced_as_text(client: TestClient) -> None:
    found = ask(client, "trace", prompt=HOSTILE)
    assert len(found["tokens"]) > 5
    assert ask(client, "edge", prompt=HOSTILE, head=0)["score"]["terms"] is not None


@pytest.mark.parametrize(
    ("what", "body", "said"),
    [
        ("trace", {"prompt": ""}, "holds no text to trace"),
        ("trace", {"prompt": "the " * 300}, "at most 256"),
        ("trace", {"prompt": "a\ud800b"}, "half a character at 1"),
        ("trace", {"layer": 9}, "layer 9: the run has layers 2"),
        ("trace", {"head": 8}, "head 8: the layer has heads 0 to 7"),
        ("trace", {"prompt": 3}, "prompt: "),
        ("trace", {"prompts": "x"}, "prompts: extra inputs"),
        ("edge", {}, "head: field required"),
        ("edge", {"head": 1, "query": 99}, "query 99: the prompt has positions 0 to"),
        ("edge", {"head": 1, "query": 2, "key": 5}, "query 2 does not see key 5"),
        ("edge", {"head": 1, "query": 4, "key": 3, "against": [3]}, "no other key"),
        ("edit", {"head": 1, "position": 200}, "position 200"),
        ("edit", {"head": 1, "edits": [{"query": 9999, "key": 0, "head": 1}]}, "the query side has features"),
        ("edit", {"head": 1, "edits": [{"side": "key", "feature": 1}] * 2}, "named twice"),
        ("edit", {"head": 1, "edits": [{"side": "key", "feature": 1, "layer": 7}]}, "layer 7: the run has"),
        ("edit", {"head": 1, "edits": [{"query": 1, "key": 1, "scale": 1e9}]}, "scale: "),
    ],
)
def test_slips_are_said_in_one_line(client: TestClient, what: str, body: dict[str, Any], said: str) -> None:
    content = json.dumps({"prompt": PROMPT, "layer": 2, **body})
    answer = client.post(f"/api/prompt/{what}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"prompt": "%s"}' % (b"x" * 65_536), "application/json", 413),
        (b'{"prompt": "a b", "layer": 2}', "text/plain", 415),
    ],
)
def test_requests_that_no_page_of_ours_sends(client: TestClient, content: bytes, kind: str, status: int) -> None:
    answer = client.post("/api/prompt/trace", content=content, headers={"content-type": kind})
    assert answer.status_code == status and list(answer.json()) == ["error"]


def test_no_path_is_told(embedded_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = client_of(tmp_path / "nowhere").get("/api/prompt/examples")
    assert missing.status_code == 400 and "nowhere" in missing.text and str(tmp_path) not in missing.text

    def broken(self: Any, asked: Any) -> Any:
        raise RuntimeError(f"{embedded_run} is on fire")

    monkeypatch.setattr(live.Prompts, "trace", broken)
    answer = client_of(embedded_run).post("/api/prompt/trace", json={"prompt": PROMPT, "layer": 2})
    assert answer.status_code == 500
    assert str(embedded_run) not in answer.text and "fire" not in answer.text and "Traceback" not in answer.text


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Traces that wait until this is set."""
    go = threading.Event()
    monkeypatch.setattr(live.Prompts, "trace", lambda self, asked: go.wait(10) and {"done": True})
    yield go
    go.set()


def test_a_request_that_takes_too_long_is_given_up(
    embedded_run: Path, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(embedded_run)
    ask(client, "edge", head=1)  # the model is open
    monkeypatch.setattr(live, "SECONDS", 0.1)
    began = time.monotonic()
    assert client.post("/api/prompt/trace", json={"prompt": PROMPT, "layer": 2}).status_code == 503
    # It still runs, and what waits behind it is given up too rather than run beside it.
    assert client.post("/api/prompt/edge", json={"prompt": PROMPT, "layer": 2, "head": 1}).status_code == 503
    assert time.monotonic() - began < 5
    slow.set()
    monkeypatch.setattr(live, "SECONDS", 60)
    assert ask(client, "trace") == {"done": True}


def test_requests_at_once_do_not_mix(client: TestClient, embedded_run: Path) -> None:
    """An edit and a trace that are asked for at the same time answer what they do one by one."""
    dec, _ = one_layer(embedded_run)
    parts = [{"query": a, "key": b, "head": HEAD} for a, b in strongest(dec, 3)]
    prompts = [f"{PROMPT} {name}" for name in ("Tom", "Ann", "Luke", "Emma")]
    asked = [("edit", {"prompt": p, "head": HEAD, "edits": parts}) for p in prompts]
    asked += [("trace", {"prompt": p, "head": HEAD}) for p in prompts]
    one_by_one = [ask(client, what, **body) for what, body in asked]
    again = client_of(embedded_run)
    found: list[Any] = [None] * len(asked)

    def work(n: int) -> None:
        found[n] = ask(again, asked[n][0], **asked[n][1])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == one_by_one
