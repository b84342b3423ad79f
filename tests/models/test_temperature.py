"""A schedule begins where it says, goes one way, and ends where it says, exactly and for good."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenkit.config import UserError, build, dump_yaml, parse_yaml, resolved
from tokenkit.models.temperature import Temperature, TemperatureConfig

MOVING = ["linear", "exponential", "cosine", "inverse"]


def schedule(horizon: int, **keys) -> Temperature:
    return build(TemperatureConfig, keys).over(horizon)


def ends(kind: str, start: float, end: float, horizon: int, **keys) -> Temperature:
    if kind == "piecewise":
        return schedule(horizon, kind=kind, points=[(0, start), (max(horizon - 1, 1), end)])
    return schedule(horizon, kind=kind, start=start, end=end, **keys)


hot = st.floats(1e-3, 1e3)


@given(st.sampled_from([*MOVING, "first_then", "piecewise"]), hot, hot, st.integers(1, 2000), st.floats(1, 50))
def test_laws_of_every_schedule(kind, start, end, horizon, speed):
    made = ends(kind, start, end, horizon, **({"speed": speed} if kind in MOVING else {}))
    numbers = sorted({*range(min(horizon, 40)), *range(max(0, horizon - 3), horizon + 5), horizon // 2, 10 * horizon})
    values = [made(n) for n in numbers]
    assert values[0] == start
    assert all(made(n) == end for n in numbers if n >= max(horizon - 1, 1))
    steps = [b - a for a, b in pairwise(values)]
    assert all(step <= 0 for step in steps) if start >= end else all(step >= 0 for step in steps)
    assert min(values) > 0
    assert all(math.isfinite(value) for value in values)


def test_one_token_is_drawn_at_the_start():
    for kind in (*MOVING, "first_then", "piecewise"):
        made = ends(kind, 7.0, 0.5, 1)
        assert (made(0), made(1), made(100)) == (7.0, 0.5, 0.5)


def test_a_fast_decay_stops_where_it_says():
    made = schedule(1024, kind="exponential", start=100, end=0.5, speed=20)
    assert min(made(n) for n in range(5000)) == 0.5
    assert made(51) > 0.5
    assert made(52) == 0.5


def test_formulas_in_the_middle():
    middle = {
        "linear": 5.5,
        "exponential": math.sqrt(10 * 1),
        "cosine": 5.5,
        "inverse": 1 + 9 * (1 / (1 + 9 / 2) - 1 / 10) / (1 - 1 / 10),  # 1 / (1 + bend u), moved and scaled to [0, 1]
    }
    for kind, value in middle.items():
        assert schedule(101, kind=kind, start=10, end=1)(50) == pytest.approx(value, rel=1e-12)
    assert schedule(101, kind="cosine", start=10, end=1)(25) == pytest.approx(1 + 4.5 * (1 + math.sqrt(0.5)))
    made = schedule(101, kind="piecewise", points=[[0, 10], [4, 2], [5, 1]])
    assert [made(n) for n in range(7)] == [10, 8, 6, 4, 2, 1, 1]
    made = schedule(101, kind="first_then", start=10, end=0.5, first=3)
    assert [made(n) for n in range(5)] == [10, 10, 10, 0.5, 0.5]


def test_stretches_of_one_temperature():
    assert schedule(8, kind="first_then", start=10, end=0.5).phases(8) == [(0, 1, 10), (1, 8, 0.5)]
    assert build(TemperatureConfig, {"start": 1.0}).over(8).phases(5) == [(0, 5, 1.0)]
    assert len(schedule(8, kind="linear", start=10, end=1).phases(8)) == 8


def test_a_number_is_a_constant_and_what_is_printed_is_read_again():
    for value in (0.7, 0, 1):
        config = TemperatureConfig.model_validate(value)
        assert config.over(5)(3) == value
    for keys in (
        {"start": 1.0},
        {"kind": "first_then", "start": 10, "end": 0.5},
        {"kind": "piecewise", "points": [[0, 3], [5, 0.5]]},
    ):
        config = build(TemperatureConfig, keys)
        assert build(TemperatureConfig, parse_yaml(dump_yaml(resolved(config)))) == config
    made = schedule(1024, kind="exponential", start=100, end=0.5, speed=20)
    assert repr(made) == "exponential(start=100.0, end=0.5, speed=20.0, horizon=1024)"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "linear", "start": 1}, "temperature.end: missing"),
        ({"kind": "constant", "start": 1, "end": 2}, "temperature.end: means nothing to constant"),
        ({"kind": "linear", "start": 1, "end": 2, "first": 3}, "temperature.first: means nothing to linear"),
        ({"kind": "exponential", "start": 0, "end": 2}, "0 only with kind=constant"),
        ({"kind": "exponential", "start": 2, "end": 0}, "greater than 0"),
        ({"kind": "piecewise"}, "temperature.points: missing"),
        ({"kind": "piecewise", "points": [[1, 2]]}, "do not rise from 0"),
        ({"kind": "piecewise", "points": [[0, 2], [0, 1]]}, "do not rise from 0"),
        ({"kind": "piecewise", "points": [[0, 2], [1, 0]]}, "not above 0"),
        ({"kind": "linear", "start": 1, "end": 2, "speed": 0.5}, "speed"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        build(TemperatureConfig, keys)
    assert "\n" not in str(caught.value)


def test_a_schedule_that_would_not_be_over():
    with pytest.raises(UserError, match="token 5 of 4 new ones"):
        schedule(4, kind="first_then", start=2, end=1, first=5)
    with pytest.raises(UserError, match="token 4 of 4 new ones"):
        schedule(4, kind="piecewise", points=[[0, 2], [4, 1]])
