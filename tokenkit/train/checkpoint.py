"""Checkpoints: what is trained, the optimizer's state and the step, in safetensors, complete or not there at all.

A checkpoint is written to a temporary name, synced, and renamed; a manifest with sizes and checksums tells a truncated
one from a whole one. Nothing is ever unpickled. Random draws are functions of (seed, step), so no generator is stored.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.tokenizers.whole_file import sync
from tokenkit.train.balance import Balance
from tokenkit.train.optimizer_state import optimizer_tensors, plain, put_optimizer
from tokenkit.train.parallel import everyone, first, leaders, like, together
from tokenkit.train.shards import Shards, write_part
from tokenkit.train.tasks import Stateful

log = logging.getLogger(__name__)
MANIFEST, BALANCE, STATE = "manifest.json", "balance.json", "state.safetensors"
REPLACED = ".replaced"  # a checkpoint that another of the same name is taking the place of
HEADERS = 1 << 20  # bytes of a checkpoint beside its tensors
LISTED = 5


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, what they were made of, and how good it has been."""

    step: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    loss: float | None = None
    """Of the last step."""
    value: float | None = None
    """What `train.best.metric` was when it was last measured."""
    best_value: float | None = None
    """The best it has been, and after which step; a resumed run goes on from both."""
    best_step: int | None = None
    since_best: int = 0
    """Measurements since then."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Progress":
        """The progress among the plain values of a checkpoint."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def after(self, loss: float, num_tokens: int, num_bytes: int) -> "Progress":
        """One step further."""
        tokens, size = self.num_tokens + num_tokens, self.num_bytes + num_bytes
        return replace(self, step=self.step + 1, num_tokens=tokens, num_bytes=size, loss=loss)


@dataclass(frozen=True)
class Training:
    """All that a checkpoint holds, where it lives while a run goes on."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    balance: Balance
    owners: Mapping[str, Stateful]
    """By name, what has a memory that (seed, step) do not give."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is trained, the optimizer's state, and the owners' memories, each by name."""
        memories = {f"{o}.{n}": plain(t) for o, owner in self.owners.items() for n, t in owner.state().items()}
        return {
            "model": {name: plain(parameter) for name, parameter in self.parameters.items()},
            "optimizer": optimizer_tensors(self.parameters, self.optimizer),
            "state": memories,
        }

    def put(self, tensors: Mapping[str, Mapping[str, Tensor]], balance: Mapping[str, dict[str, float]]) -> None:
        """Puts back what `tensors` and the balance's state were."""
        put_parameters(self.parameters, tensors["model"])
        put_optimizer(self.parameters, self.optimizer, tensors["optimizer"])
        self.put_memories(tensors["state"], balance)

    def put_memories(self, tensors: Mapping[str, Tensor], balance: Mapping[str, dict[str, float]]) -> None:
        """Puts back what the owners and the balance remembered."""
        for name, owner in self.owners.items():
            own = f"{name}."
            owner.load_state({n.removeprefix(own): tensor for n, tensor in tensors.items() if n.startswith(own)})
        self.balance.state |= balance


@runtime_checkable
class Checkpoints(Protocol):
    """Where a run's checkpoints are kept, and in what form."""

    def load(self, training: Training) -> Progress | None:
        """Puts the checkpoint that the run continues from into place; None where it begins."""
        ...

    def save(self, training: Training, progress: Progress, keep: int, last: bool) -> None:
        """Keeps the run as it stands, and of the checkpoints of other steps all but the newest `keep`."""
        ...

    def measured(self, training: Training, progress: Progress, improved: bool) -> None:
        """The run was measured at this step; where it is the best so far it is kept as such."""
        ...

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        ...


class StepFolders:
    """A folder for each checkpoint, `step_00000100`; the one that measures best in `best`, however old."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, training: Training) -> Progress | None:
        """Puts the newest whole checkpoint into place; None without one. UserError where the next would not fit."""
        size = 3 * sum(p.numel() * p.element_size() for p in training.parameters.values())

        def begin() -> Path | None:
            check_room(self.folder, size)
            put_back(self.folder)
            return newest_whole(self.folder)

        path = first(begin)
        if path is None:
            return None
        progress = _restore(path, training.parameters, training.optimizer)
        state = load_file(path / STATE) if (path / STATE).is_file() else {}
        training.put_memories(state, read_balance(self.folder, progress.step))
        return progress

    def save(self, training: Training, progress: Progress, keep: int, last: bool) -> None:
        """Writes the step's folder and drops all but the newest `keep`."""
        _write(self.folder, f"step_{progress.step:08d}", training.tensors(), progress, training.balance.state)
        first(lambda: _drop_old(self.folder, keep))

    def measured(self, training: Training, progress: Progress, improved: bool) -> None:
        """Writes `best` where the run is the best so far."""
        if improved:
            _write(self.folder, "best", training.tensors(), progress, training.balance.state)

    def newest(self) -> Path | None:
        """The folder of the newest checkpoint."""
        return next(iter(list_checkpoints(self.folder)), None)


def _write(
    folder: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    progress: Progress,
    balance: Mapping[str, Mapping[str, float]],
) -> Path:
    target, temporary = folder / name, folder / f".{name}.{leaders(os.getpid())}.tmp"
    refused = "could not be written ({}); the one before is kept; free some room and continue with --resume"
    refused = f"{target}: the checkpoint of step {progress.step} {refused}"

    def begin() -> None:
        with _telling(refused, temporary):
            folder.mkdir(parents=True, exist_ok=True)
            put_back(folder)
            _drop_leftovers(folder)
            check_room(folder, num_bytes(tensors))
            temporary.mkdir()

    def finish() -> None:
        with _telling(refused, temporary):
            (temporary / "progress.json").write_text(json.dumps(asdict(progress)), "utf-8")
            (temporary / BALANCE).write_text(json.dumps(balance), "utf-8")
            _write_manifest(temporary, sums)
            replaced = folder / f".{name}{REPLACED}"
            if target.exists():  # the best so far, or a damaged step that a resumed run comes by again
                target.rename(replaced)
            temporary.rename(target)
            sync(folder)
            if replaced.exists():
                shutil.rmtree(replaced)

    first(begin)
    own: dict[str, dict[str, Any]] = {}
    failed = None
    try:
        with _telling(refused, temporary):
            for part, values in tensors.items():
                path = write_part(temporary, part, values) if values or part != "state" else None
                if path is not None:
                    own[path.name] = _sum_of(path)
    except UserError as error:
        failed = str(error)
    together(failed)
    sums = {name: entry for some in everyone(own) for name, entry in some.items()}
    first(finish)
    return target


@contextmanager
def _telling(refused: str, temporary: Path) -> Iterator[None]:
    """What goes wrong inside is told in one line, and leaves nothing behind."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        put_back(temporary.parent)
        raise UserError(refused.format(reason(error))) from None


def put_back(folder: Path) -> None:
    """After a kill between two renames: the checkpoint that was being replaced gets its name back."""
    for replaced in folder.glob(f".*{REPLACED}"):
        target = folder / replaced.name.removeprefix(".").removesuffix(REPLACED)
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)


def num_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """What the tensors of a checkpoint take."""
    return sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())


def check_room(folder: Path, size_bytes: int) -> None:
    """UserError, before an hour is spent, where a checkpoint of so many bytes does not fit on the disk."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, size_bytes + HEADERS
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint takes {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left; free "
            "some room, or write output=... on another disk"
        )


def _drop_old(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; one that is, is passed over with a warning."""
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            return path
        log.warning("%s: %s; going back to the checkpoint before", path, damage)
    return None


def read_balance(folder: Path, step: int) -> dict[str, dict[str, float]]:
    """What the weights of the losses had learnt when `step` was saved."""
    path = folder / f"step_{step:08d}" / BALANCE
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}  # saved before there were such weights


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return "has no readable manifest"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes of {expected['bytes']:,}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} does not have the checksum it was written with"
    return None


def _restore(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    try:
        put_parameters(parameters, Shards(path, "model"))
        put_optimizer(parameters, optimizer, Shards(path, "optimizer"))
    except ValueError as error:
        raise UserError(f"{path}: trained {error}; use a new output") from None
    return Progress.of(json.loads((path / "progress.json").read_text("utf-8")))


def put_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copies saved values into parameters; ValueError where they are others."""
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    there = tensors.shapes if isinstance(tensors, Shards) else {name: tuple(t.shape) for name, t in tensors.items()}
    if there != shapes:
        raise ValueError(f"other parameters than this run does, {_mismatch(there, shapes)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(tensors[name], parameter))


def _mismatch(there: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What two sets of parameters do not have in common, each kind by its first few names."""
    gone, new = sorted(set(there) - set(shapes)), sorted(set(shapes) - set(there))
    other = [
        f"{name} {list(there[name])} there and {list(shapes[name])} here"
        for name in sorted(set(there) & set(shapes))
        if there[name] != shapes[name]
    ]
    kinds = {"only in the checkpoint": gone, "only in this run": new, "of other shapes": other}
    said = [
        f"{what}: {', '.join(names[:LISTED])}" + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        for what, names in kinds.items()
        if names
    ]
    return f"{(gone or new or other)[0].split()[0]} for one ({'; '.join(said)})"


def _write_manifest(folder: Path, sums: Mapping[str, Mapping[str, Any]]) -> None:
    """Lists every file; `sums` are those that their writers have already read again."""
    manifest = {file.name: sums.get(file.name) or _sum_of(file) for file in sorted(folder.iterdir())}
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), "utf-8")
    sync(path)
    sync(folder)


def _sum_of(file: Path) -> dict[str, Any]:
    """Size and checksum of a file that is now safe on the disk."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)


def reason(error: Exception) -> str:
    """What an operating system or a library says, in one line."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
