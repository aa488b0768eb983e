"""Writing that is whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import UserError

_UMASK = os.umask(0)
os.umask(_UMASK)


_REFUSED = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full while writing {path}; make room and give the same command again to go on"
            ) from None
        if number in _REFUSED:
            raise UserError(f"cannot write {path}: {os.strerror(number)}; choose another --out") from None
        raise


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors wraps it in its own text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, then put it in place in one step."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote; for who alone writes in the folder."""
    for pattern in (".*.[0-9]*.tmp", ".tmp??????"):  # ours, and safetensors' own
        for left in folder.rglob(pattern):
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None = None) -> None:
    """One safetensors file; `metadata` is JSON in its header."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    header = {"qkscope": json.dumps(metadata or {})}
    write_atomic(path, lambda p: save_file(plain, p, metadata=header))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of `write_tensors`; a missing or damaged file is a `UserError`."""
    with _opened(path) as file:
        # Copies, for in the file's own memory tensors begin anywhere, and the last bits of products hang on that.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, _metadata(file)  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, Any]:
    """What `read_tensors` gives beside the tensors, without reading them."""
    with _opened(path) as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get("qkscope", "{}"))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:120]})") from None


def unwritable(path: Path) -> str:
    """Why a file cannot be written there; empty where it can."""
    if path.is_dir():
        return "is a folder"
    if path.exists() and not path.is_file():
        return "is no plain file"
    if not path.parent.is_dir():
        return f"{path.parent} does not exist"
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        return str(error.strerror)
    return ""
