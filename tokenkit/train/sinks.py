"""Where the lines of metrics.jsonl go as well: TensorBoard, trackio, wandb. The file stays the truth.

No account and no network: TensorBoard's files and wandb's offline runs lie in the run folder, trackio's in its own
folder on this machine. wandb sends only where WANDB_API_KEY or WANDB_MODE says so. What a sink has been given is
noted in the run folder, so that a resumed run gives it no step twice, and one that a run gets later all it has missed.
"""

import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from tokenkit.config import UserError
from tokenkit.train.torchrun import rank

log = logging.getLogger(__name__)
SinkName = Literal["tensorboard", "trackio", "wandb"]
FOLDER = "sinks"  # in the run folder: the run's id, and by sink which lines it has been given


@runtime_checkable
class Sink(Protocol):
    """A place for numbers by step."""

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line."""
        ...

    def close(self) -> None:
        """Everything is written when this returns."""
        ...


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, folder: Path, project: str, name: str, run: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to the curve of each number."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self.writer.close()


class Trackio:
    """A run of trackio's local dashboard, `trackio show`."""

    def __init__(self, folder: Path, project: str, name: str, run: Mapping[str, Any]):
        import trackio

        options = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(project, name=name, config=dict(run), resume="allow", **options)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits for what is still to be written."""
        import trackio

        if trackio.context_vars.current_run.get() is self.run:  # else another run has begun, which finished this one
            trackio.finish()


class Wandb:
    """A run of Weights & Biases in `wandb/` of the run folder: offline, `wandb sync` sends it."""

    def __init__(self, folder: Path, project: str, name: str, run: Mapping[str, Any]):
        import wandb

        chosen = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
        self.run = wandb.init(
            project=project,
            id=name,
            name=folder.name,
            dir=str(folder),
            config=dict(run),
            resume="allow" if chosen else None,  # an offline run has nothing to resume; one id makes it one run
            mode=None if chosen else "offline",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers; those of one step become one row."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits for what is still to be written."""
        self.run.finish()


KINDS: dict[SinkName, type[TensorBoard] | type[Trackio] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


class Sinks:
    """The sinks of one run. UserError where a package is missing; one that fails later is left out with a warning."""

    def __init__(self, names: Sequence[SinkName] = (), project: str = "tokenkit"):
        for name in names:
            if find_spec(name) is None:
                raise UserError(
                    f"train.sinks: {name} is not installed; pip install 'tokenkit-torch[track]', or leave it out"
                )
        self.names, self.project = list(dict.fromkeys(names)), project
        self.folder = Path()
        self._open: dict[SinkName, Sink] = {}
        self._sent: dict[SinkName, set[str]] = {}

    def open(self, folder: Path, run: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Begins, or goes on, in a run folder; each sink gets those of the lines that it has not been given.

        Of several processes the first one alone writes.
        """
        if not self.names or rank():
            return
        self.folder = folder / FOLDER
        self.folder.mkdir(exist_ok=True)
        identity = self.folder / "id"
        if not identity.is_file():
            identity.write_text(f"{folder.name}-{uuid.uuid4().hex[:8]}", "utf-8")
        for name in self.names:
            note = self.folder / f"{name}.sent"
            self._sent[name] = set(note.read_text("utf-8").splitlines()) if note.is_file() else set()
            self._guarded(name, partial(self._begin, name, folder, identity.read_text("utf-8"), run))
        for line in lines:
            self.send(json.loads(line))

    def _begin(self, name: SinkName, folder: Path, identity: str, run: Mapping[str, Any]) -> None:
        self._open[name] = KINDS[name](folder, self.project, identity, run)

    def send(self, line: Mapping[str, Any]) -> None:
        """Gives a line of metrics.jsonl to every sink that has not been given it; what is no number stays behind."""
        step, mark = line["step"], f"{line['step']} {' '.join(sorted(line))}"
        values = {key: value for key, value in line.items() if type(value) in (int, float) and key != "step"}
        for name in [*self._open]:
            if mark not in self._sent[name]:
                self._guarded(name, partial(self._open[name].send, step, values))
                self._sent[name].add(mark)
                with (self.folder / f"{name}.sent").open("a", encoding="utf-8") as note:
                    note.write(f"{mark}\n")

    def close(self) -> None:
        """Everything is written when this returns; what is sent afterwards goes nowhere."""
        for name in [*self._open]:
            self._guarded(name, self._open[name].close)
        self._open = {}

    def _guarded(self, name: SinkName, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # what a command prints is its results alone
                action()
        except Exception as error:  # whatever it is, the run is good without, and metrics.jsonl has it all
            why = (str(error).splitlines() or ["no message"])[0]
            log.warning("train.sinks: %s left out from here on (%s: %s)", name, type(error).__name__, why)
            self._open.pop(name, None)
