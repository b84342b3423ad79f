"""The run folder: run.yaml, metrics.jsonl, checkpoints/, results. It belongs to one run and is never deleted."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenkit.config import UserError, differences, dump_yaml, parse_yaml
from tokenkit.tokenizers.whole_file import write_whole
from tokenkit.train.parallel import leads
from tokenkit.train.sinks import Sinks

RUN_FILE = "run.yaml"
MAY_CHANGE = (
    "train.stop_after",
    "train.parallel.data",
    "train.parallel.model",
    "train.accumulation",
    "output",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.sinks",
    "train.project",
    "train.collect_garbage_every",
    "push_to_hub",
)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes plain values as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class RunFolder:
    """A folder claimed by one run; what it logs goes to the run's sinks too."""

    def __init__(self, path: Path, sinks: Sinks | None = None):
        self.path = path
        self.sinks = sinks or Sinks()
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"

    def claim(self, run: Mapping[str, Any], *, resume: bool, may_change: Collection[str] | None = MAY_CHANGE) -> None:
        """Writes run.yaml into an empty folder, or checks that the folder holds this very run; UserError otherwise.

        `may_change` are the keys that may differ from those it began with; None: any.
        """
        run_file = self.path / RUN_FILE
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a file, where the output folder should be; choose a new output")
        if run_file.is_file():
            self._check_same(dict(run), run_file, resume, may_change)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path}: holds files, but no run; nothing is overwritten, choose a new output")
        elif resume:
            raise UserError(f"{self.path}: no run to resume here; leave --resume out to start one")
        write_text(run_file, dump_yaml(dict(run)))
        self.sinks.open(self.path, run, self._whole_lines())

    def _check_same(
        self, run: dict[str, Any], run_file: Path, resume: bool, may_change: Collection[str] | None
    ) -> None:
        if not resume:
            raise UserError(
                f"{self.path}: holds another run; add --resume to continue it, or write output=... with a new name"
            )
        old = parse_yaml(run_file.read_text("utf-8"), str(run_file))
        changed = [] if may_change is None else [k for k in differences(old, run) if k not in may_change]
        if changed:
            key = changed[0]
            raise UserError(
                f"{run_file}: cannot resume with another config: {', '.join(changed)} differ ({key} was "
                f"{_at(old, key)!r}, is {_at(run, key)!r}); restore it, or write output=... with a new name"
            )

    def truncate_metrics(self, step: int) -> None:
        """Drops what was logged after a step, so that a resumed run logs each step once."""
        if leads() and self.metrics.exists():
            kept = [line for line in self._whole_lines() if _step_of(line) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; of several processes the first one does."""
        if not leads():
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")
        self.sinks.send(values)

    def _whole_lines(self) -> list[str]:
        """The lines of metrics.jsonl, without one that a kill cut short."""
        lines = self.metrics.read_text("utf-8").splitlines() if self.metrics.is_file() else []
        return [line for line in lines if _step_of(line) < 1 << 60]

    def logged(self, key: str) -> dict[int, float]:
        """step → value of a key in metrics.jsonl."""
        rows = [json.loads(line) for line in self._whole_lines()]
        return {row["step"]: row[key] for row in rows if key in row}


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 1 << 60  # a line cut short by a kill


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values
