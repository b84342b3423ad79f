"""What chunks were spelled as: a permanent part, and two generations of recent ones."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

Spelling = tuple[int, ...]
DEFAULT_SIZE = 10_000


class ChunkTable(dict[str, Spelling]):
    """chunk → ids; what is not there is computed, and kept if it is short. Looking up takes no lock.

    At most `size` chunks are in the younger generation, which a lookup finds at once; when it is full it becomes the
    older one. A chunk of the older one that is asked for is young again; what nobody asked for is dropped.
    """

    def __init__(self, compute: Callable[[str], Spelling], permanent: Mapping[str, Spelling], size: int) -> None:
        """`size` 0 keeps nothing but the permanent entries."""
        super().__init__(permanent)
        self._compute, self._permanent, self.size = compute, permanent, size
        self._young: list[str] = []
        self._old: dict[str, Spelling] = {}
        self._lock = threading.Lock()
        self.misses = self.promotions = self.evictions = 0

    def __missing__(self, chunk: str) -> Spelling:
        kept = self._old.get(chunk)
        spelling = self._compute(chunk) if kept is None else kept
        self.remember(chunk, spelling, promoted=kept is not None)
        return spelling

    def remember(self, chunk: str, spelling: Spelling, *, promoted: bool = False) -> None:
        """Makes a chunk one of the younger generation."""
        with self._lock:
            self.promotions += promoted
            self.misses += not promoted
            if self.size == 0 or len(chunk) > LONGEST_KEPT or chunk in self:
                return
            self[chunk] = spelling
            self._young.append(chunk)
            if len(self._young) >= self.size:
                self.evictions += len(self._old)
                self._old = {young: self[young] for young in self._young}
                for young in self._young:
                    del self[young]
                self._young = []

    def knows(self, chunk: str) -> bool:
        """Whether the chunk need not be computed."""
        return chunk in self or chunk in self._old

    def clear_recent(self) -> None:
        """Forgets all but the permanent entries."""
        with self._lock:
            for young in self._young:
                del self[young]
            self._young, self._old = [], {}

    def statistics(self) -> dict[str, int]:
        """Entries and what became of the chunks that were not at hand."""
        return {
            "permanent": len(self._permanent),
            "recent": len(self._young) + len(self._old),
            "misses": self.misses,
            "promotions": self.promotions,
            "evictions": self.evictions,
        }

    def __reduce__(self) -> Any:
        """A copy in another process begins without recent entries."""
        return (ChunkTable, (self._compute, self._permanent, self.size))


LONGEST_KEPT = 64  # characters: long chunks are rarely seen twice
