"""SparseTranscoder: one side's dictionary, from the residual stream to queries or keys.

    acts = act((x - b_in) W_enc + b_enc)         out = acts W_dec + b_out

What is notable:
- A feature's size is its activation times the norm of its decoder row, so rescaling a row changes nothing. Activations
  that choose the largest features compare sizes.
- `size_factor` lets training compare sizes in another norm than the plain one, e.g. by their effect on scores. It is
  folded into the threshold when a dictionary is stored, so a reader only needs: f fires where relu(pre)·‖W_dec_f‖ >
  threshold_f.
- BatchTopK chooses the k·tokens largest of a batch in training and uses the running threshold afterwards (Bussmann et
  al. 2024); JumpReLU learns its thresholds through a straight-through estimate (Rajamanoharan et al. 2024).

Shapes: n tokens, D residual width, F features, M width of all heads together.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import parallel
from .config import Activation
from .kernels.mostly_zero import SHARE, MostlyZero, acts_product, large_entries, pre_product, with_gradient
from .norm import Norm

THRESHOLD_MEMORY = 0.98  # share of the running threshold kept at each step: about 50 steps of memory
CALIBRATION_TOKENS = 2048
JUMP_BANDWIDTH = 0.05  # width of the straight-through estimate, relative to the threshold


def chooses_few(activation: Activation | None, k: float, width: int) -> bool:
    """Whether so few features are active in training that, on a CPU, activations are not written with their zeros."""
    return activation == "batchtopk" and k <= SHARE * width


class SparseTranscoder(nn.Module):
    """One dictionary: float32 `W_enc [D, F]`, `W_dec [F, M]`, biases `b_in [D]`, `b_enc [F]`, `b_out [M]`."""

    def __init__(self, d_in: int, width: int, d_out: int, activation: Activation, k: float) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.k = k
        self.W_enc = nn.Parameter(torch.zeros(d_in, width))
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.b_in = nn.Parameter(torch.zeros(d_in))
        self.W_dec = nn.Parameter(torch.zeros(width, d_out))
        self.b_out = nn.Parameter(torch.zeros(d_out))
        # JumpReLU learns it; ReLU and TopK leave it at 0; BatchTopK keeps the running mean of its smallest chosen size.
        self.threshold = nn.Parameter(torch.zeros(width), requires_grad=activation == "jumprelu")
        self.metric: Tensor | None
        self.register_buffer("metric", None)
        # Of a dictionary that is handed the residual stream and reads it as the attention does, after this norm.
        self.input_norm: Norm | None = None

    @property
    def width(self) -> int:
        return self.W_dec.shape[0]

    def set_metric(self, metric_NHH: Tensor | None) -> None:
        """Compare sizes in the norm √Σ_h w_hᵀ C_h w_h of decoder rows; None: in the plain norm."""
        self.metric = None if metric_NHH is None else metric_NHH.clone()

    @torch.no_grad()
    def keep(self, index: Tensor) -> None:
        """Narrow to these features, in this order."""
        for name, dim in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0), ("threshold", 0)):
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(old.index_select(dim, index), requires_grad=old.requires_grad))

    def narrowed(self, index: Tensor) -> SparseTranscoder:
        """A copy with these features alone, in this order; what it has in common with this one is shared."""
        other = copy.copy(self)
        other._parameters = self._parameters.copy()  # a module's own copy would share them
        other.keep(index)
        return other

    def norms(self) -> Tensor:
        """What an activation is multiplied by to give a size, [F]; not differentiated."""
        w = self.W_dec.detach()
        # TopK has no threshold to fold the metric into, and must choose in a reader's hands as it did in training.
        if self.metric is None or self.activation == "topk":
            return w.norm(dim=1)
        w_NFH = w.view(len(w), *self.metric.shape[:2]).transpose(0, 1)
        n = 1 if w.device.type == "cpu" else len(w_NFH)  # heads at a time: on a CPU no copy of all of W_dec
        heads = zip(w_NFH.split(n), self.metric.split(n), strict=True)
        squares = torch.stack([torch.linalg.vecdot(w_nFH @ c_nHH, w_nFH).sum(0) for w_nFH, c_nHH in heads]).sum(0)
        return squares.clamp(min=0).sqrt()

    def read(self, x_nD: Tensor) -> Tensor:
        """What the encoder sees of its input."""
        return x_nD if self.input_norm is None else self.input_norm(x_nD)

    def pre(self, x_nD: Tensor, features: Tensor | None = None) -> Tensor:
        """Activations before the nonlinearity, [n, F]; of these features only, where they are given."""
        x_nD, W_DF, b_F = self._encoder(x_nD)
        if features is not None:
            W_DF, b_F = W_DF.index_select(1, features), b_F.index_select(0, features)
        return pre_product(x_nD, W_DF) + b_F

    def _encoder(self, x_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's input, W [D, F] and b [F]: `pre` is x W + b."""
        # b_in as a constant, and its gradient by a term that is zero: a sum over tokens times W_enc, where through the
        # product it would take another product of all tokens.
        b_in = self.b_in.detach()
        return self.read(x_nD) - b_in, self.W_enc, self.b_enc - (self.b_in - b_in) @ self.W_enc.detach()

    def encode(self, x_nD: Tensor) -> Tensor:
        """Feature activations, [n, F]: non-negative, mostly zero. In training mode BatchTopK chooses over the batch."""
        return self.activate(self.pre(x_nD))

    def fire(self, x_nD: Tensor) -> tuple[Tensor | MostlyZero, Tensor | None]:
        """Activations in training, and what they were before the nonlinearity.

        On a CPU, where BatchTopK chooses few, neither is made with its zeros, and the latter not at all.
        """
        if self._chooses_few(x_nD):
            return self._batch_topk(x_nD), None
        pre_nF = self.pre(x_nD)
        return self.activate(pre_nF), pre_nF

    def _chooses_few(self, x_nD: Tensor) -> bool:
        return self.training and x_nD.device.type == "cpu" and chooses_few(self.activation, self.k, self.width)

    def _batch_topk(self, x_nD: Tensor) -> MostlyZero:
        """What `activate` chooses, from those above half the running threshold where these are enough."""
        norms, count = self.norms(), self._chosen(parallel.count(len(x_nD)))
        encoder = self._encoder(x_nD)
        for least_F in (self.threshold / 2 / norms, torch.zeros_like(norms)):
            large = large_entries(*encoder, least_F)
            sizes_L = large.value_L * norms[large.column_L]
            if enough := parallel.number(len(sizes_L)) >= count:
                break
        cut = parallel.kth_largest(sizes_L, count) if enough else norms.new_zeros(())
        self._follow(cut)
        return with_gradient(large.take((sizes_L >= cut).nonzero()[:, 0]), *encoder)

    def activate(self, pre_nF: Tensor) -> Tensor:
        """The nonlinearity, on `pre`'s result."""
        acts = pre_nF.relu()
        if self.activation == "relu":
            return acts
        norms = self.norms()
        sizes = acts.detach() * norms
        if self.activation == "topk":
            chosen = sizes.topk(min(round(self.k), self.width), dim=-1).indices
            return acts * torch.zeros_like(acts).scatter_(-1, chosen, 1.0)
        if self.activation == "jumprelu":
            return _JumpReLU.apply(acts, self.threshold, norms)  # type: ignore[return-value]
        if self.training:
            cut = parallel.kth_largest(sizes, self._chosen(parallel.count(len(sizes))), self.threshold[0])
            self._follow(cut)
            return acts.masked_fill(sizes < cut, 0)
        return acts * (sizes > self.threshold)

    def _chosen(self, n_tokens: int) -> int:
        """How many features BatchTopK chooses over so many tokens."""
        return min(max(round(self.k * n_tokens), 1), n_tokens * self.width)

    def reach(self, acts: Tensor | MostlyZero, pre_nF: Tensor | None) -> MostlyZero:
        """Of what `fire` says, the entries that have a gradient: active ones, and JumpReLU's near their thresholds."""
        if isinstance(acts, MostlyZero):
            return acts
        on_nF = acts.detach() > 0
        if self.activation == "jumprelu":
            assert pre_nF is not None  # BatchTopK alone has none
            on_nF |= _nearness(pre_nF.detach().relu() * self.norms(), self.threshold.detach()) > 0
        return MostlyZero.of(acts, on_nF)

    @torch.no_grad()
    def _follow(self, cut: Tensor) -> None:
        memory = (self.threshold[0] > 0) * THRESHOLD_MEMORY  # the first batch sets it
        self.threshold.lerp_(cut.expand_as(self.threshold), 1 - memory)

    @torch.no_grad()
    def calibrate(self, x_nD: Tensor) -> None:
        """Set BatchTopK's threshold to the mean of what it chose on these tokens, 2048 at a time.

        The running threshold lags behind weights that still move, and L0 at inference with it. It stands half way to
        the next smaller size: on the size of a token that comes again, rounding would decide.
        """
        if self.activation != "batchtopk":
            return
        cuts = []
        for x in x_nD.split(CALIBRATION_TOKENS):
            sizes = self.pre(x).relu() * self.norms()
            chosen = self._chosen(len(x))
            edges = (
                parallel.kth_largest(sizes, k, self.threshold[0]) for k in (chosen, min(chosen + 1, sizes.numel()))
            )
            cuts.append(sum(edges) / 2 * len(x))
        self.threshold.fill_(torch.stack(cuts).sum() / len(x_nD))

    def decode(self, acts: Tensor | MostlyZero) -> Tensor:
        """Reconstructed queries or keys, [n, M]."""
        # In training JumpReLU lets gradients pass to activations of zero, near its thresholds.
        if isinstance(acts, Tensor) and (self.activation == "jumprelu" or acts.dim() != 2):
            return acts @ self.W_dec + self.b_out
        return acts_product(acts, self.W_dec) + self.b_out

    def forward(self, x_nD: Tensor) -> Tensor:
        return self.decode(self.encode(x_nD))

    def plain_threshold(self) -> Tensor:
        """Thresholds on relu(pre)·‖W_dec_f‖, [F]: what an artefact stores."""
        if self.metric is None:
            return self.threshold.detach().clone()
        plain, norms = self.W_dec.detach().norm(dim=1), self.norms()
        # A row without effect on any score never fires: its size is 0, which no positive threshold lets through.
        return torch.where(norms > 0, self.threshold.detach() * plain / norms, torch.inf)

    def l0_gap(self, pre_nF: Tensor) -> Tensor:
        """(L0/k - 1)², differentiable in JumpReLU's thresholds only."""
        sizes = pre_nF.detach().relu() * self.norms()
        l0 = parallel.mean(_Step.apply(sizes, self.threshold).sum(-1).mean())  # type: ignore[union-attr]
        return (l0 / self.k - 1) ** 2


def _nearness(sizes: Tensor, threshold: Tensor) -> Tensor:
    """The rectangle kernel of the straight-through estimate: of area 1 around the threshold."""
    width = JUMP_BANDWIDTH * threshold.clamp(min=1e-3)
    return ((sizes - threshold).abs() < width / 2) / width


class _JumpReLU(torch.autograd.Function):
    """a · [a·norm > θ], with the rectangle-kernel estimate of the gradient in θ."""

    @staticmethod
    def forward(ctx, acts, threshold, norms):
        sizes = acts * norms
        on = sizes > threshold
        ctx.save_for_backward(acts, sizes, threshold, on)
        return acts * on

    @staticmethod
    def backward(ctx, *grads):
        acts, sizes, threshold, on = ctx.saved_tensors
        near = _nearness(sizes, threshold)
        return grads[0] * on, -(grads[0] * acts * near).sum(0), None


class _Step(torch.autograd.Function):
    """[size > θ], with the rectangle-kernel estimate of the gradient in θ."""

    @staticmethod
    def forward(ctx, sizes, threshold):
        ctx.save_for_backward(sizes, threshold)
        return (sizes > threshold).to(sizes.dtype)

    @staticmethod
    def backward(ctx, *grads):
        sizes, threshold = ctx.saved_tensors
        near = _nearness(sizes, threshold)
        return None, -(grads[0] * near).sum(0)
