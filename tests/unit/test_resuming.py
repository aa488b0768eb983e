"""A stream of sequences that goes on at any point, and after what stops it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import (
    change,
    data_config,
    documents_of,
    equal,
    fake_hub,
    one_line,
    rows_of,
    same,
    slow_cut,
    slow_split,
    some_texts,
    stream,
    take,
    windows_of,
    write,
)

from qkscope.data import Sequences, sequences
from qkscope.data import hub as hub_room
from qkscope.errors import UserError

WINDOW = sequences.WINDOW


# -------------------------------------------------------------------------------------------------- resumed


@pytest.mark.parametrize("batch_tokens", [1, 24, 60])
@pytest.mark.parametrize("repeat", [False, True])
def test_restored_after_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, repeat: bool
) -> None:
    """Within a window and at its end, where an epoch ends at a window's end, within one, or between two batches."""
    monkeypatch.setattr(sequences, "WINDOW", 6)
    config = write(tmp_path / "a.jsonl", documents_of([15, 30] * 5 if batch_tokens == 1 else [15, 40, 12] * 6))
    options = {"batch_tokens": batch_tokens, "repeat": repeat}
    fresh = stream(config, **options).state()
    taken = take(stream(config, **options), 40)
    batches, states = [batch for batch, _ in taken], [fresh, *(state for _, state in taken)]
    windows = windows_of(taken)
    assert repeat or len(batches) < 40
    assert len({state["epoch"] for state in states}) >= (3 if repeat else 1)
    assert batch_tokens == 1 or max(map(len, windows)) > 4
    for n, state in enumerate(states):
        resumed = stream(config, **options)
        resumed.restore(json.loads(json.dumps(state)))
        assert resumed.state() == state and resumed.tokens == sum(batch.n_tokens for batch in batches[:n])
        rest = take(resumed, 40 - n)
        assert same([batch for batch, _ in rest], batches[n:])
        assert [state for _, state in rest] == states[n + 1 :]
        assert repeat or next(resumed, None) is None


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=3, max_size=90),
    batch_tokens=st.integers(1, 150),
    taken=st.integers(0, 60),
    repeat=st.booleans(),
    max_tokens=st.none() | st.integers(1, 4000),
)
def test_restored_anywhere_the_stream_is_the_undisturbed_one(
    lengths: list[int], batch_tokens: int, taken: int, repeat: bool, max_tokens: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder) / "a.jsonl", [*documents_of(lengths), *documents_of([40] * 12)])

        def fresh() -> Sequences:
            return stream(config, batch_tokens=batch_tokens, seed=5, repeat=repeat, max_tokens=max_tokens)

        undisturbed = fresh()
        take(undisturbed, taken)
        saved = json.dumps(undisturbed.state())
        assert len(saved) < 400
        resumed = fresh()
        next(resumed)  # wherever it stood before
        resumed.restore(json.loads(saved))
        assert resumed.state() == json.loads(saved)
        for _ in range(30):
            one, other = next(undisturbed, None), next(resumed, None)
            assert (one is None) == (other is None)
            if one is None or other is None:
                break
            assert equal(one, other)
            assert undisturbed.state() == resumed.state() and undisturbed.epoch == resumed.epoch


def test_restoring_tokenises_from_the_windows_document_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents_of([40] * 800)
    config = write(tmp_path / "a.jsonl", texts)
    before = stream(config)
    windows = windows_of(take(before, 3 * WINDOW + 9))
    seen: list[str] = []
    encode = sequences.encode
    monkeypatch.setattr(sequences, "encode", lambda tokenizer, texts: (seen.extend(texts), encode(tokenizer, texts))[1])
    after = stream(config)
    after.restore(before.state())
    assert equal(next(after), next(before))
    assert 0 < len(seen) <= sequences.AHEAD_DOCUMENTS
    current = {document for document, _, _ in rows_of(windows[-1])}
    done = {document for window in windows[:-1] for document, _, _ in rows_of(window)} - current
    assert len(done) > 50 and not {texts[document] for document in done} & {*seen}


def test_another_text_or_cut_is_refused_on_restore(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", documents_of([40] * 30))
    state = stream(config).state()
    for other, what in [
        (stream(config, seed=1), "seed 0, now it is 1"),
        (stream(config, "heldout"), "split 'train', now it is 'heldout'"),
        (stream(config, batch_tokens=51), "tokens a batch 50, now it is 51"),
        (stream(change(config, heldout=0.2)), "held-out share 0.1, now it is 0.2"),
        (stream(change(config, context=32)), "content tokens a sequence 15, now it is 31"),
        (stream(write(tmp_path / "b.jsonl", documents_of([40] * 31))), "documents 30, now it is 31"),
    ]:
        with pytest.raises(UserError, match=what):
            other.restore(state)


# ------------------------------------------------------------------------------------------ from a stream


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A dataset 'org/set', as long as it says, that fails at a document, as often as it says."""
    plan = {"at": 0, "times": 0, "length": 200}
    texts = documents_of([30] * plan["length"])

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        for number, text in enumerate(texts[: plan["length"]]):
            if number == plan["at"] and plan["times"]:
                plan["times"] -= 1
                raise ConnectionError("reset\nby peer")
            yield number, {"text": text}

    monkeypatch.setattr(hub_room, "SHUFFLE_BUFFER", 1)
    monkeypatch.setattr(sequences, "WINDOW", 8)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: IterableDataset(ExamplesIterable(rows, {})))
    return plan


def test_streamed_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = fake_hub(monkeypatch)
    found = [tokens for _, _, tokens in rows_of(list(stream(HUB)))]
    assert sorted(found) == sorted(t for x in texts if slow_split(x, 0.1) == "train" for _, t in slow_cut(x, 15, 1))


HUB = data_config(source="org/set", subset="small", context=16)


@pytest.mark.parametrize("taken", [0, 17, 90])
def test_streamed_dataset_resumes(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    fake_hub(monkeypatch)
    undisturbed, resumed = stream(HUB, repeat=True), stream(HUB, repeat=True)
    take(undisturbed, taken)
    resumed.restore(json.loads(json.dumps(undisturbed.state())))
    assert all(equal(next(undisturbed), next(resumed)) for _ in range(120))
    assert undisturbed.epoch == resumed.epoch > 0


@pytest.mark.parametrize("at", [0, 150])
def test_a_hub_that_fails_on_the_way_is_said_and_can_be_asked_again(failing: dict[str, int], at: int) -> None:
    """The window in the making must not be lost, and the stream must not look as if it had ended."""
    whole = list(stream(HUB))
    failing.update(at=at, times=2)
    text, batches = stream(HUB), []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            batches.extend(text)
        one_line(error, "'org/set' stopped streaming (reset by peer)")
        assert bool(batches) == (at > 0)
        resumed = stream(HUB)
        failing["at"] = -1
        resumed.restore(text.state())
        assert same([*batches, *resumed], whole)
        failing["at"] = at
    batches.extend(text)
    assert same(batches, whole)


def test_a_hub_that_fails_on_restore_can_be_restored_again(failing: dict[str, int]) -> None:
    before = stream(HUB)
    take(before, 3 * sequences.WINDOW + 2)
    failing.update(at=100, times=1)
    resumed = stream(HUB)
    with pytest.raises(UserError, match="stopped streaming"):
        resumed.restore(before.state())
    resumed.restore(before.state())
    assert same(list(resumed), list(before))


@pytest.mark.parametrize("left", [0, 2])
def test_a_stream_that_has_become_shorter_is_refused_on_restore(failing: dict[str, int], left: int) -> None:
    before = stream(HUB)
    take(before, 3 * sequences.WINDOW + 6)
    state = before.state()
    failing["length"] = state["position"] + left
    with pytest.raises(UserError) as error:
        stream(HUB).restore(state)
    one_line(error, "data.source 'org/set' is not the text that the checkpoint was made with")


def test_an_interrupted_window_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "a.jsonl", some_texts(300))
    whole, encode, calls = list(stream(config)), sequences.encode, []

    def interrupted(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(tokenizer, texts)

    monkeypatch.setattr(sequences, "encode", interrupted)
    source, batches = stream(config), []
    with pytest.raises(KeyboardInterrupt):
        batches.extend(source)
    assert batches
    assert same([*batches, *source], whole)
