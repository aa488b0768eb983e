"""The benchmark's sizes. Nothing here was chosen with the truth at hand: see `Size.k`."""

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
    """Active features a token of batchtopk and jumprelu (topk: the next whole number); chosen on other seeds than those
    reported: of the values tried, where the curve of validation KL against log k bends most."""
    seed_sparsity: float
    """`seed`'s penalty, chosen on those seeds for the same L0."""
    mask_sparsity: float
    """The trained mask's penalty, chosen on those seeds by the validation KL at twice the true number of pairs."""
    tokens: int
    """Training tokens of a dictionary."""
    pair_tokens: int
    """Training tokens of each way to choose pairs."""
    heldout_tokens: int
    batch_tokens: int = 2048

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
