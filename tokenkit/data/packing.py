"""Several short rows read as one: their tokens stand side by side, none sees another's, and nothing else changes.

Only the models read packed rows. What they say is unpacked again, a document a row, so alignment, chunks, labels and
losses are those of the rows without packing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tokenkit.data.example import Window
from tokenkit.data.messages import Dialogue

OPEN = 64  # rows that are filled at the same time: more waste less, and keep more in memory
SLOT, POSITIONS = "slot", "positions"
LENGTH_MULTIPLE = 32  # as of rows that are not packed


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows that are read together."""

    rows: tuple[Window | Dialogue, ...]

    @property
    def document(self) -> int:
        """The number of the first one's document."""
        return self.rows[0].document

    @property
    def start_byte(self) -> int:
        """Where the first one begins in it."""
        return self.rows[0].start_byte


def packed(rows: Iterable[Window | Dialogue], most_bytes: int) -> Iterator[Pack]:
    """Packs of at most so many bytes of text, or of one row that has more.

    Each row goes where least is left over, among packs that are not full yet; they stay in the order of their rows, but
    for a few.
    """
    opened: list[tuple[int, list[Window | Dialogue]]] = []  # bytes left, and what is in it
    for row in rows:
        size = num_bytes(row)
        fitting = [(left - size, place) for place, (left, _) in enumerate(opened) if left >= size]
        if fitting:
            left, place = min(fitting)
            opened[place] = (left, [*opened[place][1], row])
        else:
            opened.append((most_bytes - size, [row]))
        full = [place for place, (left, _) in enumerate(opened) if left <= 0]
        if len(opened) > OPEN:
            full = full or [min(range(len(opened)), key=lambda place: opened[place][0])]
        for place in reversed(full):
            yield Pack(tuple(opened.pop(place)[1]))
    yield from (Pack(tuple(some)) for _, some in opened)


def num_bytes(row: Window | Dialogue) -> int:
    """Bytes of the text of a row; of a conversation those of its messages, whatever a template adds."""
    if isinstance(row, Window):
        return len(row.text.encode())
    return sum(len(message["content"].encode()) for message in row.messages)


def slots(lengths: Sequence[Sequence[int]], width: int) -> dict[str, Tensor]:
    """Where the tokens of rows stand once packed: `slot` of each place of a row, `positions` of each slot.

    `lengths` are the tokens of each row, by pack; `width` the places of an unpacked row. A place without a token has
    slot -1. Positions begin at 0 with each row, and once more behind the last.
    """
    longest = max(sum(some) for some in lengths)
    size = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    slot = np.full((sum(map(len, lengths)), width), -1, np.int64)
    positions = np.zeros((len(lengths), size), np.int64)
    row = 0
    for number, some in enumerate(lengths):
        begin = 0
        for length in some:
            slot[row, :length] = number * size + np.arange(begin, begin + length)
            positions[number, begin : begin + length] = np.arange(length)
            row, begin = row + 1, begin + length
        positions[number, begin:] = np.arange(size - begin)
    return {SLOT: torch.from_numpy(slot), POSITIONS: torch.from_numpy(positions)}


def pack(values: Tensor, slot: Int[Tensor, "B T"], positions: Int[Tensor, "R P"], fill: int) -> Tensor:
    """[B, T, ...] with each token in its slot, [R, P, ...]; slots without one hold `fill`."""
    inside = slot >= 0
    flat = values.new_full((positions.numel(), *values.shape[2:]), fill)
    flat[slot[inside]] = values[inside]
    return flat.view(*positions.shape, *values.shape[2:])


def unpack(values: Tensor, slot: Int[Tensor, "B T"]) -> Tensor:
    """[R, P, ...] as [B, T, ...]; a place without a token holds that of another, which no mask lets through."""
    return values.flatten(0, 1)[slot.clamp_min(0)]


def unpack_maps(maps: Tensor, slot: Int[Tensor, "B T"]) -> Tensor:
    """Attention maps [R, L, H, P, P] as [B, L, H, T, T]; 0 where there is no token."""
    size, inside = maps.shape[-1], slot >= 0
    row, place = slot[:, 0] // size, (slot % size).masked_fill(~inside, 0)
    found = maps[row]  # the whole map of the row that a document stands in
    index = place[:, None, None, :, None].expand(*found.shape[:3], -1, found.shape[-1])
    found = found.gather(3, index)
    found = found.gather(4, place[:, None, None, None, :].expand(*found.shape[:4], -1))
    return found * (inside[:, None, None, :, None] & inside[:, None, None, None, :])
