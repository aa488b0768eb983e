"""The folder of a run: claimed by its processes, never overwritten by another run, and what stands where in it."""

from __future__ import annotations

import fcntl
import itertools
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
import yaml
from pydantic import ValidationError

from . import __version__, parallel, passes
from .config import DictionaryConfig, PairsConfig, RunConfig, build, one_line
from .decomposition import read_run
from .errors import UserError
from .files import disk_errors, write_text
from .training import checkpoint
from .training.recipes import resolved

TRAINED = ("dictionaries.safetensors", "pairs.parquet")  # what the trainings leave of a layer

# What may differ between the command that began a run and the one that goes on with it.
FREE = {"training.device", "training.spread", "training.checkpoint_steps", "training.log_steps"}
# What else may until step 2 has begun. (Step 1 depends on `importance_tokens`: its starts are fitted to that sample.)
FREE_AFTER_STEP1 = {f"pairs.{name}" for name in PairsConfig.model_fields} - {"pairs.importance_tokens"}


@contextmanager
def claimed(out: Path, option: str = "--out ") -> Iterator[None]:
    """Hold the folder for this process; `UserError` where another process has it or it cannot be made.

    A member of a sweep is held by the sweep's lock. Where no run was begun (bad input found later), nothing of ours is
    left behind. `option` is what the person named the folder with.
    """
    home = owner(out)
    with disk_errors(out):
        if out.exists() and not out.is_dir():
            raise UserError(f"{option}{out}: is a file; name a folder")
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(home / ".lock", os.O_RDWR | os.O_CREAT)
    with ExitStack() as stack:
        stack.callback(os.close, lock)
        try:
            taken = not _locked(lock, fcntl.LOCK_EX)
            if parallel.size() > 1:  # those of this run may write there too (`shared`), and hold it as long
                taken = taken or not _locked(lock, fcntl.LOCK_SH)
            taken = taken or os.fstat(lock).st_nlink == 0  # by one that has just removed it
        except OSError as error:  # some network file systems know no locks
            _leave(out, made)
            raise UserError(f"{option}{out}: cannot be locked ({error.strerror}); choose another disk") from None
        if taken:
            raise UserError(f"{option}{out}: another process is writing there; wait for it or choose another")
        stack.callback(_leave, out, made)
        yield


def _locked(file: int, kind: int) -> bool:
    """Whether the lock could be had; nobody waits for one."""
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def marked(out: Path) -> str:
    """A word in the lock of a folder that is held, by which other processes know that it is this one."""
    word = uuid4().hex
    with disk_errors(out):
        (owner(out) / ".lock").write_text(word)
    return word


@contextmanager
def shared(out: Path, word: str) -> Iterator[bool]:
    """Hold a folder that the first of several processes has claimed and marked, in another one; whether that can be."""
    with ExitStack() as stack:
        held = False
        with suppress(OSError):  # it is not there, or not to be written
            lock = os.open(owner(out) / ".lock", os.O_RDWR)
            stack.callback(os.close, lock)
            held = _locked(lock, fcntl.LOCK_SH) and os.read(lock, 99).decode() == word
        yield held


def _leave(out: Path, made: list[Path]) -> None:
    """Remove what `claimed` made where no run was begun."""
    if not (out / "config.yaml").exists():
        (out / ".lock").unlink(missing_ok=True)
        with suppress(OSError):  # whatever else is in there is not ours
            for folder in made:
                folder.rmdir()


def owner(folder: Path) -> Path:
    """The folder of the run that a folder belongs to: its parent for a member of a sweep, else the folder itself."""
    whole = folder.resolve()
    with suppress(UserError):  # no run there
        if whole.name in variants(build(read_run(whole.parent)["run"])):
            return whole.parent
    return folder


def unfinished(folder: Path) -> list[Path]:
    """What is there to go on from: checkpoints of passes, and the plan of them all, last."""
    return [*passes.checkpoints(folder), *folder.glob(passes.FILE)]


def require_finished(folder: Path) -> None:
    """`UserError` while there is something to go on from: what lies there is not yet what the run ends with."""
    if unfinished(folder) or unfinished(owner(folder)):
        raise UserError(f"{folder}: its run is not finished; give the command that began it to go on with it")


def require_same(out: Path, config: RunConfig) -> bool:
    """Whether the folder already holds this run; `UserError` where it holds another, or other files."""
    if not (out / "config.yaml").exists():
        strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise UserError(f"--out {out}: holds {strangers[0]!r} and no qkscope run; choose another --out")
        return False
    # An option that there was not yet when the run began has its default: what runs did then.
    there, here = (_flat(plain(one)) for one in (build(read_run(out)["run"], str(out / "config.yaml")), config))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key) and key not in FREE:
            if key in FREE_AFTER_STEP1 and _before_step2(out):
                continue
            raise UserError(
                f"--out {out}: holds another run ({key} is {there.get(key)!r} there, {here.get(key)!r} here); "
                "choose another --out, or give the command that began it to go on with it"
            )
    return True


def _before_step2(out: Path) -> bool:
    """Whether nothing is there yet of what follows from step 1."""
    saved = filter(None, map(checkpoint.progress, passes.checkpoints(out)))
    return all(one.phase == "step1" for one in saved) and not any(out.rglob("pairs.parquet"))


def recorded(folder: Path, config: RunConfig) -> bool:
    """Whether config.yaml is there and holds this run's step 2, which may have been changed after step 1."""
    return (folder / "config.yaml").exists() and read_run(folder)["run"].get("pairs") == plain(config)["pairs"]


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as values that YAML and JSON know."""
    return config.model_dump(mode="json")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def write_config(folder: Path, config: RunConfig, sites: dict[int, dict[str, Any]], device: str) -> None:
    """config.yaml: the resolved run, each layer's shape, and what it ran on."""
    values = {
        "run": plain(config),
        "sites": sites,
        "versions": {
            "qkscope": __version__,
            "git_commit": _commit(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device,
    }
    write_text(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))


def _commit() -> str | None:
    """The commit of the checkout that qkscope runs from; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """Each pair of dictionaries of a run by the name of its sub-folder; a run without a sweep has one, named ''."""
    axes = {name: values for name, values in config.sweep.model_dump().items() if values}
    if not axes:
        return {"": config.model_copy(update={"dictionary": resolved(config.dictionary, config.training)})}
    out: dict[str, RunConfig] = {}
    seen: list[DictionaryConfig] = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        values = config.dictionary.model_dump() | chosen
        try:
            dictionary = resolved(DictionaryConfig(**values), config.training)
        except ValidationError as error:
            raise UserError(f"--sweep: {_label(chosen)}: {one_line(error)}") from None
        chosen = {k: v for k, v in chosen.items() if _matters(k, dictionary)}
        # k means nothing to ReLU and the penalty nothing to TopK: such combinations are one.
        same = dictionary.model_copy(update={k: 1.0 for k in ("k", "sparsity") if not _matters(k, dictionary)})
        if same not in seen:
            seen.append(same)
            single = {"dictionary": dictionary, "sweep": type(config.sweep)()}
            out[_label(chosen)] = config.model_copy(update=single)
    return out


def _matters(field: str, config: DictionaryConfig) -> bool:
    if field == "k":
        return config.activation != "relu"
    return field != "sparsity" or config.activation in ("relu", "jumprelu")


def _label(chosen: dict[str, Any]) -> str:
    short = {"recipe": "", "activation": "", "width": "w", "k": "k", "sparsity": "s"}
    return "-".join(f"{short[k]}{v:g}" if isinstance(v, int | float) else str(v) for k, v in chosen.items())


def layer_folder(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}"
