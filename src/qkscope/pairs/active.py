"""What a pair map reads of a batch: the features that are active, and nothing of the others.

Of a dictionary's activations under one in a hundred is not zero; at 24,576 features a side the zeros of one batch take
200 MB, and twice that while they are made. So tokens are encoded a few at a time, and where only some features matter
(those that a kept pair names) no others are.

Shapes: n = B·T tokens, token (b, t) with the number b·T + t; F features; L active ones, the bias of each token among
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dictionary import SparseTranscoder
from ..kernels.mostly_zero import MostlyZero
from ..kernels.sparse_scores import Events

CHUNK_ELEMENTS = 1 << 23  # activations that are held at once with their zeros: 32 MB, a few times over


@dataclass(frozen=True)
class Active:
    """Active features of one side on a batch, ordered by token, then feature; the bias is feature F."""

    events: Events
    act_L: Tensor
    """Their activations; these, and no zeros, are what can have a gradient."""
    n_features: int
    """F + 1."""
    batch: int
    length: int

    @classmethod
    def of(cls, acts_BTF: Tensor, on_BTF: Tensor | None = None) -> Active:
        """What is not zero of activations that carry the bias; or what `on` says, bool [B, T, F + 1]."""
        batch, length, width = acts_BTF.shape
        events = Events.by_token((acts_BTF != 0 if on_BTF is None else on_BTF).flatten(0, 1))
        at = events.token_L * width + events.feature_L
        return cls(events, acts_BTF.flatten().index_select(0, at), width, batch, length)

    @classmethod
    def on_tokens(cls, acts: MostlyZero, real_BT: Tensor) -> Active:
        """These activations, without a bias yet, of the real tokens; every one of these has the bias beside them."""
        return cls._with_bias(acts.row_L, acts.column_L, acts.value_L, acts.n_columns, real_BT)

    @classmethod
    @torch.no_grad()
    def read(cls, side: SparseTranscoder, x_nD: Tensor, real_BT: Tensor, features: Tensor | None = None) -> Active:
        """A dictionary as it is at inference on the real tokens, packed; of its features only these, where given."""
        reader = side if read_width(side, features) == side.width else side.narrowed(features)  # type: ignore[arg-type]
        parts, step = [], max(CHUNK_ELEMENTS // max(reader.width, 1), 1)
        reader.eval()
        for start in range(0, max(len(x_nD), 1), step):  # of no tokens too
            acts = reader.encode(x_nD[start : start + step].float())
            row, feature = acts.nonzero(as_tuple=True)
            parts.append((row + start, feature, acts[row, feature]))
        row, feature, act = (torch.cat(column) for column in zip(*parts, strict=True))
        if reader is not side:
            feature = features[feature]  # type: ignore[index]
        return cls._with_bias(row, feature, act, side.width, real_BT)

    @classmethod
    def _with_bias(cls, row_L: Tensor, feature_L: Tensor, act_L: Tensor, width: int, real_BT: Tensor) -> Active:
        token_n = real_BT.flatten().nonzero()[:, 0]
        n = len(token_n)
        order = torch.cat([row_L, torch.arange(n, device=row_L.device)]).argsort(stable=True)
        feature_L = torch.cat([feature_L, feature_L.new_full((n,), width)])[order]
        act_L = torch.cat([act_L, act_L.new_ones(n)])[order]
        token_L = torch.cat([token_n[row_L], token_n])[order]
        return cls(Events(token_L, feature_L), act_L, width + 1, *real_BT.shape)

    def take(self, index: Tensor) -> Active:
        """These of the active features, in this order."""
        events = Events(self.events.token_L[index], self.events.feature_L[index])
        return replace(self, events=events, act_L=self.act_L.index_select(0, index))

    def by_feature(self) -> Active:
        """Ordered by feature, then token."""
        return self.take(self.events.feature_L.argsort(stable=True))

    @property
    def fired(self) -> Tensor:
        """The features that are active anywhere, ascending."""
        return self.events.feature_L[self.act_L > 0].unique()

    @property
    def l0(self) -> Tensor:
        """Active features a token, the bias not counted: a mean over the tokens that have the bias."""
        bias = (self.events.feature_L == self.n_features - 1).sum()
        return ((self.act_L.detach() > 0).sum() - bias) / bias

    def dense(self) -> Tensor:
        """With their zeros, [B, T, F + 1]."""
        out = self.act_L.new_zeros(self.batch * self.length, self.n_features)
        out[self.events.token_L, self.events.feature_L] = self.act_L
        return out.view(self.batch, self.length, -1)


def read_width(side: SparseTranscoder, features: Tensor | None) -> int:
    """How many features are encoded where these are wanted: all where that is no more work, and for TopK's choice."""
    few = features is not None and side.activation != "topk" and 2 * len(features) < side.width
    return len(features) if few else side.width  # type: ignore[arg-type]
