"""Several sources in one run: (seed, position) → which of them, and the how-manieth row of it, without any state.

Shares are exact and not drawn by chance: after any number of rows each source has had its share of them but for a few
rows. No source ends before another: each runs through epochs of its own.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePath

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from pydantic import Field

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig, describe

BLOCK = 128  # choices among which the order is drawn; the shares are those wanted at the end of each
SOURCES, LANGUAGES, INSIDE = 11, 12, 13  # streams of the run's seed


class WeightedSource(SourceConfig):
    """One of the sources of a mixture."""

    weight: float = Field(1.0, gt=0)
    """Its share of the rows, beside the weights of the others; how much text it holds does not matter."""
    language: str | None = None
    """Any word; sources with the same one are kept together where `mix_languages` is false."""


class Shares:
    """An endless sequence of choices in proportion to weights: of any beginning each has its share, but for a few."""

    def __init__(self, weights: Sequence[float | Fraction], seed: Sequence[int]):
        exact = [Fraction(weight) for weight in weights]
        self.shares, self.seed = [weight / sum(exact) for weight in exact], [*seed]
        self._block: tuple[int, Int[ndarray, "N"], Int[ndarray, "N"]] = (-1, np.empty(0, int), np.empty(0, int))

    def at(self, number: int) -> tuple[int, int]:
        """The choice of a number counted from 0, and how often the same was chosen before it."""
        block, place = divmod(number, BLOCK)
        if self._block[0] != block:
            self._block = (block, *self._drawn(block))
        return int(self._block[1][place]), int(self._block[2][place])

    def before(self, number: int) -> list[int]:
        """How often each is chosen among the first so many."""
        whole, rest = divmod(number, BLOCK)
        found = np.array(self._counts(whole * BLOCK))
        if rest:
            found += np.bincount(self._drawn(whole)[0][:rest], minlength=len(found))
        return found.tolist()

    def _drawn(self, block: int) -> tuple[Int[ndarray, "N"], Int[ndarray, "N"]]:
        """The choices of a block in the order of its draw, and how often each was chosen before."""
        first, last = np.array(self._counts(block * BLOCK)), np.array(self._counts((block + 1) * BLOCK))
        choices = np.repeat(np.arange(len(first)), last - first)
        choices = np.random.default_rng([*self.seed, block]).permutation(choices)
        times = np.empty_like(choices)
        for choice, count in enumerate(first):
            mine = choices == choice
            times[mine] = count + np.arange(mine.sum())
        return choices, times

    def _counts(self, number: int) -> list[int]:
        """Each choice's times among the first `number`: its k-th comes at (k + 1/2) / share. Whole numbers, exact."""
        when = max(0, number - len(self.shares))
        counts = [max(0, int(share * when + Fraction(1, 2))) for share in self.shares]
        coming = [((count + Fraction(1, 2)) / share, i) for i, (count, share) in enumerate(zip(counts, self.shares))]
        heapq.heapify(coming)
        for _ in range(number - sum(counts)):
            time, choice = coming[0]
            counts[choice] += 1
            heapq.heapreplace(coming, (time + 1 / self.shares[choice], choice))
        return counts


class Mixing:
    """Which source each row of a step is of: all of them in every step, or a step's rows of one language."""

    def __init__(self, sources: Sequence[WeightedSource], *, mix_languages: bool, batch_size: int, seed: int):
        self.batch_size, self.mix_languages = batch_size, mix_languages
        languages = [None if mix_languages else source.language for source in sources]
        self.groups = [[i for i, one in enumerate(languages) if one == name] for name in dict.fromkeys(languages)]
        weights = [[sources[i].weight for i in group] for group in self.groups]
        self._languages = Shares([sum(map(Fraction, some), Fraction(0)) for some in weights], [seed, LANGUAGES])
        self._inside = [Shares(some, [seed, SOURCES if mix_languages else INSIDE, i]) for i, some in enumerate(weights)]

    def at(self, step: int) -> list[tuple[int, int]]:
        """The source of each row of a step, and the how-manieth row of that source it is, in the run."""
        group, times = self._languages.at(step) if len(self.groups) > 1 else (0, step)
        places = range(times * self.batch_size, (times + 1) * self.batch_size)
        found = [self._inside[group].at(place) for place in places]
        return [(self.groups[group][choice], number) for choice, number in found]

    def counts(self, steps: int) -> list[int]:
        """How many rows of each source the first steps hold."""
        times = self._languages.before(steps) if len(self.groups) > 1 else [steps]
        found = [0] * sum(map(len, self.groups))
        for group, inside, number in zip(self.groups, self._inside, times, strict=True):
            for source, count in zip(group, inside.before(number * self.batch_size), strict=True):
                found[source] = count
        return found


def names_of(sources: Sequence[SourceConfig]) -> list[str]:
    """A short name of each source, no two alike: its language where it alone has that, else its file, folder or id."""
    languages = Counter(source.language for source in sources if isinstance(source, WeightedSource))
    found: list[str] = []
    for source in sources:
        name = source.language if isinstance(source, WeightedSource) else None
        if name is None or languages[name] > 1:
            name = PurePath(describe(source)).name
        number, free = 2, name
        while free in found:
            number, free = number + 1, f"{name}-{number}"
        found.append(free)
    return found


def check_mixture(sources: Sequence[WeightedSource], *, mix_languages: bool) -> None:
    """UserError where steps of one language are wanted and a source does not say which it is in."""
    if mix_languages:
        return
    for number, source in enumerate(sources):
        if source.language is None:
            raise UserError(
                f"data.mixture.{number}.language: missing, but data.mix_languages is false; name the language of "
                f"{describe(source)}"
            )
