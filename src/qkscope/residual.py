"""ResidualTranscoder: features of the residual stream, found by another's SAE, as one side's dictionary.

An SAE reads the residual stream r, r ≈ Σ_f a_f d_f + b_dec; the attention reads norm(r) = L(r)/σ + β (norm.py) and its
queries are A norm(r) + c. Put together, and exactly,

    q̂ = Σ_f (a_f/σ) A L(d_f)  +  (1/σ) A L(b_dec)  +  (A β + c)

which is a dictionary like any other: activations a_f/σ, decoder rows A L(d_f), one more feature for b_dec (the last
one, active with 1/σ on every token), and an output bias. So importance, map, report and examples know nothing of the
SAE, and q̂ is what the model's queries would be, had the SAE's reconstruction come through the norm at the token's true
scale. A feature's activations are thus the SAE's own, divided by each token's σ.

SAEs that rescale their input before they encode it, and their output back, by a number s of the token, have activations
a_f s/σ. Where the SAE's input is centred the layer has a LayerNorm, to which the mean is nothing.

Shapes: n tokens, D residual width, F features (b_dec's included), M width of all heads together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .config import Config
from .dictionary import SparseTranscoder
from .norm import Norm, NormKind

STD_EPS = 1e-5  # what SAELens adds to a standard deviation before it divides by it


class Reading(Config):
    """How given features read the residual stream: what an artefact's config.yaml says beside the tensors."""

    source: str
    """Where the features came from, as it was given."""
    revision: str | None = None
    """Commit of a repository on the Hugging Face hub."""
    hook: str | None = None
    """Point of the residual stream that the SAE was trained on; None for plain directions."""
    width: int
    """Features, b_dec's included."""
    constant: bool
    """Whether the last feature is b_dec's."""
    activation: Literal["relu", "topk", "jumprelu"]
    k: int = 1
    """topk: how many of the largest activations are left (b_dec's takes no place)."""
    rescale: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    """What the SAE divides its input by: nothing, the standard deviation, or the norm over √D."""
    centred: bool = False
    """Whether each token's mean is taken off first."""
    norm: NormKind
    """The norm that stands before the attention."""
    eps: float
    """ε of it."""


class ResidualTranscoder(SparseTranscoder):
    """One side's dictionary that reads the residual stream; `norm` is the one before the attention."""

    input_norm: Norm

    def __init__(self, d_in: int, d_out: int, reading: Reading, norm: Norm) -> None:
        super().__init__(d_in, reading.width, d_out, reading.activation, reading.k)
        self.reading = reading
        self.input_norm = norm

    def read(self, x_nD: Tensor) -> Tensor:
        """The residual stream as the SAE's encoder sees it."""
        if self.reading.centred:
            x_nD = x_nD - x_nD.mean(-1, keepdim=True)
        if self.reading.rescale == "layer_norm":
            return x_nD / (self._rescaled_by(x_nD) + STD_EPS)
        return x_nD / self._rescaled_by(x_nD)

    def _rescaled_by(self, x_nD: Tensor) -> Tensor:
        """s of each token, [n, 1]."""
        if self.reading.rescale == "layer_norm":
            return x_nD.std(-1, keepdim=True)
        if self.reading.rescale == "constant_norm_rescale":
            return x_nD.norm(dim=-1, keepdim=True) / x_nD.shape[-1] ** 0.5
        return torch.ones_like(x_nD[..., :1])

    def encode(self, x_nD: Tensor) -> Tensor:
        """Feature activations of the residual stream, as the attention sees them: times s/σ, [n, F]."""
        return super().encode(x_nD) * self._rescaled_by(x_nD) * self.input_norm.inverse_scale(x_nD)

    def activate(self, pre_nF: Tensor) -> Tensor:
        """The SAE's own nonlinearity; TopK compares activations, not sizes."""
        if self.activation != "topk":
            return super().activate(pre_nF)
        acts, last = pre_nF.relu(), self.width - self.reading.constant
        chosen = acts[..., :last].topk(min(self.reading.k, last), dim=-1).indices
        on = torch.zeros_like(acts).scatter_(-1, chosen, 1.0)
        on[..., last:] = 1
        return acts * on
