"""The command line: one thin function per verb. Heavy imports stand inside, so that help is quick."""

import errno
import logging
import sys
from typing import Annotated, Any

import typer

from tokenkit.config import Config, UserError, dump_yaml, load, resolved

app = typer.Typer(
    name="tokenkit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a language model a new tokenizer, a smaller body or ternary weights, and keep what it knows.",
)
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN.YAML KEY=VALUE ...", help="A run file, then overrides; either may be left out.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and leave.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that the output folder holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@app.command()
def demo(words: Words = None, dry_run: DryRun = False, quiet: Quiet = False) -> None:
    """Move the embedded model to a Unigram tokenizer and to bytes; a table, a page, models."""
    from tokenkit.verbs.demo import demo, demo_run

    run = demo_run(words or [])
    if not _shown(run, dry_run):
        demo(run, quiet=quiet)


@app.command()
def pretrain(words: Words = None, dry_run: DryRun = False, resume: Resume = False, quiet: Quiet = False) -> None:
    """Train a small model and its tokenizer from nothing."""
    from tokenkit.verbs.pretrain import PretrainRun, pretrain

    run = load(PretrainRun, words or [])
    if not _shown(run, dry_run):
        _print(pretrain(run, resume=resume, quiet=quiet))


@app.command()
def transfer(words: Words = None, dry_run: DryRun = False) -> None:
    """Give a model another tokenizer, zero-shot: no training."""
    from tokenkit.verbs.transfer import TransferRun, transfer

    run = load(TransferRun, words or [])
    if not _shown(run, dry_run):
        _print(transfer(run))


@app.command()
def distill(words: Words = None, dry_run: DryRun = False, resume: Resume = False, quiet: Quiet = False) -> None:
    """Transfer a model to another tokenizer and train it under what it was, or under another teacher."""
    from tokenkit.verbs.distill import DistillRun, distill

    run = load(DistillRun, words or [])
    if not _shown(run, dry_run):
        results = distill(run, resume=resume, quiet=quiet)
        _print({key: value for key, value in results.items() if key not in ("transfer", "losses")})
        _print({"model": str(run.output / "model"), "page": str(run.output / "report.html")})


@app.command("eval")
def evaluate(words: Words = None, dry_run: DryRun = False) -> None:
    """Bits per byte of a model on held-out text."""
    from tokenkit.verbs.evaluate import EvalRun, evaluate

    run = load(EvalRun, words or [])
    if not _shown(run, dry_run):
        _print(evaluate(run))


@app.command()
def align(words: Words = None, dry_run: DryRun = False) -> None:
    """Show two tokenisations of a text, aligned."""
    from tokenkit.verbs.align import AlignRun

    run = load(AlignRun, words or [])
    if not _shown(run, dry_run):
        from rich.console import Console

        from tokenkit.align.show import show
        from tokenkit.tokenizers.load import load_tokenizer

        Console().print(show(run.text, load_tokenizer(run.teacher), load_tokenizer(run.student)))


@app.command()
def generate(words: Words = None, dry_run: DryRun = False) -> None:
    """Let a model continue prompts."""
    from tokenkit.verbs.generate import GenerateRun, continue_prompts

    run = load(GenerateRun, words or [])
    if not _shown(run, dry_run):
        for text in continue_prompts(run):
            typer.echo(text)


@app.command()
def report(words: Words = None, dry_run: DryRun = False) -> None:
    """Write the page of a run folder again."""
    from tokenkit.report.page import write_page
    from tokenkit.verbs.report import ReportRun

    run = load(ReportRun, words or [])
    if not _shown(run, dry_run):
        typer.echo(write_page(run.run))


@app.command()
def schema(verb: Annotated[str, typer.Argument(help="The verb whose run file is described.")]) -> None:
    """Print the JSON schema of a verb's run file, for editors and for checking."""
    import json

    from tokenkit.verbs import run_schema

    typer.echo(json.dumps(run_schema(verb).model_json_schema(), indent=2))


def _shown(run: Config, dry_run: bool) -> bool:
    if dry_run:
        typer.echo(dump_yaml(resolved(run)), nl=False)
    return dry_run


def _print(values: dict[str, Any]) -> None:
    typer.echo(dump_yaml(values), nl=False)


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2, an obeyed signal 128 plus its number."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(prog_name="tokenkit")
    except UserError as error:
        typer.echo(f"tokenkit: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        typer.echo(f"tokenkit: {error.filename or 'output'}: no space left on the disk; free some and go on", err=True)
        sys.exit(2)
    except Exception as error:
        from tokenkit.train.loop import Interrupted

        if not isinstance(error, Interrupted):
            raise
        typer.echo(f"tokenkit: {error}", err=True)
        sys.exit(128 + error.signal_number if error.signal_number else 0)


if __name__ == "__main__":
    main()
