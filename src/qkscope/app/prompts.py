"""Prompts traced and edited for the live view: a run opened once, and what it says of a prompt as plain values.

What is notable:
- Patterns travel as fixed-point numbers (steps of 1/65535), of a causal layer the lower triangle alone: 512 tokens are
  0.3 MB a pattern.
- The last few prompts are kept, so that a click on an edge computes one row's terms and nothing else.
- Nothing here is safe to call from two threads at once: a model under an intervention is one model.

Shapes: T positions (Q as a query, K as a key), N heads, P kept pairs, S terms of one account, V words.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..attention import AttentionSite
from ..config import Config
from ..data.prompt_sets import READY, ready_set
from ..data.prompts import ask
from ..decomposition import Decomposition
from ..errors import UserError
from ..explain.account import Account
from ..explain.intervene import Feature, Pair, Part
from ..explain.names import FeatureNames
from ..explain.opening import open_layers
from ..explain.trace import KINDS, Trace, prompt_tokens, trace
from ..kernels.row_kl import row_entropy, row_kl
from ..tables.examples import token_texts

MOST_TOKENS = 512  # of a prompt
KEPT = 4  # prompts that are kept; of 512 tokens in a layer of 12 heads about 50 MB each
TERMS = 40  # of an account, that are named; the others are summed
NEXT = 10  # most probable next tokens
THUMBNAIL = 48  # cells to a side, at most
TRIED = 50  # prompts of a ready set, before it counts as one that the tokenizer does not take
STEPS = 65535  # of a pattern's fixed-point numbers


class Ask(Config):
    """A prompt in one layer."""

    prompt: str
    layer: int


class AskTrace(Ask):
    """What the heads do on it; `head` is the one whose patterns are sent."""

    head: int = 0


class AskEdge(Ask):
    """The account of one edge; without a key, of the most attended one."""

    head: int
    query: int = -1
    key: int | None = None
    against: tuple[int, ...] | None = Field(default=None, min_length=1, max_length=MOST_TOKENS)


class EditedPart(Config):
    """What is multiplied by `scale` (0: ablated) in a layer (empty: the one asked for), in one head or in all."""

    head: int | None = None
    layer: int | None = None
    scale: float = Field(default=0.0, ge=-100, le=100, allow_inf_nan=False)


class PairPart(EditedPart):
    """A pair."""

    query: int
    key: int

    def part(self) -> Part:
        return Pair(self.query, self.key, self.head)


class FeaturePart(EditedPart):
    """A feature."""

    side: Literal["query", "key"]
    feature: int

    def part(self) -> Part:
        return Feature(self.side, self.feature, self.head)


class AskEdit(Ask):
    """The pattern of one head, and the next token after one position, with these parts multiplied."""

    head: int
    position: int = -1
    edits: tuple[PairPart | FeaturePart, ...] = Field(default=(), max_length=200)


@dataclass(frozen=True)
class Opened:
    """One layer."""

    dec: Decomposition
    site: AttentionSite
    names: FeatureNames
    rank_P: Tensor
    """int64: each pair's rank by importance, as pairs.parquet has it."""
    predicts: bool
    """Whether the model predicts tokens. Found when it is opened: no site can be asked while another is open."""

    def places(self, head: int, query_S: Tensor, key_S: Tensor) -> Tensor:
        """Where pairs of a head stand among the kept ones, int64 [S]."""
        pairs = self.dec.pairs
        here = pairs.of_head(head)
        width_q, width_k = pairs.n_query + 1, pairs.n_key + 1
        code_P = pairs.query_P[here] * width_k + pairs.key_P[here]  # sorted, as the pairs are
        return here.start + torch.searchsorted(code_P, query_S % width_q * width_k + key_S % width_k)


class Prompts:
    """A finished run whose layers are opened when they are first needed; `folder` as in `open_layers`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self._traced = lru_cache(KEPT)(self._traced_anew)
        self._heads = lru_cache(KEPT)(self._heads_anew)
        self._next_plainly = lru_cache(64)(lambda prompt, position: self._next(prompt, position))

    @cached_property
    def layers(self) -> dict[int, Opened]:
        """The run's layers by number; opening them takes seconds."""
        found = {}
        for dec, site in open_layers(self.folder, device=self.device):
            names = FeatureNames(dec.folder or Path())
            names.of("query", 0)  # reads its files now rather than at the first click
            rank_P = dec.importance_P.argsort(descending=True, stable=True).argsort()
            found[dec.layer] = Opened(dec, site, names, rank_P, site.has_head)
        return found

    def examples(self) -> dict[str, Any]:
        """The layers with their heads' importance, and a prompt of each ready set that the tokenizer takes."""
        layers = []
        for number, one in self.layers.items():
            worth_N = torch.zeros(one.dec.shape.N, device=self.device)
            worth_N.index_add_(0, one.dec.pairs.head_P, one.dec.importance_P.detach())
            layers.append({"layer": number, "importance": worth_N.tolist()})
        ready = ((name, self._example(name)) for name in READY)
        prompts = [{"name": name, "prompt": prompt} for name, prompt in ready if prompt is not None]
        return {"layers": layers, "prompts": prompts, "most_tokens": self.most_tokens}

    @property
    def most_tokens(self) -> int:
        positions = getattr(self._any.site.model.config, "max_position_embeddings", None)
        return min(MOST_TOKENS, positions or MOST_TOKENS)

    def trace(self, asked: AskTrace) -> dict[str, Any]:
        """Tokens, a thumbnail of every head, the patterns of one, and the next token after the last."""
        one = self._traced(asked.prompt, asked.layer).of_head(asked.head)
        site, tokens_T = self.layers[asked.layer].site, self._tokens(asked.prompt)[0].tolist()
        special = set(site.tokenizer.all_special_ids)
        return {
            "layer": asked.layer,
            "head": asked.head,
            "tokens": one.tokens,
            "special": [i for i, token in enumerate(tokens_T) if token in special],
            "heads": self._heads(asked.prompt, asked.layer),
            "causal": _causal(one),
            "pattern": {kind: _packed(pattern, one) for kind, pattern in one.pattern.items()},
            "next": self._most_probable(asked.prompt, -1),
        }

    def edge(self, asked: AskEdge) -> dict[str, Any]:
        """The account of one score, and of why there and not elsewhere (None where nothing else is attended to)."""
        one = self._traced(asked.prompt, asked.layer).of_head(asked.head)
        i = one.position(asked.query, "query")
        pattern = one.pattern
        j = int(pattern["true"][i, : len(one.tokens)].argmax()) if asked.key is None else one.position(asked.key, "key")
        score = one.terms(i, j)
        acts_q, acts_k = one.acts
        at_i, value_ST = one.row(i)

        def fired(query_S: Tensor, key_S: Tensor, index_S: Tensor) -> dict[str, Tensor]:
            # The bias is -1 and stands last, always active.
            return {"query_activation": acts_q[i, query_S], "key_activation": acts_k[j, key_S]}

        def here(query_S: Tensor, key_S: Tensor, index_S: Tensor) -> dict[str, Tensor]:
            return {"here": value_ST[torch.searchsorted(at_i, index_S), j]}  # the term at the key; less it, there

        why = None
        try:
            found = one.why(i, j, asked.against)
            against = [{"key": c, "weight": w} for c, w in zip(found.against, found.weights, strict=True)]
            why = {"against": against, **self._account(one, found.account, here)}
        except UserError:
            if asked.against:
                raise
        return {
            "query": i,
            "key": j,
            "pattern": {kind: float(pattern[kind][i, j]) for kind in KINDS},
            "score": self._account(one, score, fired),
            "why": why,
        }

    def edit(self, asked: AskEdit) -> dict[str, Any]:
        """The head's pattern under an edit of all layers at once (None without one), and the next token after a
        position, before and after."""
        one = self._traced(asked.prompt, asked.layer).of_head(asked.head)
        position = one.position(asked.position, "position")
        if not asked.edits:
            return {"head": asked.head, "pattern": None, "next": self._most_probable(asked.prompt, position)}
        by_layer: dict[int, dict[Part, float]] = {asked.layer: {}}
        for named in asked.edits:
            layer, part = asked.layer if named.layer is None else named.layer, named.part()
            factors = by_layer.setdefault(self._layer(layer).dec.layer, {})
            if part in factors:
                raise UserError(f"{part} is named twice; name each part once")
            factors[part] = named.scale
        with ExitStack() as stack:
            watched = {}
            for layer, factors in by_layer.items():
                opened = self.layers[layer]
                watched[layer] = stack.enter_context(opened.site.intervene(opened.dec, scale=factors))
            edited_V = self._next(asked.prompt, position)
        pattern_BNQK = watched[asked.layer].pattern_BNQK
        return {
            "head": asked.head,
            "pattern": _packed(pattern_BNQK[0, asked.head], one),
            "next": self._most_probable(asked.prompt, position, edited_V),
        }

    # What is behind them

    @property
    def _any(self) -> Opened:
        return next(iter(self.layers.values()))

    def _layer(self, layer: int) -> Opened:
        if layer not in self.layers:
            raise UserError(f"layer {layer}: the run has layers {', '.join(map(str, self.layers))}")
        return self.layers[layer]

    def _tokens(self, prompt: str) -> Tensor:
        """The prompt's tokens, int64 [1, T]; `UserError` for one that is not text, too short or too long."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt holds half a character at {error.start}; send whole ones") from None
        tokens_BT = prompt_tokens(self._any.dec, self._any.site, prompt)
        if tokens_BT.shape[1] > MOST_TOKENS:
            raise UserError(f"the prompt has {tokens_BT.shape[1]} tokens, and at most {MOST_TOKENS} are traced here")
        return tokens_BT

    def _traced_anew(self, prompt: str, layer: int) -> Trace:
        opened = self._layer(layer)
        self._tokens(prompt)
        one = trace(opened.dec, opened.site, prompt)
        # Activations and scores, which all heads share, are worked out before any head is made of it.
        _ = one.acts, one.scores
        return one

    def _heads_anew(self, prompt: str, layer: int) -> list[dict[str, Any]]:
        """Each head's true pattern as a thumbnail, and how far the pruned map's is from it (mean KL of a query row)."""
        first = self._traced(prompt, layer)
        length = len(first.tokens)
        size = min(THUMBNAIL, length)
        heads = []
        for head in range(first.dec.shape.N):
            log_pattern = first.of_head(head).log_pattern
            true = log_pattern["true"]
            kl = row_kl(log_pattern["pruned"], true.exp(), row_entropy(true)).mean()
            cells = F.adaptive_max_pool2d(true.exp()[None, :, :length], size)[0]  # a mean would hide thin lines
            thumbnail = _base64((cells * 255).round().to(torch.uint8))
            heads.append({"head": head, "kl": float(kl), "size": size, "thumbnail": thumbnail})
        return heads

    @torch.no_grad()
    def _next(self, prompt: str, position: int) -> Tensor | None:
        """Probabilities of the next token after a position, [V], in the model as it is now; None where it predicts
        none."""
        tokens_BT = self._tokens(prompt)
        output = self._any.site._forward(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        if not self._any.predicts:
            return None
        return output.logits[0, position].float().softmax(-1).cpu()

    def _most_probable(self, prompt: str, position: int, edited_V: Tensor | None = None) -> dict[str, Any] | None:
        """The most probable next tokens, and with `edited_V` also those that are so after the edit, with both
        probabilities."""
        length = self._tokens(prompt).shape[1]
        plain_V = self._next_plainly(prompt, position % length)
        if plain_V is None:
            return None
        shown = [plain_V] if edited_V is None else [plain_V, edited_V]
        ids = dict.fromkeys(i for p in shown for i in p.topk(min(NEXT, len(p))).indices.tolist())
        texts = token_texts(self._any.site.tokenizer, sorted(ids))
        names = ("probability",) if edited_V is None else ("probability", "edited")
        rows = [{"token": texts[i], **{n: float(p[i]) for n, p in zip(names, shown, strict=True)}} for i in ids]
        return {"position": position % length, "tokens": rows}

    def _example(self, name: str) -> str | None:
        """The first prompt of a ready set that the tokenizer takes."""
        one = self._any
        whole = ready_set(name)
        for prompt in islice(whole.prompts, TRIED):
            try:
                ask(replace(whole, prompts=[prompt]), one.site.tokenizer, one.dec.config.data, 1, self.most_tokens)
            except UserError:
                continue
            return prompt.text
        return None

    def _account(self, one: Trace, account: Account, more: Callable[..., dict[str, Tensor]]) -> dict[str, Any]:
        """An account's sums, its largest terms with their pairs' numbers, and what the others come to.

        `more` makes further columns of the terms' query features, key features and places among the kept pairs.
        """
        opened = self.layers[one.dec.layer]
        query_S, key_S = account.query_S[:TERMS], account.key_S[:TERMS]
        index_S = opened.places(one.head, query_S, key_S)
        columns = {
            "query": query_S,
            "key": key_S,
            "value": account.value_S[:TERMS],
            "strength": one.dec.strength_P[index_S],
            "importance": one.dec.importance_P[index_S],
            "rank": opened.rank_P[index_S],
            **more(query_S, key_S, index_S),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        terms = [dict(zip(columns, row, strict=True)) for row in rows]
        for term in terms:
            term |= {f"{side}_name": opened.names.of(side, term[side]) for side in ("query", "key")}
        left = account.value_S[TERMS:]
        return {
            "total": account.total,
            "pairs": account.pairs,
            "count": len(account),
            "rest": dict(account.rest),
            "fewest": account.fewest(),
            "terms": terms,
            "smaller": {"count": len(left), "value": float(left.double().sum())},
        }


def _sink(one: Trace) -> bool:
    return one.inputs.rule.sink_N is not None


def _causal(one: Trace) -> bool:
    return not bool(one.inputs.rule.visible_BQK[0].triu(1).any())


def _packed(pattern_QK: Tensor, one: Trace) -> dict[str, str | None]:
    """A pattern as base64 of little-endian uint16 in steps of 1/65535: the rows of its lower triangle where the layer
    is causal, else whole; and the column of a learned sink."""
    length = len(one.tokens)
    steps = (pattern_QK.clamp(0, 1) * STEPS).round().to(torch.int32).cpu()
    cells = steps[:, :length]
    if _causal(one):
        i, j = torch.tril_indices(length, length)
        cells = cells[i, j]
    sink = steps[:, length:] if _sink(one) else None
    return {"cells": _base64(cells), "sink": None if sink is None else _base64(sink)}


def _base64(whole: Tensor) -> str:
    numbers = whole.cpu().numpy()
    return base64.b64encode((numbers if numbers.dtype == "uint8" else numbers.astype("<u2")).tobytes()).decode()
