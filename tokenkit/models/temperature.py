"""The temperature of each token of a sample: a pure function of its number, in a run file a number or keys.

`T(n)` is the temperature of the n-th new token, counted from 0, of at most `horizon` tokens. Every kind begins at
`start` exactly, goes one way, is `end` exactly from token `horizon - 1` on and stays there. With a horizon of one token
that token is drawn at `start`, and `end` is what would follow.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError

Kind = Literal["constant", "first_then", "linear", "exponential", "cosine", "inverse", "piecewise"]
KEYS: dict[str, tuple[str, ...]] = {  # what each kind reads
    "constant": ("start",),
    "first_then": ("start", "end", "first"),
    "linear": ("start", "end", "speed"),
    "exponential": ("start", "end", "speed"),
    "cosine": ("start", "end", "speed"),
    "inverse": ("start", "end", "speed", "bend"),
    "piecewise": ("points",),
}
NEEDED = {"start", "end", "points"}


class TemperatureConfig(Config):
    """How hot each new token is drawn: a number, or `{kind: exponential, start: 100, end: 0.5, speed: 20}`."""

    kind: Kind = "constant"
    start: float | None = Field(None, ge=0)
    """Temperature of the first token. 0, of `constant` alone, takes the likeliest token."""
    end: float | None = Field(None, gt=0)
    """Temperature that is reached, and kept."""
    first: int = Field(1, ge=1)
    """Of `first_then`: how many tokens are drawn at `start`; all others are drawn at `end`."""
    speed: float = Field(1.0, ge=1)
    """`end` is reached after the horizon over this: with 20, after a twentieth of it."""
    bend: float = Field(9.0, gt=0)
    """Of `inverse`: how much faster than a line it begins; towards 0 it is a line."""
    points: tuple[tuple[int, float], ...] = ()
    """Of `piecewise`: (token, temperature), tokens rising from 0; straight lines between them."""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"start": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _keys(self) -> "TemperatureConfig":
        values = self.model_dump(exclude={"kind"})
        given = [key for key, value in values.items() if value != type(self).model_fields[key].default]
        wrong = [key for key in given if key not in KEYS[self.kind]]
        missing = [key for key in KEYS[self.kind] if key in NEEDED and key not in given]
        if wrong:
            raise UserError(f"temperature.{wrong[0]}: means nothing to {self.kind}, which has {_list(self.kind)}")
        if missing:
            raise UserError(f"temperature.{missing[0]}: missing; {self.kind} has {_list(self.kind)}")
        if self.kind != "constant" and self.start == 0:
            raise UserError("temperature.start: 0 only with kind=constant; write a small number, such as 0.01")
        if self.kind == "piecewise":
            _check_points(self.points)
        return self

    def over(self, horizon: int) -> "Temperature":
        """The schedule over so many tokens; UserError where it would not be over by then."""
        last = {"first_then": self.first, "piecewise": self.points[-1][0] if self.points else 0}.get(self.kind, 0)
        if last > max(horizon - 1, 1):
            key = "first" if self.kind == "first_then" else "points"
            raise UserError(
                f"temperature.{key}: token {last} of {horizon} new ones; the last one is {horizon - 1}, write less"
            )
        return Temperature(self, horizon)


def _list(kind: str) -> str:
    return ", ".join(KEYS[kind])


def _check_points(points: tuple[tuple[int, float], ...]) -> None:
    tokens = [token for token, _ in points]
    if not points or tokens[0] != 0 or any(a >= b for a, b in pairwise(tokens)):
        raise UserError(f"temperature.points: tokens {tokens} do not rise from 0; write [[0, 10], [4, 1], [64, 0.5]]")
    if any(value <= 0 for _, value in points):
        raise UserError(f"temperature.points: {min(value for _, value in points)} is not above 0; write 0.01 or more")


@dataclass(frozen=True)
class Temperature:
    """A schedule over a number of tokens: call it with the number of a new token."""

    config: TemperatureConfig
    horizon: int

    def __call__(self, n: int) -> float:
        """The temperature of new token `n`, counted from 0; defined for every one beyond the horizon too."""
        config = self.config
        if config.kind == "piecewise":
            return piecewise(n, config.points)
        start = config.start
        assert start is not None
        if config.kind == "constant":
            return start
        end = config.end
        assert end is not None
        if config.kind == "first_then":
            return first_then(n, start, end, config.first)
        share = progress(n, self.horizon, config.speed)
        if share >= 1:
            return end
        curve = partial(inverse, bend=config.bend) if config.kind == "inverse" else CURVES[config.kind]
        return min(max(curve(share, start, end), min(start, end)), max(start, end))  # a rounding error is no step back

    def phases(self, count: int) -> list[tuple[int, int, float]]:
        """(first token, end, temperature) of the stretches of `count` tokens that are drawn at one temperature."""
        found: list[tuple[int, int, float]] = []
        for n in range(count):
            value = self(n)
            if found and found[-1][2] == value:
                found[-1] = (found[-1][0], n + 1, value)
            else:
                found.append((n, n + 1, value))
        return found

    def __repr__(self) -> str:
        config = self.config
        keys = [f"{key}={config.__dict__[key]}" for key in KEYS[config.kind]]
        return f"{config.kind}({', '.join(keys)}, horizon={self.horizon})"


def progress(n: int, horizon: int, speed: float = 1.0) -> float:
    """How much of the way is gone at token n, in [0, 1]: 0 at the first token, 1 from the last one on."""
    return min(n * speed / max(horizon - 1, 1), 1.0)


def first_then(n: int, start: float, end: float, first: int = 1) -> float:
    """`start` for the first tokens, `end` for all others."""
    return start if n < first else end


def linear(share: float, start: float, end: float) -> float:
    """A straight line."""
    return start + (end - start) * share


def exponential(share: float, start: float, end: float) -> float:
    """The same ratio at every token: a straight line of the logarithm."""
    return start * (end / start) ** share


def cosine(share: float, start: float, end: float) -> float:
    """Half a wave: slow, fast, slow."""
    return linear((1 - math.cos(math.pi * share)) / 2, start, end)


def inverse(share: float, start: float, end: float, bend: float) -> float:
    """One over a line, scaled so that it ends at `end`: fast first."""
    return linear(share * (1 + bend) / (1 + bend * share), start, end)


def piecewise(n: int, points: tuple[tuple[int, float], ...]) -> float:
    """Straight lines between (token, temperature) points, and the last temperature after them."""
    place = bisect.bisect_right(points, n, key=lambda point: point[0]) - 1
    token, value = points[place]
    if place == len(points) - 1 or n == token:
        return value
    following, aim = points[place + 1]
    return linear((n - token) / (following - token), value, aim)


CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": linear,
    "exponential": exponential,
    "cosine": cosine,
}
