"""A window of text, tokenised once for each side and aligned: pure, and the same for every tokenizer."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from tokenkit.align.spans import align
from tokenkit.tokenizers.base import Encoding, Tokenizer, framed


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document that fits a training row."""

    document: int
    start_byte: int
    text: str
    ends_document: bool


@dataclass(frozen=True, slots=True)
class Side:
    """One tokenisation of a window: ids, and the chunk of every token (-1: in none)."""

    ids: Int[ndarray, "T"]
    chunk: Int[ndarray, "T"]


@dataclass(frozen=True, slots=True)
class Example:
    """A window as both sides read it; without a teacher there are no chunks."""

    student: Side
    teacher: Side | None
    num_chunks: int
    num_bytes: int


def cut(documents: list[str], window_bytes: int) -> list[Window]:
    """Windows of at most `window_bytes` bytes, whole characters, cut before white space where there is some."""
    windows = []
    for number, document in enumerate(documents):
        data, start = document.encode(), 0
        while start < len(data):
            end = _cut_point(data, start, window_bytes)
            windows.append(Window(number, start, data[start:end].decode(), end == len(data)))
            start = end
    return windows


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


def make_examples(windows: list[Window], student: Tokenizer, teacher: Tokenizer | None) -> list[Example]:
    """Both tokenisations of each window, begun by the start token and, at a document's end, closed by eos."""
    texts = [window.text for window in windows]
    students = _encode(windows, texts, student)
    if teacher is None:
        return [_alone(encoding, window) for encoding, window in zip(students, windows, strict=True)]
    teachers = _encode(windows, texts, teacher)
    return [_pair(s, t, w) for s, t, w in zip(students, teachers, windows, strict=True)]


def _encode(windows: list[Window], texts: list[str], tokenizer: Tokenizer) -> list[Encoding]:
    start, end = tokenizer.start_id, tokenizer.eos_id
    encodings = tokenizer.encode_batch(texts)
    return [framed(e, start, end if w.ends_document else None) for e, w in zip(encodings, windows, strict=True)]


def _alone(encoding: Encoding, window: Window) -> Example:
    side = Side(encoding.ids, np.full(len(encoding), -1, np.int32))
    return Example(side, None, 0, len(window.text.encode()))


def _pair(student: Encoding, teacher: Encoding, window: Window) -> Example:
    found = align(teacher, student)
    return Example(
        Side(student.ids, found.chunk_b), Side(teacher.ids, found.chunk_a), len(found.spans), len(window.text.encode())
    )
