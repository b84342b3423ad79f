"""Runs of a sweep, each in a process and a folder of its own: started, continued, found finished, recorded as failed.

A process per run, because a run may die of what no `except` catches (memory, a signal, a broken kernel), and because
one run must not see what another left in torch's global state.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tokenkit.config import UserError, build, dump_yaml, override, read_run_file
from tokenkit.train.folder import RUN_FILE, write_text
from tokenkit.train.loop import Interrupted
from tokenkit.verbs import run_schema
from tokenkit.verbs.points import Point, Verb

LOCK = ".lock"
Status = Literal["done", "stopped", "failed"]


class SweepInterrupted(Interrupted):
    """The sweep was asked to stop; the runs at hand have saved their state."""

    def __init__(self, signal_number: int):
        super().__init__(0, signal_number)
        self.args = ("stopped; the same command goes on with what is missing",)


@dataclass(frozen=True)
class Outcome:
    """What became of a run; `stopped` at a step it was to be stopped at, or by a signal."""

    point: Point
    status: Status
    folder: Path
    log: Path
    """What the run printed, its traceback included."""
    error: str | None = None
    """The last line of that, of a failed run."""
    exit_code: int = 0
    seconds: float = 0.0
    """Of this attempt; 0 of a run that was found finished."""


class Runner:
    """A claimed folder of runs: `runs/ID/` (run folders), `points/HASH.yaml` (run files), `logs/ID.log`.

    One at a time per folder, told by a lock that the processes of the runs hold too: where a sweep was killed and its
    run lives on, a second sweep waits for nobody and says so.
    """

    def __init__(
        self, output: Path, verb: Verb, *, in_process: bool = False, jobs: int = 1, say: Callable[[str], None] = print
    ):
        if "=" in str(output):
            raise UserError(f"output: {str(output)!r} holds '=', which makes a word an assignment; choose another name")
        if in_process and jobs > 1:
            raise UserError(f"jobs: {jobs} runs at once need processes of their own; write in_process=false")
        self.output, self.verb, self.in_process, self.jobs, self.say = output, verb, in_process, jobs, say
        self.signal_number = 0
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Runner":
        self.output.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.output / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(
                f"{self.output}: another sweep, or a run that one left behind, is at work here; wait for it, or stop it"
            ) from None
        signals = () if self.in_process else (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._lock)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        for child in self._children:
            child.send_signal(signal.SIGTERM)  # it saves and leaves

    def run_all(self, points: Sequence[Point], measured_at: Mapping[str, Sequence[int]]) -> list[Outcome]:
        """The outcomes of all runs, in their order; SweepInterrupted if a signal came.

        `measured_at` are steps, by the id of a run, after which it is to be measured beside those of its own.
        """
        outcomes: list[Outcome | None] = [None] * len(points)

        def work(number: int) -> None:
            if not self.signal_number:
                point = points[number]
                outcomes[number] = found = self.run_one(point, measured_at=measured_at.get(point.id, ()))
                where = f", see {found.log}" if found.status == "failed" else ""
                self.say(f"[{number + 1}/{len(points)}] {point.id}: {found.status} ({found.seconds:.0f} s){where}")

        in_turn(work, range(len(points)), self.jobs)
        self.check()
        return [found for found in outcomes if found is not None]

    def check(self) -> None:
        """SweepInterrupted if a signal has come."""
        if self.signal_number:
            raise SweepInterrupted(self.signal_number)

    def folder(self, point: Point) -> Path:
        """Where a run keeps its things."""
        return self.output / "runs" / point.id

    def run_one(self, point: Point, *, measured_at: Sequence[int] = (), stop_after: int | None = None) -> Outcome:
        """One run, from where it is to its end or to a step; a finished one is left as it is."""
        folder, log = self.folder(point), self.output / "logs" / f"{point.id}.log"
        if (folder / "results.json").is_file():
            return Outcome(point, "done", folder, log)
        file = self._run_file(point, folder, measured_at)
        log.parent.mkdir(parents=True, exist_ok=True)
        resume = (folder / RUN_FILE).is_file()
        changes = [] if stop_after is None else [f"train.stop_after={stop_after}"]
        began = time.perf_counter()
        if self.in_process:
            code = self._here(file, changes, resume, log)
        else:
            code = self._process(file, changes, resume, log)
        seconds = time.perf_counter() - began
        if (folder / "results.json").is_file():
            return Outcome(point, "done", folder, log, seconds=seconds)
        if code == 0 or self.signal_number:
            return Outcome(point, "stopped", folder, log, seconds=seconds)
        return Outcome(point, "failed", folder, log, _last_line(log, code), code, seconds)

    def _run_file(self, point: Point, folder: Path, measured_at: Sequence[int]) -> Path:
        """The run's file; written once, so that a run goes on as it began."""
        file = self.output / "points" / f"{point.id.rpartition('-')[2]}.yaml"
        if not file.is_file():
            train = dict(point.values["train"])
            train["eval_at"] = sorted({*train.get("eval_at", []), *measured_at})
            text = dump_yaml({**point.values, "train": train, "output": str(folder)})
            write_text(file, f"# tokenkit {self.verb} {file}\n# {point.name}\n{text}")
        return file

    def _process(self, file: Path, changes: list[str], resume: bool, log: Path) -> int:
        words = [sys.executable, "-m", "tokenkit.cli", self.verb, str(file), *changes, "--quiet"]
        with log.open("ab") as out:
            child = subprocess.Popen(
                [*words, *(["--resume"] if resume else [])],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock,),
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
            self._children.append(child)
            if self.signal_number:  # it came between the look and the start
                child.send_signal(signal.SIGTERM)
            try:
                return child.wait()
            finally:
                self._children.remove(child)

    def _here(self, file: Path, changes: list[str], resume: bool, log: Path) -> int:
        values = read_run_file(file)
        for change in changes:
            override(values, change)
        try:
            verb_function(self.verb)(build(run_schema(self.verb), values), resume=resume, quiet=True)
        except Interrupted as asked:
            if asked.signal_number:
                raise
            return 0
        except Exception as error:  # whatever it is: the sweep goes on, and the traceback is kept
            with log.open("a", encoding="utf-8") as out:
                out.write(f"{error}\n" if isinstance(error, UserError) else traceback.format_exc())
            return 2 if isinstance(error, UserError) else 1
        return 0


def in_turn(work: Callable[[Any], Any], items: Sequence[Any], jobs: int) -> list[Any]:
    """What work makes of the items, in their order; one job is this very thread, which alone may handle signals."""
    if jobs == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, items))


def verb_function(verb: Verb) -> Callable[..., dict[str, Any]]:
    """The function that does a verb's run."""
    if verb == "distill":
        from tokenkit.verbs.stages import distill_stages

        return distill_stages
    from tokenkit.verbs.pretrain import pretrain

    return pretrain


def _last_line(log: Path, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"
