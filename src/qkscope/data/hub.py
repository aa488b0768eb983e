"""A Hugging Face dataset as a stream of documents: nothing is downloaded beyond what is read.

Notable: the shuffle buffer of `datasets` is not part of its saved state, so going on at a position replays the stream
up to there. That reads again, but tokenises nothing again, and is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError

from ..config import DataConfig
from ..errors import UserError
from .documents import Document, Documents, Split, split_of
from .files import check_column, check_string, one_line

SHUFFLE_BUFFER = 1000  # documents to choose the next one from; more delay the first one


class HubDocuments(Documents):
    """The documents of a Hugging Face dataset, in a buffered shuffle by (seed, epoch)."""

    count = None
    size = None

    def __init__(self, config: DataConfig) -> None:
        assert config.source is not None
        self.source, self._column, self._heldout = config.source, config.text_column, config.heldout
        self._rows = _load(config.source, config.subset, config.split)

    def stream(self, split: Split | None, seed: int, epoch: int, start: int = 0) -> Iterator[Document]:
        rows = self._rows.shuffle(seed=seed % 2**64, buffer_size=SHUFFLE_BUFFER)
        rows.set_epoch(epoch)
        for position, row in enumerate(islice(self._reachable(rows), start, None), start):
            text = self._text(row)
            its_split = split_of(text, self._heldout)
            if split is None or its_split == split:
                yield Document(position, position, its_split, text)

    def _text(self, row: dict[str, Any]) -> str:
        check_column(f"data.source {self.source!r}", self._column, list(row))
        check_string(f"data.source {self.source!r}", self._column, row[self._column])
        return row[self._column] or ""

    def _reachable(self, rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
        """The rows; a hub that fails on the way becomes a `UserError`."""
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # whatever the network or the file format raises
                raise UserError(
                    f"data.source {self.source!r} stopped streaming ({one_line(error)}); run again to go on from the "
                    "last checkpoint, or give a local file"
                ) from error
            yield row


def _load(name: str, subset: str | None, split: str) -> datasets.IterableDataset:
    """The stream of one split of a dataset, or a `UserError`."""
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
    except DatasetNotFoundError as error:
        raise UserError(
            f"data.source {name!r} is neither a file here nor a dataset on the Hugging Face hub ({one_line(error)}); "
            "check the name"
        ) from error
    except (OSError, RuntimeError) as error:  # no network, no answer, a dataset in a format that is not read any more
        raise UserError(
            f"data.source {name!r} is no file here and cannot be had from the Hugging Face hub ({one_line(error)}); "
            "check name and network, or give a local file"
        ) from error
    except ValueError as error:  # a subset or split that is not there; the message lists those that are
        raise UserError(
            f"data.source {name!r} with data.subset {subset!r} and data.split {split!r}: {one_line(error, 400)}; "
            "set them to what the dataset has"
        ) from error
    assert isinstance(rows, datasets.IterableDataset)
    return rows
