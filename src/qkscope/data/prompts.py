"""Prompts with named positions: what a study asks a model, and where in a prompt its heads are expected to look.

A prompt is a text with marks, `{NAME:words}`; a brace that is meant is written twice. A set of a person's own is a
JSONL file, one prompt a line:

    {"prompt": "When {IO:Mary} and {S1:John} went to the shop, {S2:John} gave a drink to", "answers": [" Mary"],
     "wrong": [" John"]}

The query is a prompt's last token (END), a mark stands for the last token of its words. `answers` and `wrong` are next
tokens between which the model is to choose, and may be left out. The ready sets are in prompt_sets.py.

Shapes: B prompts, T positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .sequences import Batch, first_token

_PARTS = re.compile(r"\{\{|\}\}|\{(\w+):([^{}]+)\}|[{}]")
_KEYS = {"prompt", "answers", "wrong"}
MOST_CHARACTERS = 1_000_000  # of a prompt file's line
GIVE_UP = 200  # prompts, none of which a tokenizer takes


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: str
    marks: Mapping[str, tuple[int, int]]
    """Characters of each named place, [start, end)."""
    answers: tuple[str, ...] = ()
    """Right next tokens."""
    wrong: tuple[str, ...] = ()
    """Next tokens that they are held against."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts that ask for the same thing."""

    name: str
    prompts: Sequence[Prompt] | Iterator[Prompt]
    """As many as there are, or more than anybody wants."""
    target: str
    """The mark that heads are expected to look at from the last token."""
    family: tuple[str, ...]
    """Marks of the same kind as the target, itself among them: what an ablation is to take attention from."""


@dataclass(frozen=True)
class Asked:
    """Prompts as tokens."""

    batch: Batch
    end_B: Tensor
    """int64: position of the last token."""
    marks: Mapping[str, Tensor]
    """int64 [B]: position of each mark; -1 where a prompt does not have it."""
    answers: list[list[int]]
    wrong: list[list[int]]

    def __len__(self) -> int:
        return len(self.end_B)

    def take(self, index: Tensor) -> Asked:
        """These of the prompts."""
        b = self.batch
        batch = Batch(b.tokens_BT[index], b.real_BT[index], b.document_B[index], b.offset_B[index], b.opened)
        marks = {name: at[index] for name, at in self.marks.items()}
        chosen = [[lists[i] for i in index.tolist()] for lists in (self.answers, self.wrong)]
        return Asked(batch, self.end_B[index], marks, *chosen)

    @property
    def choices(self) -> bool:
        """Whether every prompt says what is right and what is wrong."""
        return all(self.answers) and all(self.wrong)


def parse(marked: str, answers: Sequence[str] = (), wrong: Sequence[str] = ()) -> Prompt:
    """A prompt from its text with marks; `UserError` for a brace that opens or closes nothing and a mark used twice."""
    text, marks, at = "", {}, 0
    for part in _PARTS.finditer(marked):
        text += marked[at : part.start()]
        at = part.end()
        name, words = part.groups()
        if name is None and len(part[0]) == 1:
            raise UserError(
                f"prompt {_short(marked)!r}: a brace without {{NAME:words}}; write a brace that is meant twice"
            )
        if name is None:
            text += part[0][0]
            continue
        if name in marks or name == "END":
            raise UserError(f"prompt {_short(marked)!r}: the mark {name} is taken; give each place a name of its own")
        marks[name] = (len(text), len(text) + len(words))
        text += words
    return Prompt(text + marked[at:], marks, tuple(answers), tuple(wrong))


def read_prompts(path: Path, target: str | None = None) -> PromptSet:
    """A set from a JSONL file; the target is its first prompt's first mark where none is named."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}; name a ready set or a .jsonl file") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--prompts {path}: line {number}"
        try:
            values = json.loads(line[:MOST_CHARACTERS])
        except ValueError:
            raise UserError(f"{where} is not JSON: {_short(line)!r}") from None
        prompts.append(_checked(values, where))
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt")
    target = target or next(iter(prompts[0].marks), None)
    if target is None:
        raise UserError(f"--prompts {path}: its first prompt has no mark; write one as {{NAME:words}}")
    if not any(target in prompt.marks for prompt in prompts):
        raise UserError(f"--prompts {path}: no prompt has the mark {target!r}")
    return PromptSet(path.stem, prompts, target, (target,))


def _checked(values: Any, where: str) -> Prompt:
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{where}: has no "prompt", a text with marks')
    if unknown := values.keys() - _KEYS:
        raise UserError(f"{where}: unknown key {min(unknown)!r}; a prompt has {', '.join(sorted(_KEYS))}")
    lists = []
    for key in ("answers", "wrong"):
        found = values.get(key, [])
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise UserError(f"{where}: {key} is {found!r}; give a list of texts")
        lists.append(found)
    try:
        return parse(values["prompt"], *lists)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def ask(asked: PromptSet, tokenizer: Any, config: DataConfig, count: int, most: int | None = None) -> Asked:
    """The first `count` prompts of a set that a tokenizer takes, as tokens, padded on the right.

    Left out are prompts with words it does not know, with an answer that is not one token, or of more than `most`
    tokens. `UserError` where none is left, with the reason for the last one.
    """
    first = first_token(config, tokenizer)
    rows, why = [], "it is empty"
    for tried, prompt in enumerate(asked.prompts, start=1):
        found = _tokens(prompt, tokenizer, first, most)
        if isinstance(found, str):
            why = found
        else:
            rows.append(found)
        if len(rows) == count or (tried >= GIVE_UP and not rows):
            break
    if not rows:
        raise UserError(f"--prompts {asked.name}: this model's tokenizer takes none of its prompts ({why})")
    longest = max(len(ids) for ids, *_ in rows)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    tokens_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, *_ in rows])
    end_B = torch.tensor([len(ids) - 1 for ids, *_ in rows])
    real_BT = torch.arange(longest) <= end_B[:, None]
    names = dict.fromkeys(name for _, marks, *_ in rows for name in marks)
    marks = {name: torch.tensor([row[1].get(name, -1) for row in rows]) for name in names}
    nothing = torch.zeros(len(rows), dtype=torch.int64)
    batch = Batch(tokens_BT, real_BT, torch.arange(len(rows)), nothing, opened=first is not None)
    return Asked(batch, end_B, marks, [row[2] for row in rows], [row[3] for row in rows])


def _tokens(
    prompt: Prompt, tokenizer: Any, first: int | None, most: int | None
) -> tuple[list[int], dict[str, int], list[int], list[int]] | str:
    """Tokens, positions of the marks, right and wrong next tokens; or why the prompt can't be asked."""
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not ids or (unknown is not None and unknown in ids and unknown != tokenizer.eos_token_id):
        return f"it does not know every word of {_short(prompt.text)!r}"
    shift = int(first is not None)
    if most is not None and len(ids) + shift > most:
        return f"{_short(prompt.text)!r} has {len(ids) + shift} tokens, more than {most}"
    marks = {}
    for name, (start, end) in prompt.marks.items():
        inside = [t for t, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        if not inside:
            return f"the mark {name} of {_short(prompt.text)!r} holds no token"
        marks[name] = inside[-1] + shift
    lists = []
    for words in (prompt.answers, prompt.wrong):
        encodings = [tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"] for word in words]
        split = next((w for w, e in zip(words, encodings, strict=True) if len(e) != 1 or e[0] == unknown), None)
        if split is not None:
            return f"the next token {split!r} is not one token of it"
        lists.append([e[0] for e in encodings])
    return [*([] if first is None else [first]), *ids], marks, *lists


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
