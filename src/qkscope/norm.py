"""The norm between the residual stream and one layer's attention, read off the model; no architecture is named.

    norm(r) = γ ∘ (r - mean r) / σ(r) + β,     σ(r)² = mean of (r - mean r)² + ε        "layer"
    norm(r) = γ ∘ r / σ(r) + β,                σ(r)² = mean of r² + ε                   "rms"
    norm(r) = r                                                                         "none"

So norm(r) is linear in r but for σ, one number a token: what a direction of the residual stream is to the attention can
be said exactly. The last is for models whose attention reads the residual stream itself. γ, β, ε and whether the mean
goes are measured on the norm's own module, and the formula is then checked on random vectors and on the model's own.

Shapes: D residual width; any leading dimensions.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from .attention import AttentionSite

NormKind = Literal["layer", "rms", "none"]
LARGE, SMALL = 1e3, 1e-3  # sizes of vectors for which ε is nothing to σ, and for which it is not
TOLERANCE = 1e-5  # of the formula, relative to the largest entry; measured: 2e-7
TOLERANCE_16 = 3e-2  # where the model computes in 16 bits


class Norm(nn.Module):
    """A layer's norm; float32 `weight` γ and `bias` β, [D] each."""

    weight: Tensor
    bias: Tensor

    def __init__(self, kind: NormKind, weight_D: Tensor, bias_D: Tensor, eps: float) -> None:
        super().__init__()
        self.kind: NormKind = kind
        self.eps = eps
        self.register_buffer("weight", weight_D, persistent=False)  # of the model, shared by both sides, never trained
        self.register_buffer("bias", bias_D, persistent=False)

    def centred(self, r: Tensor) -> Tensor:
        return r - r.mean(-1, keepdim=True) if self.kind == "layer" else r

    def linear(self, v: Tensor) -> Tensor:
        """The part that is linear in the residual stream: γ ∘ v, without v's mean in a LayerNorm."""
        return self.centred(v) * self.weight.to(v.dtype)

    def inverse_scale(self, r: Tensor) -> Tensor:
        """1/σ of each token, [..., 1]."""
        if self.kind == "none":
            return torch.ones_like(r[..., :1])
        return (self.centred(r).square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def forward(self, r: Tensor) -> Tensor:
        return self.linear(r) * self.inverse_scale(r) + self.bias.to(r.dtype)


@torch.no_grad()
def norm_of(site: AttentionSite) -> Norm:
    """The norm between a site's residual stream and its attention; `UserError` where it is of no form known here."""
    from .attention import harvest
    from .routing import random_tokens

    tokens, real = random_tokens(site.model)
    (r,) = (i.x_BTD for i in harvest([site], tokens, real, residual=True))
    outputs: list[tuple[nn.Module, Any]] = []  # kept, so that no memory is used twice
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.append((m, out))) for m in site.block.modules()]
    try:
        (x,) = (i.x_BTD for i in harvest([site], tokens, real, residual=False))
    finally:
        for hook in hooks:
            hook.remove()
    if torch.equal(x, r):
        return Norm("none", torch.ones_like(r[0, 0]).float(), torch.zeros_like(r[0, 0]).float(), 0.0)
    makers = [m for m, out in outputs if isinstance(out, Tensor) and out.data_ptr() == x.data_ptr()]
    norm = _measured(makers[0], r.shape[-1], r.device) if makers else None
    if norm is None or not _near(norm(r.float()), x.float(), TOLERANCE if x.dtype == torch.float32 else TOLERANCE_16):
        raise UserError(
            f"layer {site.layer}: between the residual stream and the attention stands something that is neither "
            "LayerNorm nor RMSNorm; features of the residual stream cannot be carried through it"
        )
    return norm


def _measured(module: nn.Module, d: int, device: torch.device) -> Norm | None:
    """γ, β, ε of a norm's module; None where it is no norm of this form."""
    own = copy.deepcopy(module).double()
    u = torch.randn(64, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)

    def f(r_nD: Tensor) -> Tensor:
        return own(r_nD[None])[0].double()

    bias = f(torch.zeros_like(u[:1]))[0]
    kind: NormKind = "layer" if _near(f(u + 5), f(u), TOLERANCE) else "rms"
    v = Norm(kind, torch.ones_like(bias), torch.zeros_like(bias), 0.0)(u)  # u of size 1
    weight = ((f(LARGE * u) - bias) * v).sum(0) / v.square().sum(0)
    full = Norm(kind, weight, bias, 0.0)
    small = full.linear(SMALL * u)
    size = torch.linalg.vecdot(f(SMALL * u) - bias, small) / torch.linalg.vecdot(small, small)  # 1/σ
    eps = (size**-2 - full.inverse_scale(SMALL * u)[:, 0] ** -2).mean().clamp(min=0)
    norm = Norm(kind, weight.float(), bias.float(), float(eps))
    tries = [t * (u + 0.5) for t in (1e-2, 1.0, 30.0)]
    return norm if all(_near(norm(r), f(r), TOLERANCE) for r in tries) else None


def _near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether they are the same up to a share of the largest entry; NaN is not."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
