"""`tokenkit vocabulary ...`: tokens added to a tokenizer and its model, taken away, and those found that are dead."""

from typing import Annotated

import typer

from tokenkit.cli_shared import DryRun, Verbs, Words, print_values, shown

app = typer.Typer(
    cls=Verbs, no_args_is_help=True, help="Add tokens to a model, take some away, find those that never occur."
)


@app.command()
def extend(words: Words = None, dry_run: DryRun = False) -> None:
    """Learn further tokens from text by continued BPE; with a model, rows for them."""
    from tokenkit.config import load
    from tokenkit.verbs.vocabulary.extend import VocabularyExtendRun, extend_vocabulary

    run = load(VocabularyExtendRun, words or [])
    if not shown(run, dry_run):
        print_values(extend_vocabulary(run))


@app.command()
def prune(words: Words = None, dry_run: DryRun = False) -> None:
    """Take tokens away by use, script or list; with a model, its rows too."""
    from tokenkit.config import load
    from tokenkit.verbs.vocabulary.prune import VocabularyPruneRun, prune_vocabulary

    run = load(VocabularyPruneRun, words or [])
    if not shown(run, dry_run):
        print_values(prune_vocabulary(run))


@app.command()
def check(
    words: Annotated[list[str] | None, typer.Argument(metavar="TOKENIZER", help="Folder, file or hub id.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Count the tokens that no text becomes, and say why."""
    from tokenkit.verbs.positional import load_positional
    from tokenkit.verbs.vocabulary.check import VocabularyCheckRun, check_vocabulary

    run = load_positional(VocabularyCheckRun, ("tokenizer",), words or [])
    if not shown(run, dry_run):
        print_values(check_vocabulary(run))
