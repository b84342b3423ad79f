"""A corpus of chunks: read file by file with a line of progress, split by document, kept in a folder if wanted."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenkit.config import Config, UserError
from tokenkit.data.chunks import ChunkCorpus, ChunkTable, count_chunks, is_held_out
from tokenkit.data.source import SourceConfig, describe, file_documents, is_dataset, read_documents, source_files
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT, make_chunker
from tokenkit.version import __version__

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST, CHUNKS, STATISTICS = "manifest.json", "chunks.safetensors", "statistics.json"
TEXTS = {False: "train.jsonl", True: "validation.jsonl"}
EVERY_FILES, EVERY_SECONDS = 100, 5.0  # between lines of progress, whichever comes first
NAMED_SKIPS = 20


class ChunkDataConfig(Config):
    """Text for a learned tokenizer: a source, or the folder that `tokenkit tokenizer prepare` wrote of one."""

    source: SourceConfig | None = None
    prepared: Path | None = None
    held_out: SourceConfig | None = None
    """Documents to validate with; without it a share of the source's is kept for that."""
    chunker: str = DEFAULT
    """joined, word, space, superword, or fixed:N for N bytes."""
    validation_split: float = Field(0.1, gt=0, lt=1)
    """Share of the documents that is held out."""
    split_seed: int = 0
    """Which documents these are."""
    min_count: int = Field(1, ge=1)
    """Chunks that occur less often are not trained on."""
    max_files: int | None = Field(None, ge=1)
    """Read so many files at most."""

    @model_validator(mode="after")
    def _one(self) -> "ChunkDataConfig":
        if (self.source is None) == (self.prepared is None):
            raise UserError("data: give either source, or prepared, the folder that `tokenkit tokenizer prepare` wrote")
        return self


@dataclass
class Reading:
    """How far the reading of a corpus has come, and what it met."""

    started: float = field(default_factory=time.monotonic)
    files_available: int = 0
    files_read: int = 0
    skipped: list[str] = field(default_factory=list)
    num_bytes: int = 0
    documents: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    counts: dict[bool, Counter[bytes]] = field(default_factory=lambda: {False: Counter(), True: Counter()})

    def line(self) -> str:
        """Files done of all, share, chunks so far, distinct ones, speed, time left."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        done = self.files_read + len(self.skipped)
        share = done / max(1, self.files_available)
        left = seconds * (1 - share) / share if share else 0.0
        chunks = sum(counter.total() for counter in self.counts.values())
        return (
            f"{done:,}/{self.files_available:,} files ({share:.0%}), {chunks:,} chunks, "
            f"{len(self.counts[False]):,} distinct, {self.num_bytes / seconds / 1e6:.1f} MB/s, {left:.0f} s left"
        )

    def statistics(self, data: ChunkDataConfig, output: str) -> dict[str, Any]:
        """What became of it, as plain values."""
        seconds = time.monotonic() - self.started
        return {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "files_available": self.files_available,
            "files_read": self.files_read,
            "files_skipped": len(self.skipped),
            "skipped": self.skipped[:NAMED_SKIPS],
            "documents_train": self.documents[False],
            "documents_validation": self.documents[True],
            "megabytes": round(self.num_bytes / 1e6, 3),
            "megabytes_per_second": round(self.num_bytes / 1e6 / max(seconds, 1e-9), 2),
            "chunks": sum(counter.total() for counter in self.counts.values()),
            "vocab_size": len(self.counts[False]),
            "min_frequency": data.min_count,
            "chunker": data.chunker,
            "output": output,
            "build": __version__,
        }


Keep = Callable[[str, bool], None]
Tell = Callable[[str], None]


def read_corpus(data: ChunkDataConfig, tell: Tell = log.info) -> ChunkCorpus:
    """The chunks of a source, or of a prepared folder; UserError where one side would be empty."""
    if data.prepared is not None:
        return load_prepared(data.prepared)
    return _corpus(data, count_corpus(data, tell))


def count_corpus(data: ChunkDataConfig, tell: Tell = log.info, keep: Keep = lambda text, held_out: None) -> Reading:
    """Counts the chunks of both sides. `keep` is handed every document and whether it is held out."""
    reading, chunker = Reading(), make_chunker(data.chunker)

    def take(texts: list[str], side: bool | None) -> None:
        for text in filter(str.strip, texts):
            held_out = is_held_out(text, data.validation_split, data.split_seed) if side is None else side
            reading.documents[held_out] += 1
            reading.num_bytes += len(text.encode("utf-8", "surrogatepass"))
            reading.counts[held_out].update(count_chunks([text], chunker))
            keep(text, held_out)

    source = data.source
    if source is None:
        raise UserError("data.source: missing; name the text to read")
    told_at = reading.started
    for texts in _by_file(source, data.max_files, reading):
        take(texts, None if data.held_out is None else False)
        if reading.files_read % EVERY_FILES == 0 or time.monotonic() - told_at >= EVERY_SECONDS:
            tell(reading.line())
            told_at = time.monotonic()
    if data.held_out is not None:
        take(read_documents(data.held_out), True)
    _check_sides(data, source, reading)
    tell(reading.line())
    return reading


def _by_file(source: SourceConfig, max_files: int | None, reading: Reading) -> Iterator[list[str]]:
    """The documents of each readable file; those of a dataset as if they were one file's."""
    if is_dataset(source):
        reading.files_available = reading.files_read = 1
        yield read_documents(source)
        return
    files = source_files(source)[:max_files]
    if not files:
        raise UserError(f"{describe(source)}: no .txt, .jsonl, .parquet, .py or .md file in it; give a folder of text")
    reading.files_available, left, more = len(files), source.max_bytes, source.max_documents
    for path in files:
        if (left is not None and left <= 0) or more == 0:
            return
        try:
            texts = list(islice(filter(str.strip, file_documents(path, source)), more))
        except (OSError, UserError, UnicodeDecodeError) as error:
            reading.skipped.append(f"{path}: {str(error).splitlines()[0]}")
            log.warning("skipped %s", reading.skipped[-1])
            continue
        if left is not None:
            texts, left = _within(texts, left)
        more = None if more is None else more - len(texts)
        reading.files_read += 1
        yield texts


def _within(texts: list[str], left: int) -> tuple[list[str], int]:
    taken = []
    for text in texts:
        if left <= 0:
            break
        taken.append(text.encode("utf-8", "surrogatepass")[:left].decode("utf-8", "ignore"))
        left -= len(taken[-1].encode())
    return taken, left if len(taken) == len(texts) else 0


def _check_sides(data: ChunkDataConfig, source: SourceConfig, reading: Reading) -> None:
    documents = sum(reading.documents.values())
    if not documents:
        why = f"; skipped {reading.skipped[0]}" if reading.skipped else ""
        raise UserError(f"{describe(source)}: no text in its {reading.files_available:,} files{why}")
    for held_out, name in ((True, "validate with"), (False, "train on")):
        if not reading.documents[held_out]:
            raise UserError(
                f"{describe(source)}: none of {documents:,} documents is left to {name} at "
                f"validation_split={data.validation_split}; give source.separator, more documents or held_out"
            )


def _corpus(data: ChunkDataConfig, reading: Reading) -> ChunkCorpus:
    frequent = {chunk: count for chunk, count in reading.counts[False].items() if count >= data.min_count}
    if not frequent:
        raise UserError(f"data.min_count: no chunk occurs {data.min_count} times; write a smaller one")
    return ChunkCorpus(ChunkTable.of(frequent), ChunkTable.of(reading.counts[True]), data.chunker)


def prepare_corpus(data: ChunkDataConfig, output: Path, tell: Tell = log.info) -> dict[str, Any]:
    """Writes texts, chunk counts, a manifest and statistics into a new folder; the statistics."""
    for leftover in output.glob(".*.tmp"):  # of one that was stopped
        leftover.unlink()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; nothing is overwritten, choose a new output")
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {side: stack.enter_context(_temporary(output / name).open("w")) for side, name in TEXTS.items()}
        reading = count_corpus(data, tell, lambda text, held_out: _write_document(files[held_out], text))
    corpus = _corpus(data, reading)
    save_file(_tensors("train", corpus.train) | _tensors("held_out", corpus.held_out), _temporary(output / CHUNKS))
    statistics = reading.statistics(data, str(output))
    manifest = {
        "format": FORMAT,
        "chunker": corpus.chunker,
        "fingerprint": corpus.fingerprint(),
        "validation_split": data.validation_split,
        "split_seed": data.split_seed,
        "min_count": data.min_count,
    }
    for name, values in ((STATISTICS, statistics), (MANIFEST, manifest)):
        _temporary(output / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name in (*TEXTS.values(), CHUNKS, STATISTICS, MANIFEST):  # the manifest last: with it the folder is whole
        _temporary(output / name).replace(output / name)
    return statistics


def load_prepared(folder: Path) -> ChunkCorpus:
    """The chunks of a folder that `prepare_corpus` wrote; UserError for another or a damaged one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        tensors = load_file(folder / CHUNKS)
        corpus = ChunkCorpus(_table(tensors, "train"), _table(tensors, "held_out"), manifest["chunker"])
        whole = manifest["format"] == FORMAT and manifest["fingerprint"] == corpus.fingerprint()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: not a prepared corpus ({str(error).splitlines()[0]}); `tokenkit tokenizer prepare` writes one"
        ) from None
    if not whole:
        raise UserError(f"{folder}: its chunks are not those of its manifest; prepare it again")
    return corpus


def _tensors(name: str, table: ChunkTable) -> dict[str, Tensor]:
    return {
        f"{name}.bytes": torch.from_numpy(np.frombuffer(b"".join(table.chunks), np.uint8).copy()),
        f"{name}.lengths": torch.tensor([len(chunk) for chunk in table.chunks], dtype=torch.int32),
        f"{name}.counts": torch.from_numpy(table.counts),
    }


def _table(tensors: dict[str, Tensor], name: str) -> ChunkTable:
    whole, ends = tensors[f"{name}.bytes"].numpy().tobytes(), tensors[f"{name}.lengths"].long().cumsum(0).tolist()
    chunks = tuple(whole[start:end] for start, end in zip([0, *ends], ends))
    counts = tensors[f"{name}.counts"].numpy()
    if len(counts) != len(chunks) or (ends and ends[-1] != len(whole)):
        raise ValueError(f"the parts of {name} do not fit together")
    return ChunkTable(chunks, counts)


def _write_document(file: TextIO, text: str) -> None:
    file.write(json.dumps({"text": text}) + "\n")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
