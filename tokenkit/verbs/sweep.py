"""`tokenkit sweep`: many runs of one verb, each in its own folder and process, and tables that compare them fairly."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import Field, model_validator

from tokenkit.config import Config, UserError, read_run_file, resolved
from tokenkit.eval.summary import Direction
from tokenkit.report.sweep import (
    At,
    RunFigures,
    SweepTable,
    Unit,
    as_json,
    csv_text,
    markdown_page,
    markdown_rows,
    shown,
    sweep_table,
)
from tokenkit.report.tables import markdown_table
from tokenkit.train.folder import RUN_FILE, RunFolder, write_json, write_text
from tokenkit.verbs.figures import figures, steps_of, teacher_references
from tokenkit.verbs.points import SEED, Point, Verb, beside, crossed, make_point, read_base
from tokenkit.verbs.runner import Outcome, Runner
from tokenkit.verbs.space import Space, check_space, random_point

ALSO = ("time/step", "memory/cpu_peak", "memory/cuda_peak", "tokens_per_second")


class RandomPoints(Config):
    """Points drawn from a space."""

    n: int = Field(ge=1)
    space: Space
    """Per key of the run file `{kind: float, low, high, log}`, `{kind: int, low, high, step, log}` or
    `{kind: choice, choices}`; with `when: {KEY: VALUE}` it exists only beside such values."""
    seed: int = 0

    @model_validator(mode="after")
    def _conditions(self) -> "RandomPoints":
        check_space(self.space)
        return self


class Comparison(Config):
    """What all sweeps share: where the runs go, how they are started, what is compared."""

    output: Path
    verb: Verb = "distill"
    base: Path | dict[str, Any]
    """A run file of the verb, or its keys; its `output` is not used."""
    seeds: list[int] = [0, 1]
    """Every run once per seed (`train.seed`): means and deviations are over them."""
    metrics: dict[str, Direction] = {"bits_per_byte": "min"}
    """Keys of metrics.jsonl or results.json, and which direction is better."""
    references: dict[str, float] = {}
    """What a metric is good or bad beside; without one, the teacher's value where all runs share it."""
    also: list[str] = list(ALSO)
    """Further keys of metrics.jsonl whose medians stand in the tables, where runs have them."""
    equal: Unit = "tokens"
    """What "the same amount of text" counts; bytes where the runs' tokenizers differ."""
    ranked_by: At = "amount"
    """The score that ranks: at equal tokens or bytes (amount), at equal steps, or at each run's end."""
    jobs: int = Field(1, ge=1)
    """Runs at a time."""
    in_process: bool = False
    """Run in this process: no start-up time, but a crash takes the sweep along."""
    keep_going: bool = False
    """Failed runs are recorded and the others are done in any case; this makes the exit code 0 all the same."""

    @model_validator(mode="after")
    def _some(self) -> "Comparison":
        for key in ("seeds", "metrics"):
            if not self.__dict__[key]:
                raise UserError(f"{key}: empty; name at least one")
        return self


class SweepRun(Comparison):
    """A run file of `tokenkit sweep`: every entry of `list` with every draw of `random` and every cell of `grid`."""

    grid: dict[str, list[Any]] = {}
    """Per key of the run file (`train.optimizer.learning_rate`) its values."""
    random: RandomPoints | None = None
    skip_invalid: bool = False
    """Leave combinations out that make no valid run, instead of refusing the sweep."""
    list: Sequence[dict[str, Any]] = [{}]
    """Sets of changes: `{name: ..., KEY: VALUE, ...}`; the name is what the table calls them."""


def sweep(run: SweepRun, *, quiet: bool = False) -> dict[str, Any]:
    """Does what is missing, writes `results.json`, `table.csv` and `table.md`; what is printed of them."""
    base = read_base(run.base)
    entries: Sequence[dict[str, Any]] = run.list
    if run.random is not None:
        draws = [random_point(run.random.space, run.random.seed, number) for number in range(run.random.n)]
        entries = [beside(entry, draw) for entry in entries for draw in draws]
    points, skipped = points_of(run.verb, base, crossed(run.grid, entries), run.seeds, skip=run.skip_invalid)
    outcomes = compare(run, points, quiet=quiet)
    table, runs = tabulated(run, outcomes)
    write_tables(run.output, run.output.name, table, runs)
    return summary(run.output, table, runs) | ({"skipped": skipped} if skipped else {})


def points_of(
    verb: Verb,
    base: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    skip: bool = False,
) -> tuple[list[Point], list[str]]:
    """The runs of all entries and seeds, each once; and why others are no runs, if those may be skipped."""
    points: dict[str, Point] = {}
    skipped: list[str] = []
    for entry in entries:
        given = seeds if SEED not in entry else [entry[SEED]]
        try:
            for seed in given:
                point = make_point(verb, base, entry, seed)
                points.setdefault(point.id.rpartition("-")[2], point)
        except UserError as error:
            if not skip:
                raise UserError(f"{entry.get('name') or 'base'}: {error}") from None
            skipped.append(f"{entry.get('name') or 'base'}: {error}")
    if not points:
        raise UserError(
            f"list: no valid run among {len(entries)}; {skipped[0] if skipped else 'give at least one entry'}"
        )
    return list(points.values()), skipped


def compare(run: Comparison, points: Sequence[Point], *, quiet: bool) -> list[Outcome]:
    """The outcomes of all runs; what the folder holds finished is kept, whatever else the run file now says."""
    runner = runner_of(run, quiet=quiet)
    claim(run)
    with runner:
        RunFolder(run.output).claim(resolved(run), resume=True, may_change=None)
        return runner.run_all(points, equal_steps(points))


def claim(run: Comparison) -> None:
    """Takes an empty folder, or the one of a sweep; UserError for any other."""
    file = run.output / RUN_FILE
    if not file.is_file():
        RunFolder(run.output).claim(resolved(run), resume=False)
    elif "base" not in read_run_file(file):
        raise UserError(f"{run.output}: holds a single run, not a sweep; write output=... with a new name")


def runner_of(run: Comparison, *, quiet: bool) -> Runner:
    """What does the runs of a sweep; it says a line per run."""

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    return Runner(run.output, run.verb, in_process=run.in_process, jobs=run.jobs, say=say)


def equal_steps(points: Sequence[Point]) -> dict[str, list[int]]:
    """Per run the steps after which all have seen as many rows, and after which all have made as many steps."""
    sizes = {point.id: steps_of(point.values) for point in points}
    rows = min(steps * size for steps, size in sizes.values())
    fewest = min(steps for steps, _ in sizes.values())
    return {name: sorted({fewest, min(steps, round(rows / size)) or 1}) for name, (steps, size) in sizes.items()}


def tabulated(run: Comparison, outcomes: Sequence[Outcome]) -> tuple[SweepTable, list[RunFigures]]:
    """The table, and the figures it is made of."""
    runs = [figures(outcome, list(run.metrics), run.also, run.equal) for outcome in outcomes]
    references = {**teacher_references(outcomes, list(run.metrics)), **run.references}
    return sweep_table(runs, run.metrics, unit=run.equal, references=references, ranked_by=run.ranked_by), runs


def write_tables(output: Path, title: str, table: SweepTable, runs: Sequence[RunFigures]) -> None:
    """results.json, table.csv and table.md."""
    write_json(output / "results.json", as_json(table, runs))
    write_text(output / "table.csv", csv_text(table))
    write_text(output / "table.md", markdown_page(title, table, markdown_table(markdown_rows(table))))


def summary(output: Path, table: SweepTable, runs: Sequence[RunFigures]) -> dict[str, Any]:
    """What is printed: the rows in a few words, the failed runs, and where the tables are."""
    counts = {status: sum(run.status == status for run in runs) for status in ("done", "stopped", "failed")}
    rows = {
        f"{row.rank or '–'}. {row.name}": {
            "score": shown(row.score.get(table.ranked_by)),
            **{name: shown(values.get(table.ranked_by)) for name, values in row.values.items()},
        }
        for row in table.rows
    }
    failed = {run.id: {"error": run.error, "traceback": run.log} for run in table.failures}
    return {**counts, "rows": rows, **({"failures": failed} if failed else {}), "table": str(output / "table.md")}
