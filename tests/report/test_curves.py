"""Metrics files: what is read, what survives thinning, where the ticks lie."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.report.curves import Line, draw, read_metrics, smooth, thin, ticks

numbers = st.floats(-1e6, 1e6)
fuzz = settings(deadline=None, derandomize=True, max_examples=60)


def read(folder: Path, text: str) -> dict[str, list[tuple[float, float]]]:
    path = folder / "metrics.jsonl"
    path.write_text(text, "utf-8")
    return read_metrics(path, ["loss", "bits_per_byte"])


def test_nan_is_skipped_and_a_cut_off_end_tolerated(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 2}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": Infinity}\n'
    text += '{"step": 3, "bits_per_byte": 1.5}\n{"step": 4, "loss": null}\n{"step": 5, "lo'
    assert read(tmp_path, text) == {"loss": [(1.0, 2.0)], "bits_per_byte": [(3.0, 1.5)]}


def test_a_resumed_step_counts_once(tmp_path: Path) -> None:
    text = '{"step": 2, "loss": 9}\n{"step": 3, "loss": 9}\n{"step": 2, "loss": 5}\n'
    assert read(tmp_path, text)["loss"] == [(2.0, 5.0), (3.0, 9.0)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read(tmp_path, '{"step": 1, "loss": 2}\n[]\n{"step": 2, "loss": 2}\n')


@fuzz
@given(values=st.lists(numbers, min_size=1, max_size=400), most=st.integers(4, 60))
def test_thinning_keeps_ends_order_and_extremes(values: list[float], most: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= most
    assert [kept[0], kept[-1]] == [points[0], points[-1]]
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert set(kept) <= set(points)
    assert {max(value for _, value in kept), min(value for _, value in kept)} == {max(values), min(values)}


@fuzz
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_and_inside(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    assert 3 <= len(marks) <= 11
    assert all(low <= mark <= low + span for mark in marks)


@fuzz
@given(low=st.floats(1e-6, 1e3), factor=st.floats(8.0, 1e9))
def test_log_ticks_are_few_and_inside(low: float, factor: float) -> None:
    marks = ticks(low, low * factor, log=True)
    assert 2 <= len(marks) <= 12
    assert all(low <= mark <= low * factor for mark in marks)


def test_the_mean_of_a_straight_line_is_the_line() -> None:
    points = [(float(step), 3.0 * step) for step in range(300)]
    assert [value for _, value in smooth(points)][50:250] == pytest.approx([value for _, value in points][50:250])


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [2.0] * 50, [-1.0, 3.0], [1e-9, 1e9]])
def test_degenerate_curves_are_drawn_with_finite_places(values: list[float]) -> None:
    svg = str(draw("loss", [Line("a", "alm", 0, [(float(s), v) for s, v in enumerate(values)])]).svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert svg.count('class="curve alm dash0"') == 1
