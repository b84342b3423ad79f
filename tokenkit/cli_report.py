"""The commands that tell of finished runs: their pages and their model cards."""

from typing import Annotated

import typer

from tokenkit.cli_shared import DryRun, print_values, shown

app = typer.Typer()


@app.command()
def report(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN ...", help="Folders of runs; or a run file. Then KEY=VALUE.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the page of a run folder again, or one page that compares several runs."""
    from tokenkit.verbs.report import load_report, report

    run = load_report(words or [])
    if not shown(run, dry_run):
        typer.echo(report(run))


@app.command()
def card(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN_FOLDER", help="A finished run; or a run file. Then KEY=VALUE.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the model card of a finished run again, and upload the model if told to."""
    from tokenkit.verbs.card import CardRun, card
    from tokenkit.verbs.positional import load_positional

    run = load_positional(CardRun, ("run",), words or [])
    if not shown(run, dry_run):
        print_values(card(run))
