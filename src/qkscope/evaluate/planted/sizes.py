"""The benchmark's sizes.

Worlds and budgets were tried on seed 0 of `small` and `medium`; k was chosen on seeds 0 to 2 without the truth
(benchmarks/planted_settings.py). Nothing was tried on `large`; its k grows as the features that fire do. Report other
seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

from .world import WorldConfig


@dataclass(frozen=True)
class Size:
    """Worlds of one size and what the methods may spend on each."""

    world: WorldConfig
    rotary_head_width: int
    """Only the slow planes hold pairs, so heads with a rotary embedding are wider."""
    width: int
    """Features a side of every learned dictionary."""
    k: int
    """Active features a token of batchtopk, topk and jumprelu: where the curve of log KL against log k bends. (0.5 to 1
    relevant true features fire on a token; the rest of k goes to interference.)"""
    seed_sparsity: float
    """`seed`'s penalty: its recipe's own. In `medium` its L0 is near k; in `small` it is three times k, and half of k
    with three times the penalty, at four times the KL."""
    mask_sparsity: float
    """The trained mask's penalty: of three the one with the least KL (`small`)."""
    tokens: int
    """Training tokens of a dictionary."""
    pair_tokens: int
    """Training tokens of each way to choose pairs."""
    heldout_tokens: int
    batch_tokens: int = 2048
    sample_tokens: int = 8192
    """Training tokens that starts are fitted to and importance is averaged over."""

    def of(self, rotary: bool) -> WorldConfig:
        if not rotary:
            return self.world
        values = {**self.world.__dict__, "rotary": True, "head_width": self.rotary_head_width}
        return WorldConfig(**values)


SIZES = {
    "small": Size(
        WorldConfig(width=64, features=80, heads=2, head_width=12, pairs=8, pool=20, context=32),
        rotary_head_width=24, width=80, k=1, seed_sparsity=0.03, mask_sparsity=1e-3,
        tokens=400_000, pair_tokens=200_000, heldout_tokens=16_384,
    ),
    "medium": Size(
        WorldConfig(width=96, features=128, heads=4, head_width=16, pairs=12, pool=40, context=64),
        rotary_head_width=32, width=128, k=2, seed_sparsity=0.03, mask_sparsity=1e-3,
        tokens=1_000_000, pair_tokens=400_000, heldout_tokens=32_768,
    ),
    "large": Size(
        WorldConfig(width=192, features=256, heads=8, head_width=24, pairs=20, pool=100, context=128),
        rotary_head_width=64, width=320, k=4, seed_sparsity=0.03, mask_sparsity=1e-3,
        tokens=2_500_000, pair_tokens=1_000_000, heldout_tokens=65_536,
    ),
}  # fmt: skip
