"""Safetensors files by their headers: where each tensor lies, and copies of files in which some tensors are new.

No tensor is ever in memory as a whole: bytes are copied from file to file by the system, new ones come in blocks.
"""

import errno
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenkit.config import UserError

DTYPES = {  # of a header, and of torch
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; what the format allows
COPY_BYTES = 64 << 20  # asked of the system at once
NOT_BETWEEN = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # these files the system cannot join


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: where its bytes lie."""

    name: str
    path: Path
    dtype: str
    """As the header names it."""
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin

    @property
    def itemsize(self) -> int:
        """Bytes per element; 1 for a type that torch has no name for."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1

    @property
    def torch_name(self) -> str:
        """The type as torch names it, where it has a name for it."""
        return str(DTYPES[self.dtype]).removeprefix("torch.") if self.dtype in DTYPES else self.dtype


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    entries: list[Entry]
    """In the order of their bytes."""
    metadata: dict[str, str]


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor that is written where an old one lay, or behind one: its bytes come in blocks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Change:
    """What becomes of the tensors of a checkpoint; those that are not named stay as they are."""

    replaced: Mapping[str, NewTensor]
    dropped: frozenset[str]
    added: Mapping[str, tuple[str, NewTensor]]
    """By the name of the tensor behind which it stands: the name of the new one, and what it holds."""

    def touches(self, entries: Iterable[Entry]) -> bool:
        """Whether a file of these tensors has to be written anew."""
        named = {*self.replaced, *self.dropped, *self.added}
        return any(entry.name in named for entry in entries)


def read_header(path: Path) -> Header:
    """The tensors of a safetensors file; UserError where it is damaged, cut or cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        found = [_entry(name, path, one, 8 + length) for name, one in header.items()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fetch it again") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file ({_first(error)}); fetch it again") from None
    found.sort(key=lambda entry: (entry.begin, entry.end))
    end = found[-1].end if found else size
    if end != size:
        raise UserError(f"{path}: not a safetensors file ({size:,} bytes, its header says {end:,}); fetch it again")
    return Header(found, metadata)


def _entry(name: str, path: Path, described: dict[str, Any], start: int) -> Entry:
    begin, end = described["data_offsets"]
    entry = Entry(name, path, described["dtype"], tuple(described["shape"]), start + begin, start + end)
    if not 0 <= begin <= end or (entry.dtype in DTYPES and math.prod(entry.shape) * entry.itemsize != end - begin):
        raise ValueError(f"{name} has other bytes than its shape says")
    return entry


def read_bytes(entry: Entry, into: memoryview, offset: int = 0) -> None:
    """Fills a buffer with bytes of a tensor, from an offset in it on; UserError where they cannot be read."""
    try:
        with open(entry.path, "rb", buffering=0) as file:
            fill(file.fileno(), into, entry.begin + offset, entry)
    except OSError as error:
        raise UserError(f"{entry.path}: cannot be read ({error.strerror}); fetch it again") from None


def fill(descriptor: int, into: memoryview, offset: int, entry: Entry) -> None:
    """The same of an open file, and an offset in that."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise UserError(f"{entry.path}: ends inside {entry.name}; fetch it again")
        done += count


def write_tensors(path: Path, parts: Iterable[tuple[str, Entry | NewTensor]], metadata: Mapping[str, str]) -> None:
    """A safetensors file of these tensors in this order: old ones are copied byte for byte, holes stay holes."""
    parts = list(parts)
    raw = _header_bytes(parts, metadata)
    total = len(raw) + sum(part.num_bytes for _, part in parts)
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        place = len(raw)
        for _, part in parts:
            if isinstance(part, NewTensor):
                _write_blocks(file.fileno(), place, part)
            else:
                with part.path.open("rb") as old:
                    copy_range(old.fileno(), file.fileno(), part.begin, place, part.num_bytes)
            place += part.num_bytes
        os.ftruncate(file.fileno(), total)


def _header_bytes(parts: list[tuple[str, Entry | NewTensor]], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, part in parts:
        begin, end = end, end + part.num_bytes
        dtype = NAMES[part.dtype] if isinstance(part, NewTensor) else part.dtype
        described[name] = {"dtype": dtype, "shape": [*part.shape], "data_offsets": [begin, end]}
    raw = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # readers map the numbers behind it into memory
    return struct.pack("<Q", len(raw)) + raw


def _write_blocks(descriptor: int, place: int, part: NewTensor) -> None:
    end = place + part.num_bytes
    for block in part.blocks():
        data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while len(data):
            count = os.pwrite(descriptor, data, place)
            place, data = place + count, data[count:]
    assert place == end, f"{end - place} bytes are lacking"


def copy_file(old: Path, new: Path) -> None:
    """A copy of a file in the system's own way: shared blocks where the file system can, holes stay holes."""
    with old.open("rb") as source, new.open("wb") as target:
        size = os.fstat(source.fileno()).st_size
        copy_range(source.fileno(), target.fileno(), 0, 0, size)
        os.ftruncate(target.fileno(), size)


def copy_range(old: int, new: int, begin: int, place: int, length: int) -> None:
    """Copies bytes between open files; holes of the old one are left out, as the new one must be empty there."""
    for data, end in _data(old, begin, begin + length):
        while data < end:
            data += _copy_some(old, new, data, place + data - begin, min(end - data, COPY_BYTES))


def _data(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are no holes."""
    while begin < end:
        try:
            data = os.lseek(descriptor, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole up to the end
                raise
            return
        if data >= end:
            return
        hole = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        yield data, hole
        begin = hole


def _copy_some(old: int, new: int, offset: int, place: int, count: int) -> int:
    """Copies some of the bytes; how many."""
    if sys.platform == "linux":
        try:
            return _some(os.copy_file_range(old, new, count, offset, place))
        except OSError as error:
            if error.errno not in NOT_BETWEEN:
                raise
    return _some(os.pwrite(new, os.pread(old, min(count, 1 << 20), offset), place))


def _some(count: int) -> int:
    if count == 0:
        raise UserError("a file became shorter while it was copied; wait until nobody writes to the checkpoint")
    return count


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
