"""The commands over many runs: sweep, study, search, architectures, bench; and the runs that come with the package."""

from typing import Annotated, Any

import typer

from tokenkit.cli_shared import DryRun, Quiet, Words, echo, print_json, print_rich, print_values, shown
from tokenkit.config import UserError, load

app = typer.Typer()
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Exit code 0 although runs failed; they are recorded.")]
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="A run that comes with the package; see tokenkit presets.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="The preset made tiny: no network, a minute on a CPU.")]


def chosen_preset(name: str | None, words: list[str], smoke: bool) -> Any:
    """The run of a preset with overrides; None where none is named."""
    if name is None:
        if smoke:
            raise UserError("--smoke: goes with --preset NAME, which it makes tiny")
        return None
    from tokenkit.verbs.presets import preset_run

    return preset_run(name, words, smoke=smoke)


def make_teacher(name: str | None, run: Any, smoke: bool, quiet: bool) -> None:
    """Makes the teacher of a tiny preset."""
    if name is not None and smoke:
        from tokenkit.verbs.presets import train_teacher

        train_teacher(name, run, quiet=quiet)


def _finish(results: dict[str, Any], keep_going: bool) -> None:
    print_values(results)
    if results["failed"] and not keep_going:
        raise typer.Exit(1)


@app.command()
def sweep(words: Words = None, dry_run: DryRun = False, quiet: Quiet = False, keep_going: KeepGoing = False) -> None:
    """Do a grid, a list or random draws of runs; compare them at equal text and at equal steps."""
    from tokenkit.verbs.sweep import SweepRun, sweep

    run = load(SweepRun, words or [])
    if not shown(run, dry_run):
        _finish(sweep(run, quiet=quiet), keep_going or run.keep_going)


@app.command()
def study(words: Words = None, dry_run: DryRun = False, quiet: Quiet = False, keep_going: KeepGoing = False) -> None:
    """Compare objectives with plain training over seeds and budgets; say which differences are real."""
    from tokenkit.verbs.study import StudyRun, study

    run = load(StudyRun, words or [])
    if not shown(run, dry_run):
        _finish(study(run, quiet=quiet), keep_going or run.keep_going)


@app.command()
def search(words: Words = None, dry_run: DryRun = False, quiet: Quiet = False, keep_going: KeepGoing = False) -> None:
    """Look for the best values of a space: random, successive halving, or Bayesian with optuna."""
    from tokenkit.verbs.search import SearchRun, search

    run = load(SearchRun, words or [])
    if not shown(run, dry_run):
        _finish(search(run, quiet=quiet), keep_going or run.keep_going)


@app.command()
def architectures(
    words: Words = None, dry_run: DryRun = False, quiet: Quiet = False, keep_going: KeepGoing = False
) -> None:
    """Train every shape of a fixed number of weights on the same text; which are on the frontier."""
    from tokenkit.verbs.architectures import ArchitecturesRun, architectures

    run = load(ArchitecturesRun, words or [])
    if not shown(run, dry_run):
        _finish(architectures(run, quiet=quiet), keep_going or run.keep_going)


@app.command()
def bench(
    words: Words = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results, and what differs, as JSON.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Show what the benchmarks found beside their peers; with against=FOLDER exit 1 where two runs differ."""
    from tokenkit.verbs.bench import BenchRun, bench

    run = load(BenchRun, words or [])
    if shown(run, dry_run):
        return
    found = bench(run)
    if as_json:
        print_json(found | {"claims": [claim.model_dump(mode="json") for claim in found["claims"]]})
    else:
        from tokenkit.report.claim_tables import claims_tables, comparison_lines

        if run.against is None:
            print_rich(claims_tables(found["claims"]))
        else:
            echo("\n".join(comparison_lines(found["changed"], found["alone"], found["same"])))
    if found.get("changed"):
        raise typer.Exit(1)


@app.command()
def presets() -> None:
    """List the runs that come with the package, for tokenkit distill --preset NAME."""
    from tokenkit.verbs.presets import presets_view

    print_rich(presets_view())
