"""Examples → padded tensors, shifted once: at index t stand the input, and the label that its logits predict."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from tokenkit.align.bias import load_bias
from tokenkit.align.boundary import space_tokens
from tokenkit.align.modes import ModeName, chunk_mode
from tokenkit.config import Config
from tokenkit.data.example import PLAIN, Example, Reading, Row, Side, SpecialTokens, Window, cut, make_examples
from tokenkit.data.messages import Dialogue, read_dialogues
from tokenkit.data.records import BY_ALM, Record, Wanted
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import TrainOn

NO_LABEL = -1
LENGTH_MULTIPLE = 32  # few distinct shapes: kernels are built per shape, on a CPU at great cost


class DataConfig(Config):
    """Training text, cut by bytes so that every tokenizer sees the same text at the same step."""

    source: SourceConfig
    window_bytes: int = 512
    """Bytes of text in one row; a byte-level student needs about as many positions. Of conversations: tokens."""
    format: Literal["text", "chat"] = "text"
    """`chat`: each row of the source holds messages (under `source.field`, by default `messages`)."""
    learn_after: str | None = None
    """Of text: what stands up to the last occurrence of this marker is read and not learnt (`"### Response:\\n"`)."""
    train_on: TrainOn = "assistant"
    """Of conversations: what the student learns to write."""
    template_options: dict[str, Any] = {}
    """Variables of the chat templates, such as enable_thinking or date_string."""
    chunks: ModeName = "unconstrained"
    """What chunks are joined to before any loss sees them: whole words, or up to ends of little tokenization bias."""
    bias: Path | None = None
    """For `unbiased`: the folder that `tokenkit tokenizer-info` wrote for this pair."""
    bias_threshold: float = Field(0.1, ge=0, le=1)
    mined: Path | None = None
    """For losses over MinED's token map: the folder of `tokenkit mined-mapping`; without one it is made at start."""
    special_tokens_mode: SpecialTokens = "identity"
    """Special tokens of both sides are compared by their places; or none is; or all but padding tokens are."""


@dataclass(frozen=True)
class Batch:
    """Named tensors of one microbatch, and what it is made of."""

    tensors: dict[str, Tensor]
    rows: list[int]
    num_bytes: int
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.rows, self.num_bytes, self.num_tokens)


def collate(examples: list[Example], rows: list[int], record: Record | None = None, wanted: Wanted = BY_ALM) -> Batch:
    """One microbatch of examples; with a record also what is wanted of the teacher."""
    num_chunks = max((e.num_chunks for e in examples), default=0)
    tensors = _side("student", [e.student for e in examples], num_chunks)
    teachers = [e.teacher for e in examples if e.teacher is not None]
    if teachers:
        tensors |= _side("teacher", teachers, num_chunks)
    closed = [e.space_after for e in examples if e.space_after is not None]
    if closed:
        tensors["space_after"] = torch.zeros(len(examples), num_chunks, dtype=torch.bool)
        for row, values in enumerate(closed):
            tensors["space_after"][row, : len(values)] = torch.from_numpy(values)
    if record is not None:
        tensors |= record.leaves(rows, teachers, tensors["teacher_inputs"].shape[1], wanted)
    scored = int(tensors["student_label_mask"].sum())
    return Batch(tensors, rows, sum(e.num_bytes for e in examples), scored)


def _side(name: str, sides: list[Side], num_chunks: int) -> dict[str, Tensor]:
    longest = max(len(s.ids) for s in sides)
    shape = (len(sides), -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    inputs = np.zeros(shape, np.int64)
    labels, chunk = np.full(shape, NO_LABEL, np.int64), np.full(shape, -1, np.int64)
    chunk_end = np.full((len(sides), num_chunks), -1, np.int64)
    token_mask = np.zeros(shape, np.bool_)
    for row, side in enumerate(sides):
        length = len(side.ids)
        inputs[row, :length] = side.ids
        token_mask[row, : length - 1] = True  # something follows, learnt or not
        labels[row, : length - 1] = np.where(side.trained[1:], side.ids[1:], NO_LABEL)
        chunk[row, : length - 1] = side.chunk[1:]  # the first token is given, never scored
        inside = np.flatnonzero(side.chunk >= 0)
        chunk_end[row, side.chunk[inside]] = inside  # ascending, so a chunk's last token stays
    tensors = {"inputs": inputs, "labels": labels, "chunk": chunk, "chunk_end": chunk_end, "label_mask": labels >= 0}
    tensors["token_mask"] = token_mask
    return {f"{name}_{key}": torch.from_numpy(value) for key, value in tensors.items()}


def read_training_rows(data: DataConfig) -> list[Window] | list[Dialogue]:
    """The rows of the training text: windows of documents, or conversations."""
    if data.format == "text":
        return cut(read_documents(data.source), data.window_bytes, data.learn_after)
    column = data.source.field if "field" in data.source.model_fields_set else "messages"
    return read_dialogues(data.source, column)


def reading_of(
    data: DataConfig, student: Tokenizer, teacher: Tokenizer | None, shared_needs: AbstractSet[str] = frozenset()
) -> Reading:
    """How the rows of a pair of tokenizers are read; UserError where the bias of another pair is named.

    `shared_needs` are the tensors about both sides that losses ask for.
    """
    mode = None
    if teacher is not None and data.chunks != "unconstrained":
        bias = load_bias(data.bias, teacher, student) if data.bias is not None else None
        mode = chunk_mode(data.chunks, teacher, student, bias, data.bias_threshold)
    longest = data.window_bytes if data.format == "chat" else None
    spaces = None
    if teacher is not None and "space_after" in shared_needs:
        spaces = space_tokens(teacher), space_tokens(student)
    return Reading(mode, data.special_tokens_mode, longest, data.train_on, data.template_options, spaces)


class Batches:
    """(seed, step) → microbatches: no state, so a resumed run needs nothing but the step."""

    def __init__(
        self,
        windows: Sequence[Row],
        student: Tokenizer,
        teacher: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        reading: Reading = PLAIN,
        record: Record | None = None,
        wanted: Wanted = BY_ALM,
    ):
        self.windows, self.student, self.teacher, self.reading = windows, student, teacher, reading
        self.batch_size, self.seed, self.record, self.wanted = batch_size, seed, record, wanted
        self._epoch: tuple[int, Int[ndarray, "N"]] = (-1, np.empty(0, np.int64))

    def rows(self, step: int) -> list[int]:
        """The rows of a step: each epoch is its own permutation, and steps run on across epochs."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._row(position) for position in positions]

    def at(self, step: int, num_microbatches: int = 1) -> list[Batch]:
        """The microbatches of a step, together always the same rows."""
        rows = self.rows(step)
        examples = make_examples([self.windows[row] for row in rows], self.student, self.teacher, self.reading)
        parts = np.array_split(np.arange(len(rows)), num_microbatches)
        cut = [part.tolist() for part in parts if len(part)]
        teacher = self.record, self.wanted
        return [collate([examples[i] for i in part], [rows[i] for i in part], *teacher) for part in cut]

    def place(self, step: int) -> str:
        """The rows of a step, and where in the documents the first ones begin."""
        rows = self.rows(step)
        windows = [self.windows[row] for row in rows[:3]]
        starts = ", ".join(f"document {window.document} byte {window.start_byte}" for window in windows)
        return f"rows {rows[:8]}{'…' if len(rows) > 8 else ''} ({starts}{', …' if len(rows) > 3 else ''})"

    def state(self) -> dict[str, Tensor]:
        """Nothing: (seed, step) say it all."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.windows))
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
            self._epoch = (epoch, order)
        return int(self._epoch[1][offset])
