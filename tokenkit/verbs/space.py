"""A space of run-file values: ranges and choices, some of which exist only beside certain values of others."""

import math
import random
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError


class Dimension(Config):
    """A key's values."""

    when: dict[str, Any] = {}
    """The key exists only where these keys, which stand before it, have these values (a list: one of them)."""


class FloatRange(Dimension):
    """A real number between two."""

    kind: Literal["float"]
    low: float
    high: float
    log: bool = False
    """Draw its logarithm evenly."""

    @model_validator(mode="after")
    def _order(self) -> "FloatRange":
        _check(self.low, self.high, self.log)
        return self


class IntRange(Dimension):
    """A whole number between two, both included."""

    kind: Literal["int"]
    low: int
    high: int
    step: int = Field(1, ge=1)
    log: bool = False

    @model_validator(mode="after")
    def _order(self) -> "IntRange":
        _check(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise UserError(f"space: log and step={self.step} exclude each other; leave one out")
        return self


class Choice(Dimension):
    """One of several values, of any shape: a whole section may be a choice."""

    kind: Literal["choice"]
    choices: list[Any] = Field(min_length=1)


AnyDimension = FloatRange | IntRange | Choice
Space = dict[str, Annotated[AnyDimension, Field(discriminator="kind")]]
Draw = Callable[[str, AnyDimension], Any]
"""Where the value of a key comes from: random numbers, or a sampler that learns."""


def _check(low: int | float, high: int | float, log: bool) -> None:
    if low > high:
        raise UserError(f"space: low={low} is above high={high}; exchange them")
    if log and low <= 0:
        raise UserError(f"space: low={low} has no logarithm; write a positive number, or leave log out")


def check_space(space: Space) -> None:
    """UserError where a condition names a key that is not drawn before."""
    for number, (key, dimension) in enumerate(space.items()):
        for other in dimension.when:
            if other not in [*space][:number]:
                raise UserError(f"space.{key}.when: {other!r} does not stand before it in the space; put it there")


def drawn(space: Space, draw: Draw) -> dict[str, Any]:
    """One value per key that exists, in the order of the space."""
    found: dict[str, Any] = {}
    for key, dimension in space.items():
        if all(_holds(found, other, wanted) for other, wanted in dimension.when.items()):
            found[key] = draw(key, dimension)
    return found


def _holds(found: Mapping[str, Any], key: str, wanted: Any) -> bool:
    return key in found and found[key] in (wanted if isinstance(wanted, list) else [wanted])


def random_point(space: Space, seed: int, number: int) -> dict[str, Any]:
    """The point with a number: a function of (seed, number), whatever was drawn before."""
    generator = random.Random(f"{seed}/{number}")

    def draw(key: str, dimension: AnyDimension) -> Any:
        if isinstance(dimension, Choice):
            return dimension.choices[generator.randrange(len(dimension.choices))]
        if isinstance(dimension, FloatRange):
            if dimension.log:
                low, high = math.log(dimension.low), math.log(dimension.high)
                return min(max(math.exp(generator.uniform(low, high)), dimension.low), dimension.high)
            return generator.uniform(dimension.low, dimension.high)
        if dimension.log:  # every whole number owns the stretch of half a unit around it
            low, high = math.log(dimension.low - 0.5), math.log(dimension.high + 0.5)
            return min(max(round(math.exp(generator.uniform(low, high))), dimension.low), dimension.high)
        return generator.randrange(dimension.low, dimension.high + 1, dimension.step)

    return drawn(space, draw)
