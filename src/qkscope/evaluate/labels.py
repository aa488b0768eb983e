"""What is known of every token of the embedded corpus, as labels that a feature can be compared with.

A token's labels are its roles (data/stories/roles.py), the roles of the token after it (`before …`: what a query may be
looking for) and of the one before it (`after …`: what a key may carry from there), and the words at both places.
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
from ..data.stories import NAMES, story_of, token_roles

BOS = NAMES.index("bos")
ROLE_LABELS = [*NAMES, *(f"before {name}" for name in NAMES), *(f"after {name}" for name in NAMES)]


@dataclass(frozen=True)
class Labelled:
    """The labels of one batch."""

    roles_BTR: Tensor
    """bool, columns as in `ROLE_LABELS`; none at padding."""
    word_BT: Tensor
    """int64: the token, as an index into the words of its `StoryLabels`."""
    word_before_BT: Tensor
    """int64: the token before it; at the first position the token itself."""
    link_BT: Tensor
    """int64: the earlier position that the token answers to (see data/stories/roles.py), -1 where there is none."""


class StoryLabels:
    """Labels for these batches of the embedded corpus; their words are the tokens that are in them."""

    def __init__(self, tokenizer: Any, batches: Sequence[Batch]) -> None:
        self.tokenizer = tokenizer
        self.tokens_W = torch.cat([batch.tokens_BT.flatten() for batch in batches]).unique()
        words = [tokenizer.decode([i]) for i in self.tokens_W.tolist()]
        self.names = [*ROLE_LABELS, *(f"“{w}”" for w in words), *(f"after “{w}”" for w in words)]
        self.roles_of = lru_cache(maxsize=4096)(self._roles_of)

    @property
    def n_words(self) -> int:
        return len(self.tokens_W)

    def _roles_of(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        story = story_of(document)
        encoded = self.tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True)
        found = token_roles(story.text, story.spans, encoded["offset_mapping"])
        return found.roles_TR, found.link_T

    def of(self, batch: Batch) -> Labelled:
        """Labels of one batch, on its device."""
        shape = batch.tokens_BT.shape
        here = np.zeros((*shape, len(NAMES)), dtype=bool)
        link = np.full(shape, -1, dtype=np.int64)
        for b in range(shape[0]):
            roles, links = self.roles_of(int(batch.document_B[b]))
            first = int(batch.tokens_BT[b, 0] == self.tokenizer.bos_token_id)
            length, offset = int(batch.real_BT[b].sum()) - first, int(batch.offset_B[b])
            here[b, :first, BOS] = True
            here[b, first : first + length] = roles[offset : offset + length]
            part = links[offset : offset + length]
            link[b, first : first + length] = np.where(part >= offset, part - offset + first, -1)
        device = batch.tokens_BT.device
        roles_BTR = torch.from_numpy(here).to(device)
        nothing = torch.zeros_like(roles_BTR[:, :1])
        before = torch.cat([roles_BTR[:, 1:], nothing], 1) & batch.real_BT[..., None]
        after = torch.cat([nothing, roles_BTR[:, :-1]], 1) & batch.real_BT[..., None]
        word_BT = torch.searchsorted(self.tokens_W, batch.tokens_BT)
        return Labelled(
            torch.cat([roles_BTR, before, after], -1),
            word_BT,
            torch.cat([word_BT[:, :1], word_BT[:, :-1]], 1),
            torch.from_numpy(link).to(device),
        )
