"""Faithful, or merely sufficient? What an adversary can do with the pairs that the map left out.

A map that reproduces the pattern may do so because what it left out happens to cancel. So an adversary switches the
dropped pairs on, each as far as it likes between not at all and as strongly as the dictionaries have it,

    score = kept + scale · Σ_dropped m · a_q · M(i-j) · a_k,        m ∈ [0, 1], one number a dropped pair

and climbs KL(true logits ‖ patched logits) on held-out text by projected sign steps. Beside it stand the map itself
(m = 0), all that was dropped (m = 1), and m drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSite
from ..data.sequences import Batch
from ..decomposition import Decomposition
from ..kernels.row_kl import exp
from ..pairs.gated import GatedScores
from ..pairs.pair_map import rows, with_bias
from ..pattern import AttentionInputs
from ..training.stream import harvest_finite
from .figures import Ratio
from .predictions import Predictions

RATE = 0.1  # the first step of m; steps shrink linearly to nothing
LARGEST = 1 << 28  # pairs beyond which there is no adversary: several dense tensors of them are needed


def adversary(
    dec: Decomposition, site: AttentionSite, batches: Iterable[Batch], *, steps: int, seed: int = 0
) -> dict[str, Any] | None:
    """Logit KL with m as the adversary has it after `steps`, a new m for every batch; None where the map is too large.

    Figures are means over tokens with intervals over sequences.
    """
    shape = dec.shape
    if (dec.query.width + 1) * (dec.key.width + 1) * shape.N > LARGEST:
        return None
    found = {name: Ratio() for name in ("kept", "all", "random", "adversary")}
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        dropped = Dropped(dec, harvest_finite(site, batch))
        tries = {"kept": 0.0, "all": 1.0, "random": torch.rand(dropped.dropped_NQK.shape, generator=generator)}
        with site.lower_layers_once():
            with torch.no_grad():
                own = Predictions(site, batch)
                for name, m in tries.items():
                    m_NQK = dropped.dropped_NQK * (m.to(dropped.dropped_NQK) if isinstance(m, Tensor) else m)
                    _note(found[name], _logit_kl(site, dropped, m_NQK, own), batch)
            with torch.enable_grad():
                m_NQK = _climb(site, dropped, own, steps)
            with torch.no_grad():
                _note(found["adversary"], _logit_kl(site, dropped, m_NQK, own), batch)
    return {"steps": steps, "logit_kl": {name: ratio.figure() for name, ratio in found.items()}}


class Dropped:
    """The pairs of features active on one batch that the map leaves out, dense by head."""

    def __init__(self, dec: Decomposition, inputs: AttentionInputs) -> None:
        self.rule, shape = inputs.rule, dec.shape
        x = inputs.x_BTD.float()
        with torch.no_grad():
            acts = [with_bias(side.encode(x)) * inputs.real_BT[..., None] for side in (dec.query, dec.key)]
            # All kept pairs, before the cap: what is added goes under the same cap.
            self.kept_BNQK = dec.scores(replace(inputs, rule=replace(inputs.rule, softcap=None)))
            queries, keys = (on.flatten(0, 1).any(0).nonzero()[:, 0] for on in (acts[0] > 0, acts[1] > 0))
            both_rows = rows(dec.query, shape.N)[queries], rows(dec.key, shape.G)[keys]
        self.scores = GatedScores(acts[0][..., queries], acts[1][..., keys], *both_rows, inputs.rule)
        query_P, key_P = dec.pairs.query_P, dec.pairs.key_P
        here_P = torch.isin(query_P, queries) & torch.isin(key_P, keys)
        at = torch.searchsorted(queries, query_P[here_P]), torch.searchsorted(keys, key_P[here_P])
        self.dropped_NQK = x.new_ones(shape.N, len(queries), len(keys))
        self.dropped_NQK[dec.pairs.head_P[here_P], *at] = 0

    def pattern(self, m_NQK: Tensor) -> Tensor:
        """The pattern of the kept pairs and as much of the dropped ones as m says (0 where kept), [B, N, Q, K]."""
        return exp(self.rule.masked(self.rule.cap(self.kept_BNQK + self.scores(m_NQK))).log_softmax(-1))


def _climb(site: AttentionSite, dropped: Dropped, own: Predictions, steps: int) -> Tensor:
    m_NQK = 0.5 * dropped.dropped_NQK
    for step in range(steps):
        m_NQK.requires_grad_(True)
        kl = _logit_kl(site, dropped, m_NQK, own)[own.batch.real_BT].mean()
        (gradient,) = torch.autograd.grad(kl, m_NQK)
        m_NQK = m_NQK.detach().add_(gradient.sign_(), alpha=RATE * (1 - step / steps))
        m_NQK.clamp_(0, 1).mul_(dropped.dropped_NQK)
    return m_NQK


def _logit_kl(site: AttentionSite, dropped: Dropped, m_NQK: Tensor, own: Predictions) -> Tensor:
    """KL(true logits ‖ patched logits) of each token, [B, T]."""
    with site.replace_pattern(lambda inputs: dropped.pattern(m_NQK)):
        return own.kl(Predictions(site, own.batch))


def _note(ratio: Ratio, kl_BT: Tensor, batch: Batch) -> None:
    ratio.add(kl_BT.masked_fill(~batch.real_BT, 0).sum(1), batch.real_BT.sum(1).float())
