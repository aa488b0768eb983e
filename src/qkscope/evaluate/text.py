"""A run's text, as its own training would cut it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from ..attention import AttentionSite
from ..config import RunConfig
from ..data import Batch, Sequences
from ..data.documents import Split

BATCH_TOKENS = 4096  # about, at the most, whatever a step of training has: logits of a batch are held


def text_of(site: AttentionSite, config: RunConfig, split: Split, tokens: int) -> Sequences:
    """The beginning of one split, in batches of about `BATCH_TOKENS` at the most, or one sequence."""
    return Sequences(
        config.data, site.tokenizer, split, batch_tokens=min(config.training.batch_tokens, BATCH_TOKENS),
        seed=config.training.seed, repeat=False, max_tokens=tokens,
    )  # fmt: skip


def heldout_share(site: AttentionSite, config: RunConfig, share: int, shares: int) -> Iterable[Batch]:
    """One of so many shares of the held-out text that the figures are of: batches that follow on each other."""

    def whole() -> Sequences:
        return text_of(site, config, "heldout", config.evaluation.tokens)

    if shares == 1:
        return whole()
    n = sum(1 for _ in whole())
    return islice(whole(), n * share // shares, n * (share + 1) // shares)
