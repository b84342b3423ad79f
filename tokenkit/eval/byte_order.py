"""A vocabulary in the order of its bytes: the tokens that begin with the same bytes are neighbours.

So a node of the byte trie is a range, and the mass of every next byte is a sum over neighbours of one vector.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from numpy import ndarray


class Node:
    """The tokens whose bytes begin with one string: first those that are the string, then the longer ones by byte."""

    def __init__(self, order: "ByteOrder", low: int, high: int, depth: int) -> None:
        self.order, self.low, self.depth = order, low, depth
        lengths = order.lengths[low:high]
        self.whole = int((lengths == depth).sum())
        """How many tokens are the string itself: one, or several where a vocabulary has the spelling twice."""
        self.longer = high - low - self.whole
        following = order.flat[order.offsets[low + self.whole : high] + depth]
        self.bytes, starts = np.unique(following, return_index=True)
        self.starts: Int64[ndarray, "C"] = starts.astype(np.int64)
        self._children: dict[int, Node] = {}

    def sums(self, mass: ndarray) -> ndarray:
        """Per row of masses of the longer tokens, the mass of each byte in `bytes`."""
        return np.add.reduceat(mass, self.starts, axis=1) if self.longer else mass[:, :0]

    def range(self, byte: int) -> tuple[int, int] | None:
        """Which of the longer tokens go on with a byte; None where none does."""
        place = int(np.searchsorted(self.bytes, byte))
        if place == len(self.bytes) or self.bytes[place] != byte:
            return None
        after = self.starts[place + 1] if place + 1 < len(self.starts) else self.longer
        return int(self.starts[place]), int(after)

    def child(self, byte: int) -> "Node":
        """The node one byte further on."""
        if byte not in self._children:
            found = self.range(byte)
            assert found is not None, "a byte that some token goes on with"
            start = self.low + self.whole
            self._children[byte] = Node(self.order, start + found[0], start + found[1], self.depth + 1)
        return self._children[byte]


class ByteOrder:
    """Spellings sorted by their bytes; ids of one spelling stay beside each other. Empty spellings are left out."""

    def __init__(self, spellings: Sequence[bytes], rows: int) -> None:
        """`rows`: ids from there on have no logits, and so no mass."""
        found = sorted((s, i) for i, s in enumerate(spellings[:rows]) if s)
        self.ids: Int64[ndarray, "N"] = np.array([i for _, i in found], np.int64)
        self.lengths: Int64[ndarray, "N"] = np.array([len(s) for s, _ in found], np.int64)
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.flat = np.frombuffer(b"".join(s for s, _ in found), np.uint8)
        self.root = Node(self, 0, len(found), 0)
