"""`tokenkit tokenizer manage-checkpoints`: look at checkpoints, choose the best, keep it, drop old ones."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError
from tokenkit.eval.tokenizer_test import examine, open_subject
from tokenkit.tokenizers.autoencoder.bundle import EMA, read_bundle, read_network, read_state, write_bundle
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT
from tokenkit.tokenizers.autoencoder.package import METRICS, Package
from tokenkit.tokenizers.autoencoder.tokenizer import package_of, save_with_fast
from tokenkit.train.checkpoint import reason
from tokenkit.train.checkpoint_files import BEST, FINAL, TRAINING_STATE, step_files
from tokenkit.train.folder import write_json, write_text

Action = Literal["list", "compare", "select-best", "archive", "clean"]
SUMS, CARD = "SHA256SUMS", "archive.json"
LOWER_IS_BETTER = ("perplexity", "loss", "distance", "error")


class TokenizerCheckpointsRun(Config):
    """A run file of `tokenkit tokenizer manage-checkpoints`."""

    action: Action
    folder: Path | None = None
    """Where the checkpoints are."""
    checkpoints: tuple[Path, ...] = ()
    """compare: two files."""
    output: Path | None = None
    """select-best: a new folder for the tokenizer, or a new .bin file for its weights; archive: a new folder."""
    pins: Path | None = None
    """select-best: the folder of a tokenizer whose pins and settings the new one takes; without it, codes and bytes."""
    keep: int = Field(5, ge=1)
    """clean: the newest so many step files stay, and the best and the final one in any case."""

    @model_validator(mode="after")
    def _whole(self) -> "TokenizerCheckpointsRun":
        if self.action == "compare":
            if len(self.checkpoints) != 2:
                raise UserError(f"checkpoints: {len(self.checkpoints)} files; write the two that are to be compared")
        elif self.folder is None:
            raise UserError(f"folder: missing; write the folder of the checkpoints to {self.action}")
        if self.action in ("select-best", "archive") and self.output is None:
            raise UserError(f"output: missing; write where {self.action} is to put the model")
        return self


@dataclass(frozen=True)
class CheckpointRow:
    """One file as a list shows it."""

    file: str
    step: int | None
    epoch: int | None
    loss: float | None
    """Of its last step."""
    value: float | None
    """The measured value, where the run was measured at this very step."""
    megabytes: float
    timestamp: str | None
    marks: tuple[str, ...]
    """best, final, newest; or what is wrong with the file."""


def manage_checkpoints(run: TokenizerCheckpointsRun) -> dict[str, Any]:
    """Plain values of what was found or done."""
    return ACTIONS[run.action](run)


def list_checkpoints(folder: Path) -> list[CheckpointRow]:
    """Every checkpoint file: the steps by number, then the final and the best; UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"folder: {folder} does not exist; write the folder of the checkpoints")
    steps = step_files(folder)
    files = [*reversed(steps.values()), *(path for name in (FINAL, BEST) if (path := folder / name).is_file())]
    if not files:
        raise UserError(f"folder: {folder} has no checkpoints; write the folder that has checkpoint_step_1000.bin")
    curve = _curve(folder)
    return [_row(path, curve, newest=path == next(iter(steps.values()), None)) for path in files]


def best_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file whose run measured best at its own step, and what its state says; UserError where none was measured.

    Of equally good ones the file that the training itself called best goes first, then the latest.
    """
    rows = [row for row in list_checkpoints(folder) if row.value is not None]
    if not rows:
        raise UserError(f"{folder}: no checkpoint was measured; train with eval_interval, so that there is a best one")
    metric = str(read_state(folder / rows[0].file).get("metric", "value"))
    sign = -1 if any(word in metric for word in LOWER_IS_BETTER) else 1
    best = max(rows, key=lambda row: (sign * (row.value or 0.0), row.file == BEST, row.step or 0))
    path = folder / best.file
    return path, {"file": best.file, "step": best.step, "metric": metric, "value": best.value}


def clean_checkpoints(folder: Path, keep: int) -> dict[str, Any]:
    """Drops all step files but the newest `keep` by number; the best and the final file stay, and do not count."""
    list_checkpoints(folder)
    old = list(step_files(folder).values())[keep:]
    freed = sum(path.stat().st_size for path in old)
    for path in old:
        path.unlink()
    return {"dropped": sorted((path.name for path in old), key=_number), "freed_megabytes": round(freed / 1e6, 3)}


def checkpoint_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The list for people, a file a line."""
    lines = [f"{'file':30}{'step':>9}{'loss':>10}{'measured':>10}{'MB':>9}  "]
    for row in rows:
        cells = [_cell(row["loss"], 10), _cell(row["value"], 10), f"{row['megabytes']:>9.2f}"]
        step = "–" if row["step"] is None else f"{row['step']:,}"
        lines.append(f"{row['file']:30}{step:>9}{''.join(cells)}  {', '.join(row['marks'])}")
    return [line.rstrip() for line in lines]


def _cell(value: float | None, width: int) -> str:
    return f"{'–' if value is None else f'{value:.4f}':>{width}}"


def _number(name: str) -> int:
    return int("".join(filter(str.isdecimal, name)))


def _list(run: TokenizerCheckpointsRun) -> dict[str, Any]:
    return {"checkpoints": [{**asdict(row), "marks": [*row.marks]} for row in list_checkpoints(_folder(run))]}


def _compare(run: TokenizerCheckpointsRun) -> dict[str, Any]:
    sides = {name: _looked_at(path) for name, path in zip("ab", run.checkpoints)}
    first, second = sides.values()
    numbers = [key for key, value in first.items() if _is_number(value) and _is_number(second[key])]
    return {
        **sides,
        "change": {key: second[key] - first[key] for key in numbers},
        "same_configuration": first["config_hash"] == second["config_hash"],
        "same_text": first["data_fingerprint"] == second["data_fingerprint"],
    }


def _looked_at(path: Path) -> dict[str, Any]:
    state = read_state(path)
    found = examine(open_subject(path), "after").learned
    assert found is not None
    kept = ("step", "epoch", "loss", "value", "config_hash", "data_fingerprint", "timestamp")
    figures = ("char_accuracy_positional", "char_accuracy_aligned", "perfect", "mean_edit_distance", "byte_accuracy")
    return {
        "file": str(path),
        **{key: state.get(key) for key in kept},
        **{key: found.model_dump()[key] for key in (*figures, "reconstruction_perplexity")},
        "megabytes": round(path.stat().st_size / 1e6, 3),
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _select_best(run: TokenizerCheckpointsRun) -> dict[str, Any]:
    path, chosen = best_checkpoint(_folder(run))
    output = _new(run.output)
    if output.suffix == ".bin":
        if run.pins:
            raise UserError(f"pins: {output} is a file of weights, which has none; write the name of a folder")
        _write_weights(path, output)
        return {**chosen, "output": str(output)}
    network, state = read_network(path), read_state(path)
    if run.pins is None:
        package = package_of(network, chunker=state.get("chunker", DEFAULT))
    else:
        old = Package.load(run.pins, "compact")
        settings = old.config.model_dump(exclude={"network"})
        if settings["chunker"] != state.get("chunker", DEFAULT):
            raise UserError(f"pins: {run.pins} has chunks {settings['chunker']}, the checkpoint {state.get('chunker')}")
        package = package_of(network, old.pins, warm={**old.warm}, **settings)
    fingerprint = save_with_fast(package, output)
    write_json(output / METRICS, chosen)
    return {**chosen, "output": str(output), "fingerprint": fingerprint}


def _write_weights(path: Path, output: Path) -> None:
    """The averaged weights alone, in the form of a checkpoint: what is trained on stays behind."""
    tensors, state = read_bundle(path)
    memories = tensors["state"]
    averaged = {name.removeprefix(EMA): t for name, t in memories.items() if name.startswith(EMA)}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bundle(output, {"model": averaged or tensors["model"]}, state)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({reason(error)})") from None


def _archive(run: TokenizerCheckpointsRun) -> dict[str, Any]:
    """Copies the best checkpoint with its history and sums into a new folder, whole or not at all."""
    folder, output = _folder(run), _new(run.output)
    path, chosen = best_checkpoint(folder)
    read_bundle(path)  # nothing damaged is kept for later
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in (path, folder / TRAINING_STATE):
        if file.is_file():
            shutil.copy2(file, part / file.name)
    write_json(part / CARD, {**chosen, "from": str(path), "archived": datetime.now(UTC).isoformat(timespec="seconds")})
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(part.iterdir())]
    write_text(part / SUMS, "\n".join(sums) + "\n")
    part.rename(output)
    return {**chosen, "output": str(output)}


def _clean(run: TokenizerCheckpointsRun) -> dict[str, Any]:
    return clean_checkpoints(_folder(run), run.keep)


ACTIONS: Mapping[Action, Callable[[TokenizerCheckpointsRun], dict[str, Any]]] = {
    "list": _list,
    "compare": _compare,
    "select-best": _select_best,
    "archive": _archive,
    "clean": _clean,
}


def _folder(run: TokenizerCheckpointsRun) -> Path:
    assert run.folder is not None
    return run.folder


def _new(output: Path | None) -> Path:
    assert output is not None
    if output.exists():
        raise UserError(f"output: {output} exists, and nothing is overwritten; write a new name")
    return output


def _row(path: Path, curve: Mapping[int, float], newest: bool) -> CheckpointRow:
    size = round(path.stat().st_size / 1e6, 3)
    marks = [mark for mark, name in (("best", BEST), ("final", FINAL)) if path.name == name]
    try:
        state = read_state(path)
    except UserError as error:
        return CheckpointRow(path.name, None, None, None, None, size, None, (*marks, f"damaged: {error}"))
    step = state["step"]
    return CheckpointRow(
        file=path.name,
        step=step,
        epoch=state.get("epoch"),
        loss=state.get("loss"),
        value=_measured(state, curve, path.name == BEST),
        megabytes=size,
        timestamp=state.get("timestamp"),
        marks=(*marks, *(["newest"] if newest else [])),
    )


def _measured(state: Mapping[str, Any], curve: Mapping[int, float], is_best: bool) -> float | None:
    """What was measured of the weights in this file: what a state remembers may be of an earlier step."""
    if is_best or state["step"] == state.get("best_step"):
        return state.get("best_value")
    return curve.get(state["step"]) if curve else state.get("value")


def _curve(folder: Path) -> dict[int, float]:
    path = folder / TRAINING_STATE
    if not path.is_file():
        return {}
    try:
        return {int(step): float(value) for step, value in json.loads(path.read_text("utf-8"))["accuracy_curve"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the state of a training; move it away to go by the checkpoints alone") from None
