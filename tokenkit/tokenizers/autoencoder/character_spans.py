"""Which characters of a text every id stands for, as `BatchEncoding` of transformers asks for it."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

Span = tuple[int, int]
NOWHERE: Span = (0, 0)  # of special and padding tokens


def character_spans(text: str, lengths: Int64[ndarray, "T"]) -> list[Span]:
    """Half-open spans in characters (code points) of ids that add so many bytes each, one after the other.

    Ids that spell parts of one character all have its span; an id that adds nothing has an empty one.
    """
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    begun = np.concatenate([np.zeros(1, np.int64), np.cumsum((data & 0xC0) != 0x80)])  # characters begun before a byte
    ends = np.cumsum(lengths)
    starts = ends - lengths
    inside = np.concatenate([(data & 0xC0) == 0x80, np.zeros(1, np.bool_)])  # a byte that continues a character
    first = begun[starts] - inside[starts]
    last = np.where(lengths > 0, begun[ends], first)
    return [*zip(first.tolist(), last.tolist())]


class RowSpans:
    """One row of a batch; computed when it is first asked, since most batches are not."""

    def __init__(
        self,
        ids: list[int],
        tokens: Callable[[list[int]], list[str]],
        place: Callable[[], list[tuple[int, Span] | None]],
    ) -> None:
        """`place` gives the number of the sequence and the span of every id; None for special tokens."""
        self.ids, self._tokens, self._place = ids, tokens, place
        self._places: list[tuple[int, Span] | None] | None = None

    @property
    def places(self) -> list[tuple[int, Span] | None]:
        """Number of the sequence and span of every id."""
        if self._places is None:
            self._places = self._place()
        return self._places

    @property
    def tokens(self) -> list[str]:
        """The ids as strings."""
        return self._tokens(self.ids)

    @property
    def offsets(self) -> list[Span]:
        """The span of every id, (0, 0) for special tokens."""
        return [NOWHERE if place is None else place[1] for place in self.places]

    @property
    def sequence_ids(self) -> list[int | None]:
        """0 or 1 for ids of the first or second text, None for special tokens."""
        return [None if place is None else place[0] for place in self.places]

    @property
    def n_sequences(self) -> int:
        """Texts in this row."""
        return max((1 + number for number in self.sequence_ids if number is not None), default=1)

    def token_to_chars(self, index: int) -> Span | None:
        """The span of an id; None for a special token."""
        place = self.places[index]
        return None if place is None else place[1]

    def char_to_token(self, character: int, sequence: int = 0) -> int | None:
        """The first id whose span holds a character; None where no id does, after truncation say."""
        for index, place in enumerate(self.places):
            if place is not None and place[0] == sequence and place[1][0] <= character < place[1][1]:
                return index
        return None

    def token_to_sequence(self, index: int) -> int | None:
        """0 or 1 for the text that an id belongs to, None for a special token."""
        return self.sequence_ids[index]
