"""Text that is made ahead of training: the same batches, and a place that is where training is."""

from __future__ import annotations

import json
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import data_config, documents_of, stream

from qkscope.data import Sequences
from qkscope.data.sequences import Batch
from qkscope.errors import UserError
from qkscope.training.stream import Ahead


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents_of([15, 40, 9] * 20)))
    return data_config(source=str(path), context=16)


@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 6), after=st.integers(1, 6), back=st.booleans())
def test_the_place_is_that_of_the_batches_handed_over(config: Any, before: int, after: int, back: bool) -> None:
    text, ahead = stream(config, repeat=True), Ahead(stream(config, repeat=True))
    for _ in range(before):
        assert torch.equal(next(text).tokens_BT, next(ahead).tokens_BT)
    place = ahead.state()
    assert place == text.state()
    if back:
        for _ in range(after):
            next(ahead)
        ahead.restore(place)
    else:
        ahead = Ahead(stream(config, repeat=True))
        ahead.restore(place)
    assert ahead.state() == place
    for _ in range(after):
        assert torch.equal(next(text).tokens_BT, next(ahead).tokens_BT)


class Watched:
    """A text that says when a batch is being made, and breaks at the third."""

    def __init__(self, text: Sequences) -> None:
        self.text, self.begun = text, [Event() for _ in range(5)]
        self.made = 0

    def __next__(self) -> Batch:
        self.begun[self.made].set()
        self.made += 1
        if self.made == 3:
            raise UserError("the third is not there")
        return next(self.text)

    def state(self) -> dict[str, Any]:
        return self.text.state()


def test_the_next_batch_is_made_meanwhile_and_an_error_waits_until_it_is_asked_for(config: Any) -> None:
    watched = Watched(stream(config, repeat=True))
    ahead = Ahead(watched)  # type: ignore[arg-type]
    assert not watched.begun[0].is_set()
    next(ahead)
    assert watched.begun[1].wait(20)
    next(ahead)
    assert watched.begun[2].wait(20)
    place = ahead.state()
    with pytest.raises(UserError, match="the third is not there"):
        next(ahead)
    assert ahead.state() == place


def test_a_text_that_ends(config: Any) -> None:
    batches = list(iter(stream(config, repeat=False)))
    ahead = Ahead(stream(config, repeat=False))
    assert all(torch.equal(next(ahead).tokens_BT, batch.tokens_BT) for batch in batches)
    with pytest.raises(StopIteration):
        next(ahead)
