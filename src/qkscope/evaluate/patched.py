"""The model's own loss with the patterns of layers replaced: cross-entropy, and KL(true logits ‖ patched logits)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSite
from ..data.sequences import Batch
from ..pattern import AttentionInputs, HeadPatterns, HeadSource, PatternSource, patterns_of
from .figures import Ratio, ratio_figure
from .predictions import Predictions

ABLATIONS = ("zero", "uniform", "mean")


@dataclass
class PatchedScore:
    """Cross-entropy of each variant and KL of its logits from the model's, gathered over batches."""

    ce: dict[str, Ratio] = field(default_factory=dict)
    kl: dict[str, Ratio] = field(default_factory=dict)

    def add(self, site: AttentionSite, batch: Batch, variants: Mapping[str, PatternSource | HeadSource]) -> None:
        """Run the model plainly and once for each variant of one layer's pattern on one batch."""
        self.add_together([site], batch, {name: [source] for name, source in variants.items()})

    @torch.no_grad()
    def add_together(
        self, sites: Sequence[AttentionSite], batch: Batch, variants: Mapping[str, Sequence[PatternSource | HeadSource]]
    ) -> None:
        """The same for several layers of one model at once: a variant has a source for each of them."""
        with min(sites, key=lambda site: site.layer).lower_layers_once():
            own = Predictions(sites[0], batch)
            self._note(self.ce, "model", own.next_token_loss(), batch.real_BT[:, 1:])
            for name, sources in variants.items():
                with ExitStack() as stack:
                    for site, source in zip(sites, sources, strict=True):
                        stack.enter_context(site.replace_pattern(source))
                    patched = Predictions(sites[0], batch)
                self._note(self.ce, name, patched.next_token_loss(), batch.real_BT[:, 1:])
                self._note(self.kl, name, own.kl(patched), batch.real_BT)
                del patched  # before the next one's logits are made

    def merge(self, other: PatchedScore) -> None:
        """Take in what follows in the text."""
        for mine, theirs in ((self.ce, other.ce), (self.kl, other.kl)):
            for name, ratio in theirs.items():
                mine.setdefault(name, Ratio()).merge(ratio)

    @staticmethod
    def _note(into: dict[str, Ratio], name: str, values_BT: Tensor, counted_BT: Tensor) -> None:
        values = values_BT.masked_fill(~counted_BT, 0)
        into.setdefault(name, Ratio()).add(values.sum(1), counted_BT.sum(1).float())

    def report(self) -> dict[str, Any]:
        """Figures, and for each variant the share of an ablation's damage that it recovers."""
        out: dict[str, Any] = {
            "ce": {name: ratio.figure() for name, ratio in self.ce.items()},
            "logit_kl": {name: ratio.figure() for name, ratio in self.kl.items()},
            "ce_increase": {name: self.increase(name) for name in self.ce if name != "model"},
        }
        recovered: dict[str, Any] = {}
        for name in self.kl:
            if name not in ABLATIONS:
                recovered[name] = {
                    ablation: {"ce": self._recovered_ce(name, ablation), "logit_kl": self._recovered_kl(name, ablation)}
                    for ablation in ABLATIONS
                    if ablation in self.kl
                }
        return {**out, "recovered": recovered}

    def increase(self, name: str) -> dict[str, Any]:
        """Cross-entropy above the model's own, token by token (the interval is that of the difference)."""
        (sums, weights), (base, _) = self.ce[name].totals(), self.ce["model"].totals()
        return ratio_figure(sums - base, weights)

    def _recovered_ce(self, name: str, ablation: str) -> dict[str, Any] | None:
        base = self.ce["model"].totals()[0]
        lost, damage = self.ce[name].totals()[0] - base, self.ce[ablation].totals()[0] - base
        return _one_minus(ratio_figure(lost, damage)) if float(damage.sum()) > 0 else None

    def _recovered_kl(self, name: str, ablation: str) -> dict[str, Any]:
        return _one_minus(ratio_figure(self.kl[name].totals()[0], self.kl[ablation].totals()[0]))


def _one_minus(figure: dict[str, Any]) -> dict[str, Any]:
    ci = figure["ci95"]
    mean = None if figure["mean"] is None else 1 - figure["mean"]
    return {"mean": mean, "ci95": None if ci is None else [1 - ci[1], 1 - ci[0]]}


def as_source(log_pattern: HeadPatterns) -> HeadSource:
    """A log-pattern of what was seen, as a source. Only for one layer patched alone: it sees the model's own x."""
    return lambda inputs: patterns_of(log_pattern)


def zero_pattern(inputs: AttentionInputs) -> HeadPatterns:
    """No attention at all."""
    batch, length, *_ = inputs.q_BTNH.shape
    return lambda heads: inputs.q_BTNH.new_zeros(batch, heads.stop - heads.start, length, inputs.k_BTGH.shape[1])
