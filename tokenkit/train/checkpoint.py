"""Checkpoints: what is trained, the optimizer's state and the step, in safetensors, complete or not there at all.

A checkpoint is written to a temporary name, synced, and renamed; a manifest with sizes and checksums tells a truncated
one from a whole one. Nothing is ever unpickled. Random draws are functions of (seed, step), so no generator is stored.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenkit.config import UserError

log = logging.getLogger(__name__)
MANIFEST, BALANCE = "manifest.json", "balance.json"
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, and what they were made of."""

    step: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    balance: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Writes `folder/step_XXXXXXXX` and drops all but the newest `keep`; UserError if the disk does not take it.

    `balance` is what the weights of the losses have learnt; JSON keeps every digit of its numbers.
    """
    target = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_leftovers(folder)
        temporary.mkdir()
        save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, temporary / "model.safetensors")
        save_file(_optimizer_tensors(parameters, optimizer), temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(progress.__dict__), "utf-8")
        (temporary / BALANCE).write_text(json.dumps(balance or {}), "utf-8")
        _write_manifest(temporary)
        if target.exists():  # a resumed run comes by its own step again
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{target}: the checkpoint of step {progress.step} could not be written ({_reason(error)}); the one before "
            "is kept; free some room and continue with --resume"
        ) from None
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return target


def load_newest(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Puts the newest whole checkpoint into place; None without one. A damaged one is skipped with a warning."""
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            return _restore(path, parameters, optimizer)
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
    tensors = load_file(path / "model.safetensors")
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
        odd = sorted(set(tensors) ^ set(shapes)) or [n for n in shapes if tuple(tensors[n].shape) != shapes[n]]
        raise UserError(f"{path}: trained other parameters than this run does, {odd[0]} for one; use a new output")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    state = load_file(path / "optimizer.safetensors")
    for name, parameter in parameters.items():
        if f"{name}.step" in state:
            optimizer.state[parameter] = {key: state[f"{name}.{key}"].to(parameter.device) for key in ADAM_STATE}
    values: dict[str, Any] = json.loads((path / "progress.json").read_text("utf-8"))
    return Progress(**values)


def _optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter] if parameter in optimizer.state else {}
        for key in ADAM_STATE:
            if key in state:
                tensors[f"{name}.{key}"] = state[key].detach().cpu().contiguous()
    return tensors


def _write_manifest(folder: Path) -> None:
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    for name in manifest:
        _sync(folder / name)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), "utf-8")
    _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".step_*.tmp"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
