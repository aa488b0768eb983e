"""A study: which heads do a job, which pairs make them look there, and what goes when those pairs do.

One half of the prompts chooses heads and pairs, the other half is what is reported.

1. Every head's attention from the last token to each mark, of the model, the transcoders and the pruned map; and what
   the choice between right and wrong next tokens gains when the head may not look from the last token to the target
   (its row's rest is scaled up). Heads are ordered by the latter on the choosing half: those it hurts most carry the
   job.
2. For the first of them the pairs from the last token to each mark: what they add to the log-odds of that mark against
   the rest of the row (explain/trace.py), averaged over prompts.
3. The fewest of the pairs that lead to the target's family whose ablation takes `REMOVED` of the head's attention to
   it; what that does to the choice, to the head's other rows (total variation), and, as controls, what ablating as many
   of the head's next most important pairs, and as many drawn at random, does.

Shapes: B prompts, N heads, T positions (Q as a query, K as a key), P kept pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSite, harvest
from ..data.prompts import Asked
from ..decomposition import Decomposition
from ..errors import UserError
from ..evaluate.figures import ratio_figure
from ..kernels.row_kl import exp
from ..pattern import AttentionInputs, PatternSource
from .intervene import Pair, intervene
from .trace import KINDS, Trace

REMOVED = 0.8  # share of the attention to the target's family that an ablation is to take away
TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # numbers of pairs to ablate
LEADING = 0.95  # share of what pairs add to the family's log-odds that those to ablate come from
RANDOM_DRAWS = 5


@torch.no_grad()
def study_layers(
    opened: Sequence[tuple[Decomposition, AttentionSite]],
    asked: Asked,
    target: str,
    family: Sequence[str],
    *,
    heads: int | Sequence[int] = 2,
    top: int = 10,
) -> dict[str, Any]:
    """What the heads of some layers of one model do of what a prompt set asks for.

    `heads`: how many to look into over all layers, or which of every layer. Figures are {"mean", "ci95"} over prompts
    of the reporting half; `heads` of the result holds every head, the ones that carry the job first, `details` those
    that were looked into. `UserError` for too few prompts and a head that is not there.
    """
    if len(asked) < 4:
        raise UserError(f"{len(asked)} prompts are too few: one half chooses, the other is reported; give at least 4")
    even = torch.arange(len(asked)) % 2 == 0
    halves = [
        tuple(_Half(dec, site, asked.take(side.nonzero()[:, 0])) for side in (even, ~even)) for dec, site in opened
    ]
    rows = []
    for choose, report in halves:
        n_heads = choose.dec.shape.N
        if not isinstance(heads, int) and (wrong := [n for n in heads if not 0 <= n < n_heads]):
            raise UserError(f"head {wrong[0]}: the layer has heads 0 to {n_heads - 1}")
        for head in range(n_heads):
            attention, gained = choose.without(head, target)
            said = -_mean(attention) if gained is None else _mean(gained)
            rows.append((said, {"layer": choose.dec.layer, "head": head, **report.of_head(head, target)}))
    rows.sort(key=lambda row: row[0])
    every = [row for _, row in rows]
    wanted = every[:heads] if isinstance(heads, int) else [row for row in every if row["head"] in heads]
    by_layer = {choose.dec.layer: (choose, report) for choose, report in halves}
    return {
        "prompts": {"choosing": int(even.sum()), "reported": int((~even).sum())},
        "difference": _figure(halves[0][1].difference),
        "heads": every,
        "details": [
            _details(*by_layer[row["layer"]], row["head"], [m for m in family if m in asked.marks], top)
            for row in wanted
        ],
    }


def _details(choose: _Half, report: _Half, head: int, family: Sequence[str], top: int) -> dict[str, Any]:
    """Pairs of one head, and what ablating them does."""
    found: dict[str, Any] = {
        "layer": choose.dec.layer,
        "head": head,
        "pairs": {m: _pair_rows(choose.dec, choose.contributions(head, [m]), top) for m in choose.asked.marks},
    }
    worth = choose.contributions(head, family)
    leading = leading_pairs(worth)
    if not len(leading):
        return found
    count = next(n for n in TRIED if n >= len(leading) or choose.removed(head, leading[:n], family) >= REMOVED)
    ablated = leading[:count]
    in_head = torch.arange(*choose.dec.pairs.of_head(head).indices(len(choose.dec.pairs))[:2])
    others = in_head[~torch.isin(in_head, ablated)]
    ranked = others[choose.dec.importance_P[others].argsort(descending=True)]
    draws = [
        others[torch.randperm(len(others), generator=torch.Generator().manual_seed(draw))[: len(ablated)]]
        for draw in range(RANDOM_DRAWS)
    ]
    found["ablation"] = {
        "family": list(family),
        "pairs": _pair_rows(choose.dec, torch.zeros_like(worth).index_copy(0, ablated, worth[ablated]), count),
        "effect": report.ablated(head, [ablated], family),
        "controls": {
            "next most important": report.ablated(head, [ranked[: len(ablated)]], family),
            "at random": report.ablated(head, draws, family),
        },
    }
    return found


def leading_pairs(worth_P: Tensor) -> Tensor:
    """Pairs that add to what is wanted, the most first, until they have `LEADING` of all that is added."""
    order = worth_P.argsort(descending=True)
    adds = worth_P[order].clamp(min=0)
    before = adds.cumsum(0) - adds
    return order[(before < LEADING * adds.sum()) & (adds > 0)][: TRIED[-1]]


class _Half:
    """Some of the prompts in one layer."""

    def __init__(self, dec: Decomposition, site: AttentionSite, asked: Asked) -> None:
        device = next(site.model.parameters()).device
        self.dec, self.site, self.asked = dec, site, asked
        self.tokens, self.real = asked.batch.tokens_BT.to(device), asked.batch.real_BT.to(device)
        self.inputs: AttentionInputs = harvest([site], self.tokens, self.real, dec.residual)[0]
        self.difference = _difference(site, asked)
        self.rows = torch.arange(len(asked)), asked.end_B
        logs = self.inputs.log_pattern_BNQK, dec.log_pattern_all(self.inputs), dec.log_pattern_kept(self.inputs)
        self.end_BNK = {
            kind: exp(log)[self.rows[0], :, self.rows[1]].cpu() for kind, log in zip(KINDS, logs, strict=True)
        }
        self._known: dict[tuple[int, tuple[str, ...]], Tensor] = {}

    def to(self, pattern_BNK: Tensor, marks: Sequence[str]) -> Tensor:
        """Attention of the last token's rows to some marks together, [B, N]."""
        out = torch.zeros(pattern_BNK.shape[:2])
        for at_B in (self.asked.marks[m] for m in marks):
            found = pattern_BNK[torch.arange(len(at_B)), :, at_B.clamp(min=0)]
            out += found * (at_B >= 0)[:, None]
        return out

    def of_head(self, head: int, target: str) -> dict[str, Any]:
        """A head's attention from the last token to each mark, by kind, and what the choice gains without it."""
        attention = {
            mark: {kind: _figure(self.to(pattern, [mark])[:, head]) for kind, pattern in self.end_BNK.items()}
            for mark in self.asked.marks
        }
        return {"attention": attention, "without_target": _figure(self.without(head, target)[1])}

    def without(self, head: int, target: str) -> tuple[Tensor, Tensor | None]:
        """The last token's attention to the target in one head, [B], and what the choice gains without it, [B]."""
        attention = self.to(self.end_BNK["true"], [target])[:, head]
        if not self.asked.choices:
            return attention, None
        difference = _difference(self.site, self.asked, _blind(head, *self.rows, self.asked.marks[target]))
        assert difference is not None and self.difference is not None
        return attention, difference - self.difference

    def contributions(self, head: int, marks: Sequence[str]) -> Tensor:
        """What each kept pair adds to the log-odds of the marks' keys against the rest of the last token's row, nats
        [P], the mean over prompts; a prompt's keys count by their attention."""
        known = head, tuple(marks)
        if known not in self._known:
            total = torch.zeros(len(self.dec.pairs), device=self.inputs.x_BTD.device)
            for b, end in enumerate(self.asked.end_B.tolist()):
                keys = [int(self.asked.marks[m][b]) for m in marks if int(self.asked.marks[m][b]) >= 0]
                if keys:
                    one = Trace.of_batch(self.dec, self.inputs, b, end + 1, head)
                    index, value_SK = one.row(end)
                    total[index] += value_SK @ _contrast(one.pattern["true"][end], keys, end + 1)
            self._known[known] = total / len(self.asked)
        return self._known[known]

    def removed(self, head: int, index: Tensor, family: Sequence[str]) -> float:
        """Share of the head's attention to the family that ablating these pairs takes away."""
        before = self.to(self.end_BNK["true"], family)[:, head].sum()
        return float(1 - self._after(index)[0](family)[:, head].sum() / before.clamp(min=1e-12))

    def _after(self, index: Tensor) -> Any:
        """A function for the attention to marks with these pairs ablated, the whole pattern, and the choice."""
        with intervene(self.site, self.dec, _parts(self.dec, index)) as watched:
            difference = _difference(self.site, self.asked)
        pattern = watched.pattern_BNQK
        assert pattern is not None and watched.before_BNQK is not None
        moved_BNQ = (pattern - watched.before_BNQK).abs().sum(-1) / 2
        end = pattern[self.rows[0], :, self.rows[1]].cpu()
        return (lambda marks: self.to(end, marks)), moved_BNQ, difference

    def ablated(self, head: int, draws: Iterable[Tensor], family: Sequence[str]) -> dict[str, Any]:
        """What ablating pairs does, the mean over draws of them: to the head's attention from the last token to the
        family, to its row and its other rows (total variation), and to the choice."""
        real = self.real.clone()
        real[self.rows] = False
        sums: dict[str, list[Tensor]] = {}
        for index in draws:
            to, moved_BNQ, difference = self._after(index)
            moved = moved_BNQ[:, head]
            values = {
                "attention": to(family)[:, head],
                "row": moved[self.rows].cpu(),
                "other_rows": ((moved * real).sum(1) / real.sum(1).clamp(min=1)).cpu(),
            }
            if difference is not None:
                values["difference"] = difference
            for name, value in values.items():
                sums.setdefault(name, []).append(value)
        before = {"attention": self.to(self.end_BNK["true"], family)[:, head], "difference": self.difference}
        mean = {name: torch.stack(values).mean(0) for name, values in sums.items()}
        out: dict[str, Any] = {name: _figure(value) for name, value in mean.items()}
        out["before"] = {name: _figure(value) for name, value in before.items() if value is not None}
        out["removed"] = float(1 - mean["attention"].sum() / before["attention"].sum().clamp(min=1e-12))
        return out


def _parts(dec: Decomposition, index: Tensor) -> list[Pair]:
    p = dec.pairs
    named = ((p.query_P, p.n_query), (p.key_P, p.n_key))
    query, key = (torch.where(f[index] < n, f[index], -1).tolist() for f, n in named)
    return [Pair(a, b, n) for a, b, n in zip(query, key, p.head_P[index].tolist(), strict=True)]


def _pair_rows(dec: Decomposition, worth_P: Tensor, top: int) -> list[dict[str, Any]]:
    """The pairs that add most, either way, with what they add in nats."""
    index = worth_P.abs().argsort(descending=True)[:top]
    parts = _parts(dec, index)
    return [
        {"query_feature": p.query, "key_feature": p.key, "nats": value}
        for p, value in zip(parts, worth_P[index].tolist(), strict=True)
        if value
    ]


def _contrast(pattern_K: Tensor, keys: Sequence[int], length: int) -> Tensor:
    """Weights of the log-odds of some keys against the others of a row, each by its attention; sums to zero."""
    weight = pattern_K[:length].clone()  # a learned sink has no pairs
    inside = torch.zeros_like(weight, dtype=torch.bool)
    inside[list(keys)] = True
    own, rest = weight * inside, weight * ~inside
    return own / own.sum().clamp(min=1e-30) - rest / rest.sum().clamp(min=1e-30)


def _blind(head: int, row_B: Tensor, end_B: Tensor, key_B: Tensor) -> PatternSource:
    """The model's pattern with one head's attention from the last token to one key taken away."""

    def source(inputs: AttentionInputs) -> Tensor:
        pattern = exp(inputs.log_pattern_BNQK)
        rows = pattern[row_B, head, end_B].clone()
        whole = rows.sum(-1, keepdim=True)
        there = (key_B >= 0).nonzero()[:, 0]
        rows[there, key_B[there]] = 0
        pattern[row_B, head, end_B] = rows * (whole / rows.sum(-1, keepdim=True).clamp(min=1e-12))
        return pattern

    return source


def _difference(site: AttentionSite, asked: Asked, pattern: PatternSource | None = None) -> Tensor | None:
    """log p(right) - log p(wrong) of each prompt's next token, nats [B]; None where the prompts name none.

    The model runs in any case, so that an intervention that is open is seen.
    """
    device = next(site.model.parameters()).device
    tokens, real = asked.batch.tokens_BT.to(device), asked.batch.real_BT.to(device)
    if pattern is None:
        output = site._forward(tokens, real)
    else:
        with site.replace_pattern(pattern):
            output = site._forward(tokens, real)
    if not asked.choices or not site.has_head:
        return None
    logits = output.logits[torch.arange(len(asked)), asked.end_B.to(device)].float().cpu()
    rows = zip(logits, asked.answers, asked.wrong, strict=True)
    return torch.stack([row[right].logsumexp(0) - row[wrong].logsumexp(0) for row, right, wrong in rows])


def _mean(values_B: Tensor | None) -> float:
    return 0.0 if values_B is None else float(values_B.double().mean())


def _figure(values_B: Tensor | None) -> dict[str, Any] | None:
    """Mean over prompts with its 95 % interval."""
    return None if values_B is None else ratio_figure(values_B.double().cpu(), torch.ones(len(values_B)).double())
