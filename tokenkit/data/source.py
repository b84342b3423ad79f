"""Documents: text files, JSON lines, Parquet, Arrow datasets, or the standard library that every machine has.

They are read as they come, one at a time; nothing here holds a corpus but `read_documents`, which is asked to.
"""

import gzip
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError
from tokenkit.tokenizers.base import utf8

HELD_OUT_ONE_IN = 20
BLOCK = 1 << 20  # characters of a text file that are looked through for separators at a time
LONGEST_SEPARATOR = 4096  # characters; a longer match could be cut by the end of a block
NOT_PROSE = {"site-packages", "__pycache__", "test", "tests", "idle_test", "ensurepip", "lib2to3", "turtledemo"}


class SourceConfig(Config):
    """Where documents come from: exactly one of `path`, `hub`, `saved` and `stdlib`."""

    path: str | None = None
    """A file, a folder or a glob of .txt, .jsonl (both also .gz), .parquet, .py or .md files."""
    hub: str | None = None
    """A dataset id, or a folder that `datasets.load_dataset` reads."""
    hub_name: str | None = None
    """Name of a configuration of a `hub` dataset, often a language."""
    revision: str | None = None
    """Commit, tag or branch of a `hub` dataset."""
    saved: str | None = None
    """A folder that `save_to_disk` of the datasets package wrote: a Dataset, or a DatasetDict with `split` in it."""
    stdlib: Literal["train", "held_out"] | None = None
    """The sources and docstrings of this Python's standard library; every 20th module, by name, is held out."""
    split: str = "train"
    """Split of a `hub` or `saved` dataset."""
    field: str = "text"
    """Key of the text in a JSON line, a row of a Parquet file or of a dataset."""
    separator: str | None = None
    """Regular expression between documents of a text file; without it a file is one document."""
    max_bytes: int | None = Field(None, ge=1)
    """Stop after this many bytes of text; the last document is cut at a character."""
    max_documents: int | None = Field(None, ge=1)
    """Stop after this many documents with text in them, or rows of conversations."""

    @model_validator(mode="after")
    def _one_kind(self) -> "SourceConfig":
        if sum(value is not None for value in (self.path, self.hub, self.saved, self.stdlib)) != 1:
            raise UserError("source: give exactly one of path, hub, saved and stdlib")
        for key in ("hub_name", "revision"):
            if self.__dict__[key] is not None and self.hub is None:
                raise UserError(f"source.{key}: {self.__dict__[key]!r} beside no hub; name a dataset as source.hub")
        if self.separator is not None:
            try:
                re.compile(self.separator)
            except re.error as error:
                raise UserError(f"source.separator: {self.separator!r} is no regular expression: {error}") from None
        return self


def read_documents(source: SourceConfig) -> list[str]:
    """The non-empty documents of a source, in a fixed order; UserError where there are none."""
    documents = list(iterate_documents(source))
    if not documents:
        raise UserError(f"{describe(source)}: an empty corpus; no document with text in it")
    return documents


def iterate_documents(source: SourceConfig, *, streaming: bool = False) -> Iterator[str]:
    """The non-empty documents of a source as they are read, in a fixed order; of a hub dataset not downloaded first."""
    budget, number = source.max_bytes, 0
    for text in _texts(source, streaming):
        if not text.strip():
            continue
        if number == source.max_documents:
            return
        number += 1
        if budget is not None:
            if budget <= 0:
                return
            text = utf8(text, describe(source))[:budget].decode(errors="ignore")
            budget -= len(text.encode())
        yield text


def describe(source: SourceConfig) -> str:
    """What a source is called in messages and reports."""
    if source.hub is not None and source.hub_name is not None:
        return f"{source.hub} ({source.hub_name})"
    return source.path or source.hub or source.saved or f"Python standard library ({source.stdlib})"


def is_dataset(source: SourceConfig) -> bool:
    """Whether it is read by the datasets package, and not file by file."""
    return source.hub is not None or source.saved is not None


def _texts(source: SourceConfig, streaming: bool) -> Iterator[str]:
    if is_dataset(source):
        for number, row in enumerate(_dataset(source, source.field, streaming)):
            yield _text(row, f"{describe(source)}, row {number}", source.field)
        return
    for path in source_files(source):
        try:
            yield from file_documents(path, source)
        except UnicodeDecodeError:
            continue  # a handful of modules is in another encoding on purpose


def source_files(source: SourceConfig) -> list[Path]:
    """The files that a source of files, or the standard library, is read from, in a fixed order."""
    if source.stdlib is not None:
        return list(_standard_library(held_out=source.stdlib == "held_out"))
    return _files(source.path or "")


def file_documents(path: Path, source: SourceConfig) -> Iterator[str]:
    """The documents of one of these files; UserError where it is not readable as what its name says."""
    if source.stdlib is not None:
        yield path.read_text("utf-8")
    else:
        yield from _file(path, source)


def _files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        endings = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".py", ".md")
        return sorted(p for p in path.rglob("*") if p.name.endswith(endings))
    found = sorted(file for p in glob(str(path), recursive=True) if (file := Path(p)).is_file())
    if not found:
        raise UserError(f"{pattern}: no such file, folder or glob of text")
    return found


def _file(path: Path, source: SourceConfig) -> Iterator[str]:
    if is_rows(path):
        for place, row in _rows(path):
            yield _text(row, place, source.field)
        return
    with _opened(path) as file:
        if source.separator is None:
            yield file.read()
        else:
            yield from _separated(file.read, re.compile(source.separator))


def _separated(read: Callable[[int], str], separator: re.Pattern[str]) -> Iterator[str]:
    """What stands between the separators of a text file, of which a block is in memory at a time."""
    rest, ended = "", False
    while not ended:
        block = read(BLOCK)
        ended = not block
        rest += block
        start, sure = 0, len(rest) if ended else len(rest) - LONGEST_SEPARATOR
        for match in separator.finditer(rest):
            if match.end() > sure:
                break  # more of it may stand in the next block
            yield rest[start : match.start()]
            start = match.end()
        rest = rest[start:]
    yield rest


def is_rows(path: Path) -> bool:
    """Whether a file holds rows with keys, and not text."""
    return ".jsonl" in path.suffixes or path.suffix == ".parquet"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read in groups of rows, so that a large file is never in memory whole."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet: {str(error).splitlines()[0]}") from None


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise UserError(f"{place}: expected a JSON object, found a {type(row).__name__}")
            yield place, row


def _text(row: dict[str, Any], place: str, field: str) -> str:
    if not isinstance(row.get(field), str):
        raise UserError(f"{place}: no text under {field!r}; its keys are {', '.join(row)}; set source.field")
    return row[field]


def read_rows(source: SourceConfig, column: str, *, streaming: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of JSON lines or of a dataset that have a column, with their places for messages, in a fixed order."""
    return islice(_rows_with(source, column, streaming), source.max_documents)


def _rows_with(source: SourceConfig, column: str, streaming: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_dataset(source):
        for number, row in enumerate(_dataset(source, column, streaming)):
            yield f"{describe(source)}, row {number}", row
        return
    for path in _files(source.path) if source.path else []:
        if not is_rows(path):
            raise UserError(f"{path}: not JSON lines; conversations are read from .jsonl or .parquet files or datasets")
        for place, row in _rows(path):
            if column not in row:
                raise UserError(f"{place}: nothing under {column!r}; its keys are {', '.join(row)}; set source.field")
            yield place, row


def _dataset(source: SourceConfig, column: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    rows, name = _loaded(source, streaming), describe(source)
    columns = rows.column_names  # of a stream whose features are not written down: None
    if columns is not None and column not in columns:
        raise UserError(f"{name}: no column {column!r}; it has {', '.join(columns)}; set source.field")
    for number, row in enumerate(rows):
        if column not in row:
            raise UserError(f"{name}, row {number}: no column {column!r}; it has {', '.join(row)}; set source.field")
        yield dict(row)


def _loaded(source: SourceConfig, streaming: bool) -> Any:
    """A Dataset, or a stream of rows that are fetched as they are asked for. A saved one is mapped into memory."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    name = describe(source)
    try:
        if source.saved is None:
            options: dict[str, Any] = {"name": source.hub_name, "revision": source.revision, "streaming": streaming}
            return load_dataset(source.hub or "", split=source.split, **options)
        found = load_from_disk(source.saved)
    except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
        raise UserError(f"{name}: cannot be loaded as a dataset: {str(error).splitlines()[0]}") from None
    if not isinstance(found, DatasetDict):
        return found
    if source.split not in found:
        raise UserError(f"{name}: no split {source.split!r}; it has {', '.join(map(str, found))}; set source.split")
    return found[source.split]


def _standard_library(*, held_out: bool) -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_PROSE.intersection(name.parts) and is_held_out(name.as_posix()) == held_out:
            yield path


def is_held_out(module: str) -> bool:
    """Whether a module of the standard library is kept for evaluation: by its name, so the same on every machine."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0
