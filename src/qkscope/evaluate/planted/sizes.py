"""The benchmark's sizes.

Settings were tried on seed 0 of `small` and `medium`, which is not reported; those of `large` are theirs carried over.
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
    k: float
    """Active features a token of batchtopk and jumprelu (topk: the next whole number). Known, not found: somewhat above
    the number of relevant true features that fire on a token (0.2 to 0.4 a side), the same for all."""
    seed_sparsity: float
    """`seed`'s penalty: its recipe's own, which on seed 0 gave less KL and better features than 3 or 10 times as much
    (those are nearer to k in L0)."""
    mask_sparsity: float
    """The trained mask's penalty: less prunes nothing in as many steps (seed 0)."""
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
        WorldConfig(width=32, features=56, heads=2, head_width=12, pairs=8, pool=16, context=32),
        rotary_head_width=24, width=64, k=0.5, seed_sparsity=0.03, mask_sparsity=1e-3,
        tokens=400_000, pair_tokens=100_000, heldout_tokens=16_384,
    ),
    "medium": Size(
        WorldConfig(width=64, features=128, heads=4, head_width=16, pairs=12, pool=40, context=64),
        rotary_head_width=32, width=128, k=0.5, seed_sparsity=0.03, mask_sparsity=1e-3,
        tokens=600_000, pair_tokens=200_000, heldout_tokens=32_768,
    ),
    "large": Size(
        WorldConfig(width=128, features=320, heads=8, head_width=24, pairs=20, pool=100, context=128),
        rotary_head_width=64, width=320, k=0.8, seed_sparsity=0.03, mask_sparsity=1e-3,
        tokens=2_000_000, pair_tokens=600_000, heldout_tokens=65_536,
    ),
}  # fmt: skip
