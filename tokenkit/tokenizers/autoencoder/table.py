"""The cheapest spelling of a piece of text in pins and bytes."""

from collections.abc import Mapping

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

    The tie is broken as the Unigram model of the `tokenizers` library breaks it, so that both give the same ids.
    """

    def __init__(self, pins: PinTable, byte_base: int) -> None:
        pieces = [*(bytes([b]) for b in range(256)), *pins.pieces]
        begins = {piece[:end] for piece in pins.pieces for end in range(2, len(piece))}
        # what begins a piece and is none has no entry, and still tells that longer ones are worth a look
        self._entries: dict[bytes, tuple[int, int] | None] = dict.fromkeys(begins)
        self._entries |= {piece: (pins.costs[piece], byte_base + i) for i, piece in enumerate(pieces)}

    def whole(self, piece: bytes) -> int | None:
        """The id of a piece that has one."""
        entry = self._entries.get(piece)
        return None if entry is None else entry[1]

    def spell(self, piece: bytes) -> Spelling:
        """The cheapest ids."""
        entry = self._entries.get(piece)
        return (entry[1],) if entry is not None else self._in_two(piece) or self.search(piece)

    def _in_two(self, piece: bytes) -> Spelling:
        """The cheapest two ids, of which nothing longer can be cheaper; () where there are none."""
        get, least, found = self._entries.get, FAR, ()
        for place in range(1, len(piece)):
            head = get(piece[:place], NOTHING)
            if head is NOTHING:
                break
            if head is not None:
                tail = get(piece[place:])
                if tail is not None and head[0] + tail[0] < least:
                    least, found = head[0] + tail[0], (head[1], tail[1])
        return found

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
