"""Step 1's job: the query and key dictionaries of one layer, trained on the pattern's KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import parallel
from ..config import DictionaryConfig
from ..dictionary import SparseTranscoder
from ..kernels.mostly_zero import MostlyZero, acts_product, count, fires
from .job import Job
from .objective import PatternTarget, revival_loss, sparsity_loss
from .pair_penalty import pair_penalty
from .steering import DENSEST, Steering

# Dead features that share in the auxiliary reconstruction of a token, a unit of k. Where many share, none of them
# learns to stand for one thing: on planted layers (k 0.5) 64 a token left a quarter of the true features unfound.
AUX_FEATURES = 4
KEPT_STEPS = 8  # for which a GPU keeps the list of dead features; those that fire meanwhile drop out at once
ANNEALED = 0.5  # share of the training after which no more features are active than asked for


class Step1Job(Job):
    """Two dictionaries, and for each feature the tokens since it last fired."""

    def __init__(
        self,
        layer: int,
        variant: str,
        config: DictionaryConfig,
        query: SparseTranscoder,
        key: SparseTranscoder,
        steering: Steering | None = None,
    ) -> None:
        super().__init__(layer, variant, query, key)
        self.config, self.steering = config, steering
        self.register_buffer("log_k", torch.tensor([config.k, config.key_k], dtype=torch.float64).log())
        self._kl_3: Tensor | None = None
        # Of a side: for how many steps, and which. A run that goes on on a GPU begins with the list of that moment.
        self._dead_before: dict[str, tuple[int, Tensor]] = {}
        for side in ("query", "key"):
            idle = torch.zeros(self.side(side).width, dtype=torch.int64, device=query.W_enc.device)
            self.register_buffer(f"{side}_idle", idle)

    def side(self, side: str) -> SparseTranscoder:
        return self.query if side == "query" else self.key

    def parameter_groups(self) -> list[dict]:
        """Parameters with their peak learning rate."""
        rate, beta2 = self.config.learning_rate, self.config.beta2
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters, "lr": rate, "peak": rate, "betas": (0.9, beta2)}]

    def before_step(self, done: float) -> None:
        """Let more features be active at first, `anneal` times k, and fall to k in equal ratios."""
        super().before_step(done)
        if self.steering is not None:
            self.query.k, self.key.k = self.get_buffer("log_k").exp().tolist()
            return
        for side, k in (("query", self.config.k), ("key", self.config.key_k)):
            transcoder = self.side(side)
            if transcoder.activation not in ("batchtopk", "topk"):
                continue
            first = max(min((self.config.anneal or 1.0) * k, transcoder.width / 2), k)
            transcoder.k = k * (first / k) ** max(1 - done / ANNEALED, 0.0)

    def after_step(self) -> None:
        """Steer k by the KL of the batch that was just learned from."""
        if self.steering is not None and self._kl_3 is not None:
            widths = torch.tensor([self.query.width, self.key.width], dtype=torch.float64)
            most = (widths * DENSEST).clamp(min=1.0)
            self.log_k = self.steering.step(self.get_buffer("log_k"), parallel.mean(self._kl_3), most, self.done)

    def loss(self, target: PatternTarget, autocast: torch.autocast) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on one batch, and what to log of it."""
        extra = target.x_nD.new_zeros(())
        log: dict[str, Tensor] = {}
        out: dict[str, Tensor] = {}
        fired: dict[str, Tensor | MostlyZero] = {}
        for side, true in (("query", target.q_nM), ("key", target.k_nM)):
            with autocast:
                transcoder = self.side(side)
                acts, pre = transcoder.fire(target.x_nD)
                out[side] = transcoder.decode(acts)
            fired[side] = acts
            dead = self._note(side, acts)
            extra = extra + sparsity_loss(transcoder, pre, acts, self.config.sparsity or 0.0)
            if self.config.aux and len(index := self._to_revive(side, dead)):
                aux = transcoder.W_dec.index_select(0, index)
                with autocast:
                    pre_dead = transcoder.pre(target.x_nD, index) if pre is None else pre.index_select(1, index)
                revived = _largest(pre_dead * dead[index], aux, self._aux_count(side))
                extra = extra + self.config.aux * revival_loss(
                    true - out[side].float(), acts_product(revived, aux), transcoder.metric
                )
            log[f"l0_{side}"] = count(acts) / len(acts)
            log[f"dead_{side}"] = dead.float().mean()
        if self.config.pair_sparsity:
            with autocast:
                penalty = pair_penalty(target, self.query, self.key, fired["query"], fired["key"], self.draw)
            extra = extra + self.config.pair_sparsity * penalty
            log["pair_penalty"] = penalty.detach()
        kl, self._kl_3 = target.kl_of(out["query"], out["key"])
        log["pattern_kl"] = self._kl_3[0]
        return kl + extra, log

    def _to_revive(self, side: str, dead: Tensor) -> Tensor:
        """Dead features, int64; on a GPU, whose host would wait to know how many, those that were some steps ago."""
        age, index = self._dead_before.get(side, (KEPT_STEPS, dead))
        if dead.device.type == "cpu" or age == KEPT_STEPS:
            age, index = 0, dead.nonzero()[:, 0]
        self._dead_before[side] = age + 1, index
        return index

    def _aux_count(self, side: str) -> int:
        return math.ceil(AUX_FEATURES * (self.config.k if side == "query" else self.config.key_k))

    @torch.no_grad()
    def _note(self, side: str, acts: Tensor | MostlyZero) -> Tensor:
        """Count the tokens since each feature fired; bool [F] of those that count as dead."""
        idle = self.get_buffer(f"{side}_idle")
        idle += parallel.count(len(acts))
        idle.masked_fill_(parallel.anywhere(fires(acts)), 0)
        return idle > self.config.dead_after


def _largest(pre_nd: Tensor, rows_dM: Tensor, count: int) -> Tensor:
    """Dead features' activations, all but the `count` largest of a token set to zero."""
    acts = pre_nd.relu()
    if acts.shape[1] <= count:
        return acts
    chosen = (acts * rows_dM.detach().norm(dim=1)).topk(count, dim=-1).indices
    return acts * torch.zeros_like(acts).scatter_(-1, chosen, 1.0)
