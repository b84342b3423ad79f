"""Examples → padded tensors, shifted once: at index t stand the input, and the label that its logits predict."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import numpy as np
import torch
from torch import Tensor

from tokenkit.align.bias import load_bias
from tokenkit.align.boundary import space_tokens
from tokenkit.align.modes import chunk_mode
from tokenkit.config import UserError
from tokenkit.data.corpus import DataConfig
from tokenkit.data.example import PLAIN, Example, Reading, Row, Side, make_examples
from tokenkit.data.order import ordered
from tokenkit.data.packing import Pack, slots
from tokenkit.data.records import BY_ALM, Record, Wanted
from tokenkit.data.stream import Rows
from tokenkit.tokenizers.base import Tokenizer

NO_LABEL = -1
LENGTH_MULTIPLE = 32  # few distinct shapes: kernels are built per shape, on a CPU at great cost


@dataclass(frozen=True)
class Batch:
    """Named tensors of one microbatch, and what it is made of."""

    tensors: dict[str, Tensor]
    rows: list[int]
    num_bytes: int
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.rows, self.num_bytes, self.num_tokens)


def collate(
    examples: list[Example],
    rows: list[int],
    record: Record | None = None,
    wanted: Wanted = BY_ALM,
    packs: Sequence[int] | None = None,
) -> Batch:
    """One microbatch of examples; with a record also what is wanted of the teacher.

    `packs` are how many examples in turn are read as one row: with them go their `slot` and `positions` of each side.
    """
    num_chunks = max((e.num_chunks for e in examples), default=0)
    tensors = _side("student", [e.student for e in examples], num_chunks, packs)
    teachers = [e.teacher for e in examples if e.teacher is not None]
    if teachers:
        tensors |= _side("teacher", teachers, num_chunks, packs)
    closed = [e.space_after for e in examples if e.space_after is not None]
    if closed:
        tensors["space_after"] = torch.zeros(len(examples), num_chunks, dtype=torch.bool)
        for row, values in enumerate(closed):
            tensors["space_after"][row, : len(values)] = torch.from_numpy(values)
    if record is not None:
        tensors |= record.leaves(rows, teachers, tensors["teacher_inputs"].shape[1], wanted)
    scored = int(tensors["student_label_mask"].sum())
    return Batch(tensors, rows, sum(e.num_bytes for e in examples), scored)


def _side(name: str, sides: list[Side], num_chunks: int, packs: Sequence[int] | None) -> dict[str, Tensor]:
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
    found = {f"{name}_{key}": torch.from_numpy(value) for key, value in tensors.items()}
    if packs is None:
        return found
    ends = [0, *accumulate(packs)]
    lengths = [[len(side.ids) for side in sides[begin:end]] for begin, end in pairwise(ends)]
    return found | {f"{name}_{key}": tensor for key, tensor in slots(lengths, shape[1]).items()}


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


def parts_of(count: int, num_microbatches: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """The places of a step's rows by microbatch, for one of several ranks; empty ones are left out."""
    parts = np.array_split(np.arange(count), num_microbatches * ranks)[rank::ranks]
    return [part.tolist() for part in parts if len(part)]


class Batches:
    """(seed, step) → microbatches: no state, so a resumed run needs nothing but the step."""

    def __init__(
        self,
        windows: Rows,
        student: Tokenizer,
        teacher: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        reading: Reading = PLAIN,
        record: Record | None = None,
        wanted: Wanted = BY_ALM,
        pack_bytes: int | None = None,
    ):
        """`pack_bytes` of text in several rows are read as one; UserError beside a record, which holds them singly."""
        if record is not None and pack_bytes is not None:
            raise UserError("data.packing: true beside record, which holds rows one by one; write packing=false")
        self.windows, self.order = ordered(windows, batch_size, seed, pack_bytes)
        self.student, self.teacher, self.reading, self.packing = student, teacher, reading, pack_bytes is not None
        self.batch_size, self.seed, self.record, self.wanted = batch_size, seed, record, wanted

    def rows(self, step: int) -> list[int]:
        """The numbers of a step's rows."""
        return self.order.numbers(step)

    def texts(self, step: int) -> list[Row]:
        """The windows or conversations of a step, those that are packed one by one."""
        return [one for number in self.rows(step) for one in self.single(number)]

    def single(self, number: int) -> Sequence[Row]:
        """The windows or conversations of a row: one, or those that are packed in it."""
        row = self.windows[number]
        return row.rows if isinstance(row, Pack) else [row]

    def rows_read(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first steps read; nothing where there is one source."""
        return self.order.rows_read(steps)

    def at(self, step: int, num_microbatches: int = 1, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """The microbatches of a step, together always the same rows; a rank of several reads only its own."""
        rows = self.rows(step)
        parts = parts_of(len(rows), num_microbatches, rank, ranks)
        mine = [place for part in parts for place in part]
        single = {i: self.single(rows[i]) for i in mine}
        made = iter(make_examples([one for some in single.values() for one in some], *self._read_by))
        examples = {i: list(islice(made, len(some))) for i, some in single.items()}
        return [self._collated(part, rows, examples) for part in parts]

    @property
    def _read_by(self) -> tuple[Tokenizer, Tokenizer | None, Reading]:
        return self.student, self.teacher, self.reading

    def _collated(self, part: list[int], rows: list[int], examples: Mapping[int, list[Example]]) -> Batch:
        packs = [len(examples[i]) for i in part] if self.packing else None
        together = [example for i in part for example in examples[i]]
        return collate(together, [rows[i] for i in part], self.record, self.wanted, packs)

    def place(self, step: int) -> str:
        """The rows of a step, and where in the documents the first ones begin."""
        rows = self.rows(step)
        windows = [self.windows[row] for row in rows[:3]]
        names = [f"{self.order.name(row)} " if self.order.name(row) else "" for row in rows[:3]]
        starts = ", ".join(
            f"{name}document {window.document} byte {window.start_byte}" for name, window in zip(names, windows)
        )
        return f"rows {rows[:8]}{'…' if len(rows) > 8 else ''} ({starts}{', …' if len(rows) > 3 else ''})"

    def state(self) -> dict[str, Tensor]:
        """Nothing: (seed, step) say it all."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""
