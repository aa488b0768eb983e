"""Local text files as rows that are fetched by index: .txt, .jsonl, .parquet.

Notable: no file becomes a Python list of strings. Plain text and JSON lines are memory-mapped and keep 16 bytes a
document (where it starts and ends); Parquet keeps its one column as Arrow buffers, and past `IN_MEMORY` bytes as a
memory-mapped Arrow file. What a person can get wrong in a file is found when it is opened, not in the middle of a run.
"""

from __future__ import annotations

import codecs
import json
import mmap
import re
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, nearest

ENDINGS = (".txt", ".jsonl", ".parquet")
IN_MEMORY = 1 << 30  # bytes of a Parquet column that are held in memory; a larger one is unpacked to a mapped file
SEPARATOR = b"<|endoftext|>"
BLANK_LINES = re.compile(rb"\r?\n(?:[ \t]*\r?\n){2,}")  # the end of a line, then two blank ones or more
CHUNK = 16 << 20  # bytes decoded at a time when a file is checked for UTF-8
BOM = codecs.BOM_UTF8


class Rows(Protocol):
    """Texts by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_rows(path: Path, column: str) -> Rows:
    """The rows of a file that exists, by its ending; `UserError` for whatever is wrong with the file."""
    reader = {".txt": PlainText, ".jsonl": JsonLines, ".parquet": Parquet}.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"data.source {str(path)!r} ends in {path.suffix!r}{nearest(path.suffix.lower(), ENDINGS)}; "
            f"give a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file"
        )
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data.source {str(path)!r} is an empty file; give one that holds text")
        rows = reader(path, column)
    except OSError as error:
        raise UserError(f"data.source {str(path)!r} cannot be read ({one_line(error)}); give a readable file") from None
    if not len(rows):
        raise UserError(f"data.source {str(path)!r} is empty: it holds no document; give a file that holds text")
    return rows


class PlainText:
    """Documents of a .txt: split at `<|endoftext|>` where that occurs, else at two or more blank lines, else one."""

    def __init__(self, path: Path, column: str) -> None:
        del column  # plain text has none
        self._bytes = _map_utf8(path)
        flat = array("q")
        for start, end in self._between_separators():
            if self._bytes[start:end].strip():
                flat.extend((start, end))
        self._spans_N2 = np.frombuffer(flat, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans_N2)

    def __getitem__(self, index: int) -> str:
        start, end = self._spans_N2[index]
        return self._bytes[start:end].decode("utf-8").replace("\r\n", "\n").strip("\n")

    def _between_separators(self) -> Iterator[tuple[int, int]]:
        """Byte ranges between separators, empty ones included."""
        marked = self._bytes.find(SEPARATOR) >= 0
        separator = re.compile(re.escape(SEPARATOR)) if marked else BLANK_LINES
        start = len(BOM) if self._bytes[: len(BOM)] == BOM else 0
        for match in separator.finditer(self._bytes):
            yield start, match.start()
            start = match.end()
        yield start, len(self._bytes)


class JsonLines:
    """Documents of a .jsonl: `column` of the JSON object on each line; blank lines are skipped, null is no text.

    Every line is parsed once when the file is opened, so that a bad one stops the run before it starts.
    """

    def __init__(self, path: Path, column: str) -> None:
        self._bytes, self._column = _map_utf8(path), column
        flat = array("q")
        start = len(BOM) if self._bytes[: len(BOM)] == BOM else 0
        self._bytes.seek(start)
        for number, line in enumerate(iter(self._bytes.readline, b""), 1):
            end = start + len(line)
            if line.strip():
                _check_line(line, column, f"data.source {str(path)!r}, line {number}")
                flat.extend((start, end))
            start = end
        self._spans_N2 = np.frombuffer(flat, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans_N2)

    def __getitem__(self, index: int) -> str:
        start, end = self._spans_N2[index]
        return _whole_characters(json.loads(self._bytes[start:end])[self._column] or "")


class Parquet:
    """Documents of a .parquet: the rows of one string column, read as Arrow buffers; null is no text."""

    def __init__(self, path: Path, column: str) -> None:
        self._where = f"data.source {str(path)!r}"
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                check_column(self._where, column, file.schema_arrow.names)
                kind = file.schema_arrow.field(column).type
                if not _is_text(kind):
                    raise UserError(
                        f"{self._where}: column {column!r} holds {kind}, not strings; "
                        f"set data.text_column to the one that holds the text{_text_columns(file.schema_arrow)}"
                    )
                self._texts = _read_column(file, column)
        except pa.ArrowException as error:
            raise UserError(
                f"{self._where} is not a readable Parquet file ({one_line(error)}); "
                "write it again, or give it the ending of what it is"
            ) from None

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        try:
            return self._texts[int(index)].as_py() or ""
        except UnicodeDecodeError:
            raise UserError(f"{self._where}: row {index} is not UTF-8; write the file again as UTF-8") from None


def check_column(where: str, column: str, there: Sequence[str]) -> None:
    """`UserError` where `column` is not among the columns or keys that are `there`."""
    if column not in there:
        raise UserError(
            f"{where} has no column {column!r}{nearest(column, there)}; "
            f"set data.text_column to one of: {', '.join(map(repr, there)) or '(it has none)'}"
        )


def check_string(where: str, column: str, value: Any) -> None:
    """`UserError` where a row's value is neither a string nor null."""
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} holds {type(value).__name__} {str(value)[:40]!r}, not a string; "
            "set data.text_column to the one that holds the text"
        )


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an exception says, as one line of at most `longest` characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= longest else said[: longest - 1] + "…"


def _map_utf8(path: Path) -> mmap.mmap:
    """The file's bytes, memory-mapped, or a `UserError` where they are not UTF-8 text."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    where = f"data.source {str(path)!r}"
    if (nul := data.find(b"\0")) >= 0:
        raise UserError(f"{where} is binary (a NUL byte at offset {nul}), not text; give a UTF-8 text file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), CHUNK):
        try:
            decoder.decode(data[start : start + CHUNK], final=start + CHUNK >= len(data))
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            raise UserError(f"{where} is not UTF-8 (byte 0x{bad:02x}: {error.reason}); save it as UTF-8") from None
    return data


def _check_line(line: bytes, column: str, where: str) -> None:
    """`UserError` where a line of a .jsonl is not an object with a string under `column`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({one_line(error)}): {_quoted(line)}; one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: {_quoted(line)}; one JSON object a line")
    check_column(where, column, list(row))
    check_string(where, column, row[column])


def _quoted(line: bytes) -> str:
    """The beginning of a line, as it stands in a message."""
    return repr(line.decode("utf-8").strip()[:40])


def _whole_characters(text: str) -> str:
    """Half surrogate pairs, which JSON can escape and UTF-8 (so also a tokenizer) cannot hold, become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _text_columns(schema: pa.Schema) -> str:
    names = [field.name for field in schema if _is_text(field.type)]
    return f": {', '.join(map(repr, names))}" if names else " (this file has no string column)"


def _read_column(file: pq.ParquetFile, column: str) -> pa.ChunkedArray:
    """The column, in memory or, past `IN_MEMORY` bytes, as a memory-mapped file."""
    groups = (file.metadata.row_group(g) for g in range(file.metadata.num_row_groups))
    chunks = (group.column(c) for group in groups for c in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return file.read(columns=[column]).column(0) if size <= IN_MEMORY else _unpack(file, column)


def _unpack(file: pq.ParquetFile, column: str) -> pa.ChunkedArray:
    """The column written batch by batch to a temporary Arrow file, and that file mapped: any row at once, no memory."""
    schema = pa.schema([(column, pa.large_string())])
    with tempfile.TemporaryDirectory(prefix="qkscope-", ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "column.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in file.iter_batches(batch_size=4096, columns=[column]):
                writer.write_batch(pa.record_batch([batch.column(0).cast(pa.large_string())], schema=schema))
        # The mapping outlives the file's name: the space is free again when the process ends, however it ends.
        return pa.ipc.open_file(pa.memory_map(path)).read_all().column(0)
