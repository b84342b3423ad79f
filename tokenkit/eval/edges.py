"""Whether every string comes back exactly: the law that a learned tokenizer is held to."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenkit.data.source import describe, read_documents
from tokenkit.eval.edge_corpora import EdgesConfig, edge_corpora
from tokenkit.eval.tokenizer_results import EdgeResult
from tokenkit.tokenizers.autoencoder.chunkers import escaped, to_bytes, to_text
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer

BATCH_STRINGS, BATCH_BYTES = 512, 1 << 20
MANY, FEW = 100_000, 1000  # random strings by default, of a table and of a network that is asked about each
SHOWN = 60  # characters


def edge_battery(
    tokenizer: AutoEncoderTokenizer, config: EdgesConfig, tell: Callable[[str], None] | None = None
) -> tuple[EdgeResult, ...]:
    """What became of every corpus; `tell` gets a line per corpus."""
    usual = FEW if tokenizer.codec.open_codes else MANY
    count = usual if config.random_strings is None else config.random_strings
    corpora = edge_corpora(config, count, tokenizer.codec.layout.special_names)
    if config.texts is not None:
        corpora[describe(config.texts)] = iter(read_documents(config.texts))
    found = []
    for name, strings in corpora.items():
        result = try_strings(tokenizer, name, strings)
        found.append(result)
        if tell:
            tell(edge_line(result))
    return tuple(found)


def edge_line(result: EdgeResult) -> str:
    """One corpus in one line."""
    size = f"{result.tried:,} strings, {result.bytes:,} bytes, {result.seconds:.1f} s"
    return f"{result.corpus}: {result.wrong:,} wrong of {size}{f'; {result.first_wrong}' if result.wrong else ''}"


def try_strings(tokenizer: AutoEncoderTokenizer, name: str, strings: Iterable[bytes | str]) -> EdgeResult:
    """How many of these do not come back: bytes as bytes, text as text, between special tokens, and as bytes."""
    began = time.perf_counter()
    tried = size = wrong = 0
    first: str | None = None
    for batch in _batches(strings):
        given = [string if isinstance(string, bytes) else to_bytes(escaped(string)) for string in batch]
        tried, size = tried + len(batch), size + sum(map(len, given))
        for string, data, back in zip(batch, given, _there_and_back(tokenizer, batch)):
            if back != data:
                wrong += 1
                first = first or f"{_shown(string)} came back as {_shown(back)}"
    seconds = round(time.perf_counter() - began, 3)
    return EdgeResult(corpus=name, tried=tried, bytes=size, wrong=wrong, first_wrong=first, seconds=seconds)


def _there_and_back(tokenizer: AutoEncoderTokenizer, batch: Sequence[bytes | str]) -> Iterator[bytes | str]:
    """The bytes of each string after encoding and decoding, or what went wrong on the way."""
    codec, first_regular = tokenizer.codec, tokenizer.codec.layout.byte_base
    if codec.open_codes and len(batch) > 1:  # one question to the network instead of one for each string
        split = [codec.chunker.split(to_text(s)) if isinstance(s, bytes) else codec.split(s) for s in batch]
        codec.decode_bytes(codec.encode_chunks([chunk for chunks in split for chunk in chunks]))
    for string in batch:
        if isinstance(string, bytes):
            ids = tokenizer.encode_bytes(string)
            yield "special ids" if ids and min(ids) < first_regular else tokenizer.decode_bytes(ids)
            continue
        framed = tokenizer.encode(string)
        ids = framed[1:-1]
        back = tokenizer.decode_bytes(ids)
        if ids and min(ids) < first_regular:
            yield "special ids"
        elif tokenizer.decode(framed) != back.decode("utf-8", "replace"):
            yield "another text than its bytes"
        else:
            yield back


def _batches(strings: Iterable[bytes | str]) -> Iterator[list[bytes | str]]:
    batch: list[bytes | str] = []
    size = 0
    for string in strings:
        batch.append(string)
        size += len(string)
        if len(batch) >= BATCH_STRINGS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shown(string: bytes | str) -> str:
    return f"{string[:SHOWN]!r}{'…' if len(string) > SHOWN else ''}"
