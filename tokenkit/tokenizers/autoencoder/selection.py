"""Which byte strings to pin: those that save the most ids on counted chunks, not those that occur the most."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import tokenizers
from jaxtyping import Int64
from numpy import ndarray
from tokenizers import models

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.pins import PinTable, spelling_length
from tokenkit.tokenizers.autoencoder.table import written
from tokenkit.tokenizers.pieces import byte_alphabet

LEAST_COUNT = 3  # of a chunk that may be pinned whole
LONGEST_PART = 10  # bytes of a candidate inside a chunk
SHRINK = 0.65  # share of the candidates that survives a round
PER_PIN = 6  # candidates in the first round for every pin in the last


def select_pins(chunk_counts: Mapping[bytes, int], size: int, *, keep: Mapping[bytes, int] | None = None) -> PinTable:
    """At most `size` pieces for chunks of at most 16 bytes, most used first; `keep` are pinned in any case.

    Rounds of: spell every chunk with the fewest ids, and let go of the pieces whose uses, times the ids that their best
    other spelling takes beyond one, are the least. Equal counts give equal pins.
    """
    if size < 0:
        raise UserError(f"pins: {size} of them; write 0 or more")
    chunks = sorted(chunk_counts.items(), key=lambda item: (-item[1], item[0]))
    forced = {p: c for p, c in (keep or {}).items() if len(p) > 1}
    if len(forced) > size:
        raise UserError(f"pins: {len(forced)} are to be kept, and {size} is the most; write more")
    pieces = [*forced, *(p for p in _candidates(chunks, PER_PIN * size) if p not in forced)]
    while True:
        uses = _uses(pieces, chunks)
        if len(pieces) <= size:
            break
        costs = dict.fromkeys(pieces, 1)
        longest = max(map(len, pieces))
        gains = {
            piece: int(count) * (spelling_length(piece, costs, longest, without=piece) - 1)
            for piece, count in zip(pieces, uses)
            if piece not in forced
        }
        ranked = sorted(gains, key=lambda piece: (-gains[piece], piece))
        target = max(size, int(len(pieces) * SHRINK))
        pieces = [*forced, *(p for p in ranked[: target - len(forced)] if gains[p] > 0)]
    used = sorted(zip(pieces, uses.tolist()), key=lambda item: (-item[1], item[0]))
    kept = [(piece, count) for piece, count in used if count or piece in forced]
    return PinTable(tuple(p for p, _ in kept), tuple(c for _, c in kept), _byte_uses(kept, chunks))


def _candidates(chunks: list[tuple[bytes, int]], number: int) -> list[bytes]:
    """Frequent chunks and parts of chunks."""
    whole = {chunk: count for chunk, count in chunks if count >= LEAST_COUNT and len(chunk) > 1}
    parts: Counter[bytes] = Counter()
    for chunk, count in chunks:
        for start in range(len(chunk)):
            for end in range(start + 2, min(start + LONGEST_PART, len(chunk)) + 1):
                parts[chunk[start:end]] += count
    weight = {p: count * (len(p) - 1) for p, count in parts.items() if count >= LEAST_COUNT}
    weight |= {chunk: max(weight.get(chunk, 0), count * (len(chunk) - 1)) for chunk, count in whole.items()}
    return sorted(weight, key=lambda piece: (-weight[piece], piece))[:number]


def _uses(pieces: list[bytes], chunks: list[tuple[bytes, int]]) -> Int64[ndarray, "P"]:
    """How often every piece stands in the shortest spellings of the chunks."""
    return _count(pieces, chunks)[256:]


def _byte_uses(kept: list[tuple[bytes, int]], chunks: list[tuple[bytes, int]]) -> tuple[int, ...]:
    return tuple(_count([piece for piece, _ in kept], chunks)[:256].tolist())


def _count(pieces: list[bytes], chunks: list[tuple[bytes, int]]) -> Int64[ndarray, "N"]:
    """Uses of the 256 bytes and of the pieces, by the library's own search for the best spelling."""
    vocabulary = [(character, -1.0) for character in byte_alphabet()] + [(written(piece), -1.0) for piece in pieces]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary))
    found = backend.encode_batch_fast([written(chunk) for chunk, _ in chunks])
    ids = [one.ids for one in found]
    weights = np.repeat(np.array([count for _, count in chunks], np.int64), [len(one) for one in ids])
    flat = np.fromiter((index for one in ids for index in one), np.int64, len(weights))
    return np.bincount(flat, weights, minlength=len(vocabulary)).astype(np.int64)
