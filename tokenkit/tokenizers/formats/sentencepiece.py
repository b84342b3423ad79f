"""sentencepiece models: the protobuf read field by field, every length checked against the bytes that are there.

A reader of the wire format is forty lines, needs no generated classes, and a broken file cannot make it allocate.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import MAX_TOKENS, Parsed
from tokenkit.tokenizers.formats.pieces import UNIGRAM, Pieces, pieces_definition

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
KINDS = {1: UNIGRAM, 2: "BPE", 3: "word", 4: "char"}  # TrainerSpec.ModelType
Value = int | memoryview


@dataclass(slots=True)
class _Specs:
    """What trainer_spec and normalizer_spec say, with the defaults of the format."""

    kind: int = 1
    suffix: bool = False
    byte_fallback: bool = False
    role_ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra: bool = True
    escape: bool = True


def is_sentencepiece(head: bytes) -> bool:
    """Whether a file that begins this way may be one: its first field is a piece that begins with its text."""
    try:
        number, kind, start = _tag(memoryview(head), 0)
        length, start = _varint(memoryview(head), start)
        return (number, kind) == (1, BYTES) and length >= 2 and head[start : start + 1] == b"\x0a"
    except ValueError:
        return False


def read_sentencepiece(raw: bytes, name: str) -> Parsed:
    """The tokenizer.json of a serialised ModelProto of type BPE or Unigram."""
    specs, texts, scores, types = _Specs(), [], [], []
    missing = {2: "trainer_spec", 3: "normalizer_spec"}  # both follow the pieces, and no trainer leaves one out
    try:
        for number, _, value in _fields(memoryview(raw)):
            if number == 1 and isinstance(value, memoryview):
                if len(texts) == MAX_TOKENS:
                    raise UserError(f"{name}: more than {MAX_TOKENS:,} pieces; the file is broken")
                text, score, type_ = _piece(value)
                texts.append(text)
                scores.append(score)
                types.append(type_)
            elif number in (2, 3) and isinstance(value, memoryview):
                missing.pop(number, None)
                _read_spec(specs, number, _fields(value))
        if missing:
            raise ValueError(f"no {' and no '.join(missing.values())} after {len(texts):,} pieces")
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a whole sentencepiece model ({error}); fetch the file again") from None
    if KINDS.get(specs.kind) not in ("BPE", UNIGRAM):
        raise UserError(
            f"{name}: a sentencepiece model of type {KINDS.get(specs.kind, specs.kind)}; use BPE or Unigram"
        )
    if specs.suffix:
        raise UserError(
            f"{name}: marks spaces after words (treat_whitespace_as_suffix), which no tokenizer.json can say"
        )
    pieces = Pieces(
        kind=KINDS[specs.kind],
        texts=texts,
        scores=scores,
        types=types,
        byte_fallback=specs.byte_fallback,
        role_ids={role: index for role, index in specs.role_ids.items() if index >= 0},
        charsmap=specs.charsmap,
        dummy_prefix=specs.dummy_prefix,
        remove_extra_spaces=specs.remove_extra,
        mark_spaces=specs.escape,
    )
    return pieces_definition(pieces, name)


def _read_spec(specs: _Specs, message: int, found: Iterator[tuple[int, int, Value]]) -> None:
    """Takes the fields we need of a TrainerSpec (2) or NormalizerSpec (3)."""
    roles = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    names = {(2, 3): "kind", (2, 24): "suffix", (2, 35): "byte_fallback"}
    names |= {(3, 3): "dummy_prefix", (3, 4): "remove_extra", (3, 5): "escape"}
    for number, _, value in found:
        if (message, number) == (3, 2) and isinstance(value, memoryview):
            specs.charsmap = bytes(value)
        elif message == 2 and number in roles and isinstance(value, int):
            specs.role_ids[roles[number]] = value - (1 << 64) if value >> 63 else value
        elif (message, number) in names and isinstance(value, int):
            setattr(specs, names[message, number], value if number == 3 and message == 2 else bool(value))


def _piece(message: memoryview) -> tuple[str, float, int]:
    text, score, type_ = "", 0.0, 1
    for number, kind, value in _fields(message):
        if (number, kind) == (1, BYTES):
            text = bytes(value).decode("utf-8")
        elif (number, kind) == (2, FIXED32):
            score = struct.unpack("<f", struct.pack("<I", value))[0]
        elif (number, kind) == (3, VARINT):
            type_ = int(value)
    return text, score, type_


def _fields(message: memoryview) -> Iterator[tuple[int, int, Value]]:
    """Number, wire type and value of every field; ValueError where the bytes are no message."""
    place = 0
    while place < len(message):
        number, kind, place = _tag(message, place)
        if kind == VARINT:
            value, place = _varint(message, place)
            yield number, kind, value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind, -1)
        if kind == BYTES:
            length, place = _varint(message, place)
        if length < 0:
            raise ValueError(f"wire type {kind} of field {number}")
        if length > len(message) - place:
            raise ValueError(f"field {number} claims {length} bytes, {len(message) - place} are left")
        part = message[place : place + length]
        place += length
        yield number, kind, part if kind == BYTES else int.from_bytes(part, "little")


def _tag(message: memoryview, place: int) -> tuple[int, int, int]:
    key, place = _varint(message, place)
    if key >> 3 == 0:
        raise ValueError("a field of number 0")
    return key >> 3, key & 7, place


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it ends inside a number")
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, place
    raise ValueError("a number of more than ten bytes")
