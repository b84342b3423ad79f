"""A sweep as tables: every metric at the end, at equal tokens and at equal optimizer steps; means over seeds.

A small batch makes more steps of the same text than a large one. So "better" is said twice: after the same amount of
text, and after the same number of updates; each time the smallest that a run of the sweep ended with.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from tokenkit.eval.summary import Direction, Spread, score, spread

At = Literal["final", "amount", "steps"]
Unit = Literal["tokens", "bytes"]
TOLERANCE = 0.02
"""A measurement this close to an amount of text counts as taken there: batches are not cut to fit."""


@dataclass(frozen=True)
class Reading:
    """A metric's value after so many steps on so much text (`amount`: tokens or bytes)."""

    step: float
    amount: float
    value: float


@dataclass(frozen=True)
class RunFigures:
    """What is known of one run; of a failed one also where its traceback lies."""

    id: str
    name: str
    group: str
    seed: int
    status: str
    folder: str
    error: str | None = None
    log: str | None = None
    readings: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    """Per metric, in order of steps."""
    also: Mapping[str, float] = field(default_factory=dict)
    """Other figures of the run, such as seconds per step."""

    @property
    def reach(self) -> Reading | None:
        """The last measurement of any metric: how far the run came."""
        return max((many[-1] for many in self.readings.values() if many), key=lambda r: r.step, default=None)


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but the seed."""

    name: str
    runs: int
    failed: int
    steps: float | None
    amount: float | None
    values: dict[str, dict[str, Spread]]
    """Metric, then `final`, `amount`, `steps`."""
    score: dict[str, Spread]
    """The geometric mean over the metrics, at each of the three."""
    mean_score: dict[str, Spread]
    also: dict[str, Spread]
    rank: int | None = None


@dataclass(frozen=True)
class SweepTable:
    """Rows, best first, and what "equal" means in them."""

    unit: Unit
    equal_amount: float | None
    equal_steps: float | None
    ranked_by: At
    metrics: dict[str, Direction]
    references: dict[str, float]
    rows: list[Row]
    failures: list[RunFigures]


def value_at(readings: Sequence[Reading], by: Literal["amount", "steps"], where: float) -> float | None:
    """The value at an amount of text or a step, in a straight line between measurements; None outside of them."""
    places = [(r.step if by == "steps" else r.amount, r.value) for r in readings]
    slack = TOLERANCE * where if by == "amount" else 0.0
    near = [place for place in places if abs(place[0] - where) <= slack]
    if near:
        return min(near, key=lambda place: abs(place[0] - where))[1]
    for (a, low), (b, high) in pairwise(places):
        if a < where < b:
            return low + (high - low) * (where - a) / (b - a)
    return None


def sweep_table(
    runs: Sequence[RunFigures],
    metrics: Mapping[str, Direction],
    *,
    unit: Unit,
    references: Mapping[str, float],
    ranked_by: At,
) -> SweepTable:
    """The table of all finished runs; the failed ones beside it."""
    reached = [run.reach for run in runs if run.status == "done"]
    amount = min((r.amount for r in reached if r is not None), default=None)
    steps = min((r.step for r in reached if r is not None), default=None)
    groups: dict[str, list[RunFigures]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    rows = [_row(members, metrics, amount, steps, references) for members in groups.values()]
    ranked = sorted((row for row in rows if ranked_by in row.score), key=lambda row: -row.score[ranked_by].mean)
    places = {id(row): place for place, row in enumerate(ranked, 1)}
    ordered = [*ranked, *(row for row in rows if id(row) not in places)]
    return SweepTable(
        unit,
        amount,
        steps,
        ranked_by,
        dict(metrics),
        dict(references),
        [replace(row, rank=places.get(id(row))) for row in ordered],
        [run for run in runs if run.status == "failed"],
    )


def _row(
    members: Sequence[RunFigures],
    metrics: Mapping[str, Direction],
    amount: float | None,
    steps: float | None,
    references: Mapping[str, float],
) -> Row:
    done = [run for run in members if run.status == "done"]
    found = [_values(run, metrics, amount, steps) for run in done]  # per run: place → metric → value
    values: dict[str, dict[str, Spread]] = {name: {} for name in metrics}
    scores, means = {}, {}
    for place in ("final", "amount", "steps"):
        for name in metrics:
            known = [one[place][name] for one in found if name in one[place]]
            if known:
                values[name][place] = spread(known)
        both = [score(one[place], references, metrics) for one in found if len(one[place]) == len(metrics)]
        if both:
            means[place], scores[place] = (spread(column) for column in zip(*both))
    also = {name: [run.also[name] for run in done if name in run.also] for run in done for name in run.also}
    reached = [reach for run in done if (reach := run.reach) is not None]
    return Row(
        name=members[0].name,
        runs=len(done),
        failed=sum(run.status == "failed" for run in members),
        steps=spread([r.step for r in reached]).mean if reached else None,
        amount=spread([r.amount for r in reached]).mean if reached else None,
        values=values,
        score=scores,
        mean_score=means,
        also={name: spread(many) for name, many in also.items()},
    )


def _values(
    run: RunFigures, metrics: Mapping[str, Direction], amount: float | None, steps: float | None
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"final": {}, "amount": {}, "steps": {}}
    for name in metrics:
        readings = run.readings.get(name, ())
        if not readings:
            continue
        places = {
            "final": readings[-1].value,
            "amount": None if amount is None else value_at(readings, "amount", amount),
            "steps": None if steps is None else value_at(readings, "steps", steps),
        }
        for place, value in places.items():
            if value is not None:
                found[place][name] = value
    return found


def csv_text(table: SweepTable) -> str:
    """One line per row of the table; empty cells where nothing is known."""
    places = {"final": "", "amount": f"@{table.unit}", "steps": "@steps"}
    records = []
    for row in table.rows:
        record: dict[str, Any] = {"rank": row.rank, "run": row.name, "runs": row.runs, "failed": row.failed}
        record |= {"steps": row.steps, table.unit: row.amount}
        for place, suffix in places.items():
            for title, many in (("geometric_mean", row.score), ("mean", row.mean_score)):
                record |= _cells(f"{title}{suffix}", many.get(place))
            for name in table.metrics:
                record |= _cells(f"{name}{suffix}", row.values[name].get(place))
        for name in _also(table):
            record |= _cells(name, row.also.get(name))
        records.append(record)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else ["rank", "run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _cells(title: str, value: Spread | None) -> dict[str, float | None]:
    return {title: value.mean if value else None, f"{title}_sd": value.sd if value else None}


def _also(table: SweepTable) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for name in row.also))


def markdown_rows(table: SweepTable) -> list[list[str]]:
    """A header, then one row per run of the sweep, mean ± deviation over its seeds."""
    places: dict[At, str] = {"final": "at the end", "amount": f"equal {table.unit}", "steps": "equal steps"}
    measured = [(name, place, f"{name}, {title}") for name in table.metrics for place, title in places.items()]
    also = _also(table)
    header = ["rank", "run", "runs", "steps", table.unit, *(f"score, {title}" for title in places.values())]
    rows = [[*header, *(title for *_, title in measured), *also]]
    for row in table.rows:
        cells = [_whole(row.rank), row.name, _runs(row), _whole(row.steps), _whole(row.amount)]
        cells += [shown(row.score.get(place)) for place in places]
        cells += [shown(row.values[name].get(place)) for name, place, _ in measured]
        rows.append(cells + [shown(row.also.get(name)) for name in also])
    return rows


def _runs(row: Row) -> str:
    return f"{row.runs}, {row.failed} failed" if row.failed else str(row.runs)


def _whole(value: int | float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def shown(value: Spread | None) -> str:
    """Mean ± deviation, to four significant digits of the mean."""
    if value is None:
        return "–"
    digits = 3 if value.mean == 0 else max(0, min(6, 3 - math.floor(math.log10(abs(value.mean)))))
    return f"{value.mean:.{digits}f}" + ("" if value.sd is None else f" ± {value.sd:.{digits}f}")


def markdown_page(title: str, table: SweepTable, rows: str) -> str:
    """The table with what its columns mean, and the failed runs."""
    equal = "" if table.equal_amount is None else f" Equal {table.unit}: {table.equal_amount:,.0f}"
    equal += "" if table.equal_steps is None else f"; equal steps: {table.equal_steps:,.0f}."
    better = {"max": "higher is better", "min": "lower is better"}
    directions = ", ".join(f"{name} ({better[direction]})" for name, direction in table.metrics.items())
    given = ", ".join(f"{name} {value:.4g}" for name, value in table.references.items())
    beside = f"beside {given}" if given else "by itself, without a reference"
    by = {"final": "at the end", "amount": f"at equal {table.unit}", "steps": "at equal steps"}[table.ranked_by]
    lines = [
        f"# {title}\n",
        f"{directions}.{equal} Score: geometric mean over the metrics of how good each is {beside}; higher is better, "
        f"ranked {by}. ± is the standard deviation over seeds. Where a run was not measured at a place, the value lies "
        "on a straight line between its neighbours. A run that goes on after a place had not come to the end of its "
        "schedule there.\n",
        rows,
    ]
    if table.failures:
        lines += ["## Failed\n", *(f"- {run.id}: {run.error} (traceback: {run.log})" for run in table.failures), ""]
    return "\n".join(lines)


def as_json(table: SweepTable, runs: Sequence[RunFigures]) -> dict[str, Any]:
    """The table, and every run with all of its readings."""
    return {**asdict(table), "runs": [asdict(run) for run in runs]}
