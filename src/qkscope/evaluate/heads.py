"""What each head does, in the words of the embedded corpus: between which roles it attends, and what that is worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionInputs, AttentionSite, PatternSource
from ..data.sequences import Batch
from ..kernels.row_kl import exp
from .labels import ROLE_LABELS, Labelled
from .patched import PatchedScore

ROLE_PAIRS = 5  # of a head, that are tried by intervention


@torch.no_grad()
def head_roles(site: AttentionSite, heldout: list[tuple[Batch, AttentionInputs, Labelled]]) -> list[dict[str, Any]]:
    """For each head the role pairs that its attention runs between, with what the loss gains without them.

    Of all (query label, key label) the ones with the most attention above what uniform attention gives are tried: the
    head may not attend from the one to the other (the rest of the row is scaled up; a row without a rest attends to
    position 0). `attention`: share of the head's mass; `ce_increase`: nats a token.
    """
    n_heads = site.shape["N"]
    mass = torch.stack([_mass(inputs, labelled) for _, inputs, labelled in heldout]).sum(0)
    rows_seen = sum(int(inputs.real_BT.sum()) for _, inputs, _ in heldout)
    above = (mass[0] - mass[1]).flatten(1).topk(ROLE_PAIRS).indices
    tried = {(head, *divmod(place, mass.shape[-1])) for head in range(n_heads) for place in above[head].tolist()}
    score = PatchedScore()
    if site.has_head:
        for batch, _, labelled in heldout:
            score.add(site, batch, {str(one): _without(labelled, *one) for one in sorted(tried)})
    tables: list[list[dict[str, Any]]] = [[] for _ in range(n_heads)]
    for head, query, key in sorted(tried):
        attention, uniform = (mass[:, head, query, key] / rows_seen).tolist()
        entry = {"query": ROLE_LABELS[query], "key": ROLE_LABELS[key], "attention": attention, "uniform": uniform}
        if site.has_head:
            entry["ce_increase"] = score.increase(str((head, query, key)))
        tables[head].append(entry)
    for table in tables:
        table.sort(key=lambda e: -e["ce_increase"]["mean"] if "ce_increase" in e else -e["attention"])
    return [{"head": head, "role_pairs": table} for head, table in enumerate(tables)]


def _mass(inputs: AttentionInputs, labelled: Labelled) -> Tensor:
    """Σ_ij [query label at i] P_ij [key label at j] under each head and under uniform attention, [2, N, R, R]."""
    pattern = exp(inputs.log_pattern_BNQK)[..., : inputs.real_BT.shape[1]]
    visible = inputs.rule.visible_BQK & inputs.real_BT[..., None]
    uniform = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    roles = labelled.roles_BTR.float()
    both = torch.cat([pattern * inputs.real_BT[:, None, :, None], uniform[:, None]], 1)
    mass = torch.einsum("bqr,bnqs->nrs", roles, both @ roles[:, None])
    return torch.stack([mass[:-1], mass[-1:].expand_as(mass[:-1])])


def _without(labelled: Labelled, head: int, query: int, key: int) -> PatternSource:
    """The pattern with one head's attention from one label to another taken out."""

    def source(inputs: AttentionInputs) -> Tensor:
        pattern = exp(inputs.log_pattern_BNQK)
        length = labelled.roles_BTR.shape[1]
        banned = labelled.roles_BTR[..., query][:, :, None] & labelled.roles_BTR[..., key][:, None]
        row = pattern[:, head, :, :length].masked_fill(banned, 0)
        left = row.sum(-1, keepdim=True)
        fallback = torch.zeros_like(row)
        fallback[..., 0] = 1
        pattern[:, head, :, :length] = torch.where(left > 1e-6, row / left.clamp(min=1e-6), fallback)
        return pattern

    return source
