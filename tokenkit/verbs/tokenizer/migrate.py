"""`tokenkit tokenizer migrate`: from a list of words to a learned tokenizer that has each of them as one id."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from tokenkit.config import Config, UserError
from tokenkit.data.chunks import ChunkTable, count_chunks, split_documents
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.huggingface import export_huggingface
from tokenkit.models.latents import Method
from tokenkit.models.load import input_matrix, load_model
from tokenkit.models.migrate import migrate_model
from tokenkit.tokenizers.autoencoder.bundle import read_network
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT, MAX_CHUNK, make_chunker
from tokenkit.tokenizers.autoencoder.ids import UNK
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.autoencoder.migration import WordIds, forced_pins, word_ids
from tokenkit.tokenizers.autoencoder.network import AutoEncoder
from tokenkit.tokenizers.autoencoder.package import Kind, is_package, load_network, read_config
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import package_of, save_with_fast
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.word import WordTokenizer
from tokenkit.train.folder import write_json, write_text

MAPPING, REPORT = "mapping.tsv", "migration.json"
REPEATS = 3


class TokenizerMigrateRun(Config):
    """A run file of `tokenkit tokenizer migrate`."""

    vocabulary: Path
    """The word list: a vocabulary file, or the folder of a word tokenizer."""
    source: SourceConfig
    """Text whose frequent strings become the other pins."""
    held_out: SourceConfig | None = None
    """Text on which both are compared; without it a tenth of the source's documents is kept for that."""
    output: Path
    """A new folder: tokenizer/, mapping.tsv, migration.json and, of a model, model/."""
    auto_encoder: Path | None = None
    """The auto-encoder: a package folder, or a checkpoint of `tokenkit tokenizer pretrain`."""
    kind: Kind = "compact"
    chunker: str = DEFAULT
    pins: int = Field(32768, ge=0)
    """Strings in the table; each word takes up to two of them."""
    model: Path | None = None
    """A language model over the word list, to be converted: rows of words are copied, the others made of latents."""
    embeddings: Method = "decoder"
    """How the rows without an old id are made."""
    accept_loss: bool = False
    """Convert the model although its old tokenizer did not keep all of the text."""
    seed: int = 0


def migrate(run: TokenizerMigrateRun) -> dict[str, Any]:
    """Writes tokenizer, map and, of a model, the model that has moved; both tokenizers side by side."""
    if run.output.exists():
        raise UserError(f"{run.output}: exists already; write the name of a new folder")
    words = WordTokenizer.load(run.vocabulary)
    _check(run, words)
    train, held_out = _texts(run)
    network = None if run.auto_encoder is None else _network(run.auto_encoder)
    draft = run.output.with_name(f"{run.output.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        tokenizer = _tokenizer(run, words, train, network, draft / "tokenizer")
        found = word_ids(words.config.special_tokens.literals, words.words, tokenizer.codec)
        write_text(draft / MAPPING, _mapping(found))
        report: dict[str, Any] = {
            "words": _mapped(found[6:]),
            "word": side(words, held_out, lambda ids: ids.count(UNK)),
            "learned": side(_Bare(tokenizer), held_out, lambda ids: _bytes(ids, tokenizer)),
        }
        if run.model is not None:
            report["model"] = _convert(run, run.model, words, tokenizer, found, draft / "model")
        write_json(draft / REPORT, report)
        os.rename(draft, run.output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def side(tokenizer: Any, texts: Sequence[str], count_poor: Callable[[list[int]], int]) -> dict[str, float | int]:
    """What one tokenizer makes of texts. `poor` are ids of unknown words, or of single bytes."""
    seconds, encoded = _best(lambda: tokenizer.encode_batch(texts, False))
    decoding, decoded = _best(lambda: tokenizer.decode_batch(encoded))
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    ids, pieces = sum(map(len, encoded)), sum(len(text.split()) for text in texts)
    return {
        "vocab_size": tokenizer.vocab_size,
        "ids": ids,
        "bytes_per_id": num_bytes / max(1, ids),
        "ids_per_word": ids / max(1, pieces),
        "poor_ids": sum(map(count_poor, encoded)) / max(1, ids),
        "round_trip": sum(a == b for a, b in zip(texts, decoded)) / max(1, len(texts)),
        "encode_megabytes_per_second": num_bytes / 1e6 / max(seconds, 1e-9),
        "decode_ids_per_second": ids / max(decoding, 1e-9),
    }


class _Bare:
    """The interface of the word tokenizer over the codec of a learned one."""

    def __init__(self, tokenizer: LearnedTokenizer) -> None:
        self.codec, self.vocab_size = tokenizer.codec, tokenizer.vocab_size

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Ids of every text."""
        return self.codec.encode_batch(texts)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """The text of every row of ids."""
        return [self.codec.decode(ids) for ids in batch]


def _check(run: TokenizerMigrateRun, words: WordTokenizer) -> None:
    """UserError for a model that cannot be converted, or not without a word on what its old tokenizer lost."""
    if run.model is None:
        return
    if run.auto_encoder is None or run.kind != "compact":
        raise UserError("model: rows without an old id are made of latents; give auto_encoder=..., and kind=compact")
    if not run.accept_loss:
        lower = "lower-cases text, " if words.config.normalization.lowercase else ""
        raise UserError(
            f"model: its word tokenizer {lower}drops spaces and has one id for all unknown words, so it has never seen "
            "what the new one keeps; write accept_loss=true to convert it all the same, and train it on"
        )


def _texts(run: TokenizerMigrateRun) -> tuple[list[str], list[str]]:
    documents = read_documents(run.source)
    if run.held_out is not None:
        return documents, read_documents(run.held_out)
    train, held_out = split_documents(documents, 0.1, run.seed)
    if not train or not held_out:
        raise UserError("source: too few documents to keep a tenth of them; give held_out, or source.separator")
    return train, held_out


def _network(path: Path) -> AutoEncoder:
    return load_network(path, read_config(path)) if is_package(path) else read_network(path)


def _tokenizer(
    run: TokenizerMigrateRun, words: WordTokenizer, texts: list[str], network: AutoEncoder | None, folder: Path
) -> LearnedTokenizer:
    chunker = make_chunker(run.chunker)
    counts = ChunkTable.of(count_chunks(texts, chunker)).cut(MAX_CHUNK).as_dict()
    pins = select_pins(counts, run.pins, keep=forced_pins(words.words, chunker))
    save_with_fast(package_of(network, pins, kind=run.kind, chunker=run.chunker), folder)
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, LearnedTokenizer)
    return tokenizer


def _convert(
    run: TokenizerMigrateRun,
    source: Path,
    words: WordTokenizer,
    tokenizer: LearnedTokenizer,
    found: Sequence[WordIds],
    folder: Path,
) -> dict[str, Any]:
    model = load_model(str(source))
    rows = len(input_matrix(model))
    if rows < words.vocab_size:
        raise UserError(f"model: {rows} embedding rows, where the word list has {words.vocab_size} ids; not its model")
    old_ids = {new: one.old for one in found for new in (one.bare, one.spaced) if new is not None}
    report = migrate_model(model, tokenizer, old_ids, method=run.embeddings, seed=run.seed)
    export_huggingface(model, tokenizer, folder)
    return asdict(report)


def _mapped(found: Sequence[WordIds]) -> dict[str, int]:
    return {
        "all": len(found),
        "as_one_id": sum(one.bare is not None or one.spaced is not None for one in found),
        "bare": sum(one.bare is not None for one in found),
        "after_a_space": sum(one.spaced is not None for one in found),
    }


def _mapping(found: Sequence[WordIds]) -> str:
    rows = (f"{one.old}\t{one.word}\t{_cell(one.bare)}\t{_cell(one.spaced)}" for one in found)
    return "\n".join(["old_id\tword\tbare_id\tspaced_id", *rows]) + "\n"


def _cell(index: int | None) -> str:
    return "" if index is None else str(index)


def _bytes(ids: list[int], tokenizer: LearnedTokenizer) -> int:
    layout = tokenizer.codec.layout
    return sum(layout.byte_base <= index < layout.pin_base for index in ids)


def _best(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of the fastest of a few runs, caches warm after the first, and what it gave."""
    times, value = [], None
    for _ in range(REPEATS):
        began = time.process_time()
        value = work()
        times.append(time.process_time() - began)
    return min(times), value
