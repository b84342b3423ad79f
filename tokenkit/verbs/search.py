"""`tokenkit search`: the best values of a space, by random points, successive halving, or a Bayesian sampler."""

import csv
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import typer
from pydantic import Field, model_validator

from tokenkit.config import UserError, dump_yaml, resolved
from tokenkit.report.tables import markdown_table
from tokenkit.train.folder import RunFolder, write_json, write_text
from tokenkit.verbs.figures import steps_of
from tokenkit.verbs.points import read_base, readable
from tokenkit.verbs.runner import Runner
from tokenkit.verbs.search_builtin import random_search, successive_halving
from tokenkit.verbs.search_optuna import OptunaSearch
from tokenkit.verbs.space import Choice, Space, check_space
from tokenkit.verbs.sweep import Comparison, claim, runner_of
from tokenkit.verbs.trials import Trial, Trials

MAY_CHANGE = ("trials", "jobs", "in_process", "keep_going", "also")
BEST = "best.yaml"


class SearchRun(Comparison):
    """A run file of `tokenkit search`."""

    seeds: list[int] = [0]
    """Every trial once per seed; its score is the mean."""
    space: Space = Field(min_length=1)
    """Per key of the run file `{kind: float, low, high, log}`, `{kind: int, low, high, step, log}` or
    `{kind: choice, choices}`; with `when: {KEY: VALUE}` it exists only beside such values."""
    trials: int = Field(ge=1)
    """Points that are tried; those that make no valid run are skipped and do not count."""
    method: Literal["auto", "tpe", "random", "halving"] = "auto"
    """auto: tpe where optuna is installed, otherwise random."""
    rungs: list[int] = []
    """Steps at which every trial is measured and may be given up."""
    pruner: Literal["none", "median", "hyperband"] = "median"
    """Who is given up at a rung; halving has its own rule, hyperband comes with tpe."""
    startup: int = Field(4, ge=1)
    """Trials at random before tpe learns, and trials that the median needs."""
    eta: int = Field(3, ge=2)
    """halving, hyperband: one in so many goes on."""
    seed: int = 0
    """Decides the points."""

    @model_validator(mode="after")
    def _fits(self) -> "SearchRun":
        check_space(self.space)
        if self.chosen == "random" and self.pruner == "hyperband":
            raise UserError("pruner: hyperband comes with method=tpe; write pruner=median, or method=halving")
        if self.chosen == "halving" and not self.rungs:
            raise UserError("rungs: empty; method=halving needs steps at which trials are compared")
        if any(rung < 1 for rung in self.rungs):
            raise UserError(f"rungs: {min(self.rungs)} is no step; write steps from 1")
        return self

    @property
    def chosen(self) -> Literal["tpe", "random", "halving"]:
        """The method, where `auto` left it open."""
        if self.method == "auto":
            return "tpe" if importlib.util.find_spec("optuna") else "random"
        return self.method


def search(run: SearchRun, *, quiet: bool = False) -> dict[str, Any]:
    """Does the trials that are missing, writes their table and `best.yaml`; what is printed of them."""
    runner = runner_of(run, quiet=quiet)
    claim(run)
    with runner:
        RunFolder(run.output).claim(resolved(run), resume=True, may_change=MAY_CHANGE)
        found = _try(run, runner, quiet)
    best = max((t for t in found if t.score is not None), key=lambda t: t.score or 0.0, default=None)
    if best is None:
        reason = next((t.error for t in found if t.error), "none was begun")
        raise UserError(f"{run.output}: no trial of {len(found)} came to its end; the first reason: {reason}")
    point = Trials(runner, run.verb, read_base(run.base), run.seeds, run.rungs, run.metrics, {}, run.equal).points(
        best.number, best.values
    )[0]
    again = run.output.with_name(f"{run.output.name}_best")
    header = f"# tokenkit {run.verb} {run.output / BEST}\n# {point.name}: {best.metrics} in the search\n"
    write_text(run.output / BEST, header + dump_yaml({**point.values, "output": str(again)}))
    ranked = sorted(found, key=_order)
    results = {"method": run.chosen, "best": asdict(best), "trials": [asdict(trial) for trial in ranked]}
    write_json(run.output / "results.json", results)
    write_text(run.output / "table.csv", _csv(ranked, run))
    write_text(run.output / "table.md", f"# {run.output.name}\n\n" + markdown_table(_rows(ranked, run)))
    return _summary(run, found, best)


def _try(run: SearchRun, runner: Runner, quiet: bool) -> list[Trial]:
    base = read_base(run.base)
    trials = Trials(runner, run.verb, base, run.seeds, run.rungs, run.metrics, run.references, run.equal)

    def say(trial: Trial) -> None:
        if not quiet:
            reached = [f"step {step}, score {value:.4g}" for step, value in trial.scores.items()][-1:]
            words = ", ".join([trial.status, *reached, *([trial.error] if trial.error else [])])
            typer.echo(f"trial {trial.number}: {readable(trial.values)}: {words}", err=True)

    options: dict[str, Any] = {"number": run.trials, "seed": run.seed, "jobs": run.jobs, "say": say}
    if run.chosen == "halving":
        return successive_halving(trials, run.space, eta=run.eta, **options)
    if run.chosen == "random":
        after = run.startup if run.pruner == "median" else None
        return random_search(trials, run.space, median_after=after, **options)
    study = OptunaSearch(
        trials,
        run.space,
        run.output,
        seed=run.seed,
        startup=run.startup,
        pruner=run.pruner,
        eta=run.eta,
        most_steps=_most_steps(run, base),
    )
    return study.run(run.trials, run.jobs, say)


def _most_steps(run: SearchRun, base: dict[str, Any]) -> int:
    """The steps of the longest trial."""
    own = run.space.get("train.steps")
    if own is None:
        return steps_of(base)[0]
    return max(own.choices) if isinstance(own, Choice) else int(own.high)


def _order(trial: Trial) -> tuple[bool, float, int]:
    """Finished ones first, best first; then by how far and how well the others came."""
    steps = [*trial.scores][-1] if trial.scores else 0
    value = [*trial.scores.values()][-1] if trial.scores else 0.0
    return trial.score is None, -value if trial.score is not None else float(-steps), trial.number


def _rows(trials: Sequence[Trial], run: SearchRun) -> list[list[str]]:
    rows = [["trial", "values", "status", "steps", "score", *run.metrics]]
    for trial in trials:
        steps, value = [*trial.scores.items()][-1] if trial.scores else (0, None)
        cells = [f"{trial.metrics[name]:.5g}" if name in trial.metrics else "–" for name in run.metrics]
        shown = "–" if value is None else f"{value:.5g}"
        rows.append([str(trial.number), readable(trial.values), trial.status, f"{steps:,}", shown, *cells])
    return rows


def _csv(trials: Sequence[Trial], run: SearchRun) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "status", "steps", "score", *run.metrics, *run.space, "error"])
    for trial in trials:
        steps, value = [*trial.scores.items()][-1] if trial.scores else (0, None)
        cells = [*(trial.metrics.get(name) for name in run.metrics), *(trial.values.get(key) for key in run.space)]
        writer.writerow([trial.number, trial.status, steps, value, *cells, trial.error])
    return out.getvalue()


def _summary(run: SearchRun, found: Sequence[Trial], best: Trial) -> dict[str, Any]:
    counts = {s: sum(t.status == s for t in found) for s in ("done", "pruned", "failed", "invalid")}
    failures = {f"trial {t.number}": t.error for t in found if t.status == "failed"}
    return {
        "method": run.chosen,
        **counts,
        "best": {"trial": best.number, "values": best.values, "score": best.score, **best.metrics},
        **({"failures": failures} if failures else {}),
        "best_run": str(run.output / BEST),
        "table": str(run.output / "table.md"),
    }
