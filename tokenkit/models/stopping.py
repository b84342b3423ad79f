"""Text as it comes, token by token: whole characters only, and nothing that may still turn out to be a stop string."""

import codecs
from collections.abc import Sequence

from tokenkit.config import UserError


class TextSoFar:
    """The text of bytes that come in pieces, up to the first stop string.

    Pieces may cut characters and stop strings anywhere. The stop string that is complete first ends the text, and of
    several that end at one character the longest; so the text does not depend on how its bytes are cut. Bytes that are
    no UTF-8 become U+FFFD; a character that is cut off at the end is left out.
    """

    text: str
    """Everything that was given out."""
    stopped: bool
    """A stop string has come; it and what follows it are no part of the text."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UserError("stop: an empty string is everywhere; write a text that ends the answer, or leave it out")
        self.stop = sorted(set(stop), key=len, reverse=True)
        self.longest = max(map(len, self.stop), default=0)
        self.text, self.stopped = "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, spelled: bytes) -> str:
        """What may be given out now, possibly nothing."""
        if self.stopped:
            return ""
        before, held = len(self._held), self._held + self._decoder.decode(spelled)
        found = self._first_stop(held, before)
        if found is not None:
            self.stopped, self._held = True, ""
            return self._out(held[:found])
        kept = self._may_begin(held)
        self._held = held[len(held) - kept :]
        return self._out(held[: len(held) - kept])

    def finish(self) -> str:
        """What was held back for a stop string that did not come; the end of the text."""
        held, self._held = self._held, ""
        return self._out(held)

    def _out(self, piece: str) -> str:
        self.text += piece
        return piece

    def _first_stop(self, held: str, before: int) -> int | None:
        """Where the stop string that ends first begins; those that end in the first `before` characters are known."""
        hits = [(held.find(stop, max(0, before - len(stop) + 1)), len(stop)) for stop in self.stop]
        ends = [(start + length, start) for start, length in hits if start >= 0]
        return min(ends)[1] if ends else None

    def _may_begin(self, held: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        for length in range(min(self.longest - 1, len(held)), 0, -1):
            end = held[len(held) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self.stop):
                return length
        return 0
