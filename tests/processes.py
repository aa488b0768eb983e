"""Several processes that run one thing together, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_server = multiprocessing.get_context("forkserver")
# Children are forked from it: no second import of torch.
_server.set_forkserver_preload(["qkscope.pipeline", "transformers.models.gpt2.modeling_gpt2", "qkscope.data.hub"])


def start(size: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[int | None]:
    """`work(*args)` in that many processes; their exit codes.

    What each says on standard error is in the folder's `0.err`, `1.err` ...; what it returns in `0.pt`, `1.pt` ...
    """
    # As torchrun's agent has one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    children = [_server.Process(target=_child, args=(r, size, store.port, work, folder, args)) for r in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode is not None, "a process hangs"
    return [child.exitcode for child in children]


def together(size: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`start`, and what each process returned."""
    codes = start(size, work, folder, *args)
    assert codes == [0] * size, "\n".join(said(folder, size))
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(size)]


def said(folder: Path, size: int) -> list[str]:
    """Lines on standard error of all processes."""
    return [line for r in range(size) for line in (folder / f"{r}.err").read_text().splitlines()]


def _child(rank: int, size: int, port: int, work: Callable[..., Any], folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
    sys.stderr = open(folder / f"{rank}.err", "w", buffering=1)  # noqa: SIM115
    try:
        torch.save(work(*args), folder / f"{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
