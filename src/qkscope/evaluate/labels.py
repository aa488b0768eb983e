"""What is known of every token of the embedded corpus, as labels that a feature can be compared with.

A token's labels are its roles (data/stories/roles.py), the roles of what begins after it (`before …`: what a query may
be looking for) and of the token before it (`after …`: what a key may carry from there), a role of its own together with
one of those, and the words at both places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sequences import Batch
from ..data.stories import NAMES, TokenRoles, story_of, token_roles

BOS = NAMES.index("bos")
ROLE_LABELS = [*NAMES, *(f"before {name}" for name in NAMES), *(f"after {name}" for name in NAMES)]
FEWEST = 30  # tokens on which two roles must meet to be a label together
NEARLY = 0.95  # share of a role's tokens from which the two together say no more than it does alone


@dataclass(frozen=True)
class Labelled:
    """The labels of one batch."""

    roles_BTR: Tensor
    """bool, columns as in `ROLE_LABELS`, then as in `StoryLabels.both_2C`; none at padding."""
    word_BT: Tensor
    """int64: the token, as an index into the words of its `StoryLabels`."""
    word_before_BT: Tensor
    """int64: the token before it; at the first position the token itself."""
    link_BT: Tensor
    """int64: the earlier position that the token answers to (see data/stories/roles.py), -1 where there is none."""


class StoryLabels:
    """Labels for these batches of the embedded corpus; words and roles that meet are those that are in them."""

    def __init__(self, tokenizer: Any, batches: Sequence[Batch]) -> None:
        self.tokenizer = tokenizer
        self.roles_of = lru_cache(maxsize=4096)(self._roles_of)
        self.tokens_W = torch.cat([batch.tokens_BT.flatten() for batch in batches]).unique()
        self.both_2C = _meeting(torch.cat([self._roles(batch)[0].flatten(0, 1) for batch in batches]))
        """The two labels, as columns, of each label that is two roles together."""
        words = [tokenizer.decode([i]) for i in self.tokens_W.tolist()]
        both = [f"{ROLE_LABELS[a]}, {ROLE_LABELS[b]}" for a, b in self.both_2C.T.tolist()]
        self.names = [*ROLE_LABELS, *both, *(f"“{w}”" for w in words), *(f"after “{w}”" for w in words)]

    @property
    def n_words(self) -> int:
        return len(self.tokens_W)

    def _roles_of(self, document: int) -> TokenRoles:
        story = story_of(document)
        encoded = self.tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True)
        return token_roles(story.text, story.spans, encoded["offset_mapping"])

    def of(self, batch: Batch) -> Labelled:
        """Labels of one batch, on its device."""
        roles_BTR, link_BT = self._roles(batch)
        word_BT = torch.searchsorted(self.tokens_W, batch.tokens_BT)
        first, second = self.both_2C
        return Labelled(
            torch.cat([roles_BTR, roles_BTR[..., first] & roles_BTR[..., second]], -1),
            word_BT,
            torch.cat([word_BT[:, :1], word_BT[:, :-1]], 1),
            link_BT,
        )

    def _roles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Columns as in `ROLE_LABELS`, bool [B, T, R], and the links [B, T], on the batch's device."""
        shape = batch.tokens_BT.shape
        here, begins = (np.zeros((*shape, len(NAMES)), dtype=bool) for _ in range(2))
        link = np.full(shape, -1, dtype=np.int64)
        first = int(batch.opened)
        for b in range(shape[0]):
            found = self.roles_of(int(batch.document_B[b]))
            length, offset = int(batch.real_BT[b].sum()) - first, int(batch.offset_B[b])
            here[b, :first, BOS] = True
            here[b, first : first + length] = found.roles_TR[offset : offset + length]
            begins[b, first : first + length] = found.starts_TR[offset : offset + length]
            part = found.link_T[offset : offset + length]
            link[b, first : first + length] = np.where(part >= offset, part - offset + first, -1)
        nothing = np.zeros_like(here[:, :1])
        before = np.concatenate([begins[:, 1:], nothing], 1)
        after = np.concatenate([nothing, here[:, :-1]], 1)
        device = batch.tokens_BT.device
        roles_BTR = torch.from_numpy(np.concatenate([here, before, after], 2)).to(device)
        return roles_BTR & batch.real_BT[..., None], torch.from_numpy(link).to(device)


def _meeting(roles_nR: Tensor) -> Tensor:
    """Columns of a token's own role and a neighbour's that meet often enough to be a label together, [2, C]."""
    n = len(NAMES)
    counts = roles_nR.sum(0)
    together = roles_nR[:, :n].float().T @ roles_nR.float()
    fewer = torch.minimum(counts[:n, None], counts)
    said = (together >= FEWEST) & (together < NEARLY * fewer)
    said[:, :n] = False  # two roles of one token say little more than the narrower one
    return said.nonzero().T
