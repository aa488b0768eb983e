"""Documents to batches of sequences: against slow references, and on real text."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import (
    BOS,
    Row,
    change,
    data_config,
    documents_of,
    equal,
    rows_of,
    slow_cut,
    slow_split,
    some_texts,
    stream,
    take,
    tiny_tokenizer,
    windows_of,
    write,
)
from transformers import PreTrainedTokenizerFast

from qkscope.config import DataConfig, TrainingConfig
from qkscope.data import Batch, check_text, open_documents, sequences
from qkscope.data.documents import SPLITS, LocalDocuments, Split
from qkscope.errors import UserError

WINDOW = sequences.WINDOW


def slow_epoch(config: DataConfig, split: Split, seed: int, epoch: int, first: int | None) -> list[Row]:
    """Every sequence of an epoch in the order of its documents."""
    content = config.context - (first is not None)
    found = open_documents(config).stream(None, seed, epoch)
    return [
        (document.index, offset, tokens)
        for document in found
        if slow_split(document.text, config.heldout) == split
        for offset, tokens in slow_cut(document.text, content, first)
    ]


def encoding(text: str) -> list[int]:
    return BOS(text, add_special_tokens=False)["input_ids"]


def length_of(row: Row) -> int:
    return len(row[2])


def padding(batches: list[Batch]) -> float:
    return 1 - sum(batch.n_tokens for batch in batches) / sum(batch.real_BT.numel() for batch in batches)


# -------------------------------------------------------------------------------------------------- the cut


@pytest.mark.parametrize("bos", [True, False])
def test_positions_are_places_in_the_document(tmp_path: Path, bos: bool) -> None:
    """Of every sequence of a document, not of the first alone; an opening token has none."""
    texts = documents_of([40] * 20)
    config = change(write(tmp_path / "text.jsonl", texts), context=12, prepend_bos=bos)
    tokens = [encoding(text) for text in texts]
    seen = 0
    for batch in stream(config):
        for b, t in batch.real_BT.nonzero():
            position, token = int(batch.positions(b, t)), int(batch.tokens_BT[b, t])
            if bos and t == 0:
                assert position == sequences.OPENING == -1
            else:
                assert tokens[int(batch.document_B[b])][position] == token
                seen = max(seen, position)
    assert seen > 24


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=5, max_size=90),
    context=st.integers(9, 40),
    batch_tokens=st.integers(1, 60),
    split=st.sampled_from(SPLITS),
    bos=st.booleans(),
    repeat=st.booleans(),
)
def test_windows_are_the_slow_cutting_in_order(
    lengths: list[int], context: int, batch_tokens: int, split: Split, bos: bool, repeat: bool
) -> None:
    """Each window holds the next pieces of the text, each once, of whatever epochs, and cuts them by length."""
    seed, first = len(lengths), 1 if bos else None
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder) / "a.jsonl", documents_of(lengths))
        config = change(config, context=context, prepend_bos=bos, heldout=0.3)
        source = stream(config, split, batch_tokens=batch_tokens, seed=seed, repeat=repeat)
        expected = slow_epoch(config, split, seed, 0, first)
        if not expected:
            with pytest.raises(UserError, match=f"its {split} split holds no document"):
                next(source)
            return
        windows = windows_of(take(source, 2 * WINDOW if repeat else 10_000))
        if repeat:
            windows.pop()  # perhaps not given out to its end
        n = sum(len(batch.tokens_BT) for window in windows for batch in window)
        epoch = 0
        while repeat and len(expected) < n:
            epoch += 1
            expected += slow_epoch(config, split, seed, epoch, first)
    assert repeat or len(expected) == n
    pieces = iter(expected)
    for window in windows:
        rows = rows_of(window)
        now = list(islice(pieces, len(rows)))
        assert sorted(rows) == sorted(now)
        size = sum(map(length_of, now))
        assert size - length_of(now[-1]) < WINDOW * batch_tokens
        assert size >= WINDOW * batch_tokens or (window is windows[-1] and not repeat)
        by_length = sorted(window, key=lambda batch: sorted(batch.real_BT.sum(1).tolist()))
        assert [length_of(row) for row in rows_of(by_length)] == sorted(map(length_of, rows))


def test_every_epoch_gives_every_piece_once_in_a_new_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "WINDOW", 1)  # of one token: a window, and so an epoch, ends after each piece
    config = write(tmp_path / "a.parquet", some_texts(80))
    once = rows_of(list(stream(config, batch_tokens=1)))
    endless = stream(config, batch_tokens=1, repeat=True)
    epochs: list[list[Row]] = [[], [], []]
    for epoch in range(3):
        for n in range(len(once)):
            epochs[epoch] += rows_of([next(endless)])
            assert endless.epoch == (epoch if n else max(epoch - 1, 0))  # a window begins where the last one ended
    assert epochs[0] == once
    assert epochs[1] != once and epochs[2] != epochs[1]
    assert sorted(epochs[1]) == sorted(epochs[2]) == sorted(once)


def test_a_batch_and_a_window_may_span_epochs(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", documents_of([15] * 20))
    n = len(rows_of(list(stream(config))))
    source = stream(config, batch_tokens=16 * (2 * n + 1), repeat=True)
    batches = [next(source) for _ in range(WINDOW)]
    assert {len(batch.tokens_BT) for batch in batches} == {2 * n + 1}
    counts = Counter(document for document, _, _ in rows_of(batches))
    assert len(counts) == n and max(counts.values()) - min(counts.values()) == 1
    assert source.state()["epoch"] == source.epoch == 0
    assert len(next(source).tokens_BT) == 2 * n + 1
    assert source.state()["epoch"] == source.epoch == WINDOW * (2 * n + 1) // n


@pytest.mark.parametrize("batch_tokens", [32, 50, 300])
@pytest.mark.parametrize("repeat", [False, True])
def test_batches_hold_about_equally_many_tokens(tmp_path: Path, batch_tokens: int, repeat: bool) -> None:
    config = write(tmp_path / "a.jsonl", some_texts(400))
    source = stream(config, batch_tokens=batch_tokens, repeat=repeat)
    sizes = [batch.n_tokens for batch in islice(source, 3 * WINDOW)]
    assert len(sizes) > 15
    if next(source, None) is None:
        assert sizes.pop() <= 2 * batch_tokens  # the end of the text may be small
    assert batch_tokens / 2 <= min(sizes) and max(sizes) <= 2 * batch_tokens
    assert 0.9 * batch_tokens < sum(sizes) / len(sizes) < 1.1 * batch_tokens


def test_a_sequence_of_more_than_batch_tokens_is_a_batch(tmp_path: Path) -> None:
    batches = list(stream(write(tmp_path / "a.jsonl", some_texts(50)), batch_tokens=1))
    assert {len(batch.tokens_BT) for batch in batches} == {1}
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        stream(write(tmp_path / "a.jsonl", some_texts(50)), batch_tokens=0)


def test_order_within_a_window_is_by_seed_and_place_and_not_by_length(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", some_texts(900))

    def ranks(seed: int) -> list[tuple[int, ...]]:
        """Of each full window, its batches' places in the order by length."""
        windows = windows_of(take(stream(config, seed=seed, batch_tokens=100, repeat=True), 4 * WINDOW))
        orders = []
        for window in windows[:-1]:
            lengths = [batch.n_tokens / len(batch.tokens_BT) for batch in window]
            assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
            orders.append(tuple(sorted(range(len(window)), key=lengths.__getitem__)))
        return orders

    one, other = ranks(0), ranks(1)
    assert one == ranks(0) and len(one) >= 3
    assert len({*one, *other}) == len(one) + len(other), "each window is shuffled anew"


def test_order_within_a_window_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here, or one that differs between two processes, would resume a run on other text than it left."""
    monkeypatch.setattr(sequences, "WINDOW", 8)
    text = next(text for text in documents_of([15 * 40] * 9) if slow_split(text, 0.1) == "train")
    source = stream(write(tmp_path / "a.jsonl", [text]), batch_tokens=16, seed=5)
    windows = windows_of(take(source, 16))
    assert [[int(batch.offset_B) // 15 for batch in window] for window in windows] == [
        [1, 0, 7, 6, 3, 2, 5, 4],
        [12, 14, 11, 15, 9, 8, 10, 13],
    ]


def test_padding_mask_and_crop(tmp_path: Path) -> None:
    batches = list(stream(write(tmp_path / "a.txt", some_texts(60))))
    assert any(not batch.real_BT.all() for batch in batches)
    for batch in batches:
        length_B = batch.real_BT.sum(1)
        assert batch.tokens_BT.dtype == torch.int64 and batch.real_BT.dtype == torch.bool
        assert batch.document_B.dtype == batch.offset_B.dtype == torch.int64
        assert torch.equal(batch.real_BT, torch.arange(batch.real_BT.shape[1]) < length_B[:, None])
        assert batch.tokens_BT.shape[1] == int(length_B.max()) <= 16
        assert (batch.tokens_BT[~batch.real_BT] == 0).all() and (batch.tokens_BT[batch.real_BT] != 0).all()
        assert batch.n_tokens == int(length_B.sum())
        assert (batch.tokens_BT[:, 0] == 1).all() and (batch.tokens_BT[:, 1:] != 1).all()
        assert equal(batch.to("cpu"), batch) and batch.to("meta").tokens_BT.is_meta


@pytest.mark.parametrize(
    ("roles", "first", "content", "pad"),
    [
        ({"bos_token": "<s>", "cls_token": "<cls>", "eos_token": "</s>"}, 1, 15, 2),
        ({"cls_token": "<cls>", "pad_token": "<pad>"}, 4, 15, 0),
        ({"eos_token": "</s>"}, None, 16, 2),
        ({}, None, 16, 0),
    ],
)
def test_first_and_padding_token(
    tmp_path: Path, roles: dict[str, str], first: int | None, content: int, pad: int
) -> None:
    config = write(tmp_path / "a.jsonl", documents_of([25] * 30))
    batch, *more = list(stream(config, tokenizer=tiny_tokenizer(**roles), batch_tokens=10_000))
    n = len(batch.tokens_BT) // 2  # documents, each of a full piece and a short one
    assert not more and n > 10
    assert batch.offset_B.tolist() == [content] * n + [0] * n
    assert batch.real_BT.sum(1).tolist() == [25 - content + (first is not None)] * n + [16] * n
    assert (set(batch.tokens_BT[:, 0].tolist()) == {first}) == (first is not None)
    assert set(batch.tokens_BT[~batch.real_BT].tolist()) == {pad}


def test_a_context_under_eight_still_gives_its_full_pieces(tmp_path: Path) -> None:
    config = change(write(tmp_path / "a.jsonl", documents_of([11] * 30)), context=5)
    assert {length_of(row) for row in rows_of(list(stream(config)))} == {5}


def test_max_tokens_ends_after_the_batch_that_reaches_it(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", some_texts(80))
    for repeat in (False, True):
        sizes = [batch.n_tokens for batch in stream(config, max_tokens=200, repeat=repeat)]
        assert sum(sizes[:-1]) < 200 <= sum(sizes)
        limited = stream(config, max_tokens=sum(sizes), repeat=repeat)
        assert [batch.n_tokens for batch in limited] == sizes and limited.tokens == sum(sizes)


def test_long_documents_raise_no_tokenizer_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(bos_token="<s>")  # takes 16 tokens
    assert len(list(stream(write(tmp_path / "a.jsonl", documents_of([500] * 9)), tokenizer=tokenizer))) > 30
    assert not caplog.records


# ------------------------------------------------------------------------------------------------ real text


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[DataConfig, Any]:
    """Text and tokenizer of a small model that was trained on it."""
    text = shared / "text" / "stories260K.parquet"
    if not text.exists():
        pytest.skip(f"{text} is not on this machine")
    return data_config(source=str(text)), PreTrainedTokenizerFast.from_pretrained(shared / "models" / "stories260K")


def test_real_text(stories: tuple[DataConfig, Any]) -> None:
    config, tokenizer = change(stories[0], context=128), stories[1]
    check_text(config, tokenizer)
    train = stream(config, tokenizer=tokenizer, batch_tokens=1024, repeat=True)
    documents = open_documents(config)
    assert isinstance(documents, LocalDocuments)
    for _ in range(20):
        batch = next(train)
        assert (batch.tokens_BT[:, 0] == tokenizer.bos_token_id).all()
        for document, offset, tokens in rows_of([batch]):
            whole = tokenizer(documents[document], add_special_tokens=False)["input_ids"]
            assert whole[offset : offset + 127] == tokens[1:]
    resumed = stream(config, tokenizer=tokenizer, batch_tokens=1024, repeat=True)
    resumed.restore(train.state())
    assert all(equal(next(train), next(resumed)) for _ in range(sequences.WINDOW))


@pytest.mark.parametrize("context", [128, DataConfig().context])
def test_little_of_real_text_is_padding(stories: tuple[DataConfig, Any], context: int) -> None:
    config, batch_tokens = change(stories[0], context=context), TrainingConfig().batch_tokens
    source = stream(config, tokenizer=stories[1], batch_tokens=batch_tokens, repeat=True)
    batches = [next(source) for _ in range(128)]
    assert padding(batches) < 0.1
    assert all(batch_tokens / 2 <= batch.n_tokens <= 2 * batch_tokens for batch in batches)
    widths = [batch.tokens_BT.shape[1] for batch in batches]
    assert any(one > other for one, other in pairwise(widths)) and any(one < other for one, other in pairwise(widths))
