"""An embedding or output matrix row by row, read in blocks: norms, broken rows, outliers, and what each id is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from tokenkit.align.doctor_schemes import encodings
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.rows import Rows, block_rows

TO_DEVIATION = 1.4826  # the median absolute deviation of a normal distribution times this is its standard deviation


@dataclass(frozen=True, eq=False)
class IdKinds:
    """What the ids of a matrix stand for; every id is one of ordinary, special, hole and padding."""

    tokenizer: Tokenizer
    rows: int
    ordinary: Bool[ndarray, "V"]
    special: Bool[ndarray, "V"]

    @cached_property
    def padding(self) -> Bool[ndarray, "V"]:
        """Rows beyond the vocabulary."""
        return np.arange(self.rows) >= self.tokenizer.vocab_size

    @cached_property
    def hole(self) -> Bool[ndarray, "V"]:
        """Ids inside the vocabulary that no token has."""
        return ~(self.ordinary | self.special | self.padding)

    @cached_property
    def unreachable(self) -> Bool[ndarray, "V"]:
        """Ordinary tokens that are text, and that the tokenizer does not give for that text.

        Tried as the whole text and after a line break. Parts of characters are not tried.
        """
        found = np.zeros(self.rows, bool)
        texts = {i: text for i in np.flatnonzero(self.ordinary).tolist() if (text := _as_text(self.tokenizer, i))}
        met = met_ids(self.tokenizer, texts.values(), self.rows) | met_ids(
            self.tokenizer, ("\n" + text for text in texts.values()), self.rows
        )
        found[[*texts]] = True
        return found & ~met

    @property
    def unused(self) -> Bool[ndarray, "V"]:
        """Rows that no text ever reads: padding, holes, tokens that are never given."""
        return self.padding | self.hole | self.unreachable

    def name(self, i: int) -> str:
        """A token as people may read it."""
        if i >= self.tokenizer.vocab_size:
            return "(padding)"
        literal = next((text for text, one in self.tokenizer.special_tokens.items() if one == i), None)
        if literal is not None:
            return literal
        spelling = self.tokenizer.token_bytes[i]
        return spelling.decode(errors="backslashreplace") if spelling else "(no token)"


def id_kinds(tokenizer: Tokenizer, rows: int) -> IdKinds:
    """What the ids of a matrix of so many rows are."""
    ordinary, special = np.zeros(rows, bool), np.zeros(rows, bool)
    special[[i for i in tokenizer.special_ids if i < rows]] = True
    ordinary[[i for i, spelling in enumerate(tokenizer.token_bytes[:rows]) if spelling and not special[i]]] = True
    return IdKinds(tokenizer, rows, ordinary, special)


def met_ids(tokenizer: Tokenizer, texts: Iterable[str], rows: int) -> Bool[ndarray, "V"]:
    """The ids that stand in these texts."""
    met = np.zeros(rows, bool)
    for encoding in encodings(tokenizer, [*texts]):
        if encoding is not None:
            met[encoding.ids[encoding.ids < rows]] = True
    return met


def _as_text(tokenizer: Tokenizer, i: int) -> str | None:
    try:
        return tokenizer.token_bytes[i].decode()
    except UnicodeDecodeError:
        return None


def blocks(rows: Rows) -> Iterator[tuple[Int64[ndarray, "N"], Float[Tensor, "N D"]]]:
    """All rows with their ids, so many at a time that they take `BLOCK_BYTES` in float32."""
    size, width = rows.shape
    step = block_rows(width)
    for begin in range(0, size, step):
        ids = np.arange(begin, min(begin + step, size))
        yield ids, rows.gather(ids)


def row_norms(rows: Rows) -> Float64[ndarray, "V"]:
    """The length of every row; not finite where the row is not."""
    norms = np.empty(rows.shape[0])
    for ids, block in blocks(rows):
        norms[ids] = block.double().norm(dim=1).cpu().numpy()
    return norms


def robust_z(values: Float64[ndarray, "V"], among: Bool[ndarray, "V"]) -> Float64[ndarray, "V"]:
    """Distance from the median of the values `among`, in their deviation: half of them lie within 0.67 of 0.

    Values that are not finite say nothing of the others, and get 0. Where half the values are the same one, that
    value's last digits stand for the deviation, so that anything else lies far out.
    """
    finite = np.isfinite(values)
    known = values[among & finite]
    if len(known) == 0:
        return np.zeros(len(values))
    middle = float(np.median(known))
    spread = TO_DEVIATION * float(np.median(np.abs(known - middle)))
    scale = max(spread, 1e-6 * abs(middle), float(np.finfo(np.float64).tiny))
    return np.where(finite, np.where(finite, values - middle, 0) / scale, 0.0)
