"""How far something is: a bar on a terminal, now and then a line where there is none."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from tokenkit.report.terminal import terminal

EVERY = 30.0
"""Seconds between two lines, where there is no terminal to draw a bar on."""
BAR, NAME = 10, 16
SAYS_FROM, TIME_FROM, BAR_FROM = 58, 66, 80  # columns of a terminal from which there is room for these, figures whole


@runtime_checkable
class Advance(Protocol):
    """Moves a stage on by so much; `says` stands beside it from then on."""

    def __call__(self, count: int = 1, says: str = "") -> None: ...


Begin = Callable[..., Advance]


@contextmanager
def stages(quiet: bool) -> Iterator[Begin]:
    """A function `begin(name, total, done=0)`, whose result moves that stage on. All of it on standard error."""
    console = terminal(stderr=True)
    if quiet:
        yield lambda name, total, done=0: _nothing
    elif console.is_interactive:
        with Progress(*_columns(console.width), console=console, transient=True) as bar:
            yield lambda name, total, done=0: _bar(bar, name, total, done)
    else:
        yield lambda name, total, done=0: _lines(console, name, total, done)


@contextmanager
def progress(name: str, total: int, *, quiet: bool, done: int = 0) -> Iterator[Advance]:
    """The same of a single stage."""
    with stages(quiet) as begin:
        yield begin(name, total, done)


def _columns(width: int) -> list[ProgressColumn]:
    wanted: list[tuple[int, ProgressColumn]] = [
        (0, TextColumn("{task.description}")),
        (BAR_FROM, BarColumn(BAR)),
        (0, MofNCompleteColumn()),
        (SAYS_FROM, TextColumn("{task.fields[says]}")),
        (TIME_FROM, TimeRemainingColumn()),
    ]
    return [column for least, column in wanted if width >= least]


def _bar(bar: Progress, name: str, total: int, done: int) -> Advance:
    shown = name if len(name) <= NAME else name[: NAME - 1] + "…"
    task = bar.add_task(shown, total=total, completed=done, says="")

    def advance(count: int = 1, says: str = "") -> None:
        bar.update(task, advance=count, says=says)

    return advance


def _lines(console: Console, name: str, total: int, done: int) -> Advance:
    """A line at most every EVERY seconds, so that the log of a long run stays short and a short run says nothing."""
    at, last = done, time.monotonic()

    def advance(count: int = 1, says: str = "") -> None:
        nonlocal at, last
        at, now = at + count, time.monotonic()
        if now - last >= EVERY:
            last = now
            console.file.write(f"{name}: {at:,} of {total:,}{', ' if says else ''}{says}\n")
            console.file.flush()

    return advance


def _nothing(count: int = 1, says: str = "") -> None:
    """Of a stage that nobody wants to hear of."""
