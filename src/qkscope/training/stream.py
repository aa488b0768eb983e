"""What training reads: batch after batch of what attention layers were handed, from a place that can be saved.

The loop knows no model and no text. `ModelStream` runs a frozen model on a stream of sequences; the planted benchmark
draws its batches from a world whose truth is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import parallel
from ..attention import AttentionInputs, AttentionSite, harvest
from ..data.sequences import Batch, Sequences
from ..routing import plain_batches
from .objective import Padding
from .watch import Watch


class Origin(Protocol):
    """Where a batch's tokens come from."""

    @property
    def document_B(self) -> Tensor: ...

    def positions(self, row_E: Tensor, at_E: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Harvest:
    """One batch, as every layer that is trained on saw it."""

    layers: dict[int, AttentionInputs]
    origin: Origin
    n_tokens: int
    """Real tokens, BOS included; of the rows in all processes."""
    padding: Padding
    """Of the rows here."""


class Stream(Protocol):
    """An endless iterator over harvests whose place can be saved as plain values and gone back to."""

    def __next__(self) -> Harvest: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Ahead:
    """A text whose next batch is made in a thread of its own while the present one is learned from.

    A GPU would else wait while the text is tokenised. The place is that of the batches that were handed over; what goes
    wrong is raised where the batch is asked for.
    """

    def __init__(self, text: Sequences) -> None:
        self.text, self._place = text, text.state()
        self._coming: Future[tuple[Batch, dict[str, Any]]] | None = None

    def __next__(self) -> Batch:
        coming, self._coming = self._coming or self._begun(), None
        batch, self._place = coming.result()
        self._coming = self._begun()
        return batch

    def _begun(self) -> Future[tuple[Batch, dict[str, Any]]]:
        coming: Future[tuple[Batch, dict[str, Any]]] = Future()

        def make() -> None:
            try:
                coming.set_result((next(self.text), self.text.state()))
            except BaseException as error:
                coming.set_exception(error)

        Thread(target=make, daemon=True, name="qkscope-text").start()
        return coming

    def state(self) -> dict[str, Any]:
        return self._place

    def restore(self, state: dict[str, Any]) -> None:
        if self._coming is not None:
            wait([self._coming])
        self._coming = None
        self.text.restore(state)
        self._place = self.text.state()


class ModelStream:
    """Layers of one frozen model on a stream of sequences; one forward pass a batch, for this process's rows of it."""

    def __init__(self, sites: Sequence[AttentionSite], text: Sequences) -> None:
        self.sites, self.text = sites, Ahead(text)
        self.device = next(sites[0].model.parameters()).device

    def __next__(self) -> Harvest:
        whole = next(self.text)
        mine = whole.rows(slice(parallel.rank(), None, parallel.size()))
        padding, batch = Padding.of(mine.real_BT, self.device), mine.to(self.device)
        with plain_batches():
            seen = harvest(self.sites, batch.tokens_BT, batch.real_BT)
        return Harvest(dict(zip([s.layer for s in self.sites], seen, strict=True)), batch, whole.n_tokens, padding)

    def state(self) -> dict[str, Any]:
        return self.text.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.text.restore(state)


class Reused:
    """A stream whose batches come `times` each: `held` of them at a time, one after the other, again and again.

    The model runs once for all of these steps. No more are held than it takes to have harvested `tokens`. The place to
    go back to is where the held batches begin, and how many have been handed out since; they are harvested anew.
    """

    def __init__(self, stream: Stream, times: int, held: int, tokens: float) -> None:
        self.stream, self.times, self.held, self.tokens = stream, times, held, tokens
        self._batches: list[Harvest] = []
        self._given = self._harvested = 0
        self._begin: dict[str, Any] = {}

    def __next__(self) -> Harvest:
        if self._ended:
            self._batches, self._given = [], 0  # let go of before the next ones are made
        if not self._batches:
            self._harvest()
        self._given += 1
        return self._batches[(self._given - 1) % len(self._batches)]

    @property
    def _ended(self) -> bool:
        return self._given == self.times * len(self._batches)

    def _harvest(self) -> None:
        self._begin = self._place()
        while not self._batches or (len(self._batches) < self.held and self._harvested < self.tokens):
            self._batches.append(next(self.stream))
            self._harvested += self._batches[-1].n_tokens

    def _place(self) -> dict[str, Any]:
        return {"text": self.stream.state(), "harvested": self._harvested}

    def state(self) -> dict[str, Any]:
        return {**self._place(), "given": 0} if self._ended else {**self._begin, "given": self._given}

    def restore(self, state: dict[str, Any]) -> None:
        self.stream.restore(state["text"])
        self._batches, self._begin = [], state
        self._harvested, self._given = state["harvested"], state["given"]


def harvest_finite(site: AttentionSite, batch: Batch) -> AttentionInputs:
    """What one layer saw on a batch, outside of training; `UserError` where that is not finite."""
    inputs = harvest([site], batch.tokens_BT, batch.real_BT)[0]
    require_finite(inputs, site.layer, batch)
    return inputs


def require_finite(
    inputs: AttentionInputs, layer: int, origin: Origin, step: int | None = None, watch: Watch | None = None
) -> None:
    """Raise `UserError` that says where, unless everything harvested is finite; `watch`: when that one is read.

    Document and position are those of examples.parquet: content tokens from 0, BOS not counted (-1: BOS itself).
    """
    watch = watch or Watch(torch.device("cpu"))
    for name, values in (("inputs", inputs.x_BTD), ("queries", inputs.q_BTNH), ("keys", inputs.k_BTGH)):
        largest_BT = torch.linalg.vector_norm(values.flatten(2), torch.inf, -1)
        bad_BT = ~(largest_BT < torch.inf) & inputs.real_BT  # NaN is not less either
        watch.note(bad_BT.any(), partial(_where, bad_BT, name, layer, origin, step))


def _where(bad_BT: Tensor, name: str, layer: int, origin: Origin, step: int | None) -> str:
    when = "" if step is None else f"at step {step}, "
    b, t = bad_BT.nonzero()[0]
    return (
        f"layer {layer}: the model's attention {name} hold NaN or infinity {when}document "
        f"{int(origin.document_B[b])}, position {int(origin.positions(b, t))}; try --training.dtype float32 "
        "(the last checkpoint is kept)"
    )
