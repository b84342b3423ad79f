"""`tokenkit record`: a teacher reads a corpus once; students of any tokenizer are then taught from the folder."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenkit.config import Config, UserError, digest, resolved
from tokenkit.data.batch import collate, reading_of
from tokenkit.data.corpus import DataConfig, read_training_rows
from tokenkit.data.example import Example, Reading, Row, make_examples
from tokenkit.data.records import (
    HIDDEN,
    HOLDS,
    TOKENIZER,
    TOP,
    Identity,
    Manifest,
    Record,
    Recording,
    RowScores,
    Store,
    positions,
    rows_identity,
    sha256_of,
)
from tokenkit.data.source import read_documents
from tokenkit.data.stream import held
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.models.adapter import SETTINGS, WEIGHTS
from tokenkit.models.view import ModelView
from tokenkit.report.progress import progress
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.folder import RunFolder
from tokenkit.train.tasks.distill import boundary_mask
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair


class RecordRun(Config):
    """A run file of `tokenkit record`."""

    output: Path
    """Folder for shards, manifest.json and the teacher's tokenizer."""
    teacher: ModelChoice
    data: DataConfig
    """As the students will have it. Keys that only concern a student (`train_on`, `chunks`, ...) may differ there."""
    batch_size: int = Field(16, ge=1)
    """Rows that the teacher reads together."""
    shard_rows: int = Field(8192, ge=1)
    """Rows per file; an interrupted recording loses at most so many."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward pass, not of what is recorded."""
    top_k: int | None = Field(None, ge=1)
    """Also record the teacher's best ids at each position, their log-probabilities and the log-mass of all others."""
    hidden: bool = False
    """Also record the teacher's last hidden state at each token."""
    store: Store = "float32"
    """Type of those log-probabilities and states on disk; the log-masses and what ALM reads stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval: EvalConfig | None = None
    """Also measure the teacher, so that runs on the same held-out text can show its bits per byte."""


def record(run: RecordRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Writes the output folder; what the command prints."""
    model, tokenizer = load_pair(run.teacher, pick_device(run.device), teacher=True)
    rows = held(read_training_rows(run.data))
    held_out = read_documents(run.eval.source) if run.eval else []
    identity = data_identity(run.data, rows, tokenizer) | teacher_identity(run.teacher)
    view, reading = ModelView(model), reading_of(run.data, tokenizer, None)
    blank = _blank(run, view, {**identity, "precision": run.precision}, len(rows))
    RunFolder(run.output).claim(resolved(run), resume=resume)
    _keep_tokenizer(tokenizer, run.output / TOKENIZER)
    recording = Recording(run.output, blank)
    with progress("recording", len(rows), quiet=quiet) as advance:
        for number, first in enumerate(range(0, len(rows), run.shard_rows)):
            some = rows[first : first + run.shard_rows]
            if not recording.has(number):
                recording.add(number, first, _scores(run, blank.holds, view, tokenizer, some, reading))
            advance(len(some))
    figure = None
    if run.eval:
        figure = bits_per_byte(view, tokenizer, held_out, **run.eval.model_dump(exclude={"source"})).value
    done = recording.finish(figure, evaluated_on(run.eval, held_out) if run.eval else None)
    Record(run.output).check(identity)  # what leaves the house is read again
    return {
        "record": str(run.output),
        "rows": done.rows,
        "tokens": done.tokens,
        "bytes_per_token": done.bytes_per_token,
        "shards": len(done.shards),
        "teacher_bits_per_byte": figure,
    }


def _blank(run: RecordRun, view: ModelView, identity: Identity, rows: int) -> Manifest:
    """The manifest before a row is read; UserError where more ids are wanted than the teacher has."""
    if run.top_k is not None and run.top_k > view.vocab_rows:
        raise UserError(f"top_k: {run.top_k}, but the teacher has {view.vocab_rows} ids; write that many at most")
    return Manifest(
        holds=(*HOLDS, *(TOP if run.top_k is not None else ()), *((HIDDEN,) if run.hidden else ())),
        teacher=run.teacher.source,
        text=run.data.describe(),
        identity=identity,
        rows=rows,
        top_k=run.top_k,
        hidden_width=view.head().shape[1] if run.hidden else None,
        store=run.store,
    )


def data_identity(data: DataConfig, rows: Sequence[Row], teacher: Tokenizer) -> Identity:
    """What must be the same of a run's data where a record is written and where it is read."""
    return rows_identity(
        rows, teacher, format=data.format, window_bytes=data.window_bytes, template_options=data.template_options
    )


def teacher_identity(choice: ModelChoice) -> Identity:
    """sha256 of the configuration and weight files of a model, of its adapter, and of what it is rounded to."""
    folder = Path(choice.source)
    if not folder.is_dir():
        folder = _downloaded(choice)
    parts = []
    adapter = () if choice.adapter is None else (choice.adapter / SETTINGS, choice.adapter / WEIGHTS)
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors")), *adapter):
        if not path.is_file():
            raise UserError(f"{path}: no such file; write the folder of a Hugging Face model as teacher.source")
        with path.open("rb") as file:
            parts += [path.name.encode(), hashlib.file_digest(file, "sha256").digest()]
    parts += [] if choice.quantize is None else [choice.quantize.encode()]
    return {"teacher weights": sha256_of(parts)}


def _downloaded(choice: ModelChoice) -> Path:
    from huggingface_hub import snapshot_download  # only for hub ids: heavy to import
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["config.json", "*.safetensors"]
    try:
        return Path(snapshot_download(choice.source, revision=choice.revision, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{choice.source}: no such folder, not loaded from the hub ({type(error).__name__})") from None


def evaluated_on(config: EvalConfig, held_out: list[str]) -> str:
    """A fingerprint of held-out text and of the context it is read with."""
    how = digest(resolved(config)["context_tokens"]) + digest(resolved(config)["stride_tokens"])
    return sha256_of([how.encode(), *(text.encode() for text in held_out)])


def _keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the teacher's tokenizer, whole or not at all, and reads it back."""
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # of a recording that was killed while it wrote
        draft.mkdir()
        tokenizer.save(draft)
        draft.rename(folder)
    again = load_tokenizer(str(folder))
    if (again.fingerprint, again.chat_template) != (tokenizer.fingerprint, tokenizer.chat_template):
        raise UserError(f"{folder}: does not hold the teacher's tokenizer; write output=... with a new name")


@torch.no_grad()
def _scores(
    run: RecordRun,
    holds: Sequence[str],
    view: ModelView,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    reading: Reading,
) -> list[RowScores]:
    """What the teacher says of each row: of every token, because which ones a student learns is the student's."""
    examples = [_all_scored(example) for example in make_examples(rows, tokenizer, None, reading)]
    sets = {"boundary_logp": boundary_mask(view, tokenizer)}
    found: dict[int, RowScores] = {}
    for some in _batches(examples, run.batch_size):
        batch = collate([examples[i] for i in some], some).to(view.model.device)
        inputs, labels = batch.tensors["student_inputs"], batch.tensors["student_labels"]
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
            leaves = view.leaves(set(holds), inputs, labels, sets, top_k=run.top_k)
        stored = {name: _stored(name, leaves[name], run.store, view.vocab_rows) for name in holds}
        for place, row in enumerate(some):
            ids = examples[row].student.ids
            said = {name: values[place, positions(name, len(ids) - 1)] for name, values in stored.items()}
            found[row] = RowScores(ids, said)
    return [found[row] for row in range(len(rows))]


def _stored(name: str, leaf: Tensor, store: Store, vocab_rows: int) -> np.ndarray:
    """A leaf in the type that it has on disk; UserError where its numbers are too large for that."""
    if name == "top_ids":
        return leaf.cpu().numpy().astype(np.uint16 if vocab_rows <= 1 << 16 else np.int32)
    values = leaf.float().cpu().numpy()
    if store == "float32" or name not in ("top_logp", HIDDEN):
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (np.isinf(half) & np.isfinite(values)).any():
        raise UserError(
            f"store: float16 ends at 65,504, but the teacher's {name} reaches {np.abs(values).max():,.0f}; write "
            "store=float32"
        )
    return half


def _all_scored(example: Example) -> Example:
    return replace(example, student=replace(example.student, trained=np.ones(len(example.student.ids), np.bool_)))


def _batches(examples: list[Example], size: int) -> Iterator[list[int]]:
    """Rows of like length together, so that little is padding."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].student.ids))
    return (order[start : start + size] for start in range(0, len(order), size))
