"""What the readers share: limits on what a file may claim, and the parts of a tokenizer.json they all build."""

import json
import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.splits import Split, byte_level_steps
from tokenkit.tokenizers.pieces import Definition, byte_alphabet

Parsed = tuple[Definition, dict[str, Any] | None]  # a tokenizer.json, and what a tokenizer_config.json would say

MAX_FILE_BYTES = 1 << 29  # vocabularies in use are below 40 MB
MAX_PACKING = 1000  # times its .xz; vocabularies in use shrink to a twentieth at best
MAX_TOKENS = 1 << 22  # vocabularies in use are below 300,000
MAX_TOKEN_BYTES = 4096  # tokens in use are below 600 bytes; the merges of one take its length squared
MARK = "▁"
TO_PIECE = dict(enumerate(byte_alphabet()))


def read_bytes(path: Path) -> bytes:
    """The content of a vocabulary file, unpacked if it ends in .xz; UserError where it is far larger than any is."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {size:,} bytes, which no vocabulary file has; write the tokenizer's file")
    if path.suffix != ".xz":
        return path.read_bytes()
    most = min(MAX_FILE_BYTES, MAX_PACKING * size)
    content = bytearray()
    try:
        with lzma.open(path) as file:
            while chunk := file.read(1 << 20):  # a read of `most` bytes would take that memory at once
                content += chunk
                if len(content) > most:
                    raise UserError(f"{path}: unpacks to over {most:,} bytes, as no vocabulary does; fetch it again")
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: not a JSON file packed by xz ({error}); fetch it again") from None
    return bytes(content)


def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError where it is none, or nested deeper than any tokenizer file is."""
    return parse_json(read_bytes(path), path)


def parse_json(raw: bytes, path: Path) -> Any:
    """The value of a JSON text; `path` is for messages."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path}: not a JSON file ({str(error).splitlines()[0]}); write a whole one") from None


def refuse_pattern(pattern: str | None, name: str) -> None:
    """UserError where a pattern was given for a file that says how text is split."""
    if pattern is not None:
        raise UserError(f"{name}: says itself how text is split; leave pattern={pattern!r} out")


def added_token(index: int, content: str, *, special: bool = True) -> Definition:
    """An entry of `added_tokens` that is matched as it stands."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}


def piece_of(token: bytes) -> str:
    """Bytes written in the byte alphabet."""
    return token.decode("latin-1").translate(TO_PIECE)


def begin_template(content: str, index: int) -> Definition:
    """The post-processor that puts one special token before a text."""
    special, text = {"SpecialToken": {"id": content, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{kind: {**part, "type_id": 1} for kind, part in step.items()} for step in (special, text)]
    second[1]["Sequence"]["id"] = "B"
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, *second],
        "special_tokens": {content: {"id": content, "ids": [index], "tokens": [content]}},
    }


def bpe_model(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], **options: Any) -> Definition:
    """The `model` of a BPE tokenizer.json; `options` replace the defaults of byte-level tokenizers."""
    defaults = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return defaults | options | {"vocab": dict(vocabulary), "merges": [list(pair) for pair in merges]}


def whole(model: Definition, added: list[Definition], **steps: Definition | None) -> Definition:
    """A tokenizer.json around a model; `steps` are its normalizer, pre_tokenizer, decoder and post_processor."""
    empty = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    order = sorted(added, key=lambda token: token["id"])
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": order}
    return head | empty | steps | {"model": model}


def byte_level(model: Definition, added: list[Definition], split: Split, **steps: Definition | None) -> Definition:
    """The tokenizer.json of a byte-level model."""
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    normalizer = {"type": "NFC"} if split.nfc else None
    pre_tokenizer = byte_level_steps(split)
    return whole(model, added, normalizer=normalizer, pre_tokenizer=pre_tokenizer, decoder=decoder, **steps)


def ranked_definition(ranks: dict[bytes, int], added: list[Definition], split: Split, name: str) -> Definition:
    """The tokenizer.json that gives the ids of a byte-pair encoding stated as ranks (tiktoken, Tekken).

    Such an encoder joins the two neighbours that spell the token of the smallest rank, so every split of a token into
    two tokens is one of its merges; and a word that is a token needs no merge at all (`ignore_merges`).
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{name}: no token for the single byte 0x{missing[0]:02X}, so not every text can be written")
    pieces = {token: piece_of(token) for token in sorted(ranks, key=ranks.__getitem__)}
    merges: list[tuple[str, str]] = []
    for token in pieces:
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        found.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(pieces[left], pieces[right]) for left, right in found]
    vocabulary = {piece: ranks[token] for token, piece in pieces.items()}
    return byte_level(bpe_model(numbered(vocabulary, added), merges, ignore_merges=True), added, split)


def numbered(vocabulary: dict[str, int], added: list[Definition]) -> dict[str, int]:
    """The vocabulary, with the added tokens where their ids do not simply follow it.

    The library numbers added tokens that the model does not hold one by one after it, whatever the file says.
    """
    extra = {token["content"]: token["id"] for token in added if token["content"] not in vocabulary}
    follows = sorted(extra.values()) == list(range(len(vocabulary), len(vocabulary) + len(extra)))
    return vocabulary if follows else dict(sorted((vocabulary | extra).items(), key=lambda entry: entry[1]))
