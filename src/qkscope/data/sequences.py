"""Documents to batches of token sequences: resumable, and endless where wanted.

    B sequences of a batch   T positions, cropped to the longest sequence of the batch

Notable: a sequence never holds two documents (packing without a boundary lets a head attend across texts), the stream
of a training run never ends in its middle, and a place in it is four numbers: epoch, document, piece, batch of a
window. Batches hold about equally many tokens and sequences of like length: a window of some batches is read ahead,
sorted by length, cut, and its batches shuffled, so little of a batch is padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..devices import sent
from ..errors import UserError
from .documents import Document, Split, open_documents

SHORTEST = 8  # content tokens; a shorter piece is dropped: it has next to no pattern to explain
WINDOW = 32  # batches that are read ahead and cut by length; fewer leave more padding
AHEAD_DOCUMENTS = 64  # documents tokenised at once ...
AHEAD_CHARACTERS = 1 << 20  # ... or so many characters, whichever is first reached
OPENING = -1  # the position of BOS, which is no token of the document


@dataclass(frozen=True)
class Batch:
    """A batch of sequences, padded on the right."""

    tokens_BT: Tensor
    """int64."""
    real_BT: Tensor
    """bool; False: padding."""
    document_B: Tensor
    """int64: index of the document in its source; running number for a streamed one."""
    offset_B: Tensor
    """int64: where in its document the sequence starts, in content tokens (BOS not counted)."""
    opened: bool = False
    """Whether each sequence starts with a token that its document does not hold (BOS or CLS)."""

    @property
    def n_tokens(self) -> int:
        """Real tokens, BOS included."""
        return int(self.real_BT.sum())

    def positions(self, row_E: Tensor, at_E: Tensor) -> Tensor:
        """Where in its document each token stands that is at `at` in sequence `row`, in content tokens from 0 (BOS not
        counted, also those that open the document's earlier sequences); -1 for an opening token itself."""
        if not self.opened:
            return self.offset_B[row_E] + at_E
        return (self.offset_B[row_E] + at_E - 1).masked_fill(at_E == 0, OPENING)

    def rows(self, which: slice) -> Batch:
        """Some of the sequences."""
        rows = (t[which] for t in (self.tokens_BT, self.real_BT, self.document_B, self.offset_B))
        return Batch(*rows, opened=self.opened)

    def first(self, count: int) -> Batch:
        """The first `count` sequences."""
        return self.rows(slice(count))

    def until(self, length: int) -> Batch:
        """The first `length` tokens of each sequence."""
        return replace(self, tokens_BT=self.tokens_BT[:, :length], real_BT=self.real_BT[:, :length])

    def to(self, device: torch.device | str) -> Batch:
        moved = (sent(t, device) for t in (self.tokens_BT, self.real_BT, self.document_B, self.offset_B))
        return Batch(*moved, opened=self.opened)


class Cursor(NamedTuple):
    """The next piece of the stream."""

    epoch: int = 0
    position: int = 0
    """Of the document in the epoch's order."""
    piece: int = 0
    """Of the document."""


class Piece(NamedTuple):
    tokens: list[int]
    """Content tokens, without BOS."""
    document: int
    offset: int
    after: Cursor
    """Where the stream goes on after this piece."""


class Sequences:
    """Batches of about `batch_tokens` real tokens from one split of the text; an iterator whose place can be saved.

    `repeat`: start again in a new order where the text ends (training); otherwise the stream ends there.
    `max_tokens`: stop after the batch that reaches so many real tokens.
    Raises `UserError` for a source that cannot be read, and from `next` where the split holds no sequence at all.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        *,
        batch_tokens: int,
        seed: int,
        repeat: bool,
        max_tokens: int | None = None,
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; a batch holds at least one token")
        self._config, self._tokenizer = config, tokenizer
        self._split: Split = split
        self._batch_tokens, self._seed, self._repeat, self._max_tokens = batch_tokens, seed, repeat, max_tokens
        self._documents = open_documents(config)
        self._first = first_token(config, tokenizer)
        self._length = content_length(config, tokenizer)
        self._pad = next((i for i in (_id(tokenizer, "pad"), _id(tokenizer, "eos")) if i is not None), 0)
        self._cursor, self._after, self._tokens = Cursor(), Cursor(), 0
        self._pieces: Iterator[Piece] | None = None
        self._window: list[list[Piece]] = []
        self._used = 0  # batches of the window, which starts at the cursor, that were given out

    @property
    def epoch(self) -> int:
        """How often the text had been repeated where the current window begins."""
        return self._cursor.epoch

    @property
    def tokens(self) -> int:
        """Real tokens given out so far."""
        return self._tokens

    def __iter__(self) -> Sequences:
        return self

    def __next__(self) -> Batch:
        if self._max_tokens is not None and self._tokens >= self._max_tokens:
            raise StopIteration
        if self._used == len(self._window):
            self._next_window()
        pieces = self._window[self._used]
        self._used += 1
        batch = self._collate(pieces)
        self._tokens += batch.n_tokens
        return batch

    def _next_window(self) -> None:
        """Read the next window; StopIteration at the end of the stream."""
        start = self._after if self._window else self._cursor
        if self._pieces is None:
            self._pieces = self._stream(start)
        pieces: list[Piece] = []
        count = 0
        try:
            while count < WINDOW * self._batch_tokens and (piece := next(self._pieces, None)) is not None:
                pieces.append(piece)
                count += len(piece.tokens) + (self._first is not None)
        except BaseException:
            self._pieces = None  # a generator that raised is at its end; asked again, go on from the cursor instead
            raise
        if not pieces:
            raise StopIteration
        self._window = self._batches(pieces, count, start)
        self._cursor, self._after, self._used = start, pieces[-1].after, 0

    def _batches(self, pieces: list[Piece], count: int, start: Cursor) -> list[list[Piece]]:
        """Pieces of like length together, as batches of about equally many tokens, in an order drawn from the place."""
        pieces = sorted(pieces, key=lambda piece: len(piece.tokens))
        n_batches = max(round(count / self._batch_tokens), 1)
        groups: list[list[Piece]] = [[] for _ in range(n_batches)]
        reached = 0
        for piece in pieces:
            groups[min(reached * n_batches // count, n_batches - 1)].append(piece)
            reached += len(piece.tokens) + (self._first is not None)
        random.Random(f"{self._seed}/{start.epoch}/{start.position}/{start.piece}").shuffle(groups)
        return [group for group in groups if group]

    def state(self) -> dict[str, Any]:
        """The place in the stream, for `restore`: plain numbers and words, small, for JSON."""
        return {**self._cursor._asdict(), "batch": self._used, "tokens": self._tokens, "of": self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; `UserError` where that was another text or another cut of it."""
        for key, now in self._identity().items():
            if (then := state["of"].get(key)) != now:
                raise UserError(
                    f"data.source {self._config.source!r}: the checkpoint was made with {key} {then!r}, now it is "
                    f"{now!r}; give what the run began with, or start a new one"
                )
        self._cursor = Cursor(state["epoch"], state["position"], state["piece"])
        self._tokens, self._pieces, self._window, self._used = state["tokens"], None, [], 0
        if not state["batch"]:
            return
        with suppress(StopIteration):
            self._next_window()
        if len(self._window) < state["batch"]:
            raise UserError(
                f"data.source {self._config.source!r} is not the text that the checkpoint was made with: it ends "
                "sooner; give what the run began with, or start a new one"
            )
        self._used = state["batch"]

    def _identity(self) -> dict[str, Any]:
        """What the order and the cut of the stream follow from: a cursor means nothing with another."""
        return {
            "documents": self._documents.count,
            "file size": self._documents.size,
            "split": self._split,
            "held-out share": self._config.heldout,
            "seed": self._seed,
            "content tokens a sequence": self._length,
            "tokens a batch": self._batch_tokens,
        }

    def _stream(self, cursor: Cursor) -> Iterator[Piece]:
        """Every piece from `cursor` on, epoch after epoch where the text is repeated."""
        whole = cursor.position == cursor.piece == 0
        while True:
            empty = True
            for piece in self._one_epoch(cursor):
                empty = False
                yield piece
            if whole and empty:
                raise UserError(
                    f"data.source {self._config.source!r}: its {self._split} split holds no document of at least "
                    f"{shortest(self._length)} tokens; give more text or another data.heldout"
                )
            if not self._repeat:
                return
            cursor, whole = Cursor(cursor.epoch + 1), True

    def _one_epoch(self, cursor: Cursor) -> Iterator[Piece]:
        """The pieces of one epoch from `cursor` on; only documents from the cursor's on are tokenised."""
        epoch, start, skip = cursor
        for group in ahead(self._documents.stream(self._split, self._seed, epoch, start)):
            encoded = encode(self._tokenizer, [document.text for document in group])
            for document, token_ids in zip(group, encoded, strict=True):
                pieces = cut(token_ids, self._length)
                for number in range(skip if document.position == start else 0, len(pieces)):
                    after = Cursor(epoch, document.position, number + 1)
                    if number + 1 == len(pieces):
                        after = Cursor(epoch, document.position + 1)
                    offset, tokens = pieces[number]
                    yield Piece(tokens, document.index, offset, after)

    def _collate(self, pieces: list[Piece]) -> Batch:
        """Pieces to a batch: BOS before each, padding after the shorter ones."""
        start = 0 if self._first is None else 1
        shape = len(pieces), start + max(len(piece.tokens) for piece in pieces)
        tokens_BT = torch.full(shape, self._pad, dtype=torch.int64)
        real_BT = torch.zeros(shape, dtype=torch.bool)
        if self._first is not None:
            tokens_BT[:, 0] = self._first
        for row, piece in enumerate(pieces):
            end = start + len(piece.tokens)
            tokens = np.array(piece.tokens)  # torch itself reads a list a number at a time
            tokens_BT[row, start:end] = torch.from_numpy(tokens)
            real_BT[row, :end] = True
        document_B = torch.tensor([piece.document for piece in pieces])
        offset_B = torch.tensor([piece.offset for piece in pieces])
        return Batch(tokens_BT, real_BT, document_B, offset_B, opened=self._first is not None)


def first_token(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that opens every sequence: BOS, else CLS (BERT), else (or where it is not wanted) none."""
    if not config.prepend_bos:
        return None
    bos = _id(tokenizer, "bos")
    return _id(tokenizer, "cls") if bos is None else bos


def _id(tokenizer: PreTrainedTokenizerBase, role: str) -> int | None:
    """The id of the tokenizer's `bos`, `cls`, `pad` or `eos` token, where it has one."""
    return getattr(tokenizer, f"{role}_token_id", None)


def content_length(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Content tokens of a full sequence: the context, less one for the token that opens it."""
    return config.context - (first_token(config, tokenizer) is not None)


def shortest(length: int) -> int:
    """The fewest content tokens a piece may have; a context shorter than that still gives its full pieces."""
    return min(SHORTEST, length)


def cut(token_ids: list[int], length: int) -> list[tuple[int, list[int]]]:
    """(offset, tokens) of a document's pieces of `length` tokens; the last may be shorter, or dropped if too short."""
    last = len(token_ids) - shortest(length)
    return [(offset, token_ids[offset : offset + length]) for offset in range(0, last + 1, length)]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Each text's tokens: all of them, no special tokens, no warning that they are more than the model takes."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def ahead(documents: Iterator[Document], most: int = AHEAD_DOCUMENTS) -> Iterator[list[Document]]:
    """Documents in groups to be tokenised at once: a fast tokenizer works on a group in parallel."""
    group, characters = [], 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == most or characters >= AHEAD_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
