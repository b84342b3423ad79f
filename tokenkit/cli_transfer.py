"""Commands that give a model another tokenizer without training it, and that train what makes rows for any."""

from typing import Annotated

import typer

from tokenkit.cli_shared import DryRun, Quiet, Resume, Words, print_results, print_values, shown
from tokenkit.config import load

app = typer.Typer()


@app.command()
def transfer(
    words: Words = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="MODEL OUTPUT: give a model the tokenizer back that it had.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Give a model another tokenizer, zero-shot: no training."""
    from tokenkit.verbs.transfer import TransferRun, reverse_words, transfer

    run = load(TransferRun, reverse_words(words or []) if reverse else words or [])
    if not shown(run, dry_run):
        print_values(transfer(run))


@app.command("train-hypernet")
def train_hypernet(words: Words = None, dry_run: DryRun = False, resume: Resume = False, quiet: Quiet = False) -> None:
    """Train a network that makes the rows of any tokenizer for one model."""
    from tokenkit.verbs.train_hypernet import TrainHypernetRun, train_hypernet

    run = load(TrainHypernetRun, words or [])
    if not shown(run, dry_run):
        print_results(train_hypernet(run, resume=resume, quiet=quiet))
