"""A set of texts that a teacher wrote, on disk: gzipped JSON lines that any source reads, and what it is made of.

A row of texts holds `text`, the `ids` that the teacher read and wrote (the start token among them, and the end token
where it wrote one), how many of them were `given`, whether it `ended`, the log-probability `logp` of the drawn ids at
temperature 1 in nats, and the `number` of the sequence, from which with the seed every draw follows. A row of
conversations holds `messages` in place of `text` and, under `drawn`, the ids of each stretch that the teacher wrote.
"""

import codecs
import gzip
import hashlib
import io
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from tokenkit.align.bias import write_whole_with
from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)
METADATA = "metadata.json"
REJECTED_IN_A_ROW = 500  # so many draws without a new row, and no more are tried
Row = dict[str, Any]


@dataclass
class SyntheticWriter:
    """A set while it is written: shards in order, each there whole or not at all.

    Sequences are taken in the order of their numbers, so the set is the same however they were drawn, and however often
    the writing was interrupted.
    """

    folder: Path
    samples: int
    shard_rows: int
    dedupe: bool = False
    rows: list[Row] = field(default_factory=list)
    """Rows of the shard at hand."""
    count: int = 0
    """Rows of the whole set so far."""
    next_number: int = 0
    _seen: set[bytes] = field(default_factory=set)
    _in_vain: int = 0

    def __post_init__(self) -> None:
        for leftover in self.folder.glob(".*.tmp*"):  # of a run that was killed while it wrote
            leftover.unlink()
        for shard in self._whole_shards():
            for row in shard:
                self._take(row)
            self._close()
        if self.count > self.samples:
            raise UserError(f"{self.folder}: holds {self.count:,} rows already; write samples={self.count} or more")

    def wanted(self) -> range:
        """The numbers of the sequences that are to be drawn next: as many as the shard at hand has room for."""
        room = min(self.shard_rows - len(self.rows), self.samples - self.count)
        return range(self.next_number, self.next_number + room)

    def add(self, drawn: Sequence[Row | None]) -> None:
        """Takes the rows of the wanted sequences; None stands for one that gave nothing to keep."""
        for row in drawn:
            number, self.next_number = self.next_number, self.next_number + 1
            if row is None or (self.dedupe and _seal(row) in self._seen):
                self._in_vain += 1
            else:
                self._take({**row, "number": number})
        if self._in_vain >= REJECTED_IN_A_ROW:
            raise UserError(
                f"the last {self._in_vain} sequences were empty or there already, at row {self.count:,}; raise "
                "sampling.temperature or sampling.max_new_tokens, give more prompts, or write dedupe=false"
            )
        if self.rows and (len(self.rows) == self.shard_rows or self.count == self.samples):
            self._write()

    def _take(self, row: Row) -> None:
        self._in_vain, self.next_number = 0, row["number"] + 1
        self._seen.add(_seal(row))
        self.rows.append(row)
        self.count += 1

    def _write(self) -> None:
        path = self.folder / shard_name((self.count - 1) // self.shard_rows)
        write_whole_with(path, lambda temporary: temporary.write_bytes(_packed(self.rows)))
        self._close()

    def _close(self) -> None:
        if len(self.rows) == self.shard_rows:
            self.rows = []

    def _whole_shards(self) -> Iterator[list[Row]]:
        """The shards that are there, up to the first that is missing, damaged or not full; that one comes too."""
        number = 0
        while (path := self.folder / shard_name(number)).is_file():
            try:
                shard = list(read_shard(path))
            except UserError as error:
                log.warning("%s; it is drawn again", error)
                return
            yield shard
            if len(shard) != self.shard_rows:
                return
            number += 1


def shard_name(number: int) -> str:
    """What a shard's file is called."""
    return f"shard_{number:06d}.jsonl.gz"


def _packed(rows: Iterable[Row]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", mtime=0, fileobj=buffer) as file:  # neither name nor time: same rows, same bytes
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return buffer.getvalue()


def _seal(row: Row) -> bytes:
    told = row["text"] if "text" in row else json.dumps(row["messages"], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(told.encode()).digest()


def read_shard(path: Path) -> Iterator[Row]:
    """The rows of a shard; UserError where it is not as it was written."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, json.JSONDecodeError):
        raise UserError(f"{path}: damaged; `tokenkit synthesize RUN.YAML --resume` draws it again") from None


def shards_of(folder: Path) -> list[Path]:
    """The shards of a set, in order."""
    return sorted(folder.glob("shard_*.jsonl.gz"))


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a finished set says of itself; UserError where it is unfinished or not what was written."""
    path = folder / METADATA
    if not path.is_file():
        raise UserError(f"{path}: no such file; finish the set with `tokenkit synthesize RUN.YAML --resume`")
    found = json.loads(path.read_text("utf-8"))
    for name, sha256 in found["shards"].items():
        shard = folder / name
        if not shard.is_file() or hashlib.sha256(shard.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{shard}: missing or changed; `tokenkit synthesize RUN.YAML --resume` draws it again")
    return found


def read_rows_of_set(folder: Path) -> Iterator[Row]:
    """The rows of a finished set, verified, in order: ids as they were drawn, so nothing is tokenised again."""
    for name in read_metadata(folder)["shards"]:
        yield from read_shard(folder / name)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, without special tokens; a character that was cut off at the end is left out."""
    spelled = b"".join(tokenizer.token_bytes[i] for i in ids)
    whole = codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)
    cut = len(spelled.decode(errors="replace")) - len(whole)
    text = tokenizer.decode(ids)
    return text[: len(text) - cut]


def drawn_ids(row: Row) -> list[list[int]]:
    """The stretches of a row that the teacher wrote."""
    return row["drawn"] if "drawn" in row else [row["ids"][row["given"] :]]


@dataclass
class SetStatistics:
    """What a set is like, counted row by row."""

    tokenizer: Tokenizer
    rows: int = 0
    tokens: int = 0
    logp: float = 0.0
    ended: int = 0
    duplicates: int = 0
    alike: int = 0
    """Texts whose tokens are the drawn ones when they are tokenised again."""
    texts: int = 0
    last_number: int = -1
    _bigram_count: int = 0
    _unigrams: set[int] = field(default_factory=set)
    _bigrams: Int64[ndarray, "N"] = field(default_factory=lambda: np.zeros(0, np.int64))
    _seen: set[bytes] = field(default_factory=set)

    def add(self, rows: Sequence[Row]) -> None:
        """Counts the rows of a shard."""
        pairs = [self._bigrams]
        for row in rows:
            for ids in drawn_ids(row):
                array = np.array(ids, np.int64)
                self.tokens += len(array)
                self._unigrams.update(ids)
                pairs.append(array[:-1] * self.tokenizer.vocab_size + array[1:])
                self._bigram_count += max(0, len(array) - 1)
            self._count(row)
        self._bigrams = np.unique(np.concatenate(pairs))
        texts = [row for row in rows if "text" in row]
        again = self.tokenizer.encode_batch([row["text"] for row in texts])
        self.alike += sum(self._is_alike(row, found.ids.tolist()) for row, found in zip(texts, again, strict=True))
        self.texts += len(texts)

    def _count(self, row: Row) -> None:
        self.rows += 1
        self.logp += row["logp"]
        self.ended += row["ended"]
        self.duplicates += _seal(row) in self._seen
        self._seen.add(_seal(row))
        self.last_number = row["number"]

    def _is_alike(self, row: Row, again: list[int]) -> bool:
        return [i for i in row["ids"] if i not in self.tokenizer.special_ids] == again

    def summary(self) -> dict[str, Any]:
        """Counts and shares. Perplexity is the teacher's, of what it wrote, per token, at temperature 1."""
        drawn = self.last_number + 1
        found = {
            "rows": self.rows,
            "tokens": self.tokens,
            "mean_new_tokens": self.tokens / max(1, self.rows),
            "ended": self.ended / max(1, self.rows),
            "distinct_1": len(self._unigrams) / max(1, self.tokens),
            "distinct_2": len(self._bigrams) / max(1, self._bigram_count),
            "teacher_perplexity": math.exp(-self.logp / max(1, self.tokens)),
            "duplicate_rate": self.duplicates / max(1, self.rows),
            "sequences_drawn": drawn,
            "rejected_rate": (drawn - self.rows) / max(1, drawn),
        }
        return found | ({"tokenised_alike": self.alike / self.texts} if self.texts else {})


def finish_set(folder: Path, about: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Reads every shard again, writes metadata.json from what is there, and returns it."""
    statistics, shards = SetStatistics(tokenizer), {}
    for path in shards_of(folder):
        statistics.add(list(read_shard(path)))
        shards[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    found = {**about, **statistics.summary(), "shards": shards}
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    write_whole_with(folder / METADATA, lambda path: path.write_text(text, "utf-8"))
    return found
