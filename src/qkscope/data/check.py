"""Is there enough text for a run? Asked before anything slow is loaded.

Notable: it reads documents of all splits in one order and stops as soon as every split has shown a sequence, so on a
text that is large enough it tokenises some tens of documents.
"""

from __future__ import annotations

from collections import Counter

from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..errors import UserError
from .documents import SPLITS, Documents, Split, open_documents
from .sequences import ahead, content_length, cut, encode, shortest

_NAMES: dict[Split, str] = {"train": "training", "heldout": "held-out", "validation": "validation"}


def check_text(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """`UserError` where the source cannot be read or gives too little text for training, choice and report.

    Every split must give one sequence at least, and the training text be no shorter than one context.
    """
    documents = open_documents(config)
    found = _Found(content_length(config, tokenizer), config.context)
    for group in ahead(documents.stream(None, 0, 0), most=16):
        found.documents.update(document.split for document in group)
        wanted = [document for document in group if not found.enough(document.split)]
        if wanted:
            encoded = encode(tokenizer, [document.text for document in wanted])
            for document, token_ids in zip(wanted, encoded, strict=True):
                found.add(document.split, token_ids)
        if all(found.enough(split) for split in SPLITS):
            return
    _refuse(config, documents, found)


class _Found:
    """Documents, content tokens and sequences seen of each split."""

    def __init__(self, length: int, context: int) -> None:
        self.length, self.context = length, context
        self.documents, self.tokens, self.sequences = Counter[Split](), Counter[Split](), Counter[Split]()

    def add(self, split: Split, token_ids: list[int]) -> None:
        self.tokens[split] += len(token_ids)
        self.sequences[split] += len(cut(token_ids, self.length))

    def enough(self, split: Split) -> bool:
        tokens = self.context if split == "train" else 0
        return self.sequences[split] > 0 and self.tokens[split] >= tokens


def _refuse(config: DataConfig, documents: Documents, found: _Found) -> None:
    """The `UserError` for a text that was read to its end and did not suffice."""
    where = f"data.source {config.source!r}"
    total = found.documents.total()
    holds = f"{where} holds {total} {'document' if total == 1 else 'documents'}"
    for split, name in _NAMES.items():
        if not found.documents[split]:
            other = "smaller" if split == "train" else "larger"
            raise UserError(
                f"{holds} and none of them is {name} text; {name} text needs more documents{_separate(documents)} "
                f"or a {other} data.heldout (it is {config.heldout:g})"
            )
        if split == "train" and found.tokens[split] < config.context:
            raise UserError(
                f"{where} is shorter than one context: {found.tokens[split]} training tokens found, data.context is "
                f"{config.context}; give more text or a smaller data.context"
            )
        if not found.sequences[split]:
            raise UserError(
                f"{where}: its {name} documents ({found.documents[split]}) are all too short, under "
                f"{shortest(found.length)} tokens each, to give one sequence; give longer documents"
            )


def _separate(documents: Documents) -> str:
    """How to mark documents in a plain text file, where that is what was given."""
    plain = documents.source.lower().endswith(".txt")
    return " (a line '<|endoftext|>' between two documents separates them)" if plain else ""
