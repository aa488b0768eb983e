"""Trace: what one prompt's scores are made of, pair by pair, and why a head looks here and not there.

    score_ij = Σ_kept scale·strength·a_q[i,a]·M(i-j)·a_k[j,b]  +  dropped_ij  +  error_ij

`dropped` is what the pairs that were not kept (and the tuning of the kept ones) are short of the transcoders' score,
`error` what the transcoders are short of the model's. The account is exact and of scores before a soft cap.

Why here and not there: the log-odds of the attended key j against its competitors c, weighted by their share of the
attention that goes to them,

    Σ_c w_c · log(P_ij / P_ic)  =  s_ij - Σ_c w_c s_ic,

is a difference of scores, so it has an exact account too, in which a pair that raises the competitors hinders. A
constant along the row, such as any pair with the keys' bias where positions are learned, drops out.

Shapes: T positions (Q as a query, K as a key), N heads, S terms of one row, A and U the features they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention import AttentionSite, harvest
from ..data.sequences import first_token
from ..decomposition import Decomposition
from ..errors import UserError
from ..kernels.row_kl import exp
from ..pairs.pair_map import rows, with_bias
from ..pattern import AttentionInputs
from ..tables.examples import token_texts
from .account import Account

KINDS = ("true", "reconstructed", "pruned")
COMPETITORS = 5  # keys that an attended one is held against, where none are named


@dataclass(frozen=True)
class Why:
    """Why query i of a head attends to key j and not to its competitors."""

    query: int
    key: int
    against: list[int]
    """Competitors, strongest first; one learned sink is `len(tokens)`."""
    weights: list[float]
    """Their shares of the attention that goes to them all."""
    account: Account
    """Of the weighted log-odds, in nats."""


class Trace:
    """One prompt in one layer: patterns, scores and accounts, of one head at a time."""

    def __init__(self, dec: Decomposition, inputs: AttentionInputs, tokens: Sequence[str], head: int = 0) -> None:
        """`inputs` hold one unpadded sequence, `tokens` its texts; `trace` makes one of a prompt."""
        if not 0 <= head < dec.shape.N:
            raise UserError(f"head {head}: the layer has heads 0 to {dec.shape.N - 1}")
        self.dec, self.inputs, self.tokens, self.head = dec, inputs, list(tokens), head

    @classmethod
    def of_batch(cls, dec: Decomposition, inputs: AttentionInputs, b: int, length: int, head: int = 0) -> Trace:
        """The first `length` positions of one sequence of a batch, whose tokens' texts nobody needs."""
        return cls(dec, inputs.crop(length, b), [""] * length, head)

    def of_head(self, head: int) -> Trace:
        """The same prompt in another head; nothing is computed again."""
        other = Trace(self.dec, self.inputs, self.tokens, head)
        other.__dict__ |= {k: v for k, v in self.__dict__.items() if k in ("acts", "_rows", "_scores_NQK")}
        return other

    # What the heads do

    @property
    def pattern(self) -> dict[str, Tensor]:
        """The head's pattern by kind (`KINDS`), [Q, K]; one more column with a learned sink."""
        return {kind: exp(log_pattern) for kind, log_pattern in self.log_pattern.items()}

    @property
    def log_pattern(self) -> dict[str, Tensor]:
        """The same in logarithms, -inf where masked."""
        rule = self.inputs.one_head(self.head).rule
        return {
            kind: rule.masked(rule.cap(scores[None, None])).log_softmax(-1)[0, 0]
            for kind, scores in self.scores.items()
        }

    @property
    def scores(self) -> dict[str, Tensor]:
        """The head's scaled scores by kind, [Q, K], before a soft cap and before the mask."""
        return {kind: scores_NQK[self.head] for kind, scores_NQK in self._scores_NQK.items()}

    @cached_property
    @torch.no_grad()
    def _scores_NQK(self) -> dict[str, Tensor]:
        inputs, dec = self._uncapped, self.dec
        x = dec.x_of(inputs)
        q, k = dec.query(x).view(inputs.q_BTNH.shape), dec.key(x).view(inputs.k_BTGH.shape)
        true, whole = inputs.rule.scores(inputs.q_BTNH, inputs.k_BTGH), inputs.rule.scores(q, k)
        return dict(zip(KINDS, (true[0], whole[0], dec.scores(inputs)[0]), strict=True))

    @property
    def _uncapped(self) -> AttentionInputs:
        return replace(self.inputs, rule=replace(self.inputs.rule, softcap=None))

    @cached_property
    @torch.no_grad()
    def acts(self) -> tuple[Tensor, Tensor]:
        """Activations of both sides, bias behind them, [T, F + 1]."""
        x = self.dec.x_of(self.inputs)[0]
        return with_bias(self.dec.query.encode(x)), with_bias(self.dec.key.encode(x))

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        shape = self.dec.shape
        return rows(self.dec.query, shape.N).detach(), rows(self.dec.key, shape.G).detach()

    # Accounts

    def terms(self, query: int = -1, key: int = 0, pairs: Literal["kept", "all"] = "kept") -> Account:
        """The account of one score: by the kept pairs, or by all pairs of features that are active there.

        `query` and `key` are positions, negative ones from the end. `UserError` where the query does not see the key.
        """
        i, j = self.position(query, "query"), self.position(key, "key")
        if not bool(self.inputs.rule.visible_BQK[0, i, j]):
            raise UserError(f"query {i} does not see key {j}: the mask of this layer hides it")
        true, whole, kept = (float(self.scores[kind][i, j]) for kind in KINDS)
        if pairs == "all":
            a, b, value = self._all_terms(i, j)
            return Account.of(*self._named(a, b), value, {"error": true - whole}, true)
        index_S, value_ST = self.row(i)
        named = self._named(self.dec.pairs.query_P[index_S], self.dec.pairs.key_P[index_S])
        return Account.of(*named, value_ST[:, j], {"dropped": whole - kept, "error": true - whole}, true)

    def why(self, query: int = -1, key: int | None = None, against: Sequence[int] | None = None) -> Why:
        """The account of why a query attends to a key and not to others.

        `key`: by default the most attended one; `against`: by default its `COMPETITORS` strongest competitors.
        """
        i = self.position(query, "query")
        pattern_K = self.pattern["true"][i]  # with a learned sink, its column stands last
        seen_K = self.inputs.rule.visible_BQK[0, i]
        length = len(seen_K)
        j = int(pattern_K[:length].argmax()) if key is None else self.position(key, "key")
        if against is None:
            others = pattern_K.clone()
            others[j] = 0
            others[:length] *= seen_K
            found = others.topk(min(COMPETITORS, len(others)))
            chosen = found.indices[found.values > 0].tolist()
        else:
            chosen = [length if c == length < len(pattern_K) else self.position(c, "against") for c in against]
        hidden = [k for k in (j, *chosen) if k < length and not bool(seen_K[k])]
        if hidden:
            raise UserError(f"query {i} does not see key {hidden[0]}: the mask of this layer hides it")
        if not chosen or j in chosen:
            raise UserError(f"query {i}, key {j}: there is no other key to hold it against")
        weight = pattern_K[chosen].double()
        weight = weight / weight.sum() if float(weight.sum()) > 0 else torch.full_like(weight, 1 / len(weight))
        contrast_K = torch.zeros(len(pattern_K), dtype=torch.float64, device=pattern_K.device)
        contrast_K[chosen] = -weight
        contrast_K[j] += 1
        return Why(i, j, chosen, weight.tolist(), self._contrast(i, contrast_K))

    def _contrast(self, i: int, contrast_K: Tensor) -> Account:
        """The account of Σ_j contrast_j · score_ij, of capped scores, whose weights sum to zero."""
        length = len(self.tokens)
        inside = contrast_K[:length]
        true, whole, kept = (float(inside @ self.scores[kind][i].double()) for kind in KINDS)
        index_S, value_ST = self.row(i)
        named = self._named(self.dec.pairs.query_P[index_S], self.dec.pairs.key_P[index_S])
        rest, total = {"dropped": whole - kept, "error": true - whole}, true
        rule = self.inputs.rule
        if rule.softcap is not None:
            capped = float(inside @ rule.cap(self.scores["true"][i]).double())
            rest["soft cap"], total = capped - true, capped
        if rule.sink_N is not None and float(contrast_K[length]) != 0:
            rest["sink"] = float(contrast_K[length]) * float(rule.sink_N[self.head])
            total += rest["sink"]
        return Account.of(*named, (value_ST.double() @ inside).float(), rest, total)

    @torch.no_grad()
    def row(self, i: int) -> tuple[Tensor, Tensor]:
        """Kept pairs of the head that are active at query i, as places in `dec.pairs` [S], and what they add to its
        scores, [S, K]."""
        pairs, rule = self.dec.pairs, self.inputs.rule
        acts_q, acts_k = self.acts
        in_head = torch.arange(*pairs.of_head(self.head).indices(len(pairs))[:2], device=acts_q.device)
        index = in_head[acts_q[i, pairs.query_P[in_head]] != 0]
        a_S, b_S = pairs.query_P[index], pairs.key_P[index]
        value_ST = (rule.scaling * self.dec.strength_P[index] * acts_q[i, a_S])[:, None] * acts_k[:, b_S].T
        if rule.rotary is not None:
            a_A, place_q = a_S.unique(return_inverse=True)
            b_U, place_k = b_S.unique(return_inverse=True)
            value_ST *= self._turned(i, a_A, b_U)[place_q, place_k]
        return index, value_ST

    @torch.no_grad()
    def _turned(self, i: int, a_A: Tensor, b_U: Tensor) -> Tensor:
        """M(i-j) = ⟨R_i W_q[a], R_j W_k[b]⟩ of each query feature, key feature and key j, [A, U, K]."""
        rotary, (rows_q, rows_k) = self.inputs.rule.rotary, self._rows
        assert rotary is not None
        length, group = len(self.tokens), self.head * self.dec.shape.G // self.dec.shape.N
        left = rotary.rotate(rows_q[a_A, self.head].expand(1, length, -1, -1))[0, i]
        right = rotary.rotate(rows_k[b_U, group].expand(1, length, -1, -1))[0]
        return torch.einsum("ah,tuh->aut", left, right)

    @torch.no_grad()
    def _all_terms(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair of features active at a query and a key, and what it adds to their score."""
        acts_q, acts_k = self.acts
        a_A, b_U = acts_q[i].nonzero()[:, 0], acts_k[j].nonzero()[:, 0]
        if self.inputs.rule.rotary is not None:
            m_AU = self._turned(i, a_A, b_U)[..., j]
        else:
            rows_q, rows_k = self._rows
            m_AU = rows_q[a_A, self.head] @ rows_k[b_U, self.head * self.dec.shape.G // self.dec.shape.N].T
        value_AU = self.inputs.rule.scaling * acts_q[i, a_A][:, None] * m_AU * acts_k[j, b_U]
        a_AU, b_AU = torch.meshgrid(a_A, b_U, indexing="ij")
        return a_AU.flatten(), b_AU.flatten(), value_AU.flatten()

    def _named(self, query_S: Tensor, key_S: Tensor) -> tuple[Tensor, Tensor]:
        """Feature numbers as an artefact has them: -1 for the bias."""
        n_query, n_key = self.dec.query.width, self.dec.key.width
        return torch.where(query_S < n_query, query_S, -1), torch.where(key_S < n_key, key_S, -1)

    def position(self, at: int, what: str) -> int:
        """A position counted from the start, where a negative one counts from the end; `UserError` outside."""
        length = len(self.tokens)
        if not -length <= at < length:
            raise UserError(
                f"{what} {at}: the prompt has positions 0 to {length - 1} (or -1 to -{length} from its end)"
            )
        return at % length

    def to_dict(self) -> dict[str, Any]:
        """Tokens and the head's patterns, for JSON."""
        return {
            "layer": self.dec.layer,
            "head": self.head,
            "tokens": self.tokens,
            "pattern": {kind: p.tolist() for kind, p in self.pattern.items()},
        }


def trace(dec: Decomposition, site: AttentionSite, prompt: str, head: int = 0) -> Trace:
    """Run a prompt through the model up to the layer; BOS stands before it where the run's text had one.

    `UserError` for an empty prompt, one that the model's positions do not hold, and a head that is not there.
    """
    if site.layer != dec.layer:
        raise UserError(f"the decomposition is of layer {dec.layer}, the site of layer {site.layer}; open that layer")
    tokens_BT = prompt_tokens(dec, site, prompt)
    texts = token_texts(site.tokenizer, sorted(set(tokens_BT[0].tolist())))
    (inputs,) = harvest([site], tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), dec.residual)
    whole = replace(inputs, rule=inputs.rule.crop(tokens_BT.shape[1]))
    return Trace(dec, whole, [texts[t] for t in tokens_BT[0].tolist()], head)


def prompt_tokens(dec: Decomposition, site: AttentionSite, prompt: str) -> Tensor:
    """Tokens of a prompt as the run would have read it, int64 [1, T]."""
    ids = site.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    first = first_token(dec.config.data, site.tokenizer)
    ids = ids if first is None else [first, *ids]
    if len(ids) < 2:
        raise UserError(f"prompt {prompt!r}: holds no text to trace; give at least two tokens")
    most = getattr(site.model.config, "max_position_embeddings", None)
    if most is not None and len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens and the model takes at most {most}; shorten it")
    return torch.tensor([ids], device=next(site.model.parameters()).device)
