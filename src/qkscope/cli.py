"""The command line: tyro over the configs, no logic.

What a person got wrong ends in one line on standard error and exit status 2; anything else that goes wrong is a bug and
keeps its stack trace.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, ValidationError

from .config import Config, Dtype, RunConfig, build, known_keys, one_line, read_config
from .errors import UserError, nearest

USAGE = """usage: qkscope COMMAND [OPTIONS]

  run        decompose layers of a model: harvest, both training steps, evaluation, report
  evaluate   measure a finished run again and write its report anew
  trace      one prompt's attention, and the pairs behind one edge of it
  study      which heads do what a set of prompts asks for, by which pairs, and what goes without them
  compare    what of one run's features and pairs recurs in another's
  heads      what each head's pairs are, which heads share them, and the units they form
  serve      a run's page on a local server
  export     the same page as static files, for any web host
  bench      planted: every method on layers whose features and pairs are known
             quality: beside the published recipe, on layers of real models
             speed: every part's time and memory, beside the machine's ceiling and the published procedure

qkscope COMMAND --help lists a command's options.
"""


class RunCommand(RunConfig):
    """Decompose the QK circuit of a model's layers. The same command goes on with a run that was interrupted."""

    out: Path = Path("runs/qkscope")
    """Folder of the run; one that holds another run is never overwritten."""
    config: Path | None = None
    """A YAML file with any of these options; flags given beside it win."""


class EvaluateCommand(Config):
    """Measure every layer of a finished run again, on its held-out text, and write its report anew."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""


class CompareCommand(Config):
    """What of one run's features and pairs recurs in another's (another seed, another recipe), layer by layer."""

    one: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    other: Annotated[Path, tyro.conf.Positional]
    """Another run's, of the same model."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""


class TraceCommand(Config):
    """What one prompt's scores are made of, pair by pair, and why a head looks here and not there."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A finished run's folder, or a layer's in it."""
    prompt: str
    """The text; it is read as the run's own text was, BOS before it."""
    layer: int | None = None
    """Of a run with several."""
    head: int | None = None
    """Empty: what every head attends to."""
    query: int = -1
    """Position of the query; negative: from the end."""
    key: int | None = None
    """Position of the key; empty: the most attended one."""
    against: tuple[int, ...] = ()
    """Keys that it is held against; empty: the strongest others."""
    pairs: Literal["kept", "all"] = "kept"
    """Pairs in the account of the score: those kept, or all that are active there."""
    top: int = Field(default=10, ge=1)
    """Pairs that are listed."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too."""


class StudyCommand(Config):
    """Which heads do what a set of prompts asks for, by which pairs, and what ablating those pairs does."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A finished run's folder, or a layer's in it."""
    prompts: str
    """ioi, dates, years, induction, brackets, agreement; or a .jsonl file: a prompt a line, places marked {NAME:words}
    (docs/explain.md)."""
    layer: int | None = None
    """Empty: all of the run's."""
    head: tuple[int, ...] = ()
    """Heads to look into; empty: those that matter most to the choice of the next token."""
    heads: int = Field(default=2, ge=1)
    """How many, where none are named."""
    target: str | None = None
    """The mark that heads are to look at; empty: the set's own."""
    count: int = Field(default=64, ge=4)
    """Prompts: one half chooses heads and pairs, the other is reported."""
    seed: int = Field(default=0, ge=0)
    """Of a ready set's prompts."""
    top: int = Field(default=5, ge=1)
    """Pairs listed a mark."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too."""


class HeadsCommand(Config):
    """What each head's pairs are, which heads share them, and the units they form, each beside chance."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one layer's."""
    layer: int | None = None
    """Of a run with several, only this one."""
    top: int = 5
    """Strongest pairs that are shown of each head."""
    rank: int | None = None
    """Units; without it, as many as explain most beyond chance."""
    distance: bool = False
    """With a rotary embedding: run the model over held-out text and tell content from position."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""


class ServeCommand(Config):
    """The page of a finished run on a local server: its features, pairs and heads."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one layer's."""
    host: str = "127.0.0.1"
    """Where to listen; anything but this machine's own address shows the run to others."""
    port: int = 8765
    """0: any that is free."""


class ExportCommand(Config):
    """The page of a finished run as static files, for any web host and path; all but live tracing."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one layer's."""
    site: Path
    """The folder to write; one that holds anything but an earlier export is not overwritten."""


class PlantedCommand(Config):
    """Every method on planted layers, whose query features, key features and pairs are known, in one table."""

    size: Literal["small", "medium", "large"] = "small"
    """How large the worlds are, and how long the training."""
    seeds: tuple[int, ...] = (3, 4, 5)
    """Worlds and starts; settings were chosen on 0 to 2, so leave those out of what you report."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too."""
    processes: int = Field(default=2, ge=1)
    """Worlds at a time, with one thread each; figures do not depend on it."""


class QualityCommand(Config):
    """A decomposition's quality beside the published recipe's, on layers of real models, in one table."""

    size: Literal["small", "medium"] = "small"
    """How wide the dictionaries are, and how long the training."""
    models: tuple[str, ...] = ("stories-gpt2", "stories-llama")
    """Embedded models, or MODEL=TEXT: a model's folder or name, and a .txt, .jsonl or .parquet file."""
    layers: tuple[int, ...] = ()
    """Layers of each model; empty: its last three."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of starts and of the order of the text."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too, after each layer; what it already holds is not run again. A page with curves is made
    beside it (.html)."""
    processes: int = Field(default=2, ge=1)
    """Layers at a time, with one thread each; figures do not depend on it."""


class SpeedCommand(Config):
    """Time and memory of every part of a run at GPT-2 small's attention shape, beside what the machine can do at best
    and beside the published procedure."""

    size: Literal["small", "batches", "medium", "wide", "large"] = "small"
    """small: a few minutes on two cores. The others, with larger steps, wider and longer, are meant for a GPU."""
    dtype: Dtype = "float32"
    """Of our products; the published procedure's are float32."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write every figure here too."""


BENCHMARKS = ("planted", "quality", "speed")
RENAMED = {"--json-file": "--json"}  # pydantic has a method of that name


def main(argv: list[str] | None = None) -> None:
    """Entry point of `qkscope`."""
    argv = sys.argv[1:] if argv is None else argv
    # OpenMP threads that spin while they wait make small products up to 30 times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _dispatch(argv)
    except UserError as error:
        _complain(f"qkscope: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        again = "" if argv[:1] == ["bench"] else "; give the same command again to go on"
        _complain(f"qkscope: interrupted{again}")
        raise SystemExit(130) from None


def _complain(line: str) -> None:
    """On standard error; once, where several processes were started together."""
    parallel = sys.modules.get("qkscope.parallel")  # not imported for a slip in the options: it waits for torch
    if parallel is None:
        print(line, file=sys.stderr)
    else:
        parallel.complain(line)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    command, rest = argv[0], argv[1:]
    if command == "--version":
        from . import __version__

        print(f"qkscope {__version__}")
    elif command == "run":
        _run(rest)
    elif command == "evaluate":
        _evaluate(rest)
    elif command == "trace":
        from .explain.show_trace import trace_prompt

        chosen = _parse(TraceCommand, rest, "qkscope trace", {})
        trace_prompt(**dict(chosen))
    elif command == "study":
        from .explain.show_study import study

        chosen = _parse(StudyCommand, rest, "qkscope study", {})
        study(**dict(chosen))
    elif command == "compare":
        from .evaluate.compare import compare_runs

        chosen = _parse(CompareCommand, rest, "qkscope compare", {})
        compare_runs(chosen.one, chosen.other, chosen.json_file, chosen.device)
    elif command == "heads":
        from .explain.heads_report import report_heads

        chosen = _parse(HeadsCommand, rest, "qkscope heads", {})
        report_heads(
            chosen.folder, chosen.layer, top=chosen.top, rank=chosen.rank, distance=chosen.distance,
            path=chosen.json_file, device=chosen.device,
        )  # fmt: skip
    elif command == "serve":
        from .app.server import serve

        serve(**dict(_parse(ServeCommand, rest, "qkscope serve", {})))
    elif command == "export":
        from .app.export import export

        export(**dict(_parse(ExportCommand, rest, "qkscope export", {})))
    elif command == "bench":
        _bench(rest)
    else:
        known = ["run", "evaluate", "trace", "study", "heads", "compare", "serve", "export", "bench"]
        raise UserError(f"unknown command {command!r}{nearest(command, known)}; see qkscope --help")


def _run(argv: list[str]) -> None:
    from . import parallel
    from .pipeline import follow, run

    with parallel.joined():
        if parallel.rank() > 0:  # the first process reads the options
            follow()
            return
        values = _config_file(argv)
        chosen = _parse(RunCommand, argv, "qkscope run", values)
        config = build(chosen.model_dump(exclude={"out", "config"}))
        run(config, chosen.out)


def _evaluate(argv: list[str]) -> None:
    from . import parallel
    from .pipeline import evaluate, follow

    with parallel.joined():
        if parallel.rank() > 0:
            follow()
            return
        chosen = _parse(EvaluateCommand, argv, "qkscope evaluate", {})
        evaluate(chosen.folder, device=chosen.device)


def _bench(argv: list[str]) -> None:
    if not argv or argv[0] not in (*BENCHMARKS, "-h", "--help"):
        slip = f"unknown benchmark {argv[0]!r}{nearest(argv[0], BENCHMARKS)}" if argv else "bench: name a benchmark"
        raise UserError(f"{slip}; choose {', '.join(BENCHMARKS)}")
    if argv[0] not in BENCHMARKS:
        print(f"usage: qkscope bench {{{','.join(BENCHMARKS)}}} [OPTIONS]")
        return
    if argv[0] == "quality":
        from .evaluate.quality.report import bench_quality

        chosen = _parse(QualityCommand, argv[1:], "qkscope bench quality", {})
        bench_quality(chosen.size, chosen.models, chosen.layers, chosen.seeds, chosen.json_file, chosen.processes)
        return
    if argv[0] == "speed":
        from .evaluate.speed.report import bench_speed

        chosen = _parse(SpeedCommand, argv[1:], "qkscope bench speed", {})
        bench_speed(chosen.size, chosen.json_file, chosen.dtype)
        return
    from .evaluate.planted.report import bench_planted

    chosen = _parse(PlantedCommand, argv[1:], "qkscope bench planted", {})
    bench_planted(chosen.size, chosen.seeds, chosen.json_file, chosen.processes)


def _config_file(argv: list[str]) -> dict[str, Any]:
    """The values of the file named by --config, if one is, checked as a configuration of their own."""
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--config":
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
            values = read_config(path)
            build(values, f"--config {path}")
            return values
    return {}


def _parse(kind: type, argv: list[str], program: str, values: dict[str, Any]) -> Any:
    """The command's options, with a person's slips said in one line."""
    flags = [f"--{key.replace('_', '-')}" for key in known_keys(kind)]
    known = [*(RENAMED.get(flag, flag) for flag in flags), "--help", "-h"]
    for word in argv:
        flag = word.partition("=")[0]
        positive = flag.replace("_", "-").replace(".no-", ".")  # a switch has both forms
        if flag.startswith("--") and positive not in known:
            raise UserError(f"unknown option {flag!r}{nearest(flag, known)}; see {program} --help")
    default = kind.model_validate(values) if kind is RunCommand else tyro.MISSING_NONPROP
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=argv, prog=program, default=default)
    except ValidationError as error:
        raise UserError(one_line(error)) from None
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(f"{_condensed(complaint.getvalue())}; see {program} --help") from None


def _condensed(box: str) -> str:
    """tyro's framed complaint, or pydantic's inside it, as one line with the option and the value."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    body = [line for line in lines if line and line[0] not in "╭╰─"]
    if len(body) > 1 and not body[1].strip("-"):  # where the terminal is not UTF-8, the title is a line of its own
        body = [line for line in body[2:] if line.strip("-")]
    ends = [i for i, line in enumerate(body) if line.startswith(("Argument helptext", "For full helptext"))]
    text = " ".join(body[: ends[0] if ends else None]).removeprefix("Error parsing ")
    # Of an option of several types, what each of them has to say is no help.
    text = re.sub(r"no type matching (.*?) could be instantiated from \[(.*?)\]\..*", r"\2 is not \1", text)
    found = re.match(r"(\w+): \d+ validation errors? for \w+ (?:([\w.]+) (?=Input|List|Value))?(.*?) \[type=(.*)", text)
    if not found:
        return text
    group, key, message, rest = found.groups()
    value = re.search(r"input_value=(.*?), input_type", rest)
    option = f"--{group}.{key}" if key else f"--{group}"
    shown = f" {value[1]}" if value and key else ""
    return f"{option}{shown}: {message.removeprefix('Value error, ')}"
