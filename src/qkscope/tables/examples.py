"""What features and pairs do in text: their statistics and examples, gathered in one pass over held-out text.

What is notable:
- Memory does not grow with the text, and parts of it that are gathered apart merge into what one pass gives, whatever
  the order (sums to the rounding of float64).
- An example's position counts the tokens of its document before it, BOS not among them (`Batch.positions`).

Shapes: B sequences, T positions, F features of a side, P kept pairs, N heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..data.sequences import Batch
from ..decomposition import SIDES, Decomposition
from ..files import write_atomic
from ..pattern import AttentionInputs
from .columns import array, lists
from .feature_examples import HISTOGRAM_EDGES, FeatureExamples
from .firing import Firing, blocks
from .pair_examples import PairExamples

TOP_HEADS = 3
GROUP_ROWS = 1 << 12  # rows of a row group, so that one feature's are read without the rest: in about 20 ms


class Examples:
    """Statistics and examples of every feature and examples of every kept pair of a decomposition.

    `most` strongest examples a feature and `drawn` from each range of its activations, with `window` tokens to either
    side; `pairs` places a pair, with `pair_window`.
    """

    def __init__(
        self,
        dec: Decomposition,
        most: int,
        window: int = 16,
        *,
        drawn: int = 0,
        pairs: int = 0,
        pair_window: int = 8,
    ) -> None:
        self.dec = dec
        self.options = (most, window, drawn, pairs, pair_window)
        device = dec.query.W_enc.device
        self.sides = {
            side: FeatureExamples(transcoder.width, most, drawn, window, salt, device)
            for salt, (side, transcoder) in enumerate(zip(SIDES, (dec.query, dec.key), strict=True))
        }
        self.pairs = PairExamples(dec, pairs, pair_window)

    def __getstate__(self) -> dict[str, Any]:
        """What was gathered; the decomposition stays where it is. The copy can be merged, and no more."""
        return {**vars(self), "dec": None}

    @torch.no_grad()
    def add(self, batch: Batch, acts: dict[str, Tensor], inputs: AttentionInputs | None = None) -> None:
        """Take in one batch: `acts` gives each side's activations [B, T, F], whatever they are at padding, and `inputs`
        what the attention was handed; without it, pairs get no examples."""
        batch = batch.to(self.dec.query.W_enc.device)
        firing: dict[str, Firing] = {}
        for side, gathered in self.sides.items():
            parts = []
            for here, acts_BTf, fires in blocks(acts[side], batch.real_BT):
                gathered.add(batch, here, acts_BTf, fires)
                parts.append(fires)
            firing[side] = Firing.cat(parts)
            gathered.add_whole(batch, firing[side])
        if inputs is not None:
            self.pairs.add(batch, inputs, acts, firing["query"], firing["key"])

    @torch.no_grad()
    def merge(self, other: Examples) -> None:
        """Take in what another gathered of the same decomposition, with the same options, on other text."""
        if self.options != other.options or not torch.equal(self.pairs.index_P3.cpu(), other.pairs.index_P3.cpu()):
            raise ValueError(
                f"examples of another decomposition or with other options: {other.options}, {self.options}"
            )
        for side in SIDES:
            self.sides[side].merge(other.sides[side])
        self.pairs.merge(other.pairs)

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Write features.parquet, examples.parquet and pair_examples.parquet into a layer's folder."""
        texts = token_texts(tokenizer, self.used_tokens())
        edges = {"histogram_edges": json.dumps(HISTOGRAM_EDGES)}
        tables = {
            "features": pa.concat_tables([self._features(side, texts) for side in SIDES]).replace_schema_metadata(
                edges
            ),
            "examples": pa.concat_tables([self._examples(side, texts) for side in SIDES]),
            "pair_examples": self.pairs.table(texts),
        }
        for name, table in tables.items():
            write_atomic(
                folder / f"{name}.parquet", lambda path, t=table: pq.write_table(t, path, row_group_size=GROUP_ROWS)
            )

    def used_tokens(self) -> list[int]:
        """The tokens that the tables hold, in order."""
        return sorted(self.pairs.used_tokens().union(*(side.used_tokens() for side in self.sides.values())))

    def _features(self, side: str, texts: dict[int, str]) -> pa.Table:
        """A row for each feature, dead ones included."""
        width = len(self.sides[side].fired_F)
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
                "feature": array(torch.arange(width), pa.int32()),
                **self.sides[side].statistics(texts),
                "top_heads": _top_heads(by_head[:width], reads[:width]),
                "pairs": array(in_pairs, pa.int32()),
                "importance": array(by_head[:width].sum(1), pa.float32()),
            }
        )

    def _examples(self, side: str, texts: dict[int, str]) -> pa.Table:
        """A row for each kept example, by feature, range and rank; `position` is its token's in the document."""
        columns = self.sides[side].examples(texts)
        return pa.table({"side": pa.array([side] * len(columns["feature"]), pa.string()), **columns})


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
    return lists(counts, array(kept, pa.int16()))
