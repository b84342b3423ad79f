"""Token ends in bytes, from what the tokens spell or from the character offsets of the tokenizer library."""

import numpy as np
from jaxtyping import Int, Int64
from numpy import ndarray


def byte_positions(text: str) -> Int64[ndarray, "C1"]:
    """Byte position of every character of the text in UTF-8, and of its end."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])


def common_bytes(a: bytes, b: bytes) -> int:
    """How many bytes from the beginning are equal."""
    shorter = min(len(a), len(b))
    unequal = np.flatnonzero(np.frombuffer(a[:shorter], np.uint8) != np.frombuffer(b[:shorter], np.uint8))
    return int(unequal[0]) if len(unequal) else shorter


def uncovered_character(offsets: Int[ndarray, "T 2"], num_characters: int) -> int | None:
    """The first character that no token covers, if any."""
    reach = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else np.zeros(0, np.int64)
    before = np.concatenate([np.zeros(1, reach.dtype), reach])  # how far the tokens before token t reach
    starts = np.concatenate([offsets[:, 0], [num_characters]])
    gaps = np.flatnonzero(starts > before)
    return int(before[gaps[0]]) if len(gaps) else None


def ends_from_offsets(
    offsets: Int[ndarray, "T 2"], lengths: Int64[ndarray, "T"], positions: Int64[ndarray, "C1"]
) -> Int64[ndarray, "T"]:
    """Byte ends of tokens, given their half-open character offsets and how many bytes each of them spells.

    Tokens whose characters overlap (pieces of one character, or of a character that was normalised) share the bytes of
    these characters in proportion to what they spell; where they spell them exactly, the shares are exact. Characters
    of no token (a mark that was composed into the letter before) belong to the tokens before them.
    """
    reach = np.maximum.accumulate(offsets[:, 1])
    opens = np.append(True, offsets[1:, 0] >= reach[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(offsets)) - 1
    group = np.cumsum(opens) - 1
    low = positions[offsets[first, 0]]
    low[0] = 0
    high = np.append(low[1:], positions[-1])
    spelled = np.cumsum(lengths)
    before = (spelled - lengths)[first]
    total = np.maximum(spelled[last] - before, 1)
    ends = low[group] + (spelled - before[group]) * (high - low)[group] // total[group]
    ends[last] = high
    return ends
