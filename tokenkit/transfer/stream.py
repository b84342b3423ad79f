"""A checkpoint given other rows per id, from folder to folder: a block of rows is in memory at a time.

Everything that has no row per id is copied byte for byte, by the file where a file holds nothing else, so that memory
does not depend on the size of the model, and the number format of a body is whatever it was.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.models.moved_settings import Settings, moved_settings, read_settings
from tokenkit.models.tensor_files import Change, Entry, NewTensor, copy_file, read_bytes, read_header, write_tensors
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.apply import FVT, TransferReport, check_sides, check_target, padded_size
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.initialize import Choice, RowMaker, origins, row_blocks
from tokenkit.transfer.mixture import pieces_mixture
from tokenkit.transfer.plan import Override, Side, TransferPlan, plan_transfer
from tokenkit.transfer.rows import Known, Rows
from tokenkit.transfer.shards import INDEX, Checkpoint, FileRows, open_checkpoint, read_index

Part = Literal["input", "head", "bias"]
Body = Literal["copy", "hardlink"]
KEPT = ("LICENSE*", "NOTICE*", "USE_POLICY*", "*.py")  # files that go along; others are the tokenizer's or a card
SAMPLED, SAMPLED_BYTES = 8, 1 << 20  # tensors of the body that are compared after writing, and bytes at either end


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The rows that a matrix, or a bias, is to have; the type is that of the old one."""

    old: FileRows
    maker: RowMaker
    known: Known
    size: int
    written: list[tuple[int, int]] = field(default_factory=list)
    """The ranges of ids that blocks were made of, as they were made."""

    def blocks(self) -> Iterator[Shaped[Tensor, "N D"]]:
        """All rows in blocks."""
        begin = 0
        self.written.clear()
        for block in row_blocks(self.maker, self.known, self.size):
            self.written.append((begin, begin + len(block)))
            begin += len(block)
            yield block.to(self.old.dtype)

    def tensor(self) -> NewTensor:
        """What is written."""
        shape = (self.size, *self.old.entry.shape[1:])
        return NewTensor(self.old.dtype, shape, self.blocks)

    def check(self, found: FileRows) -> None:
        """Makes the first, the middle and the last block again; UserError where a file holds other bytes."""
        made = [(begin, end) for begin, end in self.written if end <= len(self.maker)]
        for begin, end in {made[0], made[len(made) // 2], made[-1]} if made else ():
            ids = np.arange(begin, end)
            again, stored = self.maker(ids).to(self.old.dtype), found.raw(ids)
            if not torch.equal(again.reshape(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8)):
                raise UserError(
                    f"{found.entry.path}: rows {begin} to {end - 1} of {found.entry.name} are not what was written; "
                    "see to the disk"
                )


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A checkpoint, and what is to be in the place of its rows per id."""

    checkpoint: Checkpoint
    parts: Mapping[Part, TargetRows]
    """Without "head": the input matrix serves as output matrix too."""
    settings: Settings
    size: int

    def names(self) -> dict[Part, str]:
        """What the parts are called in the files that are written."""
        tables = self.checkpoint.tables
        swapped = tables.tied and tables.input == tables.head_name and "head" in self.parts
        found: dict[Part, str | None] = {
            "input": tables.input_name if swapped else tables.input,
            "head": tables.head or tables.head_name,
            "bias": tables.bias,
        }
        return {part: name for part, name in found.items() if part in self.parts and name is not None}

    def write(self, folder: Path, *, body: Body = "copy") -> None:
        """Weights, index, settings and licences into a folder that there is."""
        change, files = self._change(), []
        for path, header in self.checkpoint.files.items():
            new = folder / path.name
            if not change.touches(header.entries):
                _copy_body(path, new, body)
            elif not _write_changed(new, header.entries, header.metadata, change):
                continue
            files.append(new)
        _write_index(self.checkpoint, files, folder)
        self.settings.write(folder)
        for pattern in KEPT:
            for path in sorted(self.checkpoint.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)

    def verify(self, folder: Path) -> None:
        """UserError where the folder, opened anew, does not hold these rows, or another body."""
        found, names = open_checkpoint(folder), self.names()
        tables, old = self.checkpoint.tables, self.checkpoint.entries
        gone = {tables.input, tables.head, tables.bias, *tables.twins}
        rest = {name: entry for name, entry in old.items() if name not in gone}
        if found.entries.keys() != {*rest, *names.values()} or found.tables.tied != ("head" not in self.parts):
            odd = sorted(found.entries.keys() ^ {*rest, *names.values()}) or [found.tables.head_name]
            raise UserError(f"{folder}: {odd[0]} is not as it was to be written; see to the disk")
        for part, rows in self.parts.items():
            rows.check(found.rows(names[part]))
        sampled = list(rest)[:: max(1, len(rest) // SAMPLED)] + list(rest)[-1:]
        for name in sampled:
            _compare_ends(rest[name], found.entries[name])

    def _change(self) -> Change:
        tables, names = self.checkpoint.tables, self.names()
        old = {"input": tables.input, "head": tables.head, "bias": tables.bias}
        tensors = {part: rows.tensor() for part, rows in self.parts.items()}
        replaced: dict[str, NewTensor] = {}
        added: dict[str, tuple[str, NewTensor]] = {}
        for part, tensor in tensors.items():
            name = old[part]
            if name is not None and names[part] == name:
                replaced[name] = tensor
        if "head" in tensors and tables.tied:
            if names["input"] == tables.input:
                added[tables.input] = (names["head"], tensors["head"])
            else:  # the one matrix there was bears the head's name
                replaced[tables.input] = tensors["head"]
                added[tables.input] = (names["input"], tensors["input"])
        lost = {tables.head} if tables.head is not None and "head" not in tensors else set()
        return Change(replaced, frozenset({*tables.twins, *lost}), added)


def stream_transfer(
    checkpoint: Checkpoint,
    source: Tokenizer,
    target: Tokenizer,
    choice: Choice = FVT,
    *,
    evidence: Evidence | None = None,
    override: Override = MappingProxyType({}),
    kept: Mapping[int, int] | None = None,
    pad_to_multiple_of: int = 1,
    untie: bool = False,
) -> tuple[Rewrite, TransferPlan, TransferReport]:
    """What a checkpoint becomes with the rows of another tokenizer; nothing is written yet, nor any row made.

    The rows are those that `transfer_model` makes of the same model in memory, bit for bit.
    """
    check_target(target, pad_to_multiple_of)
    tables = checkpoint.tables
    check_sides(choice, tied=tables.tied and not untie)
    head = tables.head or tables.input
    embedding, output = checkpoint.rows(tables.input), checkpoint.rows(head)
    source_rows = min(embedding.shape[0], output.shape[0])
    plan = plan_transfer(source, target, source_rows=source_rows, override=override, kept=kept)
    size = padded_size(target.vocab_size, pad_to_multiple_of)
    matrices: dict[Side, Rows] = {"input": embedding}
    if not tables.tied:
        matrices["head"] = output
    known = replace(evidence or Evidence(source, target), matrices=matrices)

    def rows(old: FileRows, maker: RowMaker) -> TargetRows:
        return TargetRows(old, maker, Known(old, min(plan.source_vocab, old.shape[0])), size)

    sides: list[tuple[Side, FileRows]] = [("input", embedding)]
    if not tables.tied or untie:
        sides.append(("head", output))
    parts: dict[Part, TargetRows] = {side: rows(old, choice.maker(side, old, plan, known)) for side, old in sides}
    report: dict[str, dict[str, int]] = {side: origins(parts[side].maker) for side, _ in sides}
    if tables.bias is not None:
        bias = checkpoint.rows(tables.bias)
        parts["bias"] = rows(bias, pieces_mixture(bias, plan, "head", seed=choice.seed))
    tied = "head" not in parts
    before = read_settings(checkpoint.folder)
    settings = moved_settings(before, checkpoint.config, source, target, rows=size, tied=tied)
    names = choice.initializer, None if tied else choice.of("head")
    described = TransferReport(
        *names, source.name, target.name, embedding.shape[0], size, tied, plan.describe(), report
    )
    return Rewrite(checkpoint, parts, settings, size), plan, described


def _copy_body(old: Path, new: Path, body: Body) -> None:
    if body == "copy":
        copy_file(old, new)
        return
    try:
        os.link(old.resolve(), new)
    except OSError as error:
        raise UserError(f"body: {old} cannot be linked to ({error.strerror}); write body=copy") from None


def _write_changed(new: Path, entries: list[Entry], metadata: Mapping[str, str], change: Change) -> bool:
    """Writes a file with its changes; whether there is anything left to write."""
    parts: list[tuple[str, Entry | NewTensor]] = []
    for entry in entries:
        if entry.name not in change.dropped:
            parts.append((entry.name, change.replaced.get(entry.name, entry)))
        if entry.name in change.added:
            parts.append(change.added[entry.name])
    if parts:
        write_tensors(new, parts, metadata)
    return bool(parts)


def _write_index(checkpoint: Checkpoint, files: list[Path], folder: Path) -> None:
    index = checkpoint.folder / INDEX
    if not index.is_file():
        return
    described = read_index(index)
    entries = [entry for path in files for entry in read_header(path).entries]
    metadata = dict(described.get("metadata") or {})
    metadata["total_size"] = sum(entry.num_bytes for entry in entries)
    if "total_parameters" in metadata:
        before = sum(entry.num_bytes // entry.itemsize for entry in checkpoint.entries.values())
        metadata["total_parameters"] += sum(entry.num_bytes // entry.itemsize for entry in entries) - before
    where = {entry.name: entry.path.name for entry in entries}
    order = [name for name in described["weight_map"] if name in where]
    described |= {"metadata": metadata, "weight_map": {name: where[name] for name in dict.fromkeys([*order, *where])}}
    (folder / INDEX).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def _compare_ends(old: Entry, new: Entry) -> None:
    count = min(SAMPLED_BYTES, old.num_bytes)
    same = (old.dtype, old.shape) == (new.dtype, new.shape)
    for offset in {0, old.num_bytes - count} if same else ():
        parts = [bytearray(count) for _ in range(2)]
        for entry, part in zip((old, new), parts, strict=True):
            read_bytes(entry, memoryview(part), offset)
        same = same and parts[0] == parts[1]
    if not same:
        raise UserError(f"{new.path}: {new.name} is not what {old.path} holds; see to the disk")
