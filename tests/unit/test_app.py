"""The page's server on runs without a model: tables against slow references, who may ask, what cannot be asked."""

from __future__ import annotations

import bisect
import gzip
import http.client
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from artefacts import HOSTILE, save_artefact
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from qkscope.app import head_store, server
from qkscope.app.export import MARK, export
from qkscope.app.server import HEADERS, hostname, make_app
from qkscope.app.tables import PAGE, KeyedRows, Table, plain
from qkscope.errors import UserError

Get = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_artefact(tmp_path_factory.mktemp("app") / "run")


def client(folder: Path, host: str = "127.0.0.1") -> TestClient:
    return TestClient(make_app(folder, host), base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def get(folder: Path) -> Get:
    """GET of an address below data/ that is there, as JSON."""
    asked = client(folder)

    def answer(path: str, status: int = 200, **words: Any) -> Any:
        found = asked.get(f"/data/{path}.json", params=words)
        assert found.status_code == status, found.text
        return found.json()

    return answer


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    columns = found["columns"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def features_of(folder: Path, side: str) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(folder / "layer_0" / "features.parquet").to_pylist() if row["side"] == side]


# Tables


@given(st.lists(st.floats(width=32)))
def test_numbers_keep_float32_and_are_json(values: list[float]) -> None:
    found = plain(np.array(values, dtype=np.float32))
    json.dumps(found, allow_nan=False)
    for value, written in zip(values, found, strict=True):
        assert written is None if not math.isfinite(value) else np.float32(written) == np.float32(value)
    assert plain(np.asarray([0.1, 2], np.float32)) == [0.1, 2.0] and plain(np.array([2, 3])) == [2, 3]


@given(
    st.lists(st.tuples(st.floats(width=32), st.booleans()), min_size=1, max_size=250), st.booleans(), st.integers(0, 2)
)
def test_a_page_is_what_sorting_all_rows_gives(rows: list[tuple[float, bool]], descending: bool, page: int) -> None:
    values = np.array([value for value, _ in rows], dtype=np.float32)
    wanted = np.array([keep for _, keep in rows])
    found = Table({"row": np.arange(len(rows)), "x": values}).page("x", descending, page, wanted)
    kept = [(i, float(x)) for i, (x, keep) in enumerate(zip(values, wanted, strict=True)) if keep]
    kept.sort(key=lambda one: (math.isnan(one[1]), 0 if math.isnan(one[1]) else (-one[1] if descending else one[1])))
    assert found["total"] == len(kept)
    assert found["columns"]["row"] == [i for i, _ in kept[page * PAGE : (page + 1) * PAGE]]


@settings(deadline=None)
@given(st.lists(st.integers(-2, 5), max_size=60), st.integers(1, 7))
def test_rows_are_found_by_key_in_any_order(tmp_path_factory: Any, keys: list[int], group: int) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.table({"key": pa.array(keys, pa.int64()), "row": range(len(keys))}), path, row_group_size=group)
    found = KeyedRows(path, ("key",), lambda table: table["key"].to_numpy())
    wanted = [3, *range(-3, 7)]
    for key, rows in zip(wanted, found.of(wanted), strict=True):
        assert [row["row"] for row in rows] == [i for i, other in enumerate(keys) if other == key]


@pytest.mark.parametrize("sort", ["feature", "density", "importance", "f1"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_features_are_found_and_sorted(folder: Path, get: Get, sort: str, order: str) -> None:
    asked = {"min_density": 0.01, "max_density": 0.4, "live": 1, "sort": sort, "order": order}
    found = rows_of(get("0/features/key", **asked))
    truth = json.loads((folder / "layer_0" / "truth.json").read_text())["features"]["key"]
    rows = [{**row, "f1": truth[row["feature"]]["f1"]} for row in features_of(folder, "key")]
    kept = [row for row in rows if np.float32(0.01) <= row["density"] <= 0.4]
    kept.sort(key=lambda row: -row[sort] if order == "desc" else row[sort])
    assert [row["feature"] for row in found] == [row["feature"] for row in kept] and kept


def test_features_are_found_by_what_they_go_by(get: Get) -> None:
    everything = rows_of(get("0/features/query"))
    for text in ("ROLE “", " THE", "␣the", "caf", "17", "\n"):
        words = text.lower().replace("␣", " ")
        said = {row["feature"]: row["name"].get("label") or "\n".join(row["name"]["tokens"]) for row in everything}
        wanted = {f for f, name in said.items() if words in name.lower() or words == str(f)}
        assert {row["feature"] for row in rows_of(get("0/features/query", text=text))} == wanted, text


def test_pairs_are_found_and_paged(folder: Path, get: Get) -> None:
    kept = pq.read_table(folder / "layer_1" / "pairs.parquet").to_pylist()
    names = {"query": "query_feature", "key": "key_feature", "head": "head"}
    for asked in (
        {},
        {"head": 2},
        {"query": -1},
        {"key": 5},
        {"bias": 0, "min_importance": 0.001},
        {"query": 3, "head": 1},
    ):
        wanted = [
            row for row in kept
            if all(row[names[n]] == v for n, v in asked.items() if n in names)
            and row["importance"] >= asked.get("min_importance", 0)
            and not ("bias" in asked and min(row["query_feature"], row["key_feature"]) < 0)
        ]  # fmt: skip
        wanted.sort(key=lambda row: -row["importance"])
        pages = [get("1/pairs", page=page, **asked) for page in range(3)]
        assert {page["total"] for page in pages} == {len(wanted)}
        rows = [tuple(row[n] for n in names) for page in pages for row in rows_of(page)]
        assert rows == [tuple(row[n] for n in names.values()) for row in wanted]
    by_strength = rows_of(get("1/pairs", sort="strength", order="asc"))
    strengths = plain(np.asarray([row["strength"] for row in kept], np.float32))
    assert [row["strength"] for row in by_strength] == sorted(strengths)[:PAGE]


def test_pairs_are_found_by_a_word_of_either_side(get: Get) -> None:
    asked = {side: {r["feature"] for r in rows_of(get(f"0/features/{side}", text="ann"))} for side in ("query", "key")}
    every = [row for page in range(3) for row in rows_of(get("0/pairs", page=page))]
    wanted = [r["rank"] for r in every if r["query"] in asked["query"] or r["key"] in asked["key"]]
    found = [r["rank"] for page in range(3) for r in rows_of(get("0/pairs", text="ann", page=page))]
    assert found == wanted and 0 < len(wanted) < len(every)


# Records


def test_a_feature_is_what_the_files_say(folder: Path, get: Get) -> None:
    row = next(row for row in features_of(folder, "key") if row["feature"] == 7)
    found = get("0/feature/key/7")
    for name in ("density", "importance", "by_position", "max_activation"):
        assert np.float32(found[name]) == np.float32(row[name])
    for name in ("top_tokens", "top_token_counts", "histogram"):
        assert found[name] == row[name]
    kept = pq.read_table(folder / "layer_0" / "examples.parquet").to_pylist()
    kept = [row for row in kept if (row["side"], row["feature"]) == ("key", 7)]
    assert [e["tokens"] for e in found["examples"]] == [row["tokens"] for row in kept] and kept
    for example, row in zip(found["examples"], kept, strict=True):
        assert np.asarray(example["activations"], np.float32).tolist() == row["activations"]
    pairs = pq.read_table(folder / "layer_0" / "pairs.parquet").to_pylist()
    pairs = sorted((row for row in pairs if row["key_feature"] == 7), key=lambda row: -row["importance"])
    partners = found["partners"]
    assert partners["total"] == len(pairs) and partners["columns"]["query"] == [p["query_feature"] for p in pairs]
    assert [name == {"bias": True} for name in partners["columns"]["query_name"]] == [
        query == -1 for query in partners["columns"]["query"]
    ]


def test_a_pair_is_what_the_files_say(folder: Path, get: Get) -> None:
    pairs = pq.read_table(folder / "layer_0" / "pairs.parquet").to_pylist()
    examples = pq.read_table(folder / "layer_0" / "pair_examples.parquet").to_pylist()
    names = ("query_feature", "key_feature", "head")
    for pair in [*pairs[:3], next(row for row in pairs if row["query_feature"] == -1)]:
        cell = tuple(pair[name] for name in names)
        found = get(f"0/pair/{cell[0]}/{cell[1]}/{cell[2]}")
        own = [row for row in examples if tuple(row[name] for name in names) == cell]
        assert [e["query_tokens"] for e in found["examples"]] == [row["query_tokens"] for row in own] and own
        assert [np.float32(e["effect"]) for e in found["examples"]] == [np.float32(row["effect"]) for row in own]
        heads = {row["head"] for row in pairs if (row["query_feature"], row["key_feature"]) == cell[:2]}
        assert set(found["heads"]["head"]) == heads
    after = pairs[1]
    assert get(f"0/pair/{pairs[0]['query_feature']}/{pairs[0]['key_feature']}/{pairs[0]['head']}")["neighbours"] == {
        "before": None,
        "after": [after[name] for name in names],
    }


def test_a_pair_has_its_strength_by_distance_where_that_is_stored(tmp_path: Path, get: Get) -> None:
    folder = save_artefact(tmp_path / "run", layers=(0,), rotary=True)
    asked = client(folder)
    assert asked.get("/data/run.json").json()["layers"][0]["has"]["distances"]
    names = ("query_feature", "key_feature", "head")
    table = pq.read_table(folder / "layer_0" / "pair_distance.parquet")
    stored = {tuple(row[name] for name in names): row for row in table.to_pylist()}
    pairs = pq.read_table(folder / "layer_0" / "pairs.parquet").to_pylist()
    for row in pairs[::9]:
        cell = tuple(row[name] for name in names)
        found = asked.get(f"/data/0/pair/{cell[0]}/{cell[1]}/{cell[2]}.json").json()["distance"]
        own = stored.get(cell)
        assert (found is None) == (own is None)
        if own is not None:
            assert found["edges"] == json.loads(table.schema.metadata[b"distances"])
            assert found["position"] is None or np.float32(found["position"]) == np.float32(own["position"])
            for name in ("mean", "low", "high", "use"):
                assert np.asarray(found[name], np.float32).tolist() == own[name]
    assert 0 < len(stored) < len(pairs)
    assert not get("run")["layers"][0]["has"]["distances"]
    (folder / "layer_0" / "pair_distance.parquet").unlink()
    cell = "/".join(str(pairs[0][name]) for name in names)
    assert client(folder).get(f"/data/0/pair/{cell}.json").json()["distance"] is None


def test_a_head_shares_what_another_has(folder: Path, get: Get) -> None:
    pairs = pq.read_table(folder / "layer_0" / "pairs.parquet").to_pylist()
    worth = {}
    for row in pairs:
        if min(row["query_feature"], row["key_feature"]) >= 0:
            worth.setdefault(row["head"], {})[row["query_feature"], row["key_feature"]] = row["importance"]
    for head in range(4):
        found = get(f"0/head/{head}")
        assert found["strongest"]["total"] == found["pairs"] == sum(row["head"] == head for row in pairs)
        for other in range(4):
            dot = sum(v * worth[other].get(cell, 0) for cell, v in worth[head].items())
            norms = [math.sqrt(sum(v * v for v in worth[n].values())) for n in (head, other)]
            assert found["similarity"][other] == pytest.approx(dot / norms[0] / norms[1], abs=1e-6)
        for like in found["like"]:
            shared = worth[head].keys() & worth[like["head"]].keys()
            assert like["shared"] == len(shared) > 0
            for row in rows_of(like):
                assert (row["query"], row["key"]) in shared
                there = worth[like["head"]][row["query"], row["key"]]
                assert np.float32(row["importance_there"]) == np.float32(there)
    chance = get("0/heads")
    assert chance["draws"] == head_store.DRAWS and len(chance["heads"]) == 4


def test_a_layer_without_most_files_still_has_its_features(tmp_path: Path) -> None:
    folder = save_artefact(tmp_path / "run", layers=(0,))
    for name in ("examples.parquet", "pair_examples.parquet", "patterns.json", "truth.json", "report.json"):
        (folder / "layer_0" / name).unlink()
    asked = client(folder)
    assert not any(asked.get("/data/run.json").json()["layers"][0]["has"].values())
    assert asked.get("/data/0/feature/key/7.json").json()["examples"] == []
    assert "f1" not in asked.get("/data/0/features/key.json").json()["columns"]
    assert asked.get("/data/0/head/1.json").json()["roles"] == []
    assert asked.get("/data/0/report.json").status_code == asked.get("/data/0/pattern/0.json").status_code == 404


# What cannot be asked


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("0/features/query?sort=name", "sort='name'"),
        ("0/features/query?order=up", "order='up'"),
        ("0/features/query?min_importance=much", "min_importance='much'"),
        ("0/features/query?max_density=nan", "max_density='nan'"),
        ("0/features/query?min_colour=1", "'colour'"),
        ("0/features/query?page=99", "page=99"),
        ("0/features/query?page=-1", "page=-1"),
        ("0/pairs?head=x", "head='x'"),
    ],
)
def test_a_slip_in_an_address_is_said(get: Get, folder: Path, path: str, words: str) -> None:
    name, _, query = path.partition("?")
    found = client(folder).get(f"/data/{name}.json?{query}")
    assert found.status_code == 400 and words in found.json()["error"]


@pytest.mark.parametrize(
    "path", ["9/report", "0/feature/query/40", "0/feature/both/1", "0/feature/key/-1", "0/feature/key/9999999999",
             "0/pair/39/39/9", "0/pair/x/1/1", "0/head/4", "0/pattern/4", "x/report", "0/nothing"],
)  # fmt: skip
def test_what_is_not_there(get: Get, path: str) -> None:
    assert "error" in get(path, 404)


ESCAPES = (
    "/../config.yaml", "/%2e%2e/server.py", "/..%2fserver.py", "/%2e%2e%2f%2e%2e%2fetc/passwd", "//etc/passwd",
    "/data/../../config.yaml", "/data/0/../../config.yaml", "/data/0/report.json/../../../config.yaml",
    "/..\\server.py",
    "/views/../../store.py", "/data/0/feature/query/..%2f..%2fconfig.json", "/app.js%00", "/%00", "/views/", "/vendor",
)  # fmt: skip


@pytest.fixture(scope="module")
def port(folder: Path) -> Any:
    """A real server: no client mends an address on its way there."""
    listener = server.listen("127.0.0.1", 0)
    running = uvicorn.Server(server.configured(make_app(folder)))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    running.should_exit = True
    thread.join()
    listener.close()


def raw(port: int, path: str, host: str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{port}")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ESCAPES)
def test_no_address_leads_out(port: int, path: str, folder: Path) -> None:
    status, _, body = raw(port, path)
    assert status in (400, 404), (status, body)
    for word in (b"import", b"root:", b"somewhere", str(folder).encode()):
        assert word not in body


def test_a_link_out_of_the_package_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    static, secret = tmp_path / "static", tmp_path / "secret.js"
    static.mkdir()
    secret.write_text("secret")
    (static / "index.html").write_text("page")
    (static / "out.js").symlink_to(secret)
    monkeypatch.setattr(server, "STATIC", static)
    asked = client(folder)
    assert asked.get("/").text == "page" and asked.get("/out.js").status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.com", 421),
     ("127.0.0.1.evil.com", 421), ("127.0.0.1:80@evil.com", 421), ("localhost:80x", 421), ("::1", 421),
     ("192.168.0.9", 421)],
)  # fmt: skip
def test_only_its_own_names_are_answered(port: int, host: str, status: int) -> None:
    found, _, body = raw(port, "/data/run.json", host=host)
    assert found == status and (b"layers" in body) == (status == 200)


def test_a_given_host_is_a_name_too(folder: Path) -> None:
    named, open_ = client(folder, "scope.lan"), client(folder, "0.0.0.0")
    for host, status in (("scope.lan:8765", 200), ("10.0.0.7", 421), ("evil.com", 421)):
        assert named.get("/", headers={"host": host}).status_code == status
    for host, status in (("10.0.0.7:8765", 200), ("[fe80::1]", 200), ("evil.com", 421), ("1.2.3", 421)):
        assert open_.get("/", headers={"host": host}).status_code == status


@given(st.text(max_size=20))
def test_any_host_header_is_read(host: str) -> None:
    name = hostname(host)
    assert name == name.lower() or not host.isascii()
    assert hostname(f"{name}:80") == name or ":" in name or not name or name.startswith("[")


def test_another_site_is_refused(port: int) -> None:
    assert raw(port, "/data/run.json", Origin="http://evil.com")[0] == 403
    assert raw(port, "/data/run.json", Origin="null")[0] == 403
    assert raw(port, "/data/run.json", Origin=f"http://127.0.0.1:{port}")[0] == 200


@pytest.mark.parametrize(
    "path", ["/", "/app.js", "/views/pair.js", "/data/run.json", "/nothing", "/data/0/head/9.json"]
)
def test_every_answer_has_the_headers(port: int, path: str) -> None:
    _, headers, _ = raw(port, path)
    assert HEADERS.items() <= headers.items() and "server" not in headers
    if path.endswith(".js"):
        assert headers["content-type"].startswith("text/javascript")


def test_the_page_runs_and_loads_only_its_own_files() -> None:
    page = (server.STATIC / "index.html").read_text()
    assert "<style" not in page and "style=" not in page and page.count("<script") == page.count("<script src=")
    for path in server.STATIC.rglob("*"):
        if path.suffix in (".html", ".js", ".css") and path.parent.name != "vendor":
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in text and "https:" not in text and "innerHTML" not in text and "eval(" not in text, (
                path
            )


def test_a_damaged_file_is_said_without_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_artefact(tmp_path / "run", layers=(0,))
    asked = client(folder)
    (folder / "layer_0" / "pairs.parquet").write_bytes(b"PAR1nonsense")
    (folder / "layer_0" / "report.json").write_text("{")
    for path in ("/data/run.json", "/data/0/pairs.json", "/data/0/report.json"):
        found = asked.get(path)
        assert found.status_code == 500 and str(tmp_path) not in found.text and "damaged" in found.json()["error"]
    assert str(folder / "layer_0" / "pairs.parquet") in capsys.readouterr().err


def test_a_mistake_of_ours_names_no_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> None:
        raise RuntimeError(f"in {folder}")

    monkeypatch.setattr(head_store.HeadStore, "likeness", broken)
    found = client(folder).get("/data/0/heads.json")
    assert found.status_code == 500 and found.json() == {"error": "Something went wrong; see the terminal."}


def test_places_of_models_stay_here(get: Get) -> None:
    assert get("0/report")["model"] == "model" and "secret" not in json.dumps(get("run"))
    assert get("run")["model"] == "<bos>"


def test_any_text_is_whole(tmp_path: Path) -> None:
    folder = save_artefact(tmp_path / "run", words=HOSTILE)
    found = client(folder).get("/data/0/feature/query/3.json")
    kept = pq.read_table(folder / "layer_0" / "examples.parquet").to_pylist()
    kept = [row["tokens"] for row in kept if (row["side"], row["feature"]) == ("query", 3)]
    assert [e["tokens"] for e in found.json()["examples"]] == kept and found.content.isascii()


# Starting


def test_refusals(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="not a qkscope run"):
        make_app(tmp_path / "nothing")
    taken = server.listen("127.0.0.1", 0)
    try:
        with pytest.raises(UserError, match=r"--port \d+: Address already in use"):
            server.serve(folder, port=taken.getsockname()[1])
    finally:
        taken.close()
    with pytest.raises(UserError, match="--port 70000"):
        server.serve(folder, port=70000)


# The export


def test_the_export_holds_what_the_server_says(folder: Path, get: Get, tmp_path: Path) -> None:
    site = tmp_path / "site"
    export(folder, site)

    def file(name: str) -> Any:
        return json.loads(gzip.decompress((site / "data" / f"{name}.json.gz").read_bytes()))

    def readable(name: str) -> Any:
        return json.loads((site / "data" / f"{name}.json").read_text())

    run = readable("run")
    assert run == {**get("run"), "static": True, "live": False, "shards": run["shards"]}
    for about in run["layers"]:
        n = about["layer"]
        assert readable(f"{n}/report") == get(f"{n}/report") and file(f"{n}/head/2") == get(f"{n}/head/2")
        assert file(f"{n}/pattern/1") == get(f"{n}/pattern/1") and file(f"{n}/heads") == get(f"{n}/heads")
        for side in ("query", "key"):
            for feature in range(40):
                shard = file(f"{n}/feature/{side}/{feature // run['shards']['features']}")
                assert shard[str(feature)] == get(f"{n}/feature/{side}/{feature}")
            assert sorted(map(repr, rows_of(file(f"{n}/features/{side}/0")))) == sorted(
                map(repr, rows_of(get(f"{n}/features/{side}")))
            )
        rows = rows_of(file(f"{n}/pairs/0"))
        assert [row["rank"] for row in rows] == list(range(260))
        found = file(f"{n}/pair/starts")
        width, starts = found["width"], found["starts"]
        assert width == 41 and len(starts) > 2  # more than any feature's number and its bias
        for row in rows[::7]:
            cell = (row["head"] * width + row["query"] + 1) * width + row["key"] + 1
            shard = file(f"{n}/pair/{bisect.bisect_right(starts, cell) - 1}")
            assert shard[str(cell)] == get(f"{n}/pair/{row['query']}/{row['key']}/{row['head']}")
    assert (site / "index.html").read_bytes() == (server.STATIC / "index.html").read_bytes()
    assert (site / "vendor" / "d3.LICENSE").is_file()


def test_an_export_is_written_over_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    export(folder / "layer_0", site)
    (site / "data" / "old.json").write_text("{}")
    export(folder / "layer_1", site)
    assert not (site / "data" / "old.json").exists() and not (site / "data" / "0").exists() and (site / MARK).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export(folder, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        export(folder, tmp_path / "mine" / "thesis.tex")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "site"]
