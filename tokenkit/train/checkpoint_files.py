"""Checkpoints as single files: `checkpoint_step_<N>.bin`, the best, the final one, and `training_state.json`.

Steps are compared as numbers. The best and the final file are never deleted and never counted among the newest.
"""

import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.bundle import read_bundle, write_bundle
from tokenkit.train.checkpoint import Progress, Training, check_room, num_bytes, reason
from tokenkit.train.folder import write_json
from tokenkit.train.parallel import leads
from tokenkit.version import __version__

log = logging.getLogger(__name__)
BEST, FINAL, TRAINING_STATE = "checkpoint_best.bin", "checkpoint_final.bin", "training_state.json"
STEP_FILE = re.compile(r"checkpoint_step_(\d+)\.bin")
Curve = Mapping[int, float]


@dataclass(frozen=True)
class Identity:
    """What a checkpoint may only be continued under."""

    config: str
    """Fingerprint of the configuration, without the keys that may change."""
    data: str
    """Fingerprint of the training text."""
    header: Mapping[str, Any]
    """Plain values that say what the tensors are, `network` among them."""
    metric: str
    """The measured value whose course is kept."""
    steps_per_epoch: int = 1


def step_files(folder: Path) -> dict[int, Path]:
    """Step → its file, the newest first."""
    found = {int(m[1]): path for path in folder.glob("*.bin") if (m := STEP_FILE.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


class StepFiles:
    """A file for each checkpoint in one folder."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        curve: Callable[[str], Curve],
        *,
        resume: Path | None = None,
        allow_config_change: bool = False,
    ):
        """`curve` gives what was logged under a name, by step; `resume` is the file to go on from, by default the
        newest."""
        self.folder, self.identity, self.curve = folder, identity, curve
        self.resume, self.allow_config_change = resume, allow_config_change

    def load(self, training: Training) -> Progress | None:
        """Puts the checkpoint to continue from into place; UserError for one of another configuration or other text."""
        if self.resume is not None:
            return self._restore(self.resume, training, *read_bundle(self.resume))
        files = step_files(self.folder)
        for path in files.values():
            try:
                tensors, state = read_bundle(path)
            except UserError as error:
                log.warning("%s; going back to the checkpoint before", error)
                continue
            return self._restore(path, training, tensors, state)
        if files:
            raise UserError(
                f"{self.folder}: none of {len(files)} checkpoints can be read; move them away to begin anew"
            )
        return None

    def save(self, training: Training, progress: Progress, keep: int, last: bool) -> None:
        """Writes the step's file, at the end the final one too, and drops all step files but the newest `keep`."""
        if not leads():
            return
        self._write(f"checkpoint_step_{progress.step}.bin", training, progress)
        if last:
            self._write(FINAL, training, progress)
        for step, path in list(step_files(self.folder).items())[keep:]:
            if step != progress.step:
                path.unlink()
        self._tell(progress)

    def measured(self, training: Training, progress: Progress, improved: bool) -> None:
        """Writes the best file where the run is the best so far."""
        if not leads():
            return
        if improved:
            self._write(BEST, training, progress)
        self._tell(progress)

    def newest(self) -> Path | None:
        """The newest step file."""
        return next(iter(step_files(self.folder).values()), None)

    def _restore(
        self, path: Path, training: Training, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Progress:
        progress = Progress.of(state)
        self._check(path, state, progress)
        try:
            training.put(tensors, state["balance"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: trained {str(error).splitlines()[0]}; choose another folder") from None
        return progress

    def _check(self, path: Path, state: Mapping[str, Any], progress: Progress) -> None:
        if state.get("config_hash") != self.identity.config and not self.allow_config_change:
            raise UserError(
                f"{path}: was written under another configuration ({state.get('config_hash')}, this one is "
                f"{self.identity.config}); restore it, or add --allow-config-change"
            )
        if state.get("data_fingerprint") != self.identity.data:
            raise UserError(
                f"{path}: was trained on other text ({state.get('data_fingerprint')}, this is {self.identity.data}); "
                "restore it, or begin a new run from its weights with --fine-tune"
            )
        later = [number for number in step_files(self.folder) if number > progress.step]
        if self.resume is not None and later:  # would be taken for the newest, and would push out what this run writes
            raise UserError(
                f"{path}: is of step {progress.step}, and {self.folder} has checkpoint_step_{later[0]}.bin; move what "
                "is later away, or choose another folder"
            )

    def _write(self, name: str, training: Training, progress: Progress) -> None:
        target = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = training.tensors()
            check_room(self.folder, num_bytes(tensors))
            for leftover in self.folder.glob(".checkpoint_*.tmp"):  # of a run that was killed while it saved
                leftover.unlink()
            write_bundle(target, tensors, self._state(training, progress))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{target}: the checkpoint of step {progress.step} could not be written ({reason(error)}); those "
                "before are kept; free some room and continue with --resume"
            ) from None

    def _state(self, training: Training, progress: Progress) -> dict[str, Any]:
        return {
            **asdict(progress),
            "epoch": self._epoch(progress),
            "metric": self.identity.metric,
            "learning_rate": training.optimizer.param_groups[0]["lr"],
            "config_hash": self.identity.config,
            "data_fingerprint": self.identity.data,
            "balance": training.balance.state,
            **self.identity.header,
            "timestamp": _now(),
            "versions": {"tokenkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _epoch(self, progress: Progress) -> int:
        return progress.step // self.identity.steps_per_epoch

    def _tell(self, progress: Progress) -> None:
        metric = self.identity.metric
        curves = {"loss_curve": self.curve("loss"), "accuracy_curve": self.curve(metric)}
        write_json(
            self.folder / TRAINING_STATE,
            {
                "step": progress.step,
                "epoch": self._epoch(progress),
                "metric": metric,
                "value": progress.value,
                "best_value": progress.best_value,
                "best_step": progress.best_step,
                **{name: [[step, value] for step, value in curve.items()] for name, curve in curves.items()},
                "timestamp": _now(),
            },
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
