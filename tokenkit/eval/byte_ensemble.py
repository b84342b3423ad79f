"""Models of any tokenizers in lockstep over bytes: one next-byte distribution, for scoring and for writing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy import ndarray
from torch import Tensor

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
        """Mean over the bytes, in bits."""
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True)
class Window:
    """Bytes that are read together after a start token; scored from `first` on."""

    text: bytes
    first: int


@dataclass(frozen=True)
class Place:
    """Bytes of several windows, one of each."""

    windows: list[int]
    """Which windows they are of."""
    wanted: Int64[ndarray, "N"]
    """The bytes."""
    logp: list[Float64[ndarray, "N 257"]]
    """Of each model, in nats."""
    dropped: list[float]
    """Of each model the shares of mass that it dropped, together."""


def byte_windows(document: str, context_bytes: int, stride_bytes: int | None = None) -> Iterator[Window]:
    """Windows that score every byte once; each begins with a whole character."""
    text, stride = document.encode(), stride_bytes or max(1, context_bytes // 2)
    if stride >= context_bytes:
        raise UserError(f"stride: {stride} leaves no context of {context_bytes} bytes; write less")
    for start, end, first in context_windows(len(text) + 1, context_bytes + 1, stride):
        begin = start
        while begin < first - 1 and text[begin] & 0xC0 == 0x80:  # inside a character
            begin += 1
        while begin > 0 and text[begin] & 0xC0 == 0x80:  # with no room before what is scored
            begin -= 1
        yield Window(text[begin : end - 1], first - 1 - begin)


def byte_distributions(models: Sequence[ByteModel], windows: Sequence[Window]) -> Iterator["Place"]:
    """What is scored, of up to `TOGETHER` windows the bytes at one place at a time: no window is whole in one piece."""
    ordered = sorted(range(len(windows)), key=lambda number: len(windows[number].text))
    for start in range(0, len(ordered), TOGETHER):
        numbers = ordered[start : start + TOGETHER]
        some = [windows[number] for number in numbers]
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
                yield Place([numbers[n] for n in scored], wanted, found, dropped)
            for own in opened:
                for n in {*range(len(some))} - {*here}:
                    own[n].close()
            _take(models, opened, {n: some[n].text[place] for n in here if place + 1 < len(some[n].text)})


def _next(prefixes: Sequence[BytePrefix], wanted: Int64[ndarray, "N"]) -> Float64[ndarray, "N 257"]:
    """What each text may go on with; UserError where it goes on with what is not possible."""
    found = np.array([prefix.next_logp() for prefix in prefixes]).reshape(-1, SYMBOLS)
    for prefix, byte, logp in zip(prefixes, wanted.tolist(), found, strict=True):
        if logp[byte] == -np.inf:
            raise UserError(prefix.no_way(byte))
    return found


def room(models: Sequence[ByteModel], most: int) -> int:
    """Bytes that every model can read, `most` at most: in some cover each is a token."""
    found = [most]
    for reading in models:
        positions = positions_of(reading.model)
        if positions is not None:
            found.append(positions - len(reading.before([reading.tokenizer.start_id()])))
    return min(found)


def _check_window(reading: ByteModel, num_bytes: int) -> None:
    """UserError where a text of as many tokens as bytes would not fit: some cover may be that long."""
    fits = room([reading], num_bytes)
    if fits < num_bytes:
        raise UserError(
            f"context_bytes: {num_bytes} bytes can be as many tokens, and {reading.name} has positions for {fits}; "
            f"write {fits} or less"
        )


def score_bytes(
    models: Sequence[ByteModel], combine: Combination, documents: Sequence[str], *, context_bytes: int = 512
) -> tuple[ByteScore, list[ByteScore]]:
    """The ensemble and each member, on the same bytes in one pass. Each window begins with the model's start token.

    The end of a document is not scored, as in `bits_per_byte`; the 257th symbol has its mass all the same.
    """
    windows = [window for document in documents for window in byte_windows(document, context_bytes)]
    nats, dropped, count = np.zeros(len(models) + 1), np.zeros(len(models)), 0
    for place in byte_distributions(models, windows):
        joint = _joint(combine, place)
        nats -= [logp[np.arange(len(place.wanted)), place.wanted].sum() for logp in (joint, *place.logp)]
        dropped, count = dropped + place.dropped, count + len(place.wanted)
    members = [ByteScore(float(n), count, float(d) / max(1, count)) for n, d in zip(nats[1:], dropped)]
    return ByteScore(float(nats[0]), count), members


def score_pairs(
    models: Sequence[ByteModel], combine: Combination, pairs: Sequence[tuple[str, str]], *, context_bytes: int = 512
) -> list[tuple[float, bool]]:
    """Of each (context, continuation) the continuation's log-probability in nats, and whether each of its bytes is the
    likeliest symbol. Where both are longer than `context_bytes`, the beginning of the context is left out."""
    windows = []
    for context, continuation in pairs:
        added = continuation.encode()
        if len(added) > context_bytes:
            raise UserError(f"context_bytes: {context_bytes}, and a continuation has {len(added)}; write more")
        kept = context.encode()[max(0, len(context.encode()) + len(added) - context_bytes) :].decode(errors="ignore")
        windows.append(Window((kept + continuation).encode(), len(kept.encode())))
    logp, best = np.zeros(len(pairs)), np.ones(len(pairs), np.bool_)
    for place in byte_distributions(models, windows):
        joint = _joint(combine, place)
        logp[place.windows] += joint[np.arange(len(place.wanted)), place.wanted]
        best[place.windows] &= joint.argmax(1) == place.wanted
    return list(zip(logp.tolist(), best.tolist()))


def _joint(combine: Combination, place: Place) -> Float64[ndarray, "N 257"]:
    return combine([torch.from_numpy(logp) for logp in place.logp]).numpy()


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
    texts = [prompt.encode() if isinstance(prompt, str) else b"" for prompt in prompts]
    given = [[[m.tokenizer.start_id()] for m in models] if isinstance(p, str) else [*p] for p in prompts]
    for text, ids in zip(texts, given, strict=True):
        for reading, own in zip(models, ids, strict=True):
            before = reading.before(own)
            check_positions(reading.model, len(own) + len(before) + len(text) + drawing.max_new_tokens)
    found: list[str] = []
    for start in range(0, len(texts), TOGETHER):
        some = slice(start, start + TOGETHER)
        opened = [reading.open([ids[k] for ids in given[some]]) for k, reading in enumerate(models)]
        for column in zip_longest(*texts[some]):
            _take(models, opened, {n: byte for n, byte in enumerate(column) if byte is not None})
        keys = torch.tensor([sequence_key(seed, number) for number in range(start, start + len(texts[some]))])
        found += _continued(models, opened, combine, drawing, keys, stop)
    return found


def _continued(
    models: Sequence[ByteModel],
    opened: Sequence[list[BytePrefix]],
    combine: Combination,
    drawing: Drawing,
    keys: Int64[Tensor, "B"],
    stop: Sequence[str],
) -> list[str]:
    texts, active = [TextSoFar(stop) for _ in keys], list(range(len(keys)))
    for n in range(drawing.max_new_tokens):
        logp = combine([torch.from_numpy(np.array([own[row].next_logp() for row in active])) for own in opened])
        drawn = dict(zip(active, draw(logp, keys[active], n, drawing).tolist(), strict=True))
        for row, symbol in drawn.items():
            if symbol != END:
                texts[row].add(bytes([symbol]))
        active = [row for row in active if drawn[row] != END and not texts[row].stopped]
        if not active or n + 1 == drawing.max_new_tokens:
            break
        for own in opened:
            for row in drawn.keys() - set(active):
                own[row].close()
        _take(models, opened, {row: drawn[row] for row in active})
    for text in texts:
        text.finish()
    return [text.text for text in texts]


def _take(models: Sequence[ByteModel], opened: Sequence[list[BytePrefix]], bytes_by_text: dict[int, int]) -> None:
    """Every model takes the bytes that the texts go on with."""
    for reading, prefixes in zip(models, opened, strict=True):
        reading.advance([(prefixes[number], byte) for number, byte in bytes_by_text.items()])
