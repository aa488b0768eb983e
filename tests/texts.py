"""Small texts, a tokenizer of one token a word, and slow references for what the library makes of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qkscope.config import DataConfig
from qkscope.data import Batch, Sequences
from qkscope.data.documents import Split
from qkscope.errors import UserError

WORDS = 50
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<cls>"]

Window = list[Batch]
Row = tuple[int, int, list[int]]
"""A sequence: its document, its offset there, its tokens."""


def tiny_tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    """One token a word: 'w7' is 5 + 7."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *(f"w{i}" for i in range(WORDS))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16, **roles)


BOS = tiny_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def documents_of(lengths: list[int], seed: int = 0) -> list[str]:
    """A document of random words for each length; those of a few words may well be equal."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(length)) for length in lengths]


def some_texts(n: int, longest: int = 60) -> list[str]:
    rng = random.Random(7)
    return documents_of([rng.randrange(longest + 1) for _ in range(n)])


def write(path: Path, texts: Sequence[str | None]) -> DataConfig:
    """The texts in a file of the kind that the path's ending says."""
    if path.suffix == ".parquet":
        pq.write_table(
            pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, row_group_size=7
        )
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    else:
        path.write_text("\n<|endoftext|>\n".join(text or "" for text in texts))
    return data_config(source=str(path), context=16)


def data_config(**values: Any) -> DataConfig:
    return DataConfig(**values)


def change(config: DataConfig, **values: Any) -> DataConfig:
    return config.model_copy(update=values)


def stream(config: DataConfig, split: Split = "train", tokenizer: Any = BOS, **options: Any) -> Sequences:
    return Sequences(config, tokenizer, split, **{"batch_tokens": 50, "seed": 0, "repeat": False, **options})


def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A dataset 'org/set' of 150 documents in place of the hub; its texts."""
    texts = some_texts(150)

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> IterableDataset:
        assert (name, subset, split, streaming) == ("org/set", "small", "train", True)
        rows = datasets.Dataset.from_dict({"id": list(range(150)), "text": texts})
        return rows.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return texts


def rows_of(batches: list[Batch]) -> list[Row]:
    """The sequences, real tokens only, in order."""
    return [
        (document, offset, [token for token, real in zip(tokens, reals, strict=True) if real])
        for batch in batches
        for document, offset, tokens, reals in zip(
            batch.document_B.tolist(),
            batch.offset_B.tolist(),
            batch.tokens_BT.tolist(),
            batch.real_BT.tolist(),
            strict=True,
        )
    ]


def take(source: Sequences, n: int) -> list[tuple[Batch, dict[str, Any]]]:
    """Up to n batches, each with the state after it."""
    return [(batch, source.state()) for _ in range(n) if (batch := next(source, None)) is not None]


def windows_of(taken: list[tuple[Batch, dict[str, Any]]]) -> list[Window]:
    """The batches by the window that they were cut from: those of one window share all but their number."""
    grouped = groupby(taken, key=lambda one: (one[1]["epoch"], one[1]["position"], one[1]["piece"]))
    windows = [list(group) for _, group in grouped]
    for window in windows:
        assert [state["batch"] for _, state in window] == list(range(1, len(window) + 1))
    return [[batch for batch, _ in window] for window in windows]


def equal(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) and getattr(one, name).dtype == getattr(other, name).dtype
        for name in ("tokens_BT", "real_BT", "document_B", "offset_B")
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(map(equal, one, other))


def slow_cut(text: str, content: int, first: int | None) -> list[tuple[int, list[int]]]:
    """The cutting, a token at a time."""
    pieces, current, offset = [], [], 0
    for n, word in enumerate(text.split(), 1):
        current.append(len(SPECIALS) + int(word[1:]))
        if len(current) == content:
            pieces.append((offset, current))
            current, offset = [], n
    if len(current) >= 8:
        pieces.append((offset, current))
    return [(offset, tokens if first is None else [first, *tokens]) for offset, tokens in pieces]


def slow_split(text: str, heldout: float) -> str:
    share = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / float(1 << 64)
    if share < heldout:
        return "heldout"
    return "validation" if share < heldout + heldout else "train"


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    for part in parts:
        assert part in said, said
