"""A run: harvest → step 1 → pair map → evaluation → report, for as many layers and variants in one pass as fit.

A run is a list of phases. Each ends in a checkpoint that says so, and everything between two trainings is computed from
that checkpoint, so the same command after a kill at any moment goes on and ends with the same bits (on a CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import parallel
from .attention import AttentionSite, open_sites
from .config import Dtype, RunConfig, build, with_method
from .data import check_text
from .decomposition import Decomposition
from .devices import product_seconds
from .embedded import EMBEDDED_MODELS, with_defaults
from .errors import UserError, nearest
from .evaluate.layer import memory_of
from .evaluate.run import config_of, evaluate_run, take_tasks, told_tasks
from .files import remove_leftovers
from .foreign.carry import Sides, given_dictionaries
from .memory import USED, free_memory
from .models import load_model, number_of_layers
from .passes import Passes, forget
from .progress import Reporter
from .run_folder import (
    TRAINED,
    claimed,
    layer_folder,
    marked,
    plain,
    recorded,
    require_finished,
    require_same,
    shared,
    unfinished,
    variants,
    write_config,
)
from .runner import Runner
from .target import require_target


@dataclass
class Run:
    """A finished run."""

    folder: Path
    config: RunConfig

    @property
    def folders(self) -> dict[str, Path]:
        """Folder of each variant; a run without a sweep has one, named ''."""
        return {name: self.folder / name for name in variants(self.config)}

    def decomposition(self, layer: int, variant: str = "") -> Decomposition:
        return Decomposition.load(layer_folder(self.folders[variant], layer))


def run(config: RunConfig, out: str | Path, *, quiet: bool = False) -> Run:
    """Decompose `config.layers` of `config.model` into the folder `out`, or go on with the run that is there.

    Raises `UserError` for anything a person got wrong, before anything is written.

    In one of several processes that were started together (parallel.py), the first does this and the others take part.
    """
    with parallel.joined():
        return _lead(config, Path(out), quiet) if parallel.rank() == 0 else Run(Path(out), follow(quiet) or config)


def evaluate(folder: Path, *, device: str = "cpu", quiet: bool = False) -> None:
    """Measure every layer of a finished run again and write its report anew.

    Raises `UserError` for a run that is not finished, or while another process writes in its folder.

    In one of several processes, the first does this and the others take part.
    """
    with parallel.joined():
        if parallel.rank() > 0:
            follow(quiet)
            return
        config = config_of(folder)
        with claimed(folder, ""), Reporter(quiet) as reporter:
            require_finished(folder)
            remove_leftovers(folder)
            here = _device(parallel.device_name(device, "--device"), "--device")
            _call(config, here, folder, trained=True, option="--device")
            model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device=str(here))
            sites = open_sites(model, tokenizer, config.numbers, residual=_given(config))
            _leave_unless_fit(*_seen(folder, here), sites, config, folder, reporter)
            evaluate_run(Run(folder, config).folders, sites, reporter, again=True)


def _call(
    config: RunConfig, device: torch.device, out: Path, *, trained: bool, option: str = "--training.device"
) -> None:
    """Tell the other processes what they are to take part in (`follow`)."""
    told = {"config": plain(config), "device": device.type, "option": option, "out": str(out.absolute())}
    parallel.send({**told, "trained": trained})


def follow(quiet: bool = False) -> RunConfig | None:
    """Take part in the run that the first process leads; its configuration, or None where there is nothing to do."""
    told, _ = parallel.receive()
    if told is None:
        return None
    config, out = build(told["config"]), Path(told["out"])
    device = _device(parallel.device_name(told["device"], told["option"]), told["option"])
    model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device=str(device))
    sites = open_sites(model, tokenizer, config.numbers, residual=_given(config))
    features = {} if told["trained"] else _features(config, sites)
    with ExitStack() as stack:
        reporter = stack.enter_context(Reporter(quiet, bars=False))
        folder = stack.enter_context(ExitStack())
        runner = Runner(config, variants(config), out, sites, features, reporter)
        while (message := parallel.receive())[0] is not None:
            told, tensors = message
            match told["do"]:
                case "look":
                    if not _look(folder.enter_context(shared(out, told["word"])), device)[0]:
                        folder.close()
                case "train":
                    runner.take_part(told, tensors)
                case "passes":
                    runner.take_passes(told["passes"], told["left"])
                case "evaluate":
                    take_tasks(Run(out, config).folders, told_tasks(told), sites, reporter)
                    folder.close()
                    parallel.gathered(None)
                case other:
                    raise AssertionError(other)
    return config


def _seen(out: Path, device: torch.device) -> tuple[bool, int]:
    """Whether all processes see the run's folder, which this one has claimed, and the least bytes that one has."""
    if parallel.size() > 1:
        parallel.send({"do": "look", "word": marked(out)})
    return _look(True, device)


def _leave_unless_fit(
    seen_by_all: bool, free: int, sites: Sequence[AttentionSite], config: RunConfig, out: Path, reporter: Reporter
) -> None:
    """Go on alone where not all processes can measure layers."""
    if parallel.size() == 1:
        return
    need = max(memory_of(site, one) for site in sites for one in (config, *variants(config).values()))
    if not (seen_by_all and need <= USED * free):
        why = "have the memory for it" if seen_by_all else f"see {out} and can write there"
        reporter.message(f"not all processes {why}: the first one measures alone")
        parallel.leave()


def _look(held: bool, device: torch.device) -> tuple[bool, int]:
    """Whether all processes see the run's folder and hold it, and the least bytes that one of them has."""
    held_by, free = zip(*parallel.gathered((held, free_memory(device))), strict=True)
    return all(held_by), min(free)


def _lead(config: RunConfig, out: Path, quiet: bool) -> Run:
    bars = parallel.size() == 1 or config.training.spread == "text"
    with claimed(out), Reporter(quiet, bars=bars) as reporter:
        config = with_method(with_defaults(config))
        _require_values(config)
        config = with_layers(config)
        names = variants(config)
        config = names.get("", config)  # resolved: what config.yaml holds
        there = require_same(out, config)
        remove_leftovers(out)
        forget(out)
        finished = Run(out, config)
        if there and _has_all(finished, (*TRAINED, "report.json")) and (out / "report.html").exists():
            reporter.message(f"{out} is already finished; its report is {out / 'report.html'}")
            return finished
        device = "cuda" if config.training.device == "auto" and torch.cuda.is_available() else config.training.device
        device = _device(parallel.device_name("cpu" if device == "auto" else device))
        trained = _has_all(finished, TRAINED)  # a lost report is no lost training
        _call(config, device, out, trained=trained)
        together = f" in {parallel.size()} processes" if parallel.size() > 1 else ""
        reporter.message(f"loading {config.model}{together}")
        for said in (_idle(device), _slow(device, config.training.dtype)):
            if said:
                reporter.message(said)
        model, tokenizer = load_model(str(config.model), dtype=config.training.dtype, device=str(device))
        check_text(config.data, tokenizer)
        sites = open_sites(model, tokenizer, config.numbers, residual=_given(config))
        _require_context(config, model)
        require_target(config, names.values(), sites)
        features = {} if trained else _features(config, sites)
        runner = Runner(config, names, out, sites, features, reporter)
        seen_by_all, free = _seen(out, device)
        plan, apart = (Passes([], {}), False) if trained else runner.plan(seen_by_all=seen_by_all, free=free)
        shapes = {s.layer: {**s.shape, "rotary": s.layout is not None} for s in sites}
        for layer, (query, _) in features.items():
            shapes[layer]["reads"] = query.reading.model_dump()
        for name, single in {"": config, **names}.items():  # the run's own is first: by it the folder is known again
            if not recorded(out / name, single):
                write_config(out / name, single, shapes, str(device))
        if not trained:
            runner.train(plan, apart=apart)
        _leave_unless_fit(seen_by_all, free, sites, config, out, reporter)
        evaluate_run(finished.folders, sites, reporter, seconds=plan.seconds)
        for path in unfinished(out):  # the plan last: with what is noted beside it, it says that all passes are done
            path.unlink()
        forget(out)
        reporter.message(f"report: {out / 'report.html'}")
    return finished


def _idle(device: torch.device) -> str:
    """What a person may want to know of GPUs that a single process leaves idle; else nothing."""
    if device != torch.device("cuda") or parallel.size() > 1 or (number := torch.cuda.device_count()) < 2:
        return ""
    return f"one of {number} GPUs is used; torchrun --nproc-per-node {number} -m qkscope run ... uses all"


def _slow(device: torch.device, dtype: Dtype) -> str:
    """What a person may want to know of a type that is there to be faster, where it is not; else nothing."""
    if device.type != "cpu" or dtype == "float32":
        return ""
    times = product_seconds(dtype) / product_seconds("float32")
    if times < 1:
        return ""
    return f"products in {dtype} take {times:.1f} times as long as in float32 here; --training.dtype float32 is faster"


def _given(config: RunConfig) -> bool:
    return config.dictionary.features is not None


def _features(config: RunConfig, sites: Sequence[AttentionSite]) -> dict[int, Sides]:
    """The features that are given, by layer; none where dictionaries are trained."""
    return {s.layer: given_dictionaries(config.dictionary, s) for s in sites if _given(config)}


def _has_all(run: Run, names: tuple[str, ...]) -> bool:
    """Whether every layer of a run has these files, and nothing is left to go on from."""
    layers = [layer_folder(folder, layer) for folder in run.folders.values() for layer in run.config.numbers]
    return not unfinished(run.folder) and all((layer / name).exists() for layer in layers for name in names)


def with_layers(config: RunConfig) -> RunConfig:
    """With the numbers of all layers, where all are asked for; the model is not loaded for it."""
    if config.layers != "all":
        return config
    return config.model_copy(update={"layers": tuple(range(number_of_layers(str(config.model))))})


def _require_values(config: RunConfig) -> None:
    name = config.model or ""
    # A hub's gpt2 is not so near to stories-gpt2; what is nearer is a slip.
    hint = "" if name in EMBEDDED_MODELS else nearest(name.lower(), EMBEDDED_MODELS, least=0.8)
    if hint and not Path(name).exists():
        raise UserError(f"--model {name}: no such folder and no such embedded model{hint}")
    if not config.layers:
        raise UserError("--layers is missing; name the layers to decompose, e.g. --layers 2 6 10, or all")
    if config.data.source is None:
        raise UserError(
            "--data.source is missing; name a .txt, .jsonl or .parquet file, a Hugging Face dataset, or embedded"
        )


def _require_context(config: RunConfig, model: Any) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and config.data.context > most:
        raise UserError(f"--data.context {config.data.context}: the model takes at most {most} positions")


def _device(name: str, option: str = "--training.device") -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # else every process would hold some memory of the first GPU
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        others = "cpu" if option == "--device" else "cpu or auto"
        raise UserError(f"{option} {name}: cannot be used here ({reason}); choose {others}") from None
    return device
