"""`tokenkit study`: objectives beside plain training, over seeds and budgets, and which differences are real."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

from pydantic import Field, model_validator

from tokenkit.config import UserError
from tokenkit.eval.summary import Spread, differs
from tokenkit.report.sweep import Row, RunFigures, SweepTable, as_json, csv_text, markdown_rows, shown, sweep_table
from tokenkit.report.tables import markdown_table
from tokenkit.train.folder import write_json, write_text
from tokenkit.verbs.figures import figures, teacher_references
from tokenkit.verbs.points import read_base
from tokenkit.verbs.runner import Outcome
from tokenkit.verbs.sweep import Comparison, compare, points_of

STEPS, LOSSES = "train.steps", "losses"
BASELINE = "cross-entropy"


class StudyRun(Comparison):
    """A run file of `tokenkit study`: every objective with every budget and seed, and plain training beside them."""

    seeds: list[int] = Field([0, 1], min_length=2)
    """At least two: without them no difference can be told from chance."""
    objectives: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name: the `losses` section of its runs. Plain training is added as `cross-entropy` where none of them is that."""
    budgets: list[int] = Field(min_length=1)
    """Optimizer steps (`train.steps`); within a budget all runs read the same rows."""
    standard_deviations: float = Field(2.0, gt=0)
    """A difference of means counts from so many standard deviations of the difference between two runs."""

    @model_validator(mode="after")
    def _distills(self) -> "StudyRun":
        if self.verb != "distill":
            raise UserError("verb: a study is of objectives, which pretrain has none of; write verb=distill")
        return self

    def named(self) -> dict[str, dict[str, Any]]:
        """The objectives, plain training the first of them."""
        plain = {"clm": {}}
        if any(set(losses) == set(plain) for losses in self.objectives.values()):
            return self.objectives
        if BASELINE in self.objectives:
            raise UserError(f"objectives.{BASELINE}: is more than clm; choose another name for it")
        return {BASELINE: plain, **self.objectives}


def study(run: StudyRun, *, quiet: bool = False) -> dict[str, Any]:
    """Does what is missing, writes a table per budget and the differences; what is printed of them."""
    named = run.named()
    entries = [
        {"name": f"{name}, {steps} steps", LOSSES: losses, STEPS: steps}
        for steps in run.budgets
        for name, losses in named.items()
    ]
    points, _ = points_of(run.verb, read_base(run.base), entries, run.seeds)
    outcomes = compare(run, points, quiet=quiet)
    names = {f"{name}, {steps} steps": name for steps in run.budgets for name in named}
    tables, runs = {}, []
    for steps in run.budgets:
        some = [o for o in outcomes if o.point.changes[STEPS] == steps]
        tables[steps], found = _table(run, some, names)
        runs += found
    said = {steps: differences(table, run.standard_deviations) for steps, table in tables.items()}
    _write(run, tables, runs, said)
    counts = {s: sum(o.status == s for o in outcomes) for s in ("done", "stopped", "failed")}
    failures = {o.point.id: {"error": o.error, "traceback": str(o.log)} for o in outcomes if o.status == "failed"}
    rows = {f"{steps} steps": {row.name: _cells(row) for row in table.rows} for steps, table in tables.items()}
    return {
        **counts,
        "rows": rows,
        "differences": {f"{steps} steps": lines for steps, lines in said.items()},
        **({"failures": failures} if failures else {}),
        "table": str(run.output / "table.md"),
    }


def _table(run: StudyRun, outcomes: Sequence[Outcome], names: dict[str, str]) -> tuple[SweepTable, list[RunFigures]]:
    """The table of one budget, with the angles between the gradients of the losses where runs measured them."""
    losses = sorted({name for objective in run.named().values() for name in objective})
    also = [*run.also, *(f"gradient_cosine/{a}/{b}" for a, b in permutations(losses, 2))]
    metrics = list(run.metrics)
    found = [figures(outcome, metrics, also, run.equal) for outcome in outcomes]
    found = [replace(one, name=names[one.name]) for one in found]
    references = {**teacher_references(outcomes, metrics), **run.references}
    table = sweep_table(found, run.metrics, unit=run.equal, references=references, ranked_by="final")
    return table, found


def differences(table: SweepTable, by: float) -> list[str]:
    """A sentence per metric and pair of objectives that differ by more than `by` deviations, or that none do."""
    lines, undecided = [], []
    for name, direction in table.metrics.items():
        known = [(row.name, row.values[name]["final"]) for row in table.rows if "final" in row.values[name]]
        for first, second in combinations(known, 2):
            real = differs(first[1], second[1], by=by)
            if real is None:
                undecided.append(f"{first[0]} and {second[0]}")
            elif real:
                (good, low), (bad, high) = sorted(
                    (first, second), key=lambda one: one[1].mean, reverse=direction == "max"
                )
                lines.append(f"{name}: {good} ({shown(low)}) is better than {bad} ({shown(high)})")
    if undecided:
        lines.append(f"not decided, since a side has a single finished run: {', '.join(dict.fromkeys(undecided))}")
    return lines or [f"no difference exceeds {by:g} standard deviations"]


def _cells(row: Row) -> dict[str, str]:
    values: dict[str, Spread | None] = {name: many.get("final") for name, many in row.values.items()}
    return {name: shown(value) for name, value in {**values, **row.also}.items()}


def _write(
    run: StudyRun, tables: dict[int, SweepTable], runs: Sequence[RunFigures], said: dict[int, list[str]]
) -> None:
    budgets = {str(steps): {**as_json(table, []), "differences": said[steps]} for steps, table in tables.items()}
    whole = {"budgets": budgets, "runs": as_json(next(iter(tables.values())), runs)["runs"]}
    write_json(run.output / "results.json", whole)
    parts = [
        f"# {run.output.name}\n",
        f"Means ± standard deviations over {len(run.seeds)} seeds, after the same rows of text. A difference counts "
        f"from {run.standard_deviations:g} standard deviations of the difference between two runs, the root of the sum "
        "of both variances; from few seeds such a deviation is itself rough.\n",
    ]
    for steps, table in tables.items():
        csv_path = run.output / f"table_{steps}_steps.csv"
        write_text(csv_path, csv_text(table))
        lines = "".join(f"- {line}\n" for line in said[steps])
        parts += [f"## {steps:,} steps\n", markdown_table(markdown_rows(table)), lines]
        parts += [f"- failed: {one.id}: {one.error} (traceback: {one.log})\n" for one in table.failures]
    write_text(run.output / "table.md", "\n".join(parts))
