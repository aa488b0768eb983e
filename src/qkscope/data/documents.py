"""Documents from `DataConfig.source`: a local file's, by index, or a Hugging Face dataset's, streamed.

Notable: a document's split follows from its *content*, so exact duplicates never stand on both sides of a split and
no list of held-out documents needs keeping. The order follows from (seed, epoch) alone, so a place in it is one number.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from ..config import DataConfig
from ..errors import UserError, nearest
from .files import ENDINGS, Rows, open_rows

Split = Literal["train", "validation", "heldout"]
EMBEDDED = "embedded"  # the source that is written as it is read: stories/
SPLITS: tuple[Split, ...] = get_args(Split)
_UNKNOWN = len(SPLITS)  # the split of a document not yet looked at
# A missing path with one of these endings was meant as a file, not as a dataset on the hub.
_FILE_LIKE = {*ENDINGS, ".text", ".md", ".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".html", ".pdf"}


class Document(NamedTuple):
    position: int
    """Place in the order of this epoch, documents of other splits counted."""
    index: int
    """Row in the source (a streamed source: the position again)."""
    split: Split
    text: str


class Documents(ABC):
    """All documents of a source, each in one of three splits, in an order that follows from (seed, epoch)."""

    source: str
    count: int | None
    """How many documents there are, all splits together; None: a stream, not known."""
    size: int | None
    """Bytes of the file; None: a stream."""

    @abstractmethod
    def stream(self, split: Split | None, seed: int, epoch: int, start: int = 0) -> Iterator[Document]:
        """The documents of one split (None: of all) from position `start` of the order of (seed, epoch) on."""


class LocalDocuments(Documents):
    """The documents of a local file, by index."""

    def __init__(self, path: Path, column: str, heldout: float) -> None:
        self.source, self._heldout = str(path), heldout
        self._rows: Rows = open_rows(path, column)
        self.count, self.size = len(self._rows), path.stat().st_size
        self._split_N = np.full(self.count, _UNKNOWN, dtype=np.uint8)  # filled as documents are first seen

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return self._rows[index]

    def stream(self, split: Split | None, seed: int, epoch: int, start: int = 0) -> Iterator[Document]:
        order_N = np.random.default_rng([seed % 2**64, epoch]).permutation(len(self))
        for position in range(start, len(self)):
            index = int(order_N[position])
            known = self._split_N[index]
            if split is not None and known != _UNKNOWN and SPLITS[known] != split:
                continue
            text = self._rows[index]
            if known == _UNKNOWN:
                known = self._split_N[index] = SPLITS.index(split_of(text, self._heldout))
            if split is None or SPLITS[known] == split:
                yield Document(position, index, SPLITS[known], text)


def split_of(text: str, heldout: float) -> Split:
    """The split of a text: blake2b of its UTF-8 bytes as a fraction; [0, h) heldout, [h, 2h) validation, else train."""
    fraction = int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2**64
    return "heldout" if fraction < heldout else "validation" if fraction < 2 * heldout else "train"


def open_documents(config: DataConfig) -> Documents:
    """The documents that `config.source` names, or a `UserError`. A file that is already open is shared."""
    if config.source is None or not config.source.strip():
        raise UserError(
            f"data.source is {config.source!r}; name a .txt, .jsonl or .parquet file or a Hugging Face dataset"
        )
    if config.source == EMBEDDED:
        from .stories import StoryDocuments  # its words are of no use to any other source

        return StoryDocuments(config.heldout)
    path = local_path(config.source)
    if path is None:
        from .hub import HubDocuments  # the hub's library takes a second to import; a local file does without it

        return HubDocuments(config)
    stat = path.stat()
    return _open_local(path, config.text_column, config.heldout, stat.st_size, stat.st_mtime_ns)


def local_path(source: str) -> Path | None:
    """The file that `source` names; None where it can only be a dataset's name; `UserError` where no such file is."""
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return path
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in ENDINGS)
            there = f", such as {str(path / inside[0])!r}" if inside else ""
            raise UserError(f"data.source {source!r} is a folder; name one .txt, .jsonl or .parquet file{there}")
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise UserError(f"data.source {source!r} cannot be read ({error.strerror}); give a readable file") from None
    if path.suffix.lower() in _FILE_LIKE or source.startswith((".", "~", "/")) or source.count("/") > 1:
        raise UserError(f"data.source {source!r} does not exist{nearest(path.name, beside)}; give a file that does")
    return None


@lru_cache(maxsize=2)  # train, validation and held-out text of a run share one file and one record of its splits
def _open_local(path: Path, column: str, heldout: float, size: int, changed: int) -> LocalDocuments:
    del size, changed  # in the key only: a file that was written again is read again
    return LocalDocuments(path, column, heldout)
