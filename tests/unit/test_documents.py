"""Documents from files and from the hub: their text, their splits, their order, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from texts import (
    BOS,
    WORDS,
    change,
    data_config,
    documents_of,
    fake_hub,
    one_line,
    slow_split,
    some_texts,
    stream,
    write,
)

from qkscope.config import DataConfig
from qkscope.data import check, check_text, files, open_documents, sequences, split_of
from qkscope.data.documents import SPLITS, LocalDocuments
from qkscope.errors import UserError

# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".txt"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    texts = [text for text in some_texts(40) if text] + ["Über 日本語 \U0001f600 w1\n\nw2"]
    documents = open_documents(write(tmp_path / f"a{ending}", texts))
    assert isinstance(documents, LocalDocuments)
    assert [documents[i] for i in range(len(documents))] == texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb", ["a\n\nb"]),  # one blank line is a paragraph
        ("a\n\n\nb\n\n\n\n\nc\n", ["a", "b", "c"]),
        ("a\r\n\r\n \t\r\nb\r\nc", ["a", "b\nc"]),
        ("a\n\n\nb\n<|endoftext|>\nc\n<|endoftext|>\n\n<|endoftext|>", ["a\n\n\nb", "c"]),
        ("\ufeffa", ["a"]),
    ],
)
def test_plain_text_boundaries(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    documents = open_documents(data_config(source=str(path)))
    assert isinstance(documents, LocalDocuments)
    assert [documents[i] for i in range(len(documents))] == expected


def test_nulls_blank_lines_and_half_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n\n{"text": "a\\ud800b"}\n   \n{"text": "c"}')
    documents = open_documents(data_config(source=str(path)))
    assert isinstance(documents, LocalDocuments)
    assert [documents[i] for i in range(len(documents))] == ["", "a\ufffdb", "c"]
    assert len(list(documents.stream(None, 0, 0))) == 3
    parquet = open_documents(write(tmp_path / "a.parquet", [None, "b"]))
    assert isinstance(parquet, LocalDocuments)
    assert [parquet[0], parquet[1]] == ["", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_large_parquet_column_is_mapped_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    texts = some_texts(50)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}), path, row_group_size=9)
    in_memory = files.Parquet(path, "text")
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    before = pa.total_allocated_bytes()
    mapped = files.Parquet(path, "text")
    assert pa.total_allocated_bytes() - before < sum(map(len, texts)) / 4
    assert [mapped[i] for i in range(50)] == [in_memory[i] for i in range(50)] == texts


def test_a_file_written_again_is_read_again(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", ["w1", "w2"])
    assert open_documents(config) is open_documents(config)
    write(tmp_path / "a.jsonl", ["w1", "w2", "w3"])
    assert open_documents(config).count == 3


# --------------------------------------------------------------------------------------------------- splits


@given(st.text(), st.floats(0.01, 0.49))
def test_split_of_agrees_with_a_plain_calculation(text: str, heldout: float) -> None:
    assert split_of(text, heldout) == slow_split(text, heldout)


def test_split_of_is_pinned() -> None:
    """A change here would put yesterday's training text into today's held-out text."""
    other = {0: "validation", 2: "validation", 7: "validation", 11: "validation", 15: "heldout"}
    assert {i: split for i in range(16) if (split := split_of(f"document {i}", 0.2)) != "train"} == other


def test_splits_are_disjoint_and_jointly_exhaustive_and_duplicates_stay_together(tmp_path: Path) -> None:
    texts = some_texts(300) * 2
    documents = open_documents(write(tmp_path / "a.parquet", texts))
    found = {split: [d.index for d in documents.stream(split, 3, 1)] for split in SPLITS}
    assert sorted(i for split in SPLITS for i in found[split]) == list(range(600))
    contents = {split: {texts[i] for i in found[split]} for split in SPLITS}
    assert all(not contents[a] & contents[b] for a in SPLITS for b in SPLITS if a != b)
    assert 30 < len(found["heldout"]) < 90 and 30 < len(found["validation"]) < 90
    for split in SPLITS:
        assert {slow_split(texts[i], 0.1) for i in found[split]} == {split}
        # once all splits are known nothing changes, and the walk over all documents says the same
        assert [d.index for d in documents.stream(split, 3, 1)] == found[split]
        assert [d.index for d in documents.stream(None, 3, 1) if d.split == split] == found[split]


def test_order_is_by_seed_and_epoch(tmp_path: Path) -> None:
    documents = open_documents(write(tmp_path / "a.jsonl", some_texts(100)))

    def order(seed: int, epoch: int) -> list[int]:
        return [d.index for d in documents.stream(None, seed, epoch)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(-1, 0)]
    assert all(sorted(one) == list(range(100)) for one in orders)
    assert len({tuple(one) for one in [*orders, list(range(100))]}) == 5
    assert order(1, 0) == orders[2]


# ---------------------------------------------------------------------------------------------------- errors


def refused(config: DataConfig, *parts: str) -> None:
    """Both the check and the sequences say so."""
    with pytest.raises(UserError) as error:
        check_text(config, BOS)
    one_line(error, *parts)
    with pytest.raises(UserError) as error:
        stream(config)
    one_line(error, *parts)


def short_of(config: DataConfig, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        check_text(config, BOS)
    one_line(error, repr(config.source), *parts)


def source(path: Path, content: bytes, **values: Any) -> DataConfig:
    path.write_bytes(content)
    return data_config(source=str(path), **values)


def test_no_source() -> None:
    refused(data_config(), "data.source is None", "name a .txt, .jsonl or .parquet file")
    refused(data_config(source=" "), "data.source is ' '")


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("w1")
    path = str(tmp_path / "storeis.txt")
    refused(data_config(source=path), repr(path), "does not exist (did you mean 'stories.txt'?)")
    refused(data_config(source="nowhere.jsonl"), "'nowhere.jsonl' does not exist")
    refused(data_config(source="./nowhere"), "'./nowhere' does not exist")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}")
    refused(data_config(source=str(tmp_path)), "is a folder", repr(str(tmp_path / "b.jsonl")))


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_empty_file(tmp_path: Path, ending: str) -> None:
    refused(source(tmp_path / f"a{ending}", b""), f"a{ending}' is an empty file")
    path = tmp_path / f"b{ending}"
    refused(write(path, []) if ending == ".parquet" else source(path, b" \n\n"), "is empty: it holds no document")


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_binary_file(tmp_path: Path, ending: str) -> None:
    refused(source(tmp_path / f"a{ending}", b"abc\0def"), "is binary (a NUL byte at offset 3)", "UTF-8 text file")
    refused(source(tmp_path / f"b{ending}", "caf\xe9 au lait".encode("latin-1")), "not UTF-8 (byte 0xe9", "save it")
    refused(source(tmp_path / f"c{ending}", "café".encode()[:-1]), "not UTF-8 (byte 0xc3")


def test_utf8_is_checked_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 5)
    assert open_documents(source(tmp_path / "a.txt", ("aé日" * 20).encode())).count == 1
    refused(source(tmp_path / "b.txt", ("é" * 20).encode() + b"\xff"), "byte 0xff")


def test_bad_json_line(tmp_path: Path) -> None:
    good = b'{"text": "w1"}\n'
    config = source(tmp_path / "a.jsonl", good + b'\n{"text": "w2\n')
    refused(config, "a.jsonl', line 3 is not JSON", """'{"text": "w2'""", "one JSON object a line")
    refused(source(tmp_path / "b.jsonl", good + b"[1, 2]\n"), "line 2 is not a JSON object: '[1, 2]'")
    refused(source(tmp_path / "c.jsonl", b"[" * 100_000), "line 1 is not JSON")


def test_parquet_that_is_not(tmp_path: Path) -> None:
    refused(source(tmp_path / "a.parquet", b"w1 w2 w3 w4 w5 w6"), "a.parquet' is not a readable Parquet file")
    write(tmp_path / "b.parquet", some_texts(20))
    whole = (tmp_path / "b.parquet").read_bytes()
    refused(source(tmp_path / "c.parquet", whole[: len(whole) // 2]), "not a readable Parquet file")


def test_wrong_column(tmp_path: Path) -> None:
    for ending, where in ((".parquet", "a.parquet' has"), (".jsonl", "a.jsonl', line 1 has")):
        config = change(write(tmp_path / f"a{ending}", ["w1"]), text_column="txt")
        refused(config, where, "no column 'txt' (did you mean 'text'?)", "set data.text_column to one of: 'id', 'text'")


def test_column_without_strings(tmp_path: Path) -> None:
    config = change(write(tmp_path / "a.parquet", ["w1"]), text_column="id")
    refused(config, "column 'id' holds int64, not strings", "set data.text_column", ": 'text'")
    config = change(write(tmp_path / "a.jsonl", ["w1"]), text_column="id")
    refused(config, "line 1: column 'id' holds int '0', not a string", "set data.text_column")


def test_unknown_ending(tmp_path: Path) -> None:
    refused(source(tmp_path / "a.json", b"{}"), "a.json' ends in '.json' (did you mean '.jsonl'?)", ".parquet file")


def test_all_documents_too_short(tmp_path: Path) -> None:
    texts = [f"w{i % WORDS} w{i // WORDS} w3" for i in range(100)]
    config = write(tmp_path / "a.jsonl", texts)
    n = sum(slow_split(text, 0.1) == "train" for text in texts)
    short_of(config, f"its training documents ({n}) are all too short, under 8 tokens each, to give one sequence")
    with pytest.raises(UserError, match="its train split holds no document of at least 8 tokens"):
        next(stream(config, repeat=True))
    mixed = [text if slow_split(text, 0.1) == "heldout" else text + " w4" * 20 for text in texts]
    mixed = [text for text in mixed if len(text.split()) == 3 or slow_split(text, 0.1) != "heldout"]
    short_of(write(tmp_path / "b.jsonl", mixed), "its held-out documents (", "all too short")


def test_shorter_than_one_context(tmp_path: Path) -> None:
    texts = documents_of([10] * 40)
    config = write(tmp_path / "a.jsonl", texts)
    tokens = 10 * sum(slow_split(text, 0.1) == "train" for text in texts)
    short_of(
        change(config, context=tokens + 1),
        f"is shorter than one context: {tokens} training tokens found, data.context is {tokens + 1}",
    )
    check_text(change(config, context=tokens), BOS)


def test_empty_split(tmp_path: Path) -> None:
    text = next(text for text in documents_of([30] * 20) if slow_split(text, 0.1) == "train")
    said = ("holds 1 document and none of them is held-out text", "needs more documents", "or a larger data.heldout")
    short_of(write(tmp_path / "a.jsonl", [text]), *said)
    short_of(write(tmp_path / "a.txt", [text]), *said, "<|endoftext|>")
    text = next(text for text in documents_of([30] * 50) if slow_split(text, 0.1) == "heldout")
    short_of(write(tmp_path / "b.jsonl", [text]), "none of them is training text", "or a smaller data.heldout")
    with pytest.raises(UserError, match="its train split holds no document"):
        next(stream(write(tmp_path / "b.jsonl", [text])))


def test_enough_text_passes_and_is_not_all_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = sequences.encode
    monkeypatch.setattr(check, "encode", lambda tokenizer, texts: (seen.extend(texts), encode(tokenizer, texts))[1])
    check_text(write(tmp_path / "a.jsonl", documents_of([30] * 2000)), BOS)
    assert 0 < len(seen) < 200


# ------------------------------------------------------------------------------------------------------ hub


def test_streamed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = fake_hub(monkeypatch)
    config = data_config(source="org/set", subset="small", context=16)
    check_text(config, BOS)
    documents = open_documents(config)
    assert documents.count is None
    found = [d.text for split in SPLITS for d in documents.stream(split, 0, 0)]
    assert sorted(found) == sorted(texts)
    first, second = ([d.text for d in documents.stream(None, 0, epoch)] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second) == sorted(texts) and first != texts
    assert [d.text for d in documents.stream(None, 0, 0)] == first


def test_streamed_dataset_without_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch)
    for column, said in (("txt", "has no column 'txt' (did you mean 'text'?)"), ("id", "column 'id' holds int")):
        short_of(data_config(source="org/set", subset="small", text_column=column), said, "set data.text_column")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DatasetNotFoundError("Dataset 'org/set' doesn't exist\non the Hub"), "neither a file here nor a dataset on"),
        (ConnectionError("Couldn't reach the Hub"), "cannot be had from the Hugging Face hub (Couldn't reach the Hub)"),
        (ValueError("BuilderConfig 'x' not found.\nAvailable: ['y']"), "data.subset None and data.split 'train'"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    short_of(data_config(source="org/set"), said)
