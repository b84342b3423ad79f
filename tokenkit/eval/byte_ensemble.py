"""Models of any tokenizers in lockstep over bytes: one next-byte distribution, for scoring and for writing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy import ndarray

from tokenkit.config import UserError
from tokenkit.eval.bits_per_byte import context_windows
from tokenkit.eval.combine import Combination
from tokenkit.eval.next_byte import END, SYMBOLS, ByteModel, BytePrefix
from tokenkit.models.sample import Drawing, check_positions, draw, positions_of, sequence_key
from tokenkit.models.stopping import TextSoFar

TOGETHER = 8  # texts whose trees are read in one row: the cost of attention grows with it, that of calls falls


@dataclass(frozen=True)
class ByteScore:
    """Of one member or of the ensemble, over every byte of the documents once."""

    nats: float
    num_bytes: int
    dropped: float = 0.0
    """Mean share of the mass that is dropped with covers at a byte."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True)
class Window:
    """Bytes that are read together after a start token; scored from `first` on."""

    text: bytes
    first: int


def byte_windows(document: str, context_bytes: int, stride_bytes: int | None = None) -> Iterator[Window]:
    """Windows that score every byte once; each begins with a whole character."""
    text, stride = document.encode(), stride_bytes or max(1, context_bytes // 2)
    if stride >= context_bytes:
        raise UserError(f"stride: {stride} leaves no context of {context_bytes} bytes; write less")
    for start, end, first in context_windows(len(text) + 1, context_bytes + 1, stride):
        begin = start
        while begin > 0 and text[begin] & 0xC0 == 0x80:  # inside a character
            begin -= 1
        yield Window(text[begin : end - 1], first - 1 - begin)


def byte_distributions(
    models: Sequence[ByteModel], windows: Sequence[Window]
) -> Iterator[tuple[Int64[ndarray, "N"], list[Float64[ndarray, "N 257"]], list[float]]]:
    """The bytes that are scored at a time, each model's log-probabilities before them, and the shares it dropped.

    In no order of the text: of up to `TOGETHER` windows the bytes at one place.
    """
    ordered = sorted(windows, key=lambda window: len(window.text))
    for start in range(0, len(ordered), TOGETHER):
        some = ordered[start : start + TOGETHER]
        longest = len(some[-1].text)
        for reading in models:
            _check_window(reading, longest)
        opened = [reading.open([[reading.tokenizer.start_id()]] * len(some)) for reading in models]
        for place in range(longest):
            here = [n for n, window in enumerate(some) if place < len(window.text)]
            scored = [n for n in here if place >= some[n].first]
            wanted = np.array([some[n].text[place] for n in scored], np.int64)
            found = [_next([prefixes[n] for n in scored], wanted) for prefixes in opened]
            dropped = [sum(prefixes[n].dropped for n in scored) for prefixes in opened]
            if scored:
                yield wanted, found, dropped
            for reading, prefixes in zip(models, opened, strict=True):
                _step(reading, prefixes, {n: some[n].text[place] for n in here if place + 1 < len(some[n].text)})


def _next(prefixes: Sequence[BytePrefix], wanted: Int64[ndarray, "N"]) -> Float64[ndarray, "N 257"]:
    """What each text may go on with; UserError where it goes on with what is not possible."""
    found = np.array([prefix.next_logp() for prefix in prefixes]).reshape(-1, SYMBOLS)
    for prefix, byte, logp in zip(prefixes, wanted.tolist(), found, strict=True):
        if logp[byte] == -np.inf:
            raise UserError(prefix.no_way(byte))
    return found


def _check_window(reading: ByteModel, num_bytes: int) -> None:
    """UserError where a text of as many tokens as bytes would not fit: some cover may be that long."""
    positions = positions_of(reading.model)
    if positions is not None and num_bytes > positions:
        raise UserError(
            f"context_bytes: {num_bytes} bytes can be as many tokens, but {reading.name} has {positions} positions; "
            f"write {positions} or less"
        )


def _step(reading: ByteModel, prefixes: Sequence[BytePrefix], bytes_by_text: dict[int, int]) -> None:
    """Takes the bytes; texts that get none are at their end."""
    for number, prefix in enumerate(prefixes):
        if number not in bytes_by_text:
            prefix.close()
    reading.advance([(prefixes[number], byte) for number, byte in bytes_by_text.items()])


def score_bytes(
    models: Sequence[ByteModel], combine: Combination, documents: Sequence[str], *, context_bytes: int = 512
) -> tuple[ByteScore, list[ByteScore]]:
    """The ensemble and each member, on the same bytes in one pass. Each window begins with the model's start token.

    The end of a document is not scored, as in `bits_per_byte`; the 257th symbol has its mass all the same.
    """
    windows = [window for document in documents for window in byte_windows(document, context_bytes)]
    nats, dropped, count = np.zeros(len(models) + 1), np.zeros(len(models)), 0
    for wanted, found, shares in byte_distributions(models, windows):
        joint = combine([torch.from_numpy(logp) for logp in found]).numpy()
        nats -= [logp[np.arange(len(wanted)), wanted].sum() for logp in (joint, *found)]
        dropped, count = dropped + shares, count + len(wanted)
    members = [ByteScore(float(n), count, float(d) / max(1, count)) for n, d in zip(nats[1:], dropped)]
    return ByteScore(float(nats[0]), count), members


@torch.no_grad()
def continue_bytes(
    models: Sequence[ByteModel],
    combine: Combination,
    prompts: "Sequence[str | Sequence[list[int]]]",
    drawing: Drawing,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """One continuation per prompt, byte by byte, without the prompt, up to the end of the text or a stop string.

    A prompt is text, which every model reads byte by byte after its start token, so no token border is forced at its
    end; or ids of each model, taken as they are. What is returned is whole characters.
    """
    found = []
    for number, prompt in enumerate(prompts):
        text = prompt.encode() if isinstance(prompt, str) else b""
        given = [[m.tokenizer.start_id()] for m in models] if isinstance(prompt, str) else prompt
        for reading, ids in zip(models, given, strict=True):
            check_positions(reading.model, len(ids) + len(text) + drawing.max_new_tokens)
        opened = [reading.open([ids])[0] for reading, ids in zip(models, given, strict=True)]
        for byte in text:
            _all_take(models, opened, byte)
        found.append(_continued(models, opened, combine, drawing, sequence_key(seed, number), stop))
    return found


def _continued(
    models: Sequence[ByteModel],
    opened: Sequence[BytePrefix],
    combine: Combination,
    drawing: Drawing,
    key: int,
    stop: Sequence[str],
) -> str:
    text, keys = TextSoFar(stop), torch.tensor([key])
    for n in range(drawing.max_new_tokens):
        logp = combine([torch.from_numpy(prefix.next_logp())[None] for prefix in opened])
        symbol = int(draw(logp, keys, n, drawing)[0])
        if symbol == END:
            break
        text.add(bytes([symbol]))
        if text.stopped:
            break
        if n + 1 < drawing.max_new_tokens:
            _all_take(models, opened, symbol)
    text.finish()
    return text.text


def _all_take(models: Sequence[ByteModel], opened: Sequence[BytePrefix], byte: int) -> None:
    for reading, prefix in zip(models, opened, strict=True):
        reading.advance([(prefix, byte)])
