"""What a person can get wrong: one line that says what to do, status 2, and nothing half-written left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_runs
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_runs import Moment, kill_at, require_equal, save_model, small_disk, tree
from texts import BOS, documents_of
from tiny import tiny_model

from qkscope import Decomposition, UserError, files, parallel
from qkscope.data.documents import split_of
from qkscope.pairs import mask
from qkscope.run_folder import claimed, marked, shared

Words = Callable[..., list[str]]


def save_documents(path: Path, texts: list[str]) -> Path:
    """The texts in the rows of a Parquet file."""
    pq.write_table(pa.table({"text": texts}), path)
    return path


# Options

OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": "./no-such-model"}, ("--model ./no-such-model: no such folder",)),
    ({"model": "/etc"}, ("--model /etc: has no config.json",)),
    ({"layers": 2}, ("layer 2 is out of range", "0 to 1")),
    ({"layers": -1}, ("layer -1 is out of range",)),
    ({"layers": None}, ("--layers is missing",)),
    ({"layers": "a"}, ("--layers: 'a' is not {[INT [INT ...]]}|{all}; see",)),
    ({"data.source": None}, ("--data.source is missing",)),
    ({"data.source": "no-such-text.txt"}, ("no-such-text.txt",)),
    ({"model": "Stories-Lama"}, ("--model Stories-Lama: no such", "(did you mean 'stories-llama'?)")),
    ({"data.text-column": "txt"}, ("no column 'txt' (did you mean 'text'?)",)),
    ({"data.text-column": "number"}, ("column 'number' holds int64",)),
    ({"data.context": 129}, ("--data.context 129", "128 positions")),
    ({"data.context": 1}, ("--data.context 1: Input should be greater than or equal to 2",)),
    ({"data.heldout": 0.6}, ("--data.heldout 0.6",)),
    ({"dictionary.width": 0}, ("--dictionary.width 0",)),
    ({"dictionary.width": -3}, ("--dictionary.width -3",)),
    ({"dictionary.width": 3}, ("k is 4, more than the width of 3",)),
    ({"dictionary.width-key": 2}, ("k_key is 4, more than the width of 2",)),
    ({"dictionary.k": 0}, ("--dictionary.k 0",)),
    ({"dictionary.k": "many"}, ("--dictionary.k", "'many'")),
    ({"dictionary.k": "nan"}, ("--dictionary.k nan",)),
    ({"dictionary.activation": "topk", "dictionary.k": 0.4}, ("k is 0.4; topk needs a whole number",)),
    ({"dictionary.recipe": "sede"}, ("'sede'", "--dictionary.recipe", "'seed'")),
    ({"dictionary.widht": 3}, ("unknown option '--dictionary.widht' (did you mean '--dictionary.width'?)",)),
    ({"pairs.method": "prune"}, ("'prune'", "--pairs.method", "'tune'")),
    ({"pairs.max-kl": "nan"}, ("--pairs.max_kl nan",)),
    ({"pairs.count": 0}, ("--pairs.count 0",)),
    ({"sweep.k": (2, 40)}, ("--sweep: k40: k is 40, more than the width of 32",)),
    ({"sweep.width": 0}, ("--sweep: w0: width is 0",)),
    ({"sweep.recipe": "sede"}, ("'sede'",)),
    ({"training.device": "cuda"}, ("--training.device cuda", "choose cpu or auto")),
    ({"training.device": "gpu"}, ("--training.device gpu",)),
    ({"training.dtype": "float8"}, ("'float8'", "--training.dtype")),
    ({"config": "no.yaml"}, ("--config no.yaml: No such file or directory",)),
]


@pytest.mark.parametrize(("changes", "parts"), OPTIONS, ids=[str(changes) for changes, _ in OPTIONS])
def test_options(words: Words, call: Callable, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    if changes.get("training.device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    call(words(tmp_path / "new" / "run", changes)).complaint(*parts)
    assert not (tmp_path / "new").exists()


def test_unknown_words(call: Callable, words: Words, tmp_path: Path) -> None:
    call([*words(tmp_path / "run"), "more"]).complaint("more")
    call(["rnu"]).complaint("unknown command 'rnu' (did you mean 'run'?)")
    call(["evaluate"]).complaint("folder")
    call(["evaluate", "a", "b"]).complaint("b")
    call(["evaluate", str(tmp_path / "none")]).complaint("config.yaml is missing", "is not a qkscope run")
    call(["evaluate", "x", "--devise", "cpu"]).complaint("unknown option '--devise' (did you mean '--device'?)")
    assert list(tmp_path.glob("run*")) == []


CONFIG_FILES: list[tuple[str, tuple[str, ...]]] = [
    ("dictionary: {widht: 3}", ("unknown key 'dictionary.widht' (did you mean 'dictionary.width'?)",)),
    ("dictonary: {width: 3}", ("unknown key 'dictonary' (did you mean 'dictionary",)),
    ("width: 3", ("unknown key 'width' (did you mean 'dictionary.width'?)",)),
    ("dictionary: {width: wide}", ("dictionary.width is 'wide'", "integer")),
    ("dictionary: {k: 5, width: 4}", ("dictionary: k is 5, more than the width of 4",)),
    ("pairs: {method: prune}", ("pairs.method is 'prune'", "'tune'")),
    ("layers: 3", ("layers is 3: input",)),
    ("- 1\n- 2", ("holds list, not keys and values",)),
    ("a: [", ("not YAML",)),
    ("\x00", ("not YAML",)),
    ("", ("holds NoneType",)),
]


@pytest.mark.parametrize(("text", "parts"), CONFIG_FILES, ids=[text for text, _ in CONFIG_FILES])
def test_config_file(words: Words, call: Callable, tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    call(words(tmp_path / "run", {"config": path})).complaint(f"--config {path}: ", *parts)
    assert not (tmp_path / "run").exists()


def test_flags_win_over_the_config_file_and_switches_have_two_forms(
    words: Words, call: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("dictionary: {width: 48, learning_rate: 0.003}\nevaluation: {controls: true}\n")
    command = words(tmp_path / "run", {"config": path, "layers": 0, "pairs.method": "importance"})
    said = call([*command, "--evaluation.no-controls", "--data.no-prepend-bos"])
    assert said.status == 0, said.lines
    chosen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]
    assert (chosen["dictionary"]["width"], chosen["dictionary"]["learning_rate"]) == (32, 0.003)
    assert not chosen["evaluation"]["controls"] and not chosen["data"]["prepend_bos"]
    assert json.loads((tmp_path / "run" / "layer_0" / "report.json").read_text())["controls"] == {}


# The model and the text


@pytest.mark.parametrize("name", ["bloom", "gptj", "t5"])
def test_an_unsupported_architecture(words: Words, call: Callable, tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "model", name)
    call(words(tmp_path / "run", {"model": model})).complaint(name, "supported: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: path.unlink(), "has no weights"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cannot be loaded"),
        (lambda path: save_file({"a": torch.ones(1)}, path, {"format": "pt"}), "the weights lack"),
    ],
)
def test_damaged_weights(words: Words, call: Callable, tmp_path: Path, damage: Callable, part: str) -> None:
    model = save_model(tmp_path / "model", "gpt2")
    damage(model / "model.safetensors")
    call(words(tmp_path / "run", {"model": model})).complaint(f"--model {model}", part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.txt", b"", "is an empty file"),
        ("binary.txt", b"w1 w2\0 w3", "is binary"),
        ("latin.txt", "wörter".encode("latin-1"), "is not UTF-8"),
        ("short.txt", b"w1 w2 w3", "is shorter than one context: 3 training tokens found, data.context is 24"),
        ("text.parquet", b"PAR1 nothing", "is not a readable Parquet file"),
        ("text.jsonl", b'{"text": 3}\n', "holds int '3', not a string"),
        ("text.csv", b"w1,w2\n", "ends in '.csv'"),
    ],
)
def test_text(words: Words, call: Callable, tmp_path: Path, name: str, content: bytes, part: str) -> None:
    source = tmp_path / name
    source.write_bytes(content)
    call(words(tmp_path / "run", {"data.source": source})).complaint("data.source", name, part)
    assert not (tmp_path / "run").exists()


# The output folder


def test_out_is_a_file(words: Words, call: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    call(words(tmp_path / "run")).complaint("--out", "is a file")
    call(words(tmp_path / "run" / "below")).complaint("run/below", "choose another --out")
    assert tree(tmp_path) == {"run": b"mine"}


def test_out_holds_other_files(words: Words, call: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    call(words(tmp_path / "run", {"layers": 9})).complaint("layer 9")
    assert (tmp_path / "run").is_dir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    call(words(tmp_path / "run")).complaint("--out", "'thesis.txt' and no qkscope run")
    assert tree(tmp_path) == {"run/thesis.txt": b"mine"}


def test_out_holds_another_run(run: Callable[..., Path], words: Words, call: Callable) -> None:
    out = run({"layers": 0, "pairs.method": "importance"})
    before = tree(out)
    other = {"layers": 0, "pairs.method": "importance", "dictionary.k": 3}
    call(words(out, other)).complaint("holds another run", "dictionary.k is 4.0 there, 3.0 here")
    config = out / "config.yaml"
    assert tree(out) == before
    for damage in ("run: [", "nothing: 1", "", "run: 3", "run:"):
        config.write_text(damage)
        call(words(out, other)).complaint(f"{config} is damaged")


def test_out_cannot_be_made(words: Words, call: Callable) -> None:
    call(words(Path("/proc/qkscope/run"))).complaint("/proc/qkscope/run", "choose another --out")
    call(words(Path("/tmp") / ("x" * 300))).complaint("File name too long; choose another --out")


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """As if another process were writing in the folder."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def test_out_is_locked(words: Words, call: Callable, tmp_path: Path) -> None:
    """Also before the other process has written its config.yaml: its lock and folder must stay."""
    out = tmp_path / "run"
    out.mkdir()
    with taken(out):
        call(words(out)).complaint("--out", "another process is writing there")
        assert (out / ".lock").exists()


def test_a_folder_stays_locked_while_any_process_of_a_run_writes(
    words: Words, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several, where the first was killed and another is still training a layer of its own."""
    out = tmp_path / "run"
    with ExitStack() as other:
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "_world", parallel.World(None, 0, 2))
            with claimed(out):
                (out / "config.yaml").touch()
                assert other.enter_context(shared(out, marked(out)))
                with pytest.raises(UserError, match="another process is writing there"), claimed(out):
                    pass
        call(words(out)).complaint("--out", "another process is writing there")
    with claimed(out), shared(out, marked(out)) as held:
        assert not held
    (out / "config.yaml").unlink()
    with claimed(out):
        pass


@pytest.mark.parametrize("why", ["is missing", "is read-only", "knows no locks", "is another"])
def test_a_folder_that_another_process_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    number = {"is read-only": errno.EROFS, "knows no locks": errno.ENOLCK}.get(why, 0)

    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    if why == "is read-only":
        monkeypatch.setattr(os, "open", refuse)
    elif why != "is missing":
        (tmp_path / ".lock").write_text("of another machine's folder" if why == "is another" else "")
        if why == "knows no locks":
            monkeypatch.setattr(fcntl, "flock", refuse)
    with shared(tmp_path, "") as held:
        assert not held


def test_out_cannot_be_locked(words: Words, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems know no locks: that is not another process."""

    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    call(words(tmp_path / "run")).complaint("--out", "cannot be locked (No locks available)")
    assert not (tmp_path / "run").exists()


def test_evaluating_a_run_that_is_locked(finished: Path, call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in (".report.json.12345.tmp", ".tmpXb9f0Q"):  # safetensors has temporary names of its own
        (out / "layer_0" / name).write_text("of a process that was killed")
    before = tree(out)
    with taken(out):
        said = call(["evaluate", str(out)])
        assert said.complaint("another process is writing there") and "--out" not in said.lines[-1]
    assert tree(out) == before
    assert call(["evaluate", str(out)]).status == 0
    assert not list(out.rglob("*.tmp*"))


def test_evaluating_a_member_of_a_sweep_that_is_locked(run: Callable[..., Path], call: Callable) -> None:
    """A sweep's run writes in its members' folders too: its lock is theirs."""
    out = run({"sweep.k": (2, 4), "layers": 0, "pairs.method": "importance"})
    with taken(out):
        call(["evaluate", str(out / "k2")]).complaint(f"{out / 'k2'}: another process is writing there")
    (out / "checkpoint.safetensors").write_bytes(b"")
    call(["evaluate", str(out / "k2")]).complaint(f"{out / 'k2'}: ", "is not finished")
    (out / "checkpoint.safetensors").unlink()
    assert call(["evaluate", str(out / "k2")]).status == 0


def test_a_member_of_a_sweep_is_held_by_its_lock(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = run({"sweep.k": (2, 4), "layers": 0, "pairs.method": "importance"})
    monkeypatch.setattr(parallel, "_world", parallel.World(None, 0, 2))
    with claimed(out / "k2"), shared(out / "k2", marked(out / "k2")) as held:
        assert held
        with pytest.raises(UserError), claimed(out):
            pass


def test_a_persons_own_checkpoint_is_none_of_the_runs(run: Callable[..., Path], call: Callable) -> None:
    out = run({"layers": 0, "pairs.method": "importance"})
    mine = out / "checkpoint_of_monday.safetensors"
    mine.write_bytes(b"")
    assert call(["evaluate", str(out)]).status == 0 and mine.exists()
    (out / "checkpoint_3.safetensors").write_bytes(b"")
    call(["evaluate", str(out)]).complaint(f"{out}: ", "is not finished")


# In the middle of a run


def poisoned_model(folder: Path, token: int) -> Path:
    """gpt2 whose embedding of one token is NaN."""
    model: Any = tiny_model("gpt2", tie_word_embeddings=False)
    model.get_parameter("transformer.wte.weight").data[token] = float("nan")
    model.save_pretrained(folder)
    BOS.save_pretrained(folder)
    return folder


def poisoned_text(path: Path, split: str) -> tuple[Path, int]:
    """Text with one document of one split that holds, as its 31st word, a word that is nowhere else; its row."""
    texts = [" ".join("w0" if w == "w49" else w for w in t.split()) for t in documents_of([40] * 300)]
    row = max(i for i, t in enumerate(texts) if split_of(_poison(t), 0.1) == split_of(t, 0.1) == split)
    texts[row] = _poison(texts[row])
    return save_documents(path, texts), row


def _poison(text: str) -> str:
    return " ".join("w49" if i == 30 else word for i, word in enumerate(text.split()))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_activations_that_are_not_finite(words: Words, call: Callable, tmp_path: Path, split: str) -> None:
    """Found while training (the last checkpoint stands, and holds no NaN) or only in the held-out text."""
    model = poisoned_model(tmp_path / "model", 5 + 49)
    source, row = poisoned_text(tmp_path / "text.parquet", split)
    options = {"model": model, "data.source": source, "training.tokens": 12_000, "evaluation.tokens": 5000}
    said = call(words(tmp_path / "run", {**options, "layers": 0}))
    line = said.lines[-1]
    assert said.status == 2 and sum(one.startswith("qkscope: ") for one in said.lines) == 1
    assert line.startswith("qkscope: layer 0: ") and "NaN or infinity" in line
    assert f"document {row}, position 30; " in line
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert ("at step " in line and "checkpoint is kept" in line) == (split == "train")
    kept = checkpoint if split == "train" else tmp_path / "run" / "layer_0" / "dictionaries.safetensors"
    assert all(t.isfinite().all() for t in load_file(kept).values())
    assert not (tmp_path / "run" / "layer_0" / "report.json").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_mask_that_cannot_fit(
    words: Words, call: Callable, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before step 1 as what may be, after it as what is; then the same folder goes on, in this or another way."""
    masked = {"pairs.method": "mask"}
    monkeypatch.setattr(mask, "free_memory", lambda device: 1000)
    said = call(words(tmp_path / "run", masked))
    assert said.status == 2 and said.lines[-1].startswith("qkscope: --pairs.method mask: 2 masks of at most ")
    assert "use --pairs.method tune" in said.lines[-1]
    warned = [line for line in said.lines if "may be refused after step 1" in line]
    assert len(warned) == 1 and warned[0] == said.lines[1] and "2 masks of at most 33 x 33 x 4 take " in warned[0]
    shutil.copytree(tmp_path / "run", tmp_path / "tuned")
    again = call(words(tmp_path / "run", masked))
    assert again.status == 2 and [line.split(",")[0] for line in again.lines[1:-1]] == ["going on from step1"]
    call(words(tmp_path / "run", {"pairs.method": "mask", "dictionary.k": 3})).complaint("holds another run")
    monkeypatch.undo()
    assert call(words(tmp_path / "run", masked)).status == 0
    assert call(words(tmp_path / "tuned")).status == 0
    for layer in ("layer_0", "layer_1"):
        require_equal(run(name="fresh") / layer, tmp_path / "tuned" / layer)
    assert yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())["run"]["pairs"]["method"] == "tune"
    # Nothing else but the way is open, and only until step 2 has begun.
    call(words(tmp_path / "tuned", masked)).complaint("holds another run (pairs.method is 'tune' there, 'mask' here)")


def test_a_full_disk(words: Words, call: Callable, run: Callable[..., Path], tmp_path: Path) -> None:
    """A real one: whatever is being written when it is full; with room made, the same command goes on."""
    one = {"layers": 0}
    wanted = run(one, name="wanted")
    folder = tmp_path / "disk"
    with small_disk(folder, "2m"):
        ballast = folder / "ballast"
        for room in range(0, 900, 80):  # kilobytes
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            ballast.write_bytes(bytes(free - room * 1024) if free > room * 1024 else b"")
            said = call(words(folder / "run", one))
            ballast.unlink()
            if said.status == 0:
                break
            assert said.status == 2 and "the disk is full while writing" in said.lines[-1], said.lines
            assert not list(folder.rglob("*.tmp"))
        assert said.status == 0 and room > 100
        require_equal(wanted / "layer_0", folder / "run" / "layer_0")


def test_a_checkpoint_that_cannot_be_written(
    words: Words, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise SafetensorError('Error while serializing: I/O error: Permission denied (os error 13) at path "/x"')

    monkeypatch.setattr(files, "save_file", refused)
    said = call(words(tmp_path / "run", {"layers": 0}))
    assert said.status == 2 and "checkpoint.safetensors: Permission denied; choose another --out" in said.lines[-1]


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "checkpoint.safetensors", "dictionaries.safetensors", "features.parquet", "report.html", "metrics"],
)
def test_a_disk_that_is_full_at(
    words: Words, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The same without mounting, at each file; what stood before the write stands after it."""

    def full(self: Path, *args: Any, **options: Any) -> Any:
        writing = any(set("wa+") & set(str(mode)) for mode in (*args[:1], options.get("mode", "")))
        if name in self.name and writing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *args, **options)

    opened = Path.open
    command = words(tmp_path / "run", {"layers": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        said = call(command)
    assert said.status == 2
    assert "the disk is full while writing" in said.lines[-1] and name in said.lines[-1]
    assert not list(tmp_path.rglob("*.tmp"))
    assert call(command).status == 0


# A damaged artefact


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reword(path: Path, old: str, new: str) -> None:
    """Change a text file in one place."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def column(path: Path, name: str, value: Any) -> None:
    """Change a column of a Parquet file; None drops it."""
    table = pq.read_table(path)
    at = table.column_names.index(name)
    table = table.remove_column(at) if value is None else table.set_column(at, name, value(table[name]))
    pq.write_table(table, path)


DICTIONARIES, PAIRS, CONFIG = "layer_0/dictionaries.safetensors", "layer_0/pairs.parquet", "config.yaml"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": (CONFIG, lambda p: p.unlink(), "is missing"),
    "no run in the config": (CONFIG, lambda p: p.write_text("a: 1"), "no 'run' in it"),
    "no site": (CONFIG, lambda p: reword(p, "sites:\n  0:", "sites:\n  7:"), "says nothing of layer_0"),
    "a site with a word": (CONFIG, lambda p: reword(p, "D: 32", "D: wide"), "config.yaml asks for ('wide', 32)"),
    "an unknown key": (CONFIG, lambda p: reword(p, "k: 4.0", "kk: 4"), "unknown key 'dictionary.kk' (did you mean"),
    "no dictionaries": (DICTIONARIES, lambda p: p.unlink(), "is missing"),
    "empty dictionaries": (DICTIONARIES, lambda p: p.write_bytes(b""), "is damaged"),
    "dictionaries cut short": (DICTIONARIES, lambda p: p.write_bytes(p.read_bytes()[:-8]), "is damaged"),
    "a missing tensor": (DICTIONARIES, lambda p: rewrite(p, lambda t: t.pop("key.W_dec")), "has no key.W_dec"),
    "a short tensor": (
        DICTIONARIES,
        lambda p: rewrite(p, lambda t: t.update({"key.b_enc": t["key.b_enc"][:-1].clone()})),
        "key.b_enc has shape (31,), config.yaml asks for (32,)",
    ),
    "whole numbers": (
        DICTIONARIES,
        lambda p: rewrite(p, lambda t: t.update({"key.b_enc": t["key.b_enc"].long()})),
        "key.b_enc holds int64",
    ),
    "NaN": (DICTIONARIES, lambda p: rewrite(p, lambda t: t["key.W_enc"].fill_(torch.nan)), "key.W_enc holds NaN"),
    "no pairs": (PAIRS, lambda p: p.unlink(), "is missing"),
    "pairs cut short": (PAIRS, lambda p: p.write_bytes(p.read_bytes()[:-8]), "is damaged"),
    "no strengths": (PAIRS, lambda p: column(p, "strength", None), "has no column strength of type float"),
    "strengths of another type": (
        PAIRS, lambda p: column(p, "strength", lambda c: c.cast(pa.float64())), "has no column strength of type float",
    ),
    "a head too many": (
        PAIRS, lambda p: column(p, "head", lambda c: pa.array([4] * len(c), pa.int16())), "row 0 names a feature",
    ),
    "a missing value": (
        PAIRS, lambda p: column(p, "head", lambda c: pa.array([None] * len(c), pa.int16())), "head has missing values",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(models: Callable[[str], Path], source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one layer, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    changes = {"layers": 0, "pairs.method": "importance"}
    small_runs.finish(small_runs.argv(out, models("gpt2"), source, changes))
    return out


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_artefact(finished: Path, call: Callable, tmp_path: Path, damage: str) -> None:
    name, change, part = DAMAGE[damage]
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    Decomposition.load(out / "layer_0")
    change(out / name)
    with pytest.raises(UserError) as error:
        Decomposition.load(out / "layer_0")
    assert part in str(error.value) and "\n" not in str(error.value), str(error.value)
    before = tree(out)
    said = call(["evaluate", str(out)])
    assert said.status == 2 and said.lines[-1].startswith("qkscope: "), said.lines
    assert part in said.lines[-1]
    assert tree(out) == before


def test_evaluating_a_run_that_is_not_finished(words: Words, call: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    moment: Moment = ("os.rename", "layer_0/dictionaries.safetensors", 1)
    kill_at(moment, words(out, {"layers": 0}))
    before = tree(out)
    call(["evaluate", str(out)]).complaint(f"{out}: ", "is not finished", "give the command that began it")
    assert tree(out) == before
