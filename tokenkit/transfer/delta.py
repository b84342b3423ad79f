"""A transfer as what it changes: the new rows, which rows are which old ones, and the tokenizer.

A delta names the matrices that it was made against by their digests, so it is put on no other model. The way back to
the tokenizer that a model had is a delta too, kept inside the model; it is put on the model as it is by then, and
rows that both vocabularies share come back as they were trained since.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.load import head_matrix, input_matrix, output_head, write_token_ids
from tokenkit.models.moved_settings import CONFIG, Settings, moved_settings, read_settings
from tokenkit.models.tensor_files import NewTensor, read_header, write_tensors
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.apply import set_rows
from tokenkit.transfer.mixture import Origin
from tokenkit.transfer.plan import TransferPlan
from tokenkit.transfer.rows import Known, Rows, TensorRows, block_rows
from tokenkit.transfer.shards import Checkpoint, FileRows, open_checkpoint
from tokenkit.transfer.stream import Part, Rewrite, TargetRows

DESCRIPTION, WEIGHTS = "delta.json", "delta.safetensors"
REVERSE = "reverse"  # the folder of the way back, inside a model
VERSION = 1
KNOWN_BY = 16  # bytes of the digest by which equal rows are found


@dataclass(frozen=True, eq=False)
class DeltaRows:
    """Rows of which some are rows of the base, the others stored; each in the type that it has there."""

    base: Rows
    sources: Int32[ndarray, "R"]
    """Per row the row of the base that it is, bit for bit; -1: it is stored."""
    stored: FileRows

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def origin(self) -> UInt8[ndarray, "R"]:
        """The `Origin` of each row."""
        return np.where(self.sources < 0, Origin.INITIALIZER, Origin.COPIED).astype(np.uint8)

    def __call__(self, wanted: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
        """The rows of these ids."""
        sources = self.sources[wanted].astype(np.int64)
        own = torch.from_numpy(sources < 0)
        places = np.cumsum(self.sources < 0)[wanted] - 1
        base, stored = _as_stored(self.base, sources[sources >= 0]), self.stored.raw(places[sources < 0])
        rows = torch.empty(len(wanted), self.base.shape[1], dtype=self.base.dtype, device=base.device)
        rows[~own], rows[own] = base, stored.to(base)
        return rows


@dataclass(frozen=True, eq=False)
class Delta:
    """A folder that a delta was written to."""

    folder: Path
    described: Mapping[str, Any]
    entries: Mapping[str, FileRows]
    sources: Mapping[Part, Int32[ndarray, "R"]]

    @property
    def size(self) -> int:
        """Rows of the model that it makes."""
        return self.described["rows"]

    def rows(self, part: Part, base: Rows) -> DeltaRows:
        """The rows of a part over those of a base."""
        return DeltaRows(base, self.sources[part], self.entries[part])


def write_delta(rewrite: Rewrite, folder: Path, nearest: Mapping[int, int], restored: Settings | None = None) -> int:
    """Writes what a rewrite changes into a folder that there is; how many rows are stored.

    `nearest` names for a row the row of the base that it is taken for if both are equal bit for bit: of several equal
    rows the one of the same token. `restored`: the settings as they are to be, where they are not to be moved.
    """
    parts: list[tuple[str, NewTensor]] = []
    described: dict[str, Any] = {}
    count = 0
    with tempfile.TemporaryFile(dir=folder) as spool:
        for part, rows in rewrite.parts.items():
            begin = spool.tell()
            digest, known = _known(rows.old)
            sources = np.concatenate(list(_spooled(rows, known, nearest, spool)))
            spool.flush()
            stored = int((sources < 0).sum())
            described[part] = {"shape": [*rows.old.shape], "dtype": rows.old.entry.dtype, "sha256": digest}
            shape = (stored, *rows.old.entry.shape[1:])
            parts.append((f"{part}.rows", _spool_tensor(spool.fileno(), begin, rows.old.dtype, shape)))
            parts.append((f"{part}.sources", _tensor(torch.from_numpy(sources))))
            count += stored
        write_tensors(folder / WEIGHTS, sorted(parts, key=lambda one: -one[1].dtype.itemsize), {"format": "pt"})
    config = rewrite.checkpoint.config
    values = {"version": VERSION, "model_type": config.model_type, "rows": rewrite.size, "base": described}
    if restored is not None:
        values["restored"] = {"config": restored.config, "generation": restored.generation}
        values["config_sha256"] = _sha256((rewrite.checkpoint.folder / CONFIG).read_bytes())
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return count


def open_delta(folder: Path) -> Delta:
    """The delta of a folder; UserError where there is none."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        version = described["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: no {DESCRIPTION} of a delta; write a folder of `tokenkit transfer delta=true`"
        ) from None
    if version != VERSION:
        raise UserError(f"{folder}: a delta of version {version}, where {VERSION} is known; make it again")
    entries = {entry.name: entry for entry in read_header(folder / WEIGHTS).entries}
    rows, sources = {}, {}
    for part in described["base"]:
        rows[part] = FileRows(entries[f"{part}.rows"])
        with open(folder / WEIGHTS, "rb") as file:
            entry = entries[f"{part}.sources"]
            sources[part] = np.fromfile(file, np.int32, entry.shape[0], offset=entry.begin)
    return Delta(folder, described, rows, sources)


def put_on(
    delta: Delta, checkpoint: Checkpoint, source: Tokenizer, target: Tokenizer, *, trained: bool = False
) -> tuple[Rewrite, bool]:
    """The rewrite of a base that a delta says, and whether the base is untouched; UserError for another base.

    `trained`: the base may have been trained since; its shape alone is checked.
    """
    bases = _bases(delta, checkpoint)
    same = _untouched(delta, bases)
    if not same and not trained:
        raise _another_base(delta, checkpoint)
    parts: dict[Part, TargetRows] = {
        part: TargetRows(old, delta.rows(part, old), Known(old, old.shape[0]), delta.size)
        for part, old in bases.items()
    }
    before = read_settings(checkpoint.folder)
    restored = delta.described.get("restored")
    if restored is not None and _sha256(before.config.encode()) == delta.described["config_sha256"]:
        settings = Settings(restored["config"], restored["generation"])
    else:
        tied = "head" not in parts
        settings = moved_settings(before, checkpoint.config, source, target, rows=delta.size, tied=tied)
    return Rewrite(checkpoint, parts, settings, delta.size), same


def way_back(original: Checkpoint, moved: Path, plan: TransferPlan, folder: Path) -> int:
    """Writes into a folder inside a transferred model the delta that undoes the transfer; how many rows it stores."""
    now = open_checkpoint(moved)
    before, after = original.tables, now.tables
    names: list[tuple[Part, str | None, str | None]] = [
        ("input", before.input, after.input),
        ("head", before.head, after.head or after.input),
        ("bias", before.bias, after.bias),
    ]
    parts: dict[Part, TargetRows] = {}
    for part, old, new in names:
        if old is not None and new is not None:
            source, base = original.rows(old), now.rows(new)
            size = source.shape[0]
            sources = np.full(size, -1, np.int32)
            rows = DeltaRows(base, sources, source)  # all of them, as they are
            parts[part] = TargetRows(base, rows, Known(source, size), size)
    single = np.flatnonzero(plan.lengths == 1)
    nearest = dict(zip(plan.pieces[plan.offsets[:-1][single]].tolist(), single.tolist()))
    settings = read_settings(original.folder)
    rewrite = Rewrite(now, parts, settings, next(iter(parts.values())).size)
    return write_delta(rewrite, folder, nearest, settings)


def apply_delta(model: PreTrainedModel, delta: Delta, checkpoint: Checkpoint, target: Tokenizer) -> None:
    """Puts a delta on its base in memory; UserError where the checkpoint that the model was read from is another."""
    if not _untouched(delta, _bases(delta, checkpoint)):
        raise _another_base(delta, checkpoint)
    bias = output_head(model).bias
    live: dict[Part, Tensor] = {"input": input_matrix(model), "head": head_matrix(model)}
    if bias is not None:
        live["bias"] = bias[:, None]
    made = {
        part: delta.rows(part, TensorRows(live[part].detach()))(np.arange(delta.size))
        for part in delta.described["base"]
    }
    set_rows(model, made["input"], made.get("head"), made["bias"][:, 0] if "bias" in made else None)
    write_token_ids(model, target)


def _bases(delta: Delta, checkpoint: Checkpoint) -> dict[Part, FileRows]:
    """The matrix of a checkpoint that each part goes by; UserError where its shape is another."""
    tables, wanted = checkpoint.tables, delta.described
    if checkpoint.config.model_type != wanted["model_type"]:
        kind = checkpoint.config.model_type
        raise UserError(f"{delta.folder}: made for a {wanted['model_type']}, and {checkpoint.folder} is a {kind}")
    names: dict[Part, str | None] = {"input": tables.input, "head": tables.head or tables.input, "bias": tables.bias}
    found: dict[Part, FileRows] = {}
    for part, name in names.items():
        if part in wanted["base"]:
            shape = [*checkpoint.rows(name).shape] if name is not None else None
            if name is None or shape != wanted["base"][part]["shape"]:
                asked = wanted["base"][part]["shape"]
                raise UserError(f"{delta.folder}: made for {part} rows {asked}, and {checkpoint.folder} has {shape}")
            found[part] = checkpoint.rows(name)
    return found


def _untouched(delta: Delta, bases: Mapping[Part, FileRows]) -> bool:
    """Whether the matrices are those that a delta was made against."""

    def digest(rows: FileRows) -> str:
        whole = hashlib.sha256()
        for _, block in _raw_blocks(rows):
            whole.update(block.data)
        return whole.hexdigest()

    return all(digest(old) == delta.described["base"][part]["sha256"] for part, old in bases.items())


def _another_base(delta: Delta, checkpoint: Checkpoint) -> UserError:
    return UserError(
        f"{delta.folder}: the embeddings of {checkpoint.folder} are not those that it was made against; take its base"
    )


def _known(rows: FileRows) -> tuple[str, dict[bytes, int]]:
    """The digest of a matrix, and by the digests of its rows the first row of each."""
    whole = hashlib.sha256()
    known: dict[bytes, int] = {}
    for ids, block in _raw_blocks(rows):
        whole.update(block.data)
        for i, row in zip(ids.tolist(), block, strict=True):
            known.setdefault(hashlib.blake2b(row, digest_size=KNOWN_BY).digest(), i)
    return whole.hexdigest(), known


def _raw_blocks(rows: FileRows) -> Iterator[tuple[Int64[ndarray, "N"], UInt8[ndarray, "N S"]]]:
    step = block_rows(rows.shape[1])
    for begin in range(0, rows.shape[0], step):
        ids = np.arange(begin, min(begin + step, rows.shape[0]))
        yield ids, _raw(rows.raw(ids))


def _raw(block: Shaped[Tensor, "N D"]) -> UInt8[ndarray, "N S"]:
    flat = block.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(len(block), block.shape[1] * block.element_size())


def _spooled(
    rows: TargetRows, known: Mapping[bytes, int], nearest: Mapping[int, int], spool: IO[bytes]
) -> Iterator[Int32[ndarray, "N"]]:
    """Which base rows the rows are, block by block; those that are none are appended to the spool."""
    begin = 0
    for block in rows.blocks():
        raw = _raw(block)
        sources = np.full(len(raw), -1, np.int32)
        for place, row in enumerate(raw):
            sources[place] = known.get(hashlib.blake2b(row, digest_size=KNOWN_BY).digest(), -1)
        wanted = np.array([nearest.get(begin + place, -1) for place in range(len(raw))], np.int64)
        named = np.flatnonzero((wanted >= 0) & (wanted < rows.old.shape[0]))
        equal = (_raw(rows.old.raw(wanted[named])) == raw[named]).all(1)
        sources[named[equal]] = wanted[named[equal]]
        spool.write(raw[sources < 0].tobytes())
        begin += len(raw)
        yield sources


def _spool_tensor(spool: int, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> NewTensor:
    """A tensor whose bytes lie in the spool."""

    def blocks() -> Iterator[Tensor]:
        left, place = int(np.prod(shape)) * dtype.itemsize, begin
        while left:
            data = os.pread(spool, min(left, 1 << 24), place)
            yield torch.frombuffer(bytearray(data), dtype=torch.uint8)
            left, place = left - len(data), place + len(data)

    return NewTensor(dtype, shape, blocks)


def _tensor(values: Tensor) -> NewTensor:
    return NewTensor(values.dtype, tuple(values.shape), lambda: [values])


def _as_stored(rows: Rows, ids: Int64[ndarray, "N"]) -> Float[Tensor, "N D"]:
    return rows.raw(ids) if isinstance(rows, FileRows) else rows.gather(ids).to(rows.dtype)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
