"""GGUF vocabularies: the metadata of a llama.cpp model file, read with every count checked against the bytes left.

The reader of the `gguf` package parses every tensor and trusts the counts in the header, so that a file of a hundred
bytes can keep it busy for hours; a tokenizer needs a few keys of the metadata, and nothing else is read.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import MAX_FILE_BYTES, MAX_TOKENS

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_KEYS = 1 << 16
Buffer = mmap.mmap | bytes


class _Reader:
    """A place in the file; every read checks that the bytes are there."""

    def __init__(self, buffer: Buffer, name: str) -> None:
        self.buffer, self.place, self.name = buffer, 0, name

    def fail(self, problem: str) -> UserError:
        return UserError(f"{self.name}: not a whole GGUF file ({problem} at byte {self.place}); fetch the file again")

    def need(self, length: int, what: str) -> int:
        """Where the next `length` bytes begin; steps over them."""
        left = len(self.buffer) - self.place
        if length > left:
            raise self.fail(f"{what} claims {length:,} bytes, {left:,} are left")
        self.place += length
        return self.place - length

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.buffer, self.need(struct.calcsize(f"<{code}"), "a number"))[0]

    def raw_string(self) -> bytes:
        length = self.scalar("Q")
        start = self.need(length, "a string")
        return self.buffer[start : start + length]

    def string(self) -> str:
        raw = self.raw_string()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{raw[:20]!r} is not UTF-8") from None

    def skip_strings(self, count: int) -> None:
        for _ in range(count):
            self.need(self.scalar("Q"), "a string")

    def value(self, kind: int, keep: bool) -> Any:
        """The value of a key; None where it is not to be kept."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            if keep:
                return self.string()
            return self.skip_strings(1)
        if kind == ARRAY:
            return self.array(keep)
        raise self.fail(f"a value of type {kind}")

    def array(self, keep: bool) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == STRING:
            self.expect(count, 8)
            if not keep:
                return self.skip_strings(count)
            self.limit(count)
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise self.fail(f"an array of type {kind}")
        width = struct.calcsize(f"<{SCALARS[kind]}")
        self.expect(count, width)
        start = self.need(count * width, "an array")
        if not keep:
            return None
        if width == 1:  # a precompiled charsmap
            self.limit(count, MAX_FILE_BYTES)
            return self.buffer[start : start + count]
        self.limit(count)
        return list(struct.unpack_from(f"<{count}{SCALARS[kind]}", self.buffer, start))

    def expect(self, count: int, width: int) -> None:
        left = len(self.buffer) - self.place
        if count * width > left:
            raise self.fail(f"an array claims {count:,} entries, {left:,} bytes are left")

    def limit(self, count: int, most: int = MAX_TOKENS) -> None:
        if count > most:
            raise self.fail(f"an array of {count:,} entries, where a vocabulary has at most {most:,}")


def read_metadata(path: Path, name: str) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file: numbers, strings and lists; an array of bytes stays bytes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        return _metadata(_Reader(buffer, name))


def _metadata(reader: _Reader) -> dict[str, Any]:
    reader.need(len(MAGIC), "the magic")
    version, _, count = reader.scalar("I"), reader.scalar("Q"), reader.scalar("Q")
    if version not in (2, 3):
        what = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF of version {version}"
        raise UserError(f"{reader.name}: {what}, not read here; convert it to little-endian version 3")
    if count > MAX_KEYS:
        raise reader.fail(f"the header claims {count:,} keys")
    found: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string()
        keep = key.startswith("tokenizer.")
        value = reader.value(reader.scalar("I"), keep)
        if keep:
            found[key] = value
    return found
