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
LEAST = 1e-6  # share of a row that counts as a rest
ALIKE = 0.5  # tokens that two labels share, of those of either, from which they say the same


@torch.no_grad()
def head_roles(site: AttentionSite, heldout: list[tuple[Batch, AttentionInputs, Labelled]]) -> list[dict[str, Any]]:
    """For each head the role pairs that its attention runs between, with what the loss gains without them.

    Of all (query label, key label) the ones with the most attention above what uniform attention gives are tried, but
    none that says the same as one before it: the head may not attend from the one to the other. They are chosen on the
    first batch and measured on the others. `attention`: share of the head's rows; `ce_increase`: nats a token, by which
    they are ordered.
    """
    n_heads = site.shape["N"]
    _, inputs, labelled = heldout[0]
    mass = _mass(inputs, labelled)
    alike = _alike(labelled)
    tried = {
        (head, query, key)
        for head, above in enumerate(mass[0] - mass[1])
        for query, key in different(above, alike, ROLE_PAIRS)
    }
    measured = heldout[1:] or heldout
    mass = torch.stack([_mass(inputs, labelled) for _, inputs, labelled in measured]).sum(0)
    rows_seen = sum(int(inputs.real_BT.sum()) for _, inputs, _ in measured)
    score = PatchedScore()
    if site.has_head:
        for batch, _, labelled in measured:
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


def different(above_RR: Tensor, alike_RR: Tensor, count: int) -> list[tuple[int, int]]:
    """The `count` largest entries, but none whose row and column both say what those of a larger one say."""
    found: list[tuple[int, int]] = []
    for place in above_RR.flatten().argsort(descending=True).tolist():
        query, key = divmod(place, above_RR.shape[1])
        if not any(bool(alike_RR[query, q] & alike_RR[key, k]) for q, k in found):
            found.append((query, key))
        if len(found) == count:
            break
    return found


def _alike(labelled: Labelled) -> Tensor:
    """Labels that hold on much the same tokens, bool [R, R]."""
    roles = labelled.roles_BTR[..., : len(ROLE_LABELS)].flatten(0, 1).float()
    both = roles.T @ roles
    each = both.diagonal()
    return both >= ALIKE * (each[:, None] + each - both).clamp(min=1)


def _mass(inputs: AttentionInputs, labelled: Labelled) -> Tensor:
    """Σ_ij [query label at i] P_ij [key label at j] under each head and under uniform attention, [2, N, R, R]."""
    pattern = exp(inputs.log_pattern_BNQK)[..., : inputs.real_BT.shape[1]]
    visible = inputs.rule.visible_BQK & inputs.real_BT[..., None]
    uniform = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    roles = labelled.roles_BTR[..., : len(ROLE_LABELS)].float()
    both = torch.cat([pattern * inputs.real_BT[:, None, :, None], uniform[:, None]], 1)
    mass = torch.einsum("bqr,bnqs->nrs", roles, both @ roles[:, None])
    return torch.stack([mass[:-1], mass[-1:].expand_as(mass[:-1])])


def _without(labelled: Labelled, head: int, query: int, key: int) -> PatternSource:
    """The pattern with one head's attention from one label to another taken out.

    The rest of such a row is scaled up to what the row had on its keys (a sink keeps its own); a row without a rest is
    spread over the keys it may see, and one that may see no other key is left alone.
    """

    def source(inputs: AttentionInputs) -> Tensor:
        pattern = exp(inputs.log_pattern_BNQK)
        length = labelled.roles_BTR.shape[1]
        banned = labelled.roles_BTR[..., query][:, :, None] & labelled.roles_BTR[..., key][:, None]
        allowed = inputs.rule.visible_BQK[..., :length] & inputs.real_BT[:, None] & ~banned
        row = pattern[:, head, :, :length]
        whole, rest = row.sum(-1, keepdim=True), row.masked_fill(banned, 0)
        left = rest.sum(-1, keepdim=True)
        spread = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        without = torch.where(left > LEAST * whole, rest / left.clamp(min=1e-30), spread) * whole
        touched = banned.any(-1, keepdim=True) & allowed.any(-1, keepdim=True)
        pattern[:, head, :, :length] = torch.where(touched, without, row)
        return pattern

    return source
