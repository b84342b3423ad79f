"""Several runs in one figure: means over seeds, and one score over metrics that point in different directions."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["min", "max"]
FLOOR = 1e-6
"""Values and references below this count as this: a zero is a bad score (or a very good one), never an error."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some values; `sd` is None of a single one."""

    mean: float
    sd: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """The mean and standard deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def ratio(value: float, reference: float, direction: Direction) -> float:
    """How good a value is beside a reference: 1 is as good, 2 twice as good, whichever direction is better."""
    for name, number in (("value", value), ("reference", reference)):
        if not number >= 0:
            raise ValueError(f"a ratio needs numbers of at least 0; the {name} is {number}")
    value, reference = max(value, FLOOR), max(reference, FLOOR)
    return value / reference if direction == "max" else reference / value


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of at least one number of at least 0; 0 where one is 0."""
    if min(values) == 0:
        return 0.0
    return math.exp(statistics.fmean(math.log(value) for value in values))


def score(
    values: Mapping[str, float], references: Mapping[str, float], directions: Mapping[str, Direction]
) -> tuple[float, float]:
    """(mean, geometric mean) over the metrics of `directions` of how good each is beside its reference; more is better.

    Without a reference a metric counts by itself: the order of runs under the geometric mean does not depend on any
    reference.
    """
    ratios = [ratio(values[name], references.get(name, 1.0), direction) for name, direction in directions.items()]
    return statistics.fmean(ratios), geometric_mean(ratios)


def differs(a: Spread, b: Spread, *, by: float = 2.0) -> bool | None:
    """Whether two means are further apart than `by` standard deviations of the difference between two runs.

    That is `by` times the root of the sum of both variances. None where a side has one run, so no deviation.
    """
    if a.sd is None or b.sd is None:
        return None
    return abs(a.mean - b.mean) > by * math.hypot(a.sd, b.sd)
