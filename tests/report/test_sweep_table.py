"""The table of a sweep, from figures made by hand: what is equal, what is between, what is not known."""

import csv
import io

import pytest

from tokenkit.report.sweep import Reading, RunFigures, csv_text, markdown_page, markdown_rows, sweep_table, value_at

LINE = [Reading(0.0, 0.0, 4.0), Reading(10.0, 100.0, 2.0), Reading(20.0, 200.0, 1.0)]


def test_values_at_a_place():
    assert value_at(LINE, "steps", 10.0) == 2.0
    assert value_at(LINE, "steps", 15.0) == 1.5
    assert value_at(LINE, "amount", 150.0) == 1.5
    assert value_at(LINE, "amount", 202.0) == 1.0  # a batch is not cut to fit
    assert value_at(LINE, "amount", 210.0) is None
    assert value_at(LINE, "steps", 21.0) is None
    assert value_at(LINE[1:], "steps", 5.0) is None
    assert value_at([], "steps", 5.0) is None


def run(name, seed, readings, status="done", **more):
    return RunFigures(f"{name}-{seed}", name, name, seed, status, "f", readings={"m": readings}, **more)


@pytest.fixture
def runs():
    """Batches of 4 and 16: the small one makes four times the steps of the same text."""
    small = [[Reading(10.0, 100.0, 3.0 + s), Reading(40.0, 400.0, 1.0 + s)] for s in (0, 0.2)]
    large = [[Reading(10.0, 400.0, 2.0 + s)] for s in (0, 0.2)]
    failed = run("small", 2, [], "failed", error="boom", log="logs/x.log")
    return [
        *(run("large", s, r) for s, r in enumerate(large)),
        *(run("small", s, r) for s, r in enumerate(small)),
        failed,
    ]


def table(runs, by="amount", metrics=None):
    return sweep_table(runs, metrics or {"m": "min"}, unit="tokens", references={"m": 2.0}, ranked_by=by)


def test_equal_text_and_equal_steps_say_different_things(runs):
    by_text, by_steps = table(runs), table(runs, "steps")
    assert (by_text.equal_amount, by_text.equal_steps) == (400, 10)
    assert [row.name for row in by_text.rows] == ["small", "large"]
    assert [row.name for row in by_steps.rows] == ["large", "small"]
    small = by_text.rows[0]
    assert {place: value.mean for place, value in small.values["m"].items()} == pytest.approx(
        {"final": 1.1, "amount": 1.1, "steps": 3.1}
    )
    assert small.values["m"]["final"].sd == pytest.approx(0.2 / 2**0.5)
    assert small.score["amount"].mean == pytest.approx((2 / 1.0 + 2 / 1.2) / 2)
    assert (small.runs, small.failed, [f.log for f in by_text.failures]) == (2, 1, ["logs/x.log"])


def test_what_is_written(runs):
    found = table(runs)
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [(row["rank"], row["run"], float(row["m@steps"])) for row in rows] == [
        ("1", "small", 3.1),
        ("2", "large", 2.1),
    ]
    page = markdown_page("t", found, "TABLE")
    assert "Equal tokens: 400; equal steps: 10." in page
    assert "small-2: boom (traceback: logs/x.log)" in page
    assert "2, 1 failed" in [cell for row in markdown_rows(found) for cell in row]


def test_a_run_without_a_metric_has_no_rank(runs):
    found = table(runs, metrics={"m": "min", "other": "max"})
    assert [row.rank for row in found.rows] == [None, None]
    assert all("–" in row for row in markdown_rows(found)[1:])
    nothing = table([run("small", 0, [], "failed", error="e", log="l")])
    assert nothing.equal_amount is None
    assert csv_text(nothing).count("\n") == 2
