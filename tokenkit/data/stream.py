"""Rows that are read as they come: shuffled inside of a buffer, by (seed, position), with no corpus in memory.

A row is a window of a document, and how many windows a document has is known from its text alone. So a run that goes on
reads again, from the beginning of the epoch, what it had read, without tokenising it: its position says all else.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar, overload

import numpy as np

from tokenkit.config import UserError
from tokenkit.data.example import Row
from tokenkit.data.mixture import WeightedSource, names_of
from tokenkit.data.source import SourceConfig

KEPT = 3  # buffers of a source: a step may reach over the end of one, and be asked for again
STREAM = 14  # of the run's seed

R = TypeVar("R")


class Stream(Generic[R]):
    """The rows of one source by their number in the run, which grows: each epoch has them all, in another order."""

    def __init__(self, read: Callable[[], Iterator[R]], name: str, buffer: int, seed: Sequence[int]):
        """`read` begins at the first row whenever it is called."""
        self.read, self.name, self.buffer, self.seed = read, name, buffer, [*seed]
        self.length: int | None = None
        """Rows of an epoch, once its end was seen."""
        self._rows: Iterator[R] | None = None
        self._next = (0, 0)  # the epoch and the buffer that the open reader comes to next
        self._kept: dict[tuple[int, int], list[R]] = {}

    def row(self, number: int) -> R:
        """The row with a number, counted from 0; those behind it are read on from, those before it read again."""
        while True:
            epoch, offset = (0, number) if self.length is None else divmod(number, self.length)
            block, place = divmod(offset, self.buffer)
            rows = self._kept.get((epoch, block))
            if rows is None:
                rows = self._filled(epoch, block)
            if place < len(rows):  # else the end was seen just now, and the number is of a later epoch
                return rows[place]

    def _filled(self, epoch: int, block: int) -> list[R]:
        """The rows of a buffer in the order of its draw; none beyond the end."""
        if self._rows is None or self._next[0] != epoch or self._next[1] > block:
            self._rows, self._next = self.read(), (epoch, 0)
        seen = self._next[1] * self.buffer
        skipped = sum(1 for _ in islice(self._rows, block * self.buffer - seen))
        rows = list(islice(self._rows, self.buffer)) if seen + skipped == block * self.buffer else []
        if len(rows) < self.buffer:
            self.length, self._rows = seen + skipped + len(rows), None
            if self.length == 0:
                raise UserError(f"{self.name}: an empty corpus; no document with text in it")
        self._next = (epoch, block + 1)
        if rows:
            order = np.random.default_rng([*self.seed, epoch, block]).permutation(len(rows))
            self._kept = dict([*self._kept.items()][1 - KEPT :]) | {(epoch, block): [rows[i] for i in order]}
        return self._kept.get((epoch, block), [])


class StreamedRows(Generic[R]):
    """The rows of several sources, none of them held. A number is a source and the how-manieth row of it in the run.

    A slice has the first rows as they stand in the sources. How many there are is not known, so this is no Sequence.
    """

    def __init__(
        self,
        reads: Sequence[Callable[[], Iterator[R]]],
        sources: Sequence[SourceConfig],
        buffer: int,
        *,
        mix_languages: bool = True,
        seed: int = 0,
    ):
        """`reads` begin at the first row of each source whenever they are called."""
        self.reads, self.sources, self.buffer, self.mix_languages = [*reads], [*sources], buffer, mix_languages
        self.names = names_of(sources)
        self.streams = [
            Stream(read, name, buffer, [seed, STREAM, number])
            for number, (read, name) in enumerate(zip(self.reads, self.names, strict=True))
        ]

    @property
    def weighted(self) -> list[WeightedSource]:
        """The sources of a mixture; none where there is one source."""
        return [source for source in self.sources if isinstance(source, WeightedSource)]

    def seeded(self, seed: int) -> "StreamedRows[R]":
        """The same rows in the order of a run's seed."""
        return StreamedRows(self.reads, self.sources, self.buffer, mix_languages=self.mix_languages, seed=seed)

    def changed(self, change: Callable[[Iterator[R]], Iterator[Any]]) -> "StreamedRows[Any]":
        """With the rows of each source changed as they are read."""
        reads = [lambda read=read: change(read()) for read in self.reads]
        return StreamedRows(reads, self.sources, self.buffer, mix_languages=self.mix_languages)

    def number(self, source: int, position: int) -> int:
        """What the `position`-th row that the run reads of a source is called."""
        return position * len(self.streams) + source

    @overload
    def __getitem__(self, index: int) -> R: ...

    @overload
    def __getitem__(self, index: slice) -> list[R]: ...

    def __getitem__(self, index: int | slice) -> R | list[R]:
        if isinstance(index, slice):
            if index.stop is None or index.stop < 0:
                raise self._endless()
            rows = (row for read in self.reads for row in read())
            return list(islice(rows, index.start or 0, index.stop, index.step or 1))
        position, source = divmod(index, len(self.streams))
        return self.streams[source].row(position)

    def __iter__(self) -> NoReturn:
        raise self._endless()

    def _endless(self) -> UserError:
        return UserError("data.streaming: true, but this needs every row of the text at once; write streaming=false")


Rows = Sequence[Row] | StreamedRows


def held(rows: Rows) -> Sequence[Row]:
    """Rows that are all there; UserError where they are read as they come."""
    return [*rows] if isinstance(rows, StreamedRows) else rows
