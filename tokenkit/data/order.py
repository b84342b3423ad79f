"""(seed, step) → the numbers of the rows that a step reads, for rows of one source, of a mixture, and of a stream."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from tokenkit.data.example import Row
from tokenkit.data.mixture import Mixing, WeightedSource, names_of
from tokenkit.data.packing import Pack, packed
from tokenkit.data.stream import Rows, StreamedRows

ROWS = 15  # stream of the run's seed
R = TypeVar("R")


@runtime_checkable
class Order(Protocol):
    """Which rows a step reads. Steps run on across epochs; in each every row stands once."""

    def numbers(self, step: int) -> list[int]:
        """The numbers of a step's rows."""
        ...

    def name(self, number: int) -> str:
        """The source of a row, where there are several; else nothing."""
        ...

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first steps read; nothing where there is one source."""
        ...


class Epochs:
    """Position → row of one source: each epoch is a permutation of its own."""

    def __init__(self, length: int, seed: Callable[[int], list[int]]):
        self.length, self.seed = length, seed
        self._epoch: tuple[int, Int[ndarray, "N"]] = (-1, np.empty(0, np.int64))

    def row(self, position: int) -> int:
        """The row at a position of the run."""
        epoch, offset = divmod(position, self.length)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng(self.seed(epoch)).permutation(self.length))
        return int(self._epoch[1][offset])


class Plain:
    """The order of one source."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.batch_size, self._epochs = batch_size, Epochs(length, lambda epoch: [seed, epoch])

    def numbers(self, step: int) -> list[int]:
        """The numbers of a step's rows."""
        return [self._epochs.row(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def name(self, number: int) -> str:
        """Nothing."""
        return ""

    def rows_read(self, steps: int) -> dict[str, int]:
        """Nothing."""
        return {}


class MixedRows(list[R]):
    """The rows of several sources, one source after another."""

    def __init__(self, parts: Sequence[Sequence[R]], sources: Sequence[WeightedSource], mix_languages: bool):
        super().__init__(row for part in parts for row in part)
        self.lengths, self.sources, self.mix_languages = [len(part) for part in parts], [*sources], mix_languages

    def parts(self) -> list[list[R]]:
        """The rows of each source."""
        return [self[begin:end] for begin, end in pairwise([0, *accumulate(self.lengths)])]


class Mixed:
    """The order of rows of several sources, each of which runs through epochs of its own."""

    def __init__(self, rows: MixedRows, batch_size: int, seed: int):
        options = {"mix_languages": rows.mix_languages, "batch_size": batch_size, "seed": seed}
        self.mixing, self.names = Mixing(rows.sources, **options), names_of(rows.sources)
        self._begins = [0, *accumulate(rows.lengths)]
        self._epochs = [
            Epochs(length, lambda epoch, number=number: [seed, epoch, ROWS, number])
            for number, length in enumerate(rows.lengths)
        ]

    def numbers(self, step: int) -> list[int]:
        """The numbers of a step's rows."""
        return [self._begins[source] + self._epochs[source].row(place) for source, place in self.mixing.at(step)]

    def name(self, number: int) -> str:
        """The source of a row."""
        return self.names[int(np.searchsorted(self._begins, number, side="right")) - 1]

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first steps read."""
        return dict(zip(self.names, self.mixing.counts(steps), strict=True))


class Streamed:
    """The order of rows that are read as they come."""

    def __init__(self, rows: StreamedRows, batch_size: int, seed: int):
        self.rows, self.batch_size, weighted = rows, batch_size, rows.weighted
        options = {"mix_languages": rows.mix_languages, "batch_size": batch_size, "seed": seed}
        self.mixing = Mixing(weighted, **options) if weighted else None

    def numbers(self, step: int) -> list[int]:
        """The numbers of a step's rows, as the streams have them."""
        if self.mixing is None:
            return [*range(step * self.batch_size, (step + 1) * self.batch_size)]
        return [self.rows.number(source, place) for source, place in self.mixing.at(step)]

    def name(self, number: int) -> str:
        """The source of a row, where there are several."""
        return "" if self.mixing is None else self.rows.names[number % len(self.rows.names)]

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first steps read."""
        return {} if self.mixing is None else dict(zip(self.rows.names, self.mixing.counts(steps), strict=True))


def ordered(
    rows: Rows, batch_size: int, seed: int, pack_bytes: int | None = None
) -> tuple[Sequence[Row | Pack] | StreamedRows, Order]:
    """The rows as a run reads them, packed up to so many bytes where it says so, and their order."""
    if isinstance(rows, StreamedRows):
        stream = (rows if pack_bytes is None else rows.changed(lambda some: packed(some, pack_bytes))).seeded(seed)
        return stream, Streamed(stream, batch_size, seed)
    if isinstance(rows, MixedRows):
        parts = rows.parts() if pack_bytes is None else [[*packed(part, pack_bytes)] for part in rows.parts()]
        mixed = MixedRows(parts, rows.sources, rows.mix_languages)
        return mixed, Mixed(mixed, batch_size, seed)
    some = rows if pack_bytes is None else [*packed(rows, pack_bytes)]
    return some, Plain(len(some), batch_size, seed)
