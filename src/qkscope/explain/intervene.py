"""Interventions inside the QK circuit: features and pairs ablated, scaled or added; values stay as they are.

    with site.intervene(dec, ablate=[Pair(412, 87, head=0), Feature("key", 3)]) as watched:
        logits = site.model(**tokens).logits
    watched.pattern_BNQK, watched.before_BNQK       # of the last forward pass

On what the edit acts is `base`:

- "model": the model's own scores. What a pair adds to them is taken off (or a multiple of it put on); a feature's
  decoder row is taken off the true queries or keys, and so off every score that they take part in.
- "kept": the pruned map's scores, "all": the transcoders'.

An edit of several layers is several of these contexts, one inside the other. Generation needs `use_cache=False`: with
cached keys the layer's input at earlier positions is gone, and with it the key features.

Shapes: B sequences, T positions (Q as a query, K as a key), N query heads, G key-value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention import AttentionSite
from ..decomposition import Decomposition
from ..errors import UserError
from ..kernels.row_kl import exp
from ..pairs.pair_map import Pairs, pair_scores, rows, with_bias
from ..pattern import AttentionInputs

Base = Literal["model", "kept", "all"]


@dataclass(frozen=True)
class Pair:
    """A query feature and a key feature (-1: the side's bias), in one head or (None) in all of them."""

    query: int
    key: int
    head: int | None = None


@dataclass(frozen=True)
class Feature:
    """A feature of one side, in one head or (None) in all of them."""

    side: Literal["query", "key"]
    feature: int
    head: int | None = None


Part = Pair | Feature


@dataclass
class Edit:
    """What is done to one decomposition's circuit, checked."""

    dec: Decomposition
    base: Base
    factor_P: Tensor
    """What each kept pair is multiplied by, [P]."""
    added: Pairs
    """Pairs that are added ..."""
    added_P: Tensor
    """... with these strengths."""
    factors: dict[str, Tensor]
    """What each feature's activation is multiplied by, by side, [N, F]."""
    offsets: dict[str, Tensor]
    """And what is then added to it."""

    @classmethod
    def of(
        cls,
        dec: Decomposition,
        ablate: Sequence[Part] = (),
        scale: Mapping[Part, float] | None = None,
        add: Mapping[Part, float] | None = None,
        base: Base = "model",
    ) -> Edit:
        """An edit of these parts: `ablate` multiplies by 0, `scale` by a number, `add` adds to a feature's activation,
        or a pair of this strength (with a rotary embedding: a factor on M(i-j)).

        `UserError` for a feature or head that is not there, a part named twice, and a pair to ablate or scale that the
        map does not keep.
        """
        if base not in ("model", "kept", "all"):
            raise UserError(f"base={base!r}: choose 'model', 'kept' or 'all'")
        factors = {part: 0.0 for part in ablate}
        if len(factors) < len(ablate) or factors.keys() & (scale or {}).keys():
            raise UserError("a part is named twice among those to ablate and to scale; name each once")
        factors |= scale or {}
        device, pairs = dec.query.W_enc.device, dec.pairs
        widths = {"query": dec.query.width, "key": dec.key.width}
        by_side = {s: torch.ones(dec.shape.N, w, device=device) for s, w in widths.items()}
        offsets = {s: torch.zeros(dec.shape.N, w, device=device) for s, w in widths.items()}
        factor_P = torch.ones(len(pairs), device=device)
        for part, factor in factors.items():
            _require(dec, part)
            if isinstance(part, Feature):
                by_side[part.side][_heads(part), part.feature] *= factor
                continue
            here = (pairs.query_P == part.query % (pairs.n_query + 1)) & (pairs.key_P == part.key % (pairs.n_key + 1))
            here &= (pairs.head_P == part.head) | (part.head is None)
            if not bool(here.any()):
                raise UserError(f"{part}: the map does not keep this pair; choose one of its pairs (pairs.parquet)")
            factor_P[here] *= factor
        new: list[tuple[int, int, int, float]] = []
        for part, value in (add or {}).items():
            _require(dec, part)
            if isinstance(part, Feature):
                offsets[part.side][_heads(part), part.feature] += value
            else:
                heads = range(dec.shape.N) if part.head is None else (part.head,)
                new += [(part.query % (pairs.n_query + 1), part.key % (pairs.n_key + 1), n, value) for n in heads]
        index = torch.tensor([row[:3] for row in new], dtype=torch.int64, device=device).reshape(-1, 3)
        added, order = Pairs.sorted(index[:, 0], index[:, 1], index[:, 2], pairs.n_query, pairs.n_key, dec.shape.N)
        added_P = torch.tensor([row[3] for row in new], device=device)[order]
        return cls(dec, base, factor_P, added, added_P, by_side, offsets)

    @torch.no_grad()
    def log_pattern(self, inputs: AttentionInputs) -> Tensor:
        """Log-pattern under the edit, [B, N, Q, K] (one more column with a learned sink)."""
        bare = replace(inputs, rule=replace(inputs.rule, softcap=None))
        scores = self._of_map(bare) if self.base == "kept" else self._of_vectors(bare)
        rule = inputs.rule
        return rule.masked(rule.cap(scores)).log_softmax(-1)

    def _of_vectors(self, bare: AttentionInputs) -> Tensor:
        """Scores of the true or the transcoders' queries and keys with what the edit adds to them."""
        dec, x = self.dec, self.dec.x_of(bare)
        q, k = bare.q_BTNH, bare.k_BTGH
        if self.base == "all":
            q, k = dec.query(x).view(q.shape), dec.key(x).view(k.shape)
        k = k.repeat_interleave(
            dec.shape.N // dec.shape.G, dim=2
        )  # an edit of one head's keys leaves its group's alone
        q, k = q + self._moved("query", x), k + self._moved("key", x)
        return bare.rule.scores(q, k) + self._of_pairs(bare, self.factor_P - 1)

    def _of_map(self, bare: AttentionInputs) -> Tensor:
        """Scores of the kept pairs with edited strengths and activations; heads that are edited alike go together."""
        dec, x = self.dec, self.dec.x_of(bare)
        acts_q, acts_k = dec.query.encode(x), dec.key.encode(x)
        strength = dec.strength_P * self.factor_P
        out = self._of_pairs(bare, torch.zeros_like(strength))  # what is added
        settings = [torch.cat([self.factors[s], self.offsets[s]], 1) for s in ("query", "key")]
        _, group_N = torch.cat(settings, 1).unique(dim=0, return_inverse=True)
        for group in group_N.unique():
            heads = (group_N == group).nonzero()[:, 0]
            some = torch.isin(dec.pairs.head_P, heads).nonzero()[:, 0]
            first = int(heads[0])
            edited = [
                with_bias(acts * self.factors[s][first] + self.offsets[s][first])
                for s, acts in (("query", acts_q), ("key", acts_k))
            ]
            scores = self._scores(bare, dec.pairs.take(some), strength[some], *edited)
            out[:, heads] += scores[:, heads]
        return out

    def _of_pairs(self, bare: AttentionInputs, strength_share_P: Tensor) -> Tensor:
        """What these shares of the kept pairs, and the added pairs, come to at the true activations."""
        dec, x = self.dec, self.dec.x_of(bare)
        some = strength_share_P.nonzero()[:, 0]
        acts = with_bias(dec.query.encode(x)), with_bias(dec.key.encode(x))
        changed = self._scores(bare, dec.pairs.take(some), (dec.strength_P * strength_share_P)[some], *acts)
        return changed + self._scores(bare, self.added, self.added_P, *acts)

    def _scores(self, bare: AttentionInputs, pairs: Pairs, strength: Tensor, acts_q: Tensor, acts_k: Tensor) -> Tensor:
        shape = self.dec.shape
        sides = rows(self.dec.query, shape.N), rows(self.dec.key, shape.G)
        return pair_scores(pairs, strength, acts_q, acts_k, *sides, bare.rule)

    def _moved(self, side: str, x_BTD: Tensor) -> Tensor:
        """What the edit adds to a side's vectors, [B, T, N, H]."""
        dec, factors, offsets = self.dec, self.factors[side], self.offsets[side]
        transcoder = dec.query if side == "query" else dec.key
        touched = ((factors != 1) | (offsets != 0)).any(0).nonzero()[:, 0]
        acts = transcoder.encode(x_BTD)[..., touched]
        row_FnH = transcoder.W_dec[touched].unflatten(1, (-1, dec.shape.H))
        row_FnH = row_FnH.repeat_interleave(dec.shape.N // row_FnH.shape[1], dim=1)
        more_BTNF = acts[:, :, None] * (factors - 1)[:, touched] + offsets[:, touched]
        return torch.einsum("btnf,fnh->btnh", more_BTNF, row_FnH)


def _heads(part: Part) -> slice | int:
    return slice(None) if part.head is None else part.head


def _require(dec: Decomposition, part: Part) -> None:
    """`UserError` unless a decomposition has this part."""
    if part.head is not None and not 0 <= part.head < dec.shape.N:
        raise UserError(f"{part}: the layer has heads 0 to {dec.shape.N - 1}")
    widths = {"query": dec.query.width, "key": dec.key.width}
    named = {part.side: part.feature} if isinstance(part, Feature) else {"query": part.query, "key": part.key}
    least = 0 if isinstance(part, Feature) else -1  # the bias can't be ablated as a feature; its pairs can
    for side, feature in named.items():
        if side not in widths:
            raise UserError(f"{part}: choose the side 'query' or 'key'")
        if not least <= feature < widths[side]:
            raise UserError(f"{part}: the {side} side has features {least} to {widths[side] - 1}")


class Watched:
    """What an intervention did in the last forward pass."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.before_BNQK: Tensor | None = None
        """The model's own pattern."""
        self.pattern_BNQK: Tensor | None = None
        """The pattern under the intervention."""

    @torch.no_grad()
    def generate(self, prompt_BT: Tensor, tokens: int, **options: Any) -> Tensor:
        """Continue prompts of equal length under the intervention, greedily unless told otherwise; int64 [B, T + n]."""
        mask = torch.ones_like(prompt_BT)
        options = {"do_sample": False, "max_new_tokens": tokens, **options}
        return self.site.model.generate(prompt_BT, attention_mask=mask, use_cache=False, **options)  # type: ignore[operator]


@contextmanager
def intervene(
    site: AttentionSite,
    dec: Decomposition,
    ablate: Sequence[Part] = (),
    *,
    scale: Mapping[Part, float] | None = None,
    add: Mapping[Part, float] | None = None,
    base: Base = "model",
) -> Iterator[Watched]:
    """While open, the layer's pattern is the edited one (see `Edit.of`)."""
    if site.layer != dec.layer:
        raise UserError(f"the decomposition is of layer {dec.layer}, the site of layer {site.layer}; open that layer")
    edit, watched = Edit.of(dec, ablate, scale, add, base), Watched(site)

    def source(inputs: AttentionInputs) -> Tensor:
        watched.before_BNQK = exp(inputs.log_pattern_BNQK)
        watched.pattern_BNQK = exp(edit.log_pattern(inputs))
        return watched.pattern_BNQK

    with site.replace_pattern(source, residual=dec.residual):
        yield watched
