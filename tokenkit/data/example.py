"""A row, tokenised once for each side and aligned: pure, and the same for every tokenizer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int, Int64
from numpy import ndarray

from tokenkit.align.modes import Mode, closed_by_space
from tokenkit.align.spans import align, keep_chunks, mask_tokens, trained_chunks, truncate
from tokenkit.data.messages import Dialogue
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, Tokenizer, framed, utf8
from tokenkit.tokenizers.chat import ChatEncoding, TrainOn, encode_chat


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document that fits a training row."""

    document: int
    start_byte: int
    text: str
    ends_document: bool
    learnt_from: int = 0  # bytes at its beginning that are read and not learnt


Row = Window | Dialogue


@dataclass(frozen=True, slots=True)
class Side:
    """One tokenisation of a row: ids, the chunk of every token (-1: in none), and which tokens are learnt."""

    ids: Int[ndarray, "T"]
    chunk: Int[ndarray, "T"]
    trained: Bool[ndarray, "T"]


@dataclass(frozen=True, slots=True)
class Example:
    """A row as both sides read it; without a teacher there are no chunks."""

    student: Side
    teacher: Side | None
    num_chunks: int
    num_bytes: int
    space_after: Bool[ndarray, "K"] | None = None
    """Chunks after which both sides go on with a space, or which end in a special token; where it is asked for."""


SpecialTokens = Literal["identity", "ignore", "ignore_pad"]


@dataclass(frozen=True)
class Reading:
    """How rows are tokenised and which of their chunks a student is compared on."""

    mode: Mode | None = None  # joins chunks; None keeps every one
    special_tokens: SpecialTokens = "identity"
    max_tokens: int | None = None  # a longer conversation is cut, on both sides at the same byte
    train_on: TrainOn = "assistant"
    template_options: Mapping[str, Any] = field(default_factory=dict)
    spaces: tuple[Bool[ndarray, "Vt"], Bool[ndarray, "Vs"]] | None = None
    """The teacher's and the student's tokens that begin with a space, where `space_after` is wanted."""


PLAIN = Reading()


def cut(documents: list[str], window_bytes: int, learn_after: str | None = None) -> list[Window]:
    """The windows of documents, as a list."""
    return list(iterate_windows(documents, window_bytes, learn_after))


def iterate_windows(documents: Iterable[str], window_bytes: int, learn_after: str | None = None) -> Iterator[Window]:
    """Windows of at most `window_bytes` bytes, whole characters, cut before white space where there is some.

    Of a document that holds `learn_after`, what stands up to its last occurrence is read and not learnt; windows with
    nothing to learn are left out.
    """
    for number, document in enumerate(documents):
        data, start = utf8(document, f"document {number}"), 0
        marker = learn_after.encode() if learn_after else b""
        begin = data.rfind(marker) + len(marker) if marker and marker in data else 0
        while start < len(data):
            end = _cut_point(data, start, window_bytes)
            if end > begin:
                text = data[start:end].decode()
                yield Window(number, start, text, end == len(data), max(0, begin - start))
            start = end


def _cut_point(data: bytes, start: int, window_bytes: int) -> int:
    end = start + window_bytes
    if end >= len(data):
        return len(data)
    earliest = start + window_bytes * 3 // 4
    space = max(data.rfind(b" ", earliest, end), data.rfind(b"\n", earliest, end))
    if space > start:
        return space
    while end > start + 1 and data[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def make_examples(
    rows: Sequence[Row], student: Tokenizer, teacher: Tokenizer | None, reading: Reading = PLAIN
) -> list[Example]:
    """Both tokenisations of each row, aligned.

    Windows are begun by the start token and, at a document's end, closed by eos. Conversations are written by each
    side's own chat template, and only what is trained counts.
    """
    students = _encoded(rows, student, reading)
    teachers = [None] * len(rows) if teacher is None else _encoded(rows, teacher, reading)
    return [_example(s, t, student, teacher, reading) for s, t in zip(students, teachers, strict=True)]


def _encoded(rows: Sequence[Row], tokenizer: Tokenizer, reading: Reading) -> list[ChatEncoding]:
    start, end = tokenizer.start_id(), tokenizer.eos_id
    windows = [row for row in rows if isinstance(row, Window)]
    plain = iter(tokenizer.encode_batch([window.text for window in windows]))
    found = []
    for row in rows:
        if isinstance(row, Window):
            encoding = framed(next(plain), start, end if row.ends_document else None)
            found.append(ChatEncoding(encoding, mask_tokens(encoding, _learnt(row))))
        else:
            options = {"train_on": reading.train_on, "template_options": reading.template_options}
            found.append(encode_chat(tokenizer, row.messages, tools=row.tools, **options))
    return found


def _learnt(window: Window) -> Int64[ndarray, "3 3"]:
    """What is learnt of a window: the start token (which is never scored), the text from a byte on, and its end."""
    text = (TEXT_SEGMENT, window.learnt_from, len(window.text.encode()))
    return np.array([(TEXT_SEGMENT - 1, 0, 0), text, (TEXT_SEGMENT + 1, 0, 0)], np.int64)


def _example(
    student: ChatEncoding, teacher: ChatEncoding | None, own: Tokenizer, other: Tokenizer | None, reading: Reading
) -> Example:
    longest = reading.max_tokens
    if teacher is None or other is None:
        student = student.first(len(student.encoding) if longest is None else longest)
        side = Side(student.encoding.ids, np.full(len(student.encoding), -1, np.int32), student.trained)
        return Example(side, None, 0, student.num_bytes)
    if longest is not None:
        pair = truncate(teacher.encoding, student.encoding, longest, longest)
        teacher, student = teacher.first(len(pair[0])), student.first(len(pair[1]))
    found = align(teacher.encoding, student.encoding)
    kept = trained_chunks(found, teacher.trained, student.trained)
    for encoding, tokenizer, spans in (
        (teacher.encoding, other, found.spans[:, :2]),
        (student.encoding, own, found.spans[:, 2:]),
    ):
        kept &= ~_holds(_left_out(encoding, tokenizer, reading.special_tokens), spans)
    if not kept.all():
        found = keep_chunks(found, kept)
    if reading.mode is not None:  # after that: a joined chunk never reaches over one that does not count
        found = reading.mode(teacher.encoding, student.encoding, found)
    closed = closed_by_space(teacher.encoding, student.encoding, found, *reading.spaces) if reading.spaces else None
    return Example(
        Side(student.encoding.ids, found.chunk_b, student.trained),
        Side(teacher.encoding.ids, found.chunk_a, teacher.trained),
        len(found),
        student.num_bytes,
        closed,
    )


def _left_out(encoding: Encoding, tokenizer: Tokenizer, mode: SpecialTokens) -> Bool[ndarray, "T"]:
    """Tokens that a student is not compared on."""
    if mode == "ignore":
        return encoding.special
    if mode == "ignore_pad" and tokenizer.pad_id is not None:
        return encoding.ids == tokenizer.pad_id
    return np.zeros(len(encoding), np.bool_)


def _holds(marked: Bool[ndarray, "T"], ranges: Int[ndarray, "K 2"]) -> Bool[ndarray, "K"]:
    """Whether each token range holds a marked token."""
    before = np.append(0, np.cumsum(marked))
    return before[ranges[:, 1]] > before[ranges[:, 0]]
