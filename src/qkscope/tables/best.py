"""The best few entries of each of many groups, whatever the order in which they come.

An entry is better with a higher score and, at equal scores, a lower tie, which no two entries of a group share. So the
result is a function of the set of entries alone, and `merge` of parts gives what one pass gives.

Shapes: G groups, M entries kept a group, E entries that come in, U groups that they touch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LAST = torch.iinfo(torch.int64).max

Payload = dict[str, Tensor]
"""What is remembered of each entry: [E, ...] each."""


class Entries(NamedTuple):
    """Entries of some groups, in order: the place of each one's group among those, its rank there, and what it is."""

    place: Tensor
    rank: Tensor
    score: Tensor
    tie: Tensor
    payload: Payload

    def of(self, index: Tensor) -> Payload:
        return {name: values[index] for name, values in self.payload.items()}


class Best:
    """The `most` best entries of each group, in order; unused places have score 0."""

    def __init__(
        self, groups: int, most: int, payload: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
    ) -> None:
        self.most = most
        self.score_GM = torch.zeros(groups, most, device=device)
        self.tie_GM = torch.full((groups, most), LAST, dtype=torch.int64, device=device)
        self.payload: Payload = {
            name: torch.zeros(groups, most, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in payload.items()
        }

    def add(self, group_E: Tensor, score_E: Tensor, tie_E: Tensor, payload: Callable[[Tensor], Payload]) -> None:
        """Take in entries with scores above 0; `payload` gives what is to be remembered of those with an index."""
        if not self.most:
            return
        index = self._wanted(group_E, score_E, tie_E)
        if not len(index):
            return
        touched_U, place = group_E[index].unique(return_inverse=True)
        stood = torch.arange(len(touched_U), device=place.device).repeat_interleave(self.most)
        score = torch.cat([self.score_GM[touched_U].flatten(), score_E[index]])
        tie = torch.cat([self.tie_GM[touched_U].flatten(), tie_E[index]])
        group = torch.cat([stood, place])
        order = tie.argsort(stable=True)
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[group[order].argsort(stable=True)]
        counts = torch.bincount(group, minlength=len(touched_U))
        starts = counts.cumsum(0) - counts  # a group has at least the `most` places that it had
        chosen_UM = order[starts[:, None] + torch.arange(self.most, device=order.device)]
        new_UM = chosen_UM >= len(stood)
        self.score_GM[touched_U], self.tie_GM[touched_U] = score[chosen_UM], tie[chosen_UM]
        fresh = payload(index[chosen_UM[new_UM] - len(stood)])
        for name, kept in self.payload.items():
            values = kept[touched_U].flatten(0, 1)[chosen_UM.clamp(max=len(stood) - 1)]
            values[new_UM] = fresh[name]
            kept[touched_U] = values

    @property
    def worst_G(self) -> Tensor:
        """The score of each group's last place: what is below has no place there."""
        return self.score_GM[:, -1]

    def _wanted(self, group_E: Tensor, score_E: Tensor, tie_E: Tensor) -> Tensor:
        """Index of the entries that are better than the last of their group."""
        worst = self.worst_G[group_E]
        better = (score_E > worst) | ((score_E == worst) & (tie_E < self.tie_GM[:, -1][group_E]))
        return (better & (score_E > 0)).nonzero()[:, 0]

    def take(self, groups_U: Tensor | None = None) -> Entries:
        """The entries of some groups, or of all."""
        groups_U = torch.arange(len(self.score_GM), device=self.score_GM.device) if groups_U is None else groups_U
        place, rank = (self.score_GM[groups_U] > 0).nonzero(as_tuple=True)
        at = groups_U[place], rank
        kept = {name: values[at] for name, values in self.payload.items()}
        return Entries(place, rank, self.score_GM[at], self.tie_GM[at], kept)

    def move(self, from_U: Tensor, to_U: Tensor) -> None:
        """Give the entries of each group to another, which may be among those that give."""
        got = self.take(from_U)
        self.score_GM[from_U], self.tie_GM[from_U] = 0, LAST
        self.add(to_U[got.place], got.score, got.tie, got.of)

    def merge(self, other: Best, from_U: Tensor, to_U: Tensor) -> None:
        """Take in the entries of another's groups `from` into the groups `to`."""
        got = other.take(from_U)
        self.add(to_U[got.place], got.score, got.tie, got.of)
