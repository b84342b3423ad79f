"""Scores over metrics of different directions, and what counts as a difference."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenkit.eval.summary import FLOOR, Spread, differs, geometric_mean, ratio, score, spread

NUMBERS = st.floats(1e-3, 1e3)


@given(NUMBERS, NUMBERS)
def test_a_ratio_is_one_at_the_reference_and_better_is_more(value, reference):
    assert ratio(value, value, "min") == ratio(value, value, "max") == 1
    assert ratio(value, reference, "max") == pytest.approx(1 / ratio(value, reference, "min"))
    assert (ratio(value, reference, "min") > 1) == (value < reference)


@given(st.lists(NUMBERS, min_size=1, max_size=5), NUMBERS)
def test_the_geometric_mean(values, factor):
    assert geometric_mean(values) == pytest.approx(math.prod(values) ** (1 / len(values)), rel=1e-9)
    assert geometric_mean([factor * v for v in values]) == pytest.approx(factor * geometric_mean(values), rel=1e-9)
    assert geometric_mean([0.0, *values]) == 0


def test_zeros_and_negative_numbers():
    assert ratio(0.0, 2.0, "max") == FLOOR / 2
    assert ratio(0.0, 2.0, "min") == 2 / FLOOR
    assert ratio(2.0, 0.0, "max") == 2 / FLOOR
    assert ratio(0.0, 0.0, "min") == 1
    with pytest.raises(ValueError, match=r"the value is -1\.0"):
        ratio(-1.0, 1.0, "max")
    with pytest.raises(ValueError, match="the reference is nan"):
        ratio(1.0, math.nan, "max")


def test_a_score_by_hand():
    teacher = {"bits_per_byte": 1.0, "accuracy": 0.8}
    directions = {"bits_per_byte": "min", "accuracy": "max"}
    mean, geometric = score({"bits_per_byte": 1.25, "accuracy": 0.4}, teacher, directions)
    assert mean == pytest.approx((0.8 + 0.5) / 2)
    assert geometric == pytest.approx(math.sqrt(0.8 * 0.5))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=4), NUMBERS, NUMBERS)
def test_references_do_not_change_the_order(runs, a, b):
    directions = {"x": "min", "y": "max"}

    def order(references):
        scores = [score({"x": x, "y": y}, references, directions)[1] for x, y in runs]
        return [round(math.log(s / scores[0]), 6) for s in scores]

    assert order({}) == pytest.approx(order({"x": a, "y": b}), abs=1e-5)


def test_differences():
    assert spread([1.0, 3.0]) == Spread(2.0, math.sqrt(2), 2)
    assert spread([5.0]) == Spread(5.0, None, 1)
    low, high = Spread(1.0, 0.3, 3), Spread(2.01, 0.4, 3)  # 2 deviations of the difference are 1.0
    assert differs(low, high) is True
    assert differs(low, Spread(1.99, 0.4, 3)) is False
    assert differs(low, Spread(9.0, None, 1)) is None
