"""Schedules: both ways of writing them, their values at 0, in the middle, at the end and beyond, and their mistakes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import Config, UserError, build, override, resolved
from tokenkit.objective import LossesConfig, Objective
from tokenkit.schedule import Schedule


class Holder(Config):
    schedule: Schedule | None = None


def schedule(value):
    return build(Holder, {"schedule": value}).schedule


@pytest.mark.parametrize(
    "text, values",
    [
        ("linear(0,1,1000)", (0, 0.5, 1, 1)),
        ("linear(2, 0.5, 1000)", (2, 1.25, 0.5, 0.5)),
        ("linear(1000)", (0, 0.5, 1, 1)),
        ("constant(0.3)", (0.3, 0.3, 0.3, 0.3)),
        ("constant", (1, 1, 1, 1)),
        ("cosine(1000)", (1, 0.5, 0, 0)),
        ("cosine(0.2,1,1000)", (0.2, 0.6, 1, 1)),
        ("reverse_cosine(1000)", (0, 0.5, 1, 1)),
    ],
)
def test_values_at_the_start_the_middle_the_end_and_beyond(text, values):
    assert [schedule(text).at(step, 7) for step in (0, 500, 1000, 5000)] == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("step", [0, 1, 13, 40])
def test_the_published_forms(step):
    """w s/S, w (1 + cos(pi s/S))/2 and w (1 - cos(pi s/S))/2 over all steps of a run."""
    weight, steps = 0.7, 40
    wave = math.cos(math.pi * step / steps)
    assert weight * schedule("linear").at(step, steps) == pytest.approx(weight * step / steps)
    assert weight * schedule("cosine").at(step, steps) == pytest.approx(weight * (1 + wave) / 2)
    assert weight * schedule("reverse_cosine").at(step, steps) == pytest.approx(weight * (1 - wave) / 2)


def test_keys_say_the_same_as_a_call():
    assert schedule({"kind": "linear", "start": 0, "end": 1, "steps": 1000}) == schedule("linear(0,1,1000)")
    assert schedule({"kind": "cosine", "steps": 9}) == schedule(" cosine( 9 ) ")
    assert schedule({"kind": "constant", "start": 2}) == schedule("constant(2)")


@given(
    st.sampled_from(["linear", "cosine", "reverse_cosine"]), st.floats(0, 10), st.floats(0, 10), st.integers(1, 10**6)
)
@settings(deadline=None, derandomize=True, max_examples=80)
def test_what_is_saved_is_read_back_and_values_stay_between_the_ends(kind, start, end, steps):
    course = schedule(f"{kind}({start!r},{end!r},{steps})")
    assert schedule(resolved(course)) == course
    values = [course.at(step, 1) for step in range(0, 2 * steps, max(1, steps // 7))]
    low, high = sorted((start, end))
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert values == sorted(values, reverse=end < start)


@pytest.mark.parametrize(
    "value",
    ["linear(0,1)", "linear()", "linear(0,1,2,3)", "line(0,1,9)", "linear(0,1,9", "constant(1,2)", 3, ["linear"]],
)
def test_a_malformed_one_is_one_line_with_the_right_form(value):
    with pytest.raises(UserError, match=r"schedule: a schedule is linear\(0,1,1000\), constant\(1\), cosine") as caught:
        schedule(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, words",
    [
        ("linear(0,1,0)", "schedule.steps: input should be greater"),
        ("linear(0,1,soon)", "schedule.steps: input should be a valid integer.*not 'soon'"),
        ("linear(-1,1,9)", "schedule.start: input should be greater"),
        ({"kind": "linear", "stat": 3}, "schedule.stat: unknown key; did you mean 'start'"),
        ({"kind": "constant", "start": 1, "end": 2}, "a constant schedule has a start and nothing else"),
    ],
)
def test_a_wrong_value_is_named(value, words):
    with pytest.raises(UserError, match=words) as caught:
        schedule(value)
    assert "\n" not in str(caught.value)


def test_a_run_files_weight_is_multiplied_by_its_schedule():
    values = {"losses": {"alm": {"weight": 0.8}, "clm": {}}}
    override(values, "losses.alm.schedule=linear(0,1,1000)")
    objective = Objective.of(build(LossesConfig, values["losses"]))
    assert objective.weights_at(0, 5000) == {"alm": 0.0, "clm": 1.0}
    assert objective.weights_at(250, 5000) == pytest.approx({"alm": 0.2, "clm": 1.0})
    assert objective.weights_at(4000, 5000) == pytest.approx({"alm": 0.8, "clm": 1.0})
    assert objective.weights() == {"alm": 0.8, "clm": 1.0}


def test_braces_tear_a_schedule_apart_unless_it_is_quoted():
    values = {}
    override(values, "alm={weight: 0.8, schedule: linear(0,1,1000)}")
    with pytest.raises(UserError, match=r"alm: a schedule ends with `\)` and inside \{...\} stands in quotes"):
        build(LossesConfig, values)
    override(values, "alm={weight: 0.8, schedule: 'linear(0,1,1000)'}")
    assert build(LossesConfig, values).alm.schedule == schedule("linear(0,1,1000)")
