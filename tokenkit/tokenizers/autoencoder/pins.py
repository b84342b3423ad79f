"""The table of pinned byte strings: exact, the same on every machine, enough with the bytes to encode anything."""

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenkit.config import UserError

TOKEN_COST = 1024  # of one id; what likelihood adds stays below it over a whole chunk
PER_BIT = 2  # cost of one bit of likelihood
DEAREST = TOKEN_COST // 16 - 1  # a chunk of 16 single bytes still costs 16 ids and no more
MAGIC = b"TKPINS1\n"
MOST_PINS, LONGEST_PIN, MOST_DIGITS = 1 << 24, 64, 1 << 10


@dataclass(frozen=True)
class PinTable:
    """Strings of two bytes or more, most frequent first, and how often every one and every byte was used."""

    pieces: tuple[bytes, ...]
    counts: tuple[int, ...]
    byte_counts: tuple[int, ...] = (0,) * 256
    digits: tuple[bytes, ...] = ()
    """The code of every piece, a byte per digit; () where no auto-encoder has placed them."""

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.pieces) or len(self.byte_counts) != 256:
            raise ValueError("a count for every piece and every byte")

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def costs(self) -> dict[bytes, int]:
        """What every piece and every byte costs in a segmentation: fewest ids first, then the likeliest ones."""
        total = sum(self.counts) + sum(self.byte_counts) + 1
        found = {piece: _cost(count, total) for piece, count in zip(self.pieces, self.counts)}
        return found | {bytes([b]): _cost(count, total) for b, count in enumerate(self.byte_counts)}

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest piece."""
        return max(map(len, self.pieces), default=1)

    def save(self, path: Path) -> None:
        """Writes the table as length-prefixed strings, whole or not at all."""
        width = len(self.digits[0]) if self.digits else 0
        parts = [MAGIC, struct.pack("<IH", len(self.pieces), width), struct.pack("<256Q", *self.byte_counts)]
        for number, (piece, count) in enumerate(zip(self.pieces, self.counts)):
            parts.append(struct.pack("<BQ", len(piece), count) + piece)
            parts.append(self.digits[number] if width else b"")
        content = b"".join(parts)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content + hashlib.sha256(content).digest())
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "PinTable":
        """The table that `save` wrote; UserError for anything else, a damaged file included."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: no table of pins ({error.strerror})") from None
        body, seal = data[:-32], data[-32:]
        if not body.startswith(MAGIC) or hashlib.sha256(body).digest() != seal:
            raise UserError(f"{path}: not a whole table of pins; save the tokenizer again")
        try:
            return _parse(body)
        except (struct.error, ValueError, IndexError):
            raise UserError(f"{path}: a table of pins that contradicts itself; save the tokenizer again") from None


def _cost(count: int, total: int) -> int:
    return TOKEN_COST + min(DEAREST, round(PER_BIT * -math.log2((count + 0.5) / total)))


def _parse(body: bytes) -> PinTable:
    number, width = struct.unpack_from("<IH", body, len(MAGIC))
    if number > MOST_PINS or width > MOST_DIGITS:
        raise ValueError("larger than any table")
    place = len(MAGIC) + 6
    byte_counts = struct.unpack_from("<256Q", body, place)
    place += 256 * 8
    pieces, counts, digits = [], [], []
    for _ in range(number):
        length, count = struct.unpack_from("<BQ", body, place)
        place += 9
        if not 2 <= length <= LONGEST_PIN or place + length + width > len(body):
            raise ValueError("a piece outside the file")
        pieces.append(body[place : place + length])
        digits.append(body[place + length : place + length + width])
        counts.append(count)
        place += length + width
    if place != len(body) or len(set(pieces)) != number:
        raise ValueError("trailing bytes, or a piece twice")
    return PinTable(tuple(pieces), tuple(counts), byte_counts, tuple(digits) if width else ())


def spelling_length(chunk: bytes, costs: Mapping[bytes, int], longest: int, without: bytes | None = None) -> int:
    """Fewest pieces that spell a chunk, of a table that may lack one piece."""
    size = len(chunk)
    best = [0, *range(1, size + 1)]
    for end in range(1, size + 1):
        for start in range(max(0, end - longest), end):
            if best[start] + 1 < best[end]:
                piece = chunk[start:end]
                if piece in costs and piece != without:
                    best[end] = best[start] + 1
    return best[-1]
