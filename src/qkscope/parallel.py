"""Several processes on one run, each with a device of its own; with one process, nothing here does anything.

    torchrun --nproc-per-node 2 -m qkscope run ...       (or what else sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)

Notable:
- The first process leads: it alone reads options, and tells the others what to take part in. Either all train the same
  dictionaries, each on its share of every batch: before each training the others are told what a checkpoint would say;
  they need the model and the text but not the run's folder, and write nothing. Or what there is to do is `dealt`: each
  takes a part, does it as if it were the only process (`alone`), and writes into the folder, which all must see.
- Within `divided`, a batch's rows lie with the processes in turn. A loss that is a mean over tokens is weighed by a
  process's share of them, and the gradients are added up: the sum is the whole batch's. That also holds for a function
  of several means, if every process takes it of the means over the whole batch (`mean`, whose gradient goes to the
  process's own part) and it depends on nothing else of its own.
- All that decides for a whole batch (what BatchTopK chooses, which features are dead) follows from what all processes
  hold alike, so parameters are the same bits everywhere, and nobody needs to send any.
- Where one process fails, the others find it gone. The first one to have something to say says it, once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from .errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = timedelta(days=7)  # for the first process, which evaluates and ranks between trainings
A_MOMENT = timedelta(seconds=10)  # for another to say what is wrong


class Gone(Exception):
    """Another process has ended."""


@dataclass
class World:
    """The processes of a run."""

    store: Any
    """Words by name that all processes can read and set, also while none of them listens."""
    rank: int
    size: int
    dismissed: bool = False
    """Whether the first process has said that nothing more is to be done together."""


@dataclass(frozen=True)
class Division:
    """A batch whose rows lie with several processes: real tokens here, and in all."""

    part: int
    whole: int


_world: World | None = None
_joined = 0  # how often: each time has its own words in the store
_division: Division | None = None


# Processes -------------------------------------------------------------------------------------------


def rank() -> int:
    """0: the process that leads, or the only one."""
    return 0 if _world is None else _world.rank


def size() -> int:
    """Processes in this run."""
    return 1 if _world is None else _world.size


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that were started together, where several were.

    A `UserError` of one process becomes one of all of them. Within another `joined`, nothing happens.
    """
    if _world is not None or not _started_together():
        yield
        return
    world = _join()
    try:
        yield
    except UserError as error:
        where = f" (process {world.rank}, on {socket.gethostname()})" if world.rank else ""
        with suppress(RuntimeError):  # the store may have gone with another
            world.store.compare_set("reason", "", f"{error}{where}")
        raise
    except Gone as gone:
        raise UserError(_reason(world)) from gone
    except SystemExit:  # --help
        leave()
        raise
    leave()


def _started_together() -> bool:
    return all(name in os.environ for name in NEEDED) and os.environ["WORLD_SIZE"] != "1"


@cache
def _meeting() -> tuple[Any, int, int]:
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    return next(rendezvous("env://"))


def _join() -> World:
    global _world, _joined
    store, rank, size = _meeting()
    _joined += 1
    store = dist.PrefixStore(f"run {_joined}", store)  # pyright: ignore[reportPrivateImportUsage]
    # Messages lie in main memory, gradients where they are made.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _world = World(store, rank, size)
    return _world


def leave() -> None:
    """Go on alone, once the first process is here too: it tells the others that nothing more is to be done together.

    After a failure nobody leaves, for that may wait for one that is gone; a process's end is what the others notice.
    """
    global _world
    if _world is None:
        return
    if _world.rank == 0:
        send(None)
    while _world.rank > 0 and not _world.dismissed:
        receive()
    dist.destroy_process_group()
    _world = None


def _reason(world: World) -> str:
    """Why another process is gone, as far as it said."""
    with suppress(RuntimeError):  # the store may have gone with it
        if world.store.check(["reason"]):
            return world.store.get("reason").decode()
    return "another process of this run has ended; give the same command again to go on"


def complain(line: str) -> None:
    """Print a line to standard error, unless another process has something to say first; then wait until it has."""
    with suppress(RuntimeError):
        if _world is not None and _world.store.add("complaints", 1) > 1:
            _world.store.wait(["said"], A_MOMENT)
            return
    print(line, file=sys.stderr, flush=True)
    with suppress(RuntimeError):
        if _world is not None:
            _world.store.set("said", "")


def device_name(name: str, option: str = "--training.device") -> str:
    """`cuda` becomes this process's own GPU, by its number among the processes of its machine."""
    if size() == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise UserError(f"{option} {name}: each of {size()} processes has a GPU of its own; say cuda")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


# Messages --------------------------------------------------------------------------------------------


def send(value: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Tell the other processes: plain values, and tensors by name."""
    if size() > 1:
        _broadcast(json.dumps(value).encode())
        _broadcast(save({name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()}))


def gathered(value: Any) -> list[Any]:
    """Each process's plain value, everywhere, once all are here."""
    mine = json.dumps(value).encode()
    return [json.loads(_broadcast(mine if r == rank() else None, r) if size() > 1 else mine) for r in range(size())]


def handed(data: bytes, to: int) -> list[bytes]:
    """Each process's bytes (one at least), in process `to`, once that has them; elsewhere nothing."""
    if rank() == to:
        return [data if source == to else _received(source) for source in range(size())]
    with _heard():
        dist.send(torch.tensor([len(data)]), to)
        dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to)
    return []


def _received(source: int) -> bytes:
    with _heard():
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, source)
        content = bytearray(int(length))
        dist.recv(torch.frombuffer(content, dtype=torch.uint8), source)
    return bytes(content)


def receive() -> tuple[Any, dict[str, Tensor]]:
    """What the first process sends, tensors in main memory; None at the end (`leave`)."""
    value, tensors = json.loads(_broadcast(None)), load(_broadcast(None))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as `files.read_tensors` does
    if _world is not None and value is None:
        _world.dismissed = True
    return value, tensors


@contextmanager
def _heard() -> Iterator[None]:
    """What torch says where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Gone(str(error)) from None


def _broadcast(data: bytes | None, source: int = 0) -> bytes:
    with _heard():
        length = torch.tensor([len(data or b"")])
        dist.broadcast(length, source)
        content = bytearray(int(length)) if data is None else bytearray(data)
        dist.broadcast(torch.frombuffer(content, dtype=torch.uint8), source)
    return bytes(content)


def total(values: Tensor) -> Tensor:
    """Sum over processes, in place; the same bits everywhere."""
    with _heard():
        dist.all_reduce(values)
    return values


# Parts -----------------------------------------------------------------------------------------------


def dealt(name: str, n: int) -> Iterator[int]:
    """0 to n - 1, each in one process: whichever asks next. The name is used once; what is dealt is done `alone`.

    Where one of them has had to say something, the others take no more.
    """
    world = _world
    if world is None:
        yield from range(n)
        return
    while True:
        with _heard():
            if world.store.check(["reason"]):
                raise Gone
            index = world.store.add(name, 1) - 1
        if index >= n:
            return
        yield index


@contextmanager
def alone() -> Iterator[None]:
    """While open, this process is the only one."""
    global _world
    world, _world = _world, None
    try:
        yield
    finally:
        _world = world


# Batches ---------------------------------------------------------------------------------------------


@contextmanager
def divided(part: int, whole: int) -> Iterator[None]:
    """While open, a batch of `whole` real tokens is at hand, `part` of which are here; with one process, all are."""
    global _division
    _division = Division(part, whole) if size() > 1 else None
    try:
        yield
    finally:
        _division = None


def share() -> float:
    """Of the batch's tokens, how many are here."""
    return 1.0 if _division is None else _division.part / _division.whole


def count(here: int) -> int:
    """Tokens of the whole batch, for `here` in this process."""
    return here if _division is None else _division.whole


def number(here: int) -> int:
    """Sum over processes of how many each has."""
    return here if _division is None else int(total(torch.tensor(here)))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, share: float) -> Tensor:
        return total(value * share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # the loss is weighed by the share already


def mean(value: Tensor) -> Tensor:
    """A mean over the whole batch's tokens, of each process's mean over its own."""
    return value if _division is None else _Mean.apply(value, share())  # type: ignore[return-value]


def variance(values_nF: Tensor) -> Tensor:
    """Over the whole batch's tokens n, of each column."""
    if _division is None:
        return values_nF.var(0, correction=0)
    centre = mean(values_nF.mean(0)).detach()  # the variance has no slope in it
    return mean((values_nF - centre).square().mean(0))


def anywhere(flags: Tensor) -> Tensor:
    """Which of these are set in any process."""
    return flags if _division is None else total(flags.int()) > 0


def kth_largest(values: Tensor, k: int, guess: Tensor | None = None) -> Tensor:
    """The k-th largest of the whole batch's values.

    Each process sends its k largest, for any of them may be the one: with k active features a token, k numbers a token.
    One alone sorts them, which on a CPU takes as long as two products with the dictionary; so those under half of
    `guess` are left out first, wherever enough are left.
    """
    values = values.flatten()
    if _division is not None:
        mine = values.new_full((k,), -torch.inf)
        here = min(k, len(values))
        mine[:here] = values.topk(here, sorted=False).values
        largest = values.new_empty(size(), k)
        with _heard():
            dist.all_gather(list(largest), mine)
        values = largest.flatten()
    elif values.device.type == "cpu":
        if guess is not None and guess > 0:
            large = values[values > guess / 2]
            values = large if len(large) >= k else values
        return values.kthvalue(len(values) - k + 1).values
    # For the k largest a GPU looks with all that it has, for the k-th with one block of threads.
    return values.topk(k, sorted=False).values.amin()


def whole_rows(rows_BX: Tensor) -> Tensor:
    """The whole batch's rows in their order, of those here: rows of numbers, and not many."""
    if _division is None:
        return rows_BX
    out = torch.zeros(number(len(rows_BX)), *rows_BX.shape[1:], dtype=torch.float32, device=rows_BX.device)
    out[rank() :: size()] = rows_BX.float()
    return total(out).to(rows_BX.dtype)


def row_here(row_N: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """For rows of the whole batch: their index among the `n_rows` here, and whether they are (else it is any)."""
    if _division is None:
        return row_N, torch.ones_like(row_N, dtype=torch.bool)
    return (row_N // size()).clamp(max=n_rows - 1), row_N % size() == rank()


def from_holders(values_NX: Tensor, here_N: Tensor) -> Tensor:
    """Each of these from the process that has it (`row_here`)."""
    if _division is None:
        return values_NX
    return total(torch.where(here_N[:, None], values_NX, 0.0))


def sum_gradients(parameters: Sequence[nn.Parameter], means: Mapping[str, Any]) -> dict[str, Any]:
    """Add up all processes' gradients, and with them what each has as means over its tokens; one message for all.

    Plain numbers among the means are alike everywhere.
    """
    if _division is None:
        return dict(means)
    names = [name for name, value in means.items() if isinstance(value, Tensor)]
    here = torch.stack([means[name].detach().float().to(parameters[0].device) for name in names]) * share()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    *grads, sums = total(torch.cat([*(g.flatten() for g in grads), here])).split(
        [p.numel() for p in parameters] + [len(names)]
    )
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.view_as(p)
    return {**means, **dict(zip(names, sums.unbind(), strict=True))}
