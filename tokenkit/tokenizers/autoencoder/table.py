"""The cheapest spelling of a piece of text in pins and bytes."""

import functools
from collections.abc import Mapping
from typing import Any

from tokenizers import models

from tokenkit.tokenizers.autoencoder.pins import TOKEN_COST, PinTable
from tokenkit.tokenizers.pieces import byte_alphabet

WRITTEN = str.maketrans({chr(byte): character for byte, character in enumerate(byte_alphabet())})
FAR = 1 << 60
NOTHING = (FAR, -1)
Spelling = tuple[int, ...]
Edges = Mapping[tuple[int, int], tuple[int, Spelling]]  # (start, end) → cost and ids of another spelling


def written(data: bytes) -> str:
    """Bytes in the printable alphabet of byte-level vocabularies."""
    return data.decode("latin-1").translate(WRITTEN)


def scored_pieces(pins: PinTable) -> list[tuple[str, float]]:
    """The bytes and the pins with their scores: multiples of 2^-10, whose sums are exact.

    So every reader of these scores finds the same best spelling, `PinModel` among them.
    """
    pieces = [*(bytes([b]) for b in range(256)), *pins.pieces]
    return [(written(piece), -pins.costs[piece] / TOKEN_COST) for piece in pieces]


class PinModel:
    """Spells pieces with the fewest ids, then the likeliest; of equally cheap ones, with the longest last piece.

    Where only the table counts it is the Unigram model of the `tokenizers` library that searches; our own search,
    which other spellings of parts can take part in, breaks ties as that one does.
    """

    def __init__(self, pins: PinTable, byte_base: int) -> None:
        self._pins, self._base = pins, byte_base
        self._model = models.Unigram(scored_pieces(pins))

    def __reduce__(self) -> Any:
        """A copy in another process is made of the pins again."""
        return (PinModel, (self._pins, self._base))

    def spell(self, piece: bytes) -> Spelling:
        """The cheapest ids, by the library's search."""
        base = self._base
        return tuple([token.id + base for token in self._model.tokenize(written(piece))])

    @functools.cached_property
    def _entries(self) -> dict[bytes, tuple[int, int] | None]:
        """Cost and id of every piece; None for what begins one and is none, so that longer ones are looked for."""
        pieces = [*(bytes([b]) for b in range(256)), *self._pins.pieces]
        found: dict[bytes, tuple[int, int] | None] = dict.fromkeys(
            piece[:end] for piece in self._pins.pieces for end in range(2, len(piece))
        )
        return found | {piece: (self._pins.costs[piece], self._base + i) for i, piece in enumerate(pieces)}

    def search(self, piece: bytes, edges: Edges | None = None) -> Spelling:
        """The cheapest ids by dynamic programming; `edges` are other spellings of parts of the piece."""
        size, get = len(piece), self._entries.get
        best = [0, *[FAR] * size]
        came: list[tuple[int, Spelling]] = [(0, ())] * (size + 1)
        for start in range(size):
            reached = best[start]
            for end in range(start + 1, size + 1):
                entry = get(piece[start:end], NOTHING)
                if entry is NOTHING:
                    break
                if entry is not None and reached + entry[0] < best[end]:
                    best[end], came[end] = reached + entry[0], (start, entry[1:])
            if edges:
                for end in range(start + 1, size + 1):
                    edge = edges.get((start, end))
                    if edge is not None and reached + edge[0] < best[end]:
                        best[end], came[end] = reached + edge[0], (start, edge[1])
        found: list[Spelling] = []
        place = size
        while place:
            place, spelled = came[place]
            found.append(spelled)
        return tuple([index for spelled in reversed(found) for index in spelled])
