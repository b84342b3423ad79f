"""Byte spans of tokens from the character offsets of the tokenizer library, where tokens do not spell the text."""

import unicodedata
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64, UInt32
from numpy import ndarray

Normalise = Callable[[str], str]


class Uncovered(Exception):
    """A character that belongs to no token: its place in the text."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def code_points(text: str) -> UInt32[ndarray, "C"]:
    """The code point of every character."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def byte_positions(codes: UInt32[ndarray, "C"]) -> Int64[ndarray, "C1"]:
    """Byte position of every character in UTF-8, and of the end."""
    positions = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(1 + (codes >= 0x80).astype(np.int8) + (codes >= 0x800) + (codes >= 0x10000), out=positions[1:])
    return positions


class Texts:
    """Several texts joined: their characters, where each begins, and the byte position of every character."""

    def __init__(self, texts: list[str]) -> None:
        self.codes = code_points("".join(texts))
        self.begins = np.cumsum([0, *map(len, texts)])
        self.positions = byte_positions(self.codes)

    def between(self, begin: int, end: int) -> str:
        """The characters from one place to another."""
        return self.codes[begin:end].tobytes().decode("utf-32-le")


def common_bytes(a: bytes, b: bytes) -> int:
    """How many bytes from the beginning are equal."""
    shorter = min(len(a), len(b))
    unequal = np.flatnonzero(np.frombuffer(a[:shorter], np.uint8) != np.frombuffer(b[:shorter], np.uint8))
    return int(unequal[0]) if len(unequal) else shorter


def tiled_ends(
    offsets: Int64[ndarray, "T 2"],
    lengths: Int64[ndarray, "T"],
    spaced: Bool[ndarray, "T"],
    texts: Texts,
    normalise: Normalise,
) -> Int64[ndarray, "T"]:
    """Byte ends of tokens that tile their texts, given their half-open character offsets in all texts joined.

    White space of no token joins the token that follows, at the end of a text its last one; marks of no token
    (composed into the letter before, or stripped from it) join the token before. Any other character of no token
    raises Uncovered. Tokens whose characters overlap (pieces of one character, or of a character that was normalised)
    share these bytes in proportion to what they spell, `lengths`; where they spell the bytes, the shares are exact.
    A space that a token spells (`spaced`) and the text does not have stands for no byte.
    """
    reach = np.maximum.accumulate(offsets[:, 1])
    opens = np.append(True, offsets[1:, 0] >= reach[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(offsets)) - 1
    starts, stops = offsets[first, 0], reach[last]
    high = texts.positions[_with_marks(starts, stops, texts, normalise)]
    if len(first) == len(offsets):
        return high
    group = np.cumsum(opens) - 1
    extent = high - texts.positions[starts]
    spelled = np.add.reduceat(lengths, first)
    dummy = spaced[first] & ((texts.codes[np.minimum(starts, len(texts.codes) - 1)] != 0x20) | (spelled == extent + 1))
    lengths = lengths.copy()
    lengths[first] -= dummy
    done = np.cumsum(lengths)
    done -= (done - lengths)[first][group]
    whole = np.maximum(spelled - dummy, 1)
    ends = texts.positions[starts][group] + done * extent[group] // whole[group]
    ends[last] = high
    return ends


def _with_marks(
    starts: Int64[ndarray, "G"], stops: Int64[ndarray, "G"], texts: Texts, normalise: Normalise
) -> Int64[ndarray, "G"]:
    """Where the tokens end that begin and end at these characters, with the marks that follow them."""
    behind = np.append(0, stops)
    width = np.append(starts, len(texts.codes)) - behind
    gaps = np.flatnonzero(width)
    width, behind = width[gaps], behind[gaps]
    past = np.cumsum(width)
    bare = np.repeat(behind - past + width, width) + np.arange(past[-1] if len(past) else 0)
    odd = bare[texts.codes[bare] != 0x20]
    if not len(odd):
        return stops
    unique, where = np.unique(texts.codes[odd], return_inverse=True)
    kinds = np.array([_kind(chr(code), normalise) for code in unique.tolist()], np.int8)[where]
    for index in np.flatnonzero(kinds == OTHER).tolist():
        place = int(odd[index])
        begin = int(behind[np.searchsorted(behind, place, "right") - 1])
        before, character = texts.between(begin - 1, place), texts.between(place, place + 1)
        if begin in texts.begins or not _composed(before, character, normalise):
            raise Uncovered(place)
        kinds[index] = MARK
    joined = np.zeros(len(texts.codes) + 1, np.bool_)
    joined[odd[kinds == MARK]] = True
    free = np.flatnonzero(~joined)
    return free[np.searchsorted(free, stops)]


SPACE, MARK, OTHER = range(3)


def _kind(character: str, normalise: Normalise) -> int:
    """What a character of no token is; a space is also what the normalizer makes one (U+200B, for some)."""
    if character.isspace() and not "\x1c" <= character <= "\x1f":
        return SPACE
    if unicodedata.category(character).startswith("M"):
        return MARK
    return SPACE if normalise(character).isspace() else OTHER


def _composed(before: str, character: str, normalise: Normalise) -> bool:
    """Whether the normalizer makes one letter of both, as it does of Hangul."""
    alone, both = normalise(before), normalise(before + character)
    return both not in (alone, alone + normalise(character))
