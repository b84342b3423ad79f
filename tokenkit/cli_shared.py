"""What the commands of the command line share: their words and options, and how they print."""

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokenkit.config import Config, UserError, dump_yaml, resolved
from tokenkit.train.torchrun import rank, started

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN.YAML KEY=VALUE ...", help="A run file, then overrides; either may be left out.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and leave.")]
TrainDryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run, and what training takes; leave.")]
On = Annotated[
    str | None,
    typer.Option(
        "--on", metavar="DEVICE", help="With --dry-run: estimate for a device that is not here: h100, a100-80, ..."
    ),
]
Price = Annotated[
    float | None, typer.Option("--price", min=0, metavar="AMOUNT", help="With --on: of an hour of one such device.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that the output folder holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


class Verbs(TyperGroup):
    """A list of commands whose sentences are folded where typer would cut them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for command in self.commands.values():
            command.short_help = command.short_help or " ".join((command.help or "").partition("\n\n")[0].split())
        super().format_commands(ctx, formatter)


SPREAD = ("distill", "pretrain", "train-hypernet", "tokenizer pretrain")  # what several processes do together


def check_processes(words: Sequence[str]) -> None:
    """UserError where `torchrun` started several processes of what one process does."""
    count = started()
    asked = "--help" in words or "--dry-run" in words
    if count > 1 and not asked and not any(" ".join(words).startswith(name) for name in SPREAD):
        what = next((word for word in words), "this")
        raise UserError(f"{what}: is done by one process, and torchrun started {count}; start it without torchrun")


def log_calmly() -> None:
    """Warnings as lines of their own; without those of a package that says at its import what no user can act on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("torchao", "torch.utils._pytree"):  # its kernels for GPUs, its registrations with torch
        logging.getLogger(name).setLevel(logging.ERROR)


def shown(run: Config, dry_run: bool) -> bool:
    """Whether the run was only to be shown, as it now is."""
    if dry_run:
        typer.echo(dump_yaml(resolved(run)), nl=False)
    return dry_run


def shown_training(run: Any, dry_run: bool, on: str | None = None, price: float | None = None) -> bool:
    """The same of a run that trains, with what it takes in memory and time, here or `on` a device at a `price`."""
    if dry_run:
        from tokenkit.verbs.estimate import dry_run_text

        typer.echo(dry_run_text(run, on, price), nl=False)
    elif on is not None or price is not None:
        raise UserError("--on, --price: say what a run would take, and start none; write --dry-run beside them")
    return dry_run


def echo(text: str) -> None:
    """Prints a line."""
    typer.echo(text)


def print_values(values: dict[str, Any]) -> None:
    """Prints plain values as YAML."""
    typer.echo(dump_yaml(values), nl=False)


def print_results(values: dict[str, Any]) -> None:
    """Prints the results of a run; nothing in a process that has none because another one tells them."""
    if values:
        print_values(values)


HIDDEN = ("transfer", "losses", "benchmarks", "model")  # of results: too long for a terminal, or said in other words


def print_distilled(results: dict[str, Any], folder: Path) -> None:
    """Prints what a distilling run has found, and where its model is; nothing in a process that has no results."""
    if not results:  # another process of this run has them, and tells
        return
    print_values({key: value for key, value in results.items() if key not in HIDDEN})
    if "benchmarks" in results:
        from tokenkit.verbs.benchmarks import benchmark_table

        print_rich(benchmark_table(results["benchmarks"]))
    print_values({"model": str(folder / "model"), "page": str(folder / "report.html")})


def print_json(values: Any) -> None:
    """Prints plain values as JSON."""
    import json

    typer.echo(json.dumps(values, ensure_ascii=False, indent=None if isinstance(values, list) else 1))


def print_rich(shown: Any) -> None:
    """Prints a table or a text with styles, at the width that there is."""
    from tokenkit.report.terminal import show

    show(shown)


def run_script(name: str, action: Callable[[], int | None]) -> None:
    """Runs a program: a user's mistake is one line and exit code 2, an obeyed signal 128 plus its number."""
    log_calmly()
    try:
        code = action()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "output"
        print(f"{name}: {where}: no space left on the disk; free some and go on", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from tokenkit.train.loop import Interrupted

        if not isinstance(error, Interrupted):
            raise
        if rank() == 0:
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(128 + error.signal_number if error.signal_number else 0)
    else:
        if code:
            sys.exit(code)
