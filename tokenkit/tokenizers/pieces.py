"""Vocabulary entries of a tokenizer.json as bytes, decided from what the file says and never from class names."""

import json
from collections.abc import Iterator
from typing import Any

from tokenkit.config import UserError

Definition = dict[str, Any]  # a parsed tokenizer.json, or a part of it


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes 0..255 in byte-level vocabularies (GPT-2's bijection)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_FALLBACK = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
TO_BYTES = {ord(character): byte for byte, character in enumerate(byte_alphabet())}


def parts(node: Definition | None) -> Iterator[Definition]:
    """Every component under a normalizer, pre-tokenizer or decoder, sequences unrolled."""
    if node is None:
        return
    yield node
    for key in ("normalizers", "pretokenizers", "decoders"):
        for child in node.get(key, []):
            yield from parts(child)


def model_type(definition: Definition) -> str:
    """BPE, Unigram, WordPiece or WordLevel, also for old files whose model does not name its type."""
    model = definition["model"]
    marks = (("merges", "BPE"), ("unk_id", "Unigram"), ("max_input_chars_per_word", "WordPiece"))
    kind = model.get("type") or next((name for key, name in marks if key in model), "WordLevel")
    if kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise UserError(f"model type {kind!r}: unknown; write a BPE, Unigram, WordPiece or WordLevel tokenizer.json")
    return kind


def is_byte_level(definition: Definition) -> bool:
    """Whether token strings are written in the byte alphabet."""
    pipeline = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in parts(definition.get(key))]
    return any(part["type"] == "ByteLevel" for part in pipeline)


def space_mark(definition: Definition) -> str | None:
    """The character that stands for a space in token strings, usually U+2581; None where spaces are spaces."""
    for part in [*parts(definition.get("pre_tokenizer")), *parts(definition.get("decoder"))]:
        if part["type"] == "Metaspace":
            return part["replacement"]
    for part in parts(definition.get("normalizer")):
        if part["type"] == "Replace" and part["pattern"].get("String") == " ":
            return part["content"]
    return None


def without_first_space(definition: Definition) -> Definition | None:
    """The tokenizer inside a text, where it adds a dummy space at the beginning of a document only; else None."""
    steps = json.loads(json.dumps(definition.get("pre_tokenizer")))  # a copy to change
    first = [part for part in parts(steps) if part["type"] == "Metaspace" and part.get("prepend_scheme") == "first"]
    for part in first:
        part["prepend_scheme"] = "never"
    return {**definition, "pre_tokenizer": steps} if first else None


def unknown_id(definition: Definition) -> int | None:
    """The id that stands for what the vocabulary cannot spell."""
    model = definition["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return model_vocabulary(definition).get(model.get("unk_token"))


def model_vocabulary(definition: Definition) -> dict[str, int]:
    """Token string to id of the model proper, without added tokens."""
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


def _byte_level_piece(piece: str) -> bytes:
    try:
        return piece.translate(TO_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # not written in the alphabet: it can only be meant literally
        return piece.encode()


def _bare(piece: str, prefix: str, suffix: str) -> str:
    """A model's piece without the marks of a word's inside and end, which stand for no text."""
    if prefix and piece != prefix:
        piece = piece.removeprefix(prefix)
    return piece.removesuffix(suffix) if suffix and piece != suffix else piece


def token_table(definition: Definition, special_ids: frozenset[int]) -> list[bytes]:
    """Bytes of every id; b"" for special tokens and holes. Added tokens stand for their literal text."""
    vocabulary, model = model_vocabulary(definition), definition["model"]
    added = definition.get("added_tokens") or []
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1)
    table = [b""] * size
    mark = space_mark(definition)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    fallback = BYTE_FALLBACK if model.get("byte_fallback") else {}
    byte_level = is_byte_level(definition)
    for piece, index in vocabulary.items():
        literal = _bare(piece, prefix, suffix) if prefix or suffix else piece
        if byte_level:
            table[index] = _byte_level_piece(literal)
        else:
            table[index] = fallback.get(piece) or (literal.replace(mark, " ") if mark else literal).encode()
    for token in added:
        if mark is None or token["content"] not in vocabulary:  # else the model also makes it, from spaces (Gemma)
            table[token["id"]] = token["content"].encode()
    for index in special_ids:
        table[index] = b""
    return table
