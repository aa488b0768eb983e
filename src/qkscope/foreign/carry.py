"""Carry features of the residual stream to one layer's queries and keys: the norm and the projections are the model's.

The projections q = A x + c and k = A' x + c' are read off the running layer, by what it makes of unit vectors, and
checked on random ones; a layer whose queries are not affine in x (a norm on queries or keys, or within the projection)
is refused.

Shapes: D residual width, F features, M width of all heads together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import AttentionSite, harvest
from ..config import DictionaryConfig
from ..errors import UserError
from ..norm import Norm, norm_of
from ..pattern import AttentionInputs
from ..residual import Reading, ResidualTranscoder
from ..routing import random_tokens
from .find import OPTION, Found, find
from .saelens import ResidualSAE, layer_of, read_sae

ROWS = 16  # sequences of vectors that a layer is handed at a time
TOLERANCE, TOLERANCE_16 = 1e-4, 3e-2  # of the affine form, relative to the largest entry; where computed in 16 bits
Sides = tuple[ResidualTranscoder, ResidualTranscoder]


@torch.no_grad()
def given_dictionaries(config: DictionaryConfig, site: AttentionSite) -> Sides:
    """Query and key dictionary of one layer from `config.features`.

    Raises `UserError` where the features are not there, are of another point of the model, or cannot be carried.
    """
    assert config.features is not None
    found = find(config.features, site.layer)
    sae = read_sae(found, site.shape["D"])
    sae.centred |= config.centred
    if sae.hook is not None and (fits := layer_of(sae.hook)) != site.layer:
        where = "none's" if fits is None else f"layer {fits}'s"
        raise UserError(
            f"{OPTION} {found.source}: is of {sae.hook}, {where} attention input, and not of what layer {site.layer} "
            "reads; {layer} and {layer-1} in the name stand for numbers of layers"
        )
    return carried(sae, site, found)


@torch.no_grad()
def carried(sae: ResidualSAE, site: AttentionSite, found: Found) -> Sides:
    """An SAE's features as the query and key dictionary of a layer."""
    norm = norm_of(site)
    if sae.centred and norm.kind != "layer":
        raise UserError(
            f"{OPTION} {found.source}: takes each token's mean off, which the attention of layer {site.layer} sees (it "
            "reads no LayerNorm); only features of the whole residual stream can be carried there"
        )
    device = norm.weight.device
    constant = bool(norm.linear(sae.b_dec.to(device)).any())
    directions_FD = torch.cat([sae.W_dec, sae.b_dec[None][:constant]]).to(device, torch.float64)
    reading = Reading(
        source=found.source, revision=found.revision, hook=sae.hook, width=len(directions_FD), constant=constant,
        activation=sae.activation, k=sae.k or 1, rescale=sae.rescale, centred=sae.centred, norm=norm.kind, eps=norm.eps,
    )  # fmt: skip
    query, key = (_side(sae, reading, norm, directions_FD, *affine) for affine in projections(site))
    return query, key


def _side(
    sae: ResidualSAE, reading: Reading, norm: Norm, directions_FD: Tensor, A_DM: Tensor, c_M: Tensor
) -> ResidualTranscoder:
    side = ResidualTranscoder(len(A_DM), len(c_M), reading, norm).to(A_DM.device)
    f = sae.W_enc.shape[1]
    side.W_enc[:, :f] = sae.W_enc
    side.b_enc[:f], side.b_enc[f:] = sae.b_enc, 1  # b_dec's feature: active by itself
    side.b_in.copy_(sae.b_in)
    side.W_dec.copy_(norm.linear(directions_FD) @ A_DM)
    side.b_out.copy_(norm.bias.double() @ A_DM + c_M)
    if sae.threshold is not None:  # on sizes, as everywhere
        side.threshold[:f] = sae.threshold.clamp(min=0).to(side.W_dec.device) * side.norms()[:f]
    return side.eval().requires_grad_(False)  # type: ignore[return-value]


def projections(site: AttentionSite) -> list[tuple[Tensor, Tensor]]:
    """(A [D, M], c [M]), float64, of the queries and of the keys; `UserError` where they are not affine in x."""
    d = site.shape["D"]
    generator = torch.Generator().manual_seed(0)
    tries_nD = torch.randn(64, d, generator=generator) * torch.logspace(-1, 1, 64)[:, None]
    inputs_nD = torch.cat([torch.zeros(1, d), torch.eye(d), tries_nD])
    out = []
    for side, made_nM in zip(("queries", "keys"), _made_of(site, inputs_nD), strict=True):
        c_M, A_DM = made_nM[0], made_nM[1 : d + 1] - made_nM[0]
        model_dtype = next(site.module.parameters()).dtype
        tolerance = TOLERANCE if model_dtype == torch.float32 else TOLERANCE_16
        wanted = made_nM[d + 1 :]
        error = (tries_nD.to(A_DM) @ A_DM + c_M - wanted).abs().amax(1) / wanted.abs().amax(1).clamp(min=1e-12)
        if not bool((error <= tolerance).all()):
            raise UserError(
                f"{OPTION}: the {side} of layer {site.layer} are not affine in what its attention reads (a norm on "
                "them or in their projection), so features of the residual stream cannot be carried to them"
            )
        out.append((A_DM, c_M))
    return out


def _made_of(site: AttentionSite, inputs_nD: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer makes of any inputs: queries and keys as they enter the rotary embedding, float64 [n, M]."""
    tokens = random_tokens(site.model)[0][:1].repeat(ROWS, 1)
    queries, keys = [], []
    for part_nD in inputs_nD.split(tokens.numel()):
        rows_nD = torch.zeros(tokens.numel(), inputs_nD.shape[1])
        rows_nD[: len(part_nD)] = part_nD

        def fed(x: Tensor, rows_nD: Tensor = rows_nD) -> Tensor:
            return rows_nD.to(x).view_as(x)

        with site.reading(fed):
            (seen,) = harvest([site], tokens, torch.ones_like(tokens, dtype=torch.bool), residual=False)
        queries.append(seen.q_BTNH.flatten(0, 1).flatten(1)[: len(part_nD)].double())
        keys.append(seen.k_BTGH.flatten(0, 1).flatten(1)[: len(part_nD)].double())
    return torch.cat(queries), torch.cat(keys)


@torch.no_grad()
def explained(sides: Sides, sample: list[AttentionInputs]) -> tuple[float, float]:
    """Share of the variance of queries and of keys that the features explain on a sample of the residual stream."""
    shares = []
    for side, name in zip(sides, ("q_BTNH", "k_BTGH"), strict=True):
        true = torch.cat([getattr(i, name)[i.real_BT].flatten(1).float() for i in sample])
        error = torch.cat([side(i.x_BTD[i.real_BT].float()) for i in sample]) - true
        shares.append(1 - float(error.square().sum() / (true - true.mean(0)).square().sum()))
    return shares[0], shares[1]


def in_brief(sides: Sides, sample: list[AttentionInputs]) -> str:
    """How well given features fit the layer, as one line; and whether they would fit better with `centred`."""
    found = explained(sides, sample)
    said = f"the features explain {found[0]:.1%} of the variance of queries and {found[1]:.1%} of that of keys"
    plain = sides[0].reading
    if plain.norm == "layer" and not plain.centred and plain.hook is not None:
        for side in sides:
            side.reading = plain.model_copy(update={"centred": True})
        other = explained(sides, sample)
        for side in sides:
            side.reading = plain
        if sum(other) > sum(found) + 0.02:
            said += f"; with --dictionary.centred {other[0]:.1%} and {other[1]:.1%}"
    return said
