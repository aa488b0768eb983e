"""What each feature fires on: its statistics and its strongest examples, gathered in one pass over held-out text.

What is notable:
- At most one example a sequence, so that one odd text cannot fill a feature's list.
- Memory does not grow with the text: for each feature the best `most` so far, as token ids and activations of fixed
  width. A batch is merged by one sort of [F, most + B] a side, without a loop over features; of equal activations the
  earlier one stays.
- The first token of a sequence (BOS) counts like any other: "attend to BOS" is a feature that layers do have.
- An example's position counts the tokens of its document before it, BOS not among them (`Batch.positions`).

Shapes: B sequences, T positions, F features of a side, M examples a feature, W = 2·window + 1 tokens of a window, P
kept pairs, N heads, R rows of a table, E examples that a batch adds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..data.sequences import Batch
from ..decomposition import SIDES, Decomposition
from ..files import write_atomic

TOP_HEADS = 3
POSITION_BINS = 24  # of places in a sequence, each twice as wide as the one before: 0, 1-2, 3-6 ...
NO_TOKEN = -1  # outside of the sequence


class _Side:
    """Statistics and best examples of one side's features so far; ranks are in order, unused ones have activation 0."""

    def __init__(self, width: int, most: int, window: int, device: torch.device) -> None:
        self.most, self.reach = most, torch.arange(-window, window + 1, device=device)
        self.tokens = 0
        self.fired_F = torch.zeros(width, dtype=torch.int64, device=device)
        self.sum_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.max_F = torch.zeros(width, device=device)
        self.square_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.bin_sum_FR = torch.zeros(width, POSITION_BINS, dtype=torch.float64, device=device)
        self.bin_tokens_R = torch.zeros(POSITION_BINS, dtype=torch.float64, device=device)
        self.best_FM = torch.zeros(width, most, device=device)
        self.place_FM2 = torch.zeros(width, most, 2, dtype=torch.int64, device=device)  # document, position in it
        self.tokens_FMW = torch.full((width, most, len(self.reach)), NO_TOKEN, dtype=torch.int32, device=device)
        self.acts_FMW = torch.zeros(width, most, len(self.reach), device=device)

    def add(self, batch: Batch, acts_BTF: Tensor) -> None:
        """Count one batch, whose activations are zero at padding."""
        self.tokens += batch.n_tokens
        self.fired_F += (acts_BTF > 0).float().sum(1).long().sum(0)  # a bool tensor's own sum is three times slower
        by_position_FT = acts_BTF.double().sum(0).T
        self.sum_F += by_position_FT.sum(1)
        self.square_F += acts_BTF.double().square().sum((0, 1))
        bin_T = (torch.arange(acts_BTF.shape[1], device=acts_BTF.device) + 1).log2().long().clamp(max=POSITION_BINS - 1)
        self.bin_sum_FR.index_add_(1, bin_T, by_position_FT)
        self.bin_tokens_R.index_add_(0, bin_T, batch.real_BT.double().sum(0))
        largest_BF, at_BF = acts_BTF.max(1)
        self.max_F = torch.maximum(self.max_F, largest_BF.amax(0))
        if self.most:
            self._merge(batch, acts_BTF, largest_BF, at_BF)

    def by_position(self) -> Tensor:
        """Share of an activation's variance over tokens that lies between positions, [F]."""
        mean_F = self.sum_F / max(self.tokens, 1)
        whole = self.square_F - self.tokens * mean_F.square()
        between = (self.bin_sum_FR.square() / self.bin_tokens_R.clamp(min=1)).sum(1) - self.tokens * mean_F.square()
        return (between / whole.clamp(min=1e-30)).clamp(0, 1)

    def _merge(self, batch: Batch, acts_BTF: Tensor, largest_BF: Tensor, at_BF: Tensor) -> None:
        """Keep the best of what stood and of each sequence's largest activation."""
        both = torch.cat([self.best_FM, largest_BF.T], 1)
        values, order = both.sort(dim=1, descending=True, stable=True)
        best, order = values[:, : self.most], order[:, : self.most]
        feature_E, rank_E = ((order >= self.most) & (best > 0)).nonzero(as_tuple=True)
        if not len(feature_E):
            return
        stood = order.clamp(max=self.most - 1)[..., None]
        self.best_FM = best
        self.place_FM2 = self.place_FM2.take_along_dim(stood, 1)
        self.tokens_FMW = self.tokens_FMW.take_along_dim(stood, 1)
        self.acts_FMW = self.acts_FMW.take_along_dim(stood, 1)
        row_E = order[feature_E, rank_E] - self.most
        at_E = at_BF[row_E, feature_E]
        into = feature_E, rank_E
        self.place_FM2[into] = torch.stack([batch.document_B[row_E], batch.positions(row_E, at_E)], 1)
        rows, span_EW = row_E[:, None], at_E[:, None] + self.reach
        inside = (span_EW >= 0) & (span_EW < acts_BTF.shape[1])
        span_EW = span_EW.clamp(0, acts_BTF.shape[1] - 1)
        inside &= batch.real_BT[rows, span_EW]
        self.tokens_FMW[into] = batch.tokens_BT[rows, span_EW].int().masked_fill(~inside, NO_TOKEN)
        self.acts_FMW[into] = acts_BTF[rows, span_EW, feature_E[:, None]].masked_fill(~inside, 0)


class Examples:
    """Statistics and the strongest `most` examples of every feature, each with `window` tokens to either side."""

    def __init__(self, dec: Decomposition, most: int, window: int = 16) -> None:
        self.dec, self.most, self.window = dec, most, window
        device = dec.query.W_enc.device
        self._sides = {
            s: _Side(t.width, most, window, device) for s, t in zip(SIDES, (dec.query, dec.key), strict=True)
        }

    @torch.no_grad()
    def add(self, batch: Batch, acts: dict[str, Tensor]) -> None:
        """Take in one batch: `acts` gives each side's activations [B, T, F], whatever they are at padding."""
        batch = batch.to(self.dec.query.W_enc.device)
        for side, gathered in self._sides.items():
            gathered.add(batch, acts[side].detach().float().masked_fill(~batch.real_BT[..., None], 0))

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Write features.parquet and examples.parquet into a layer's folder."""
        features, examples = self.feature_table(), self.example_table(tokenizer)
        write_atomic(folder / "features.parquet", lambda path: pq.write_table(features, path))
        write_atomic(folder / "examples.parquet", lambda path: pq.write_table(examples, path))

    def feature_table(self) -> pa.Table:
        """A row for each feature of both sides, dead ones included."""
        return pa.concat_tables([self._features(side) for side in SIDES])

    def _features(self, side: str) -> pa.Table:
        got = self._sides[side]
        width = len(got.fired_F)
        pairs = self.dec.pairs
        feature_P = (pairs.query_P if side == "query" else pairs.key_P).cpu()
        in_pairs = torch.bincount(feature_P, minlength=width + 1)[:width]  # the last one is the side's bias
        by_head = torch.zeros(width + 1, pairs.n_heads, dtype=torch.float64)
        importance_P = self.dec.importance_P.detach().cpu().double()
        by_head.index_put_((feature_P, pairs.head_P.cpu()), importance_P, accumulate=True)
        reads = torch.zeros(width + 1, pairs.n_heads, dtype=torch.bool)
        reads[feature_P, pairs.head_P.cpu()] = True
        return pa.table(
            {
                "side": pa.array([side] * width, pa.string()),
                "feature": _array(torch.arange(width), pa.int32()),
                "density": _array(got.fired_F / max(got.tokens, 1), pa.float32()),
                "mean_activation": _array(got.sum_F / got.fired_F.clamp(min=1), pa.float32()),
                "max_activation": _array(got.max_F, pa.float32()),
                "live": _array(got.fired_F > 0, pa.bool_()),
                "top_heads": _top_heads(by_head[:width], reads[:width]),
                "pairs": _array(in_pairs, pa.int32()),
                "importance": _array(by_head[:width].sum(1), pa.float32()),
                "by_position": _array(got.by_position(), pa.float32()),
            }
        )

    def example_table(self, tokenizer: Any) -> pa.Table:
        """A row for each kept example, by side, feature and rank; `position` is its token's in the document."""
        used = torch.cat([s.tokens_FMW.flatten() for s in self._sides.values()]).unique().tolist()
        texts = token_texts(tokenizer, [token for token in used if token != NO_TOKEN])
        return pa.concat_tables([self._examples(side, texts) for side in SIDES])

    def _examples(self, side: str, texts: dict[int, str]) -> pa.Table:
        got = self._sides[side]
        feature_R, rank_R = (got.best_FM > 0).nonzero(as_tuple=True)
        tokens_RW = got.tokens_FMW[feature_R, rank_R].cpu()
        document_R, position_R = got.place_FM2[feature_R, rank_R].cpu().unbind(1)
        inside = tokens_RW != NO_TOKEN
        strings = pa.array([texts[token] for token in tokens_RW[inside].tolist()], pa.string())
        acts = _array(got.acts_FMW[feature_R, rank_R].cpu()[inside], pa.float32())
        return pa.table(
            {
                "side": pa.array([side] * len(feature_R), pa.string()),
                "feature": _array(feature_R, pa.int32()),
                "rank": _array(rank_R, pa.int32()),
                "activation": _array(got.best_FM[feature_R, rank_R], pa.float32()),
                "document": _array(document_R, pa.int64()),
                "position": _array(position_R, pa.int32()),
                "center": _array(inside[:, : self.window].sum(1), pa.int32()),
                "tokens": _lists(inside.sum(1), strings),
                "activations": _lists(inside.sum(1), acts),
            }
        )


def token_texts(tokenizer: Any, ids: list[int]) -> dict[int, str]:
    """Each token as the text it adds behind other text; special tokens by name.

    Decoded alone, a token of many tokenizers loses the space before it, so each is decoded behind an anchor.
    """
    special = set(tokenizer.all_special_ids)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = _decode(tokenizer, anchor)
    texts = {}
    for token in ids:
        text = _decode(tokenizer, [*anchor, token])
        if token in special or not text.startswith(before):
            texts[token] = str(tokenizer.convert_ids_to_tokens(token))
        else:
            texts[token] = text[len(before) :]
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _top_heads(importance_FN: Tensor, reads_FN: Tensor) -> pa.Array:
    """For each feature the heads that its kept pairs matter to most, at most `TOP_HEADS`."""
    ranked = importance_FN.masked_fill(~reads_FN, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    counts = reads_FN.sum(1).clamp(max=TOP_HEADS)
    ranked = ranked[:, :TOP_HEADS]
    kept = ranked[torch.arange(ranked.shape[1]) < counts[:, None]]
    return _lists(counts, _array(kept, pa.int16()))


def _array(values: Tensor, kind: pa.DataType) -> pa.Array:
    return pa.array(values.cpu().numpy()).cast(kind, safe=False)


def _lists(lengths_R: Tensor, values: pa.Array) -> pa.Array:
    """A list column from its flat values."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_R.cpu().cumsum(0)])
    return pa.ListArray.from_arrays(_array(offsets, pa.int32()), values)
