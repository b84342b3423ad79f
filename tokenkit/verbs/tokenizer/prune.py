"""`tokenkit tokenizer prune`: the pins that text is worth, in a new package; a checkpoint gets its first ones."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from tokenkit.config import Config, UserError
from tokenkit.data.chunks import ChunkTable, count_chunks
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.pruning import By, compact_coverage, id_mapping, prune_pins
from tokenkit.eval.tokenizer_test import open_subject
from tokenkit.tokenizers.autoencoder.cache import LONGEST_KEPT, Spelling
from tokenkit.tokenizers.autoencoder.chunkers import escaped, make_chunker, to_bytes, to_text
from tokenkit.tokenizers.autoencoder.package import METRICS, Kind, Package
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.placement import place_pins
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, save_with_fast
from tokenkit.train.folder import write_json, write_text

MAPPING = "pruning.json"
VERIFIED_BYTES = 4 << 20  # of text that the written package must give back


class TokenizerPruneRun(Config):
    """A run file of `tokenkit tokenizer prune`."""

    model: Path
    """The folder of a learned tokenizer, or a checkpoint."""
    corpus: SourceConfig
    """Text that says what pins are worth; training text, never what is evaluated on."""
    output: Path
    """A new folder."""
    top_k: int = Field(32768, ge=0)
    """Pins that are left at most; the 256 bytes and the special tokens always stay."""
    by: By = "saving"
    """saving: ids that a pin saves over its best other spelling; frequency: how often it is used."""
    min_count: int = Field(1, ge=0)
    """A pin must be used so often."""
    kind: Kind | None = None
    """compact or open; by default what the package is, and compact for a checkpoint."""
    warm: int = Field(150_000, ge=0)
    """The commonest chunks whose ids are kept in the package, so that new text need not be spelled."""


def prune_tokenizer(run: TokenizerPruneRun) -> dict[str, Any]:
    """Writes the new package and `pruning.json` (old id → new id) whole or not at all; what it costs in ids.

    What was written is loaded again and must give back the corpus.
    """
    if run.output.exists():
        raise UserError(f"{run.output}: exists; nothing is overwritten, choose a new output")
    subject = open_subject(run.model)
    package = subject.tokenizer.package
    default = "compact" if run.model.is_file() else package.config.kind
    package = replace(package, config=package.config.model_copy(update={"kind": run.kind or default}))
    texts = read_documents(run.corpus)
    counts = count_chunks(texts, make_chunker(package.config.chunker))
    pruned = _with_pins(package, ChunkTable.of(counts).cut(package.config.max_chunk).as_dict(), run)
    pruned = replace(pruned, warm=warm_chunks(pruned, counts, run.warm))
    before, after = compact_coverage(package, counts), compact_coverage(pruned, counts)
    summary = {
        "model": str(run.model),
        "model_fingerprint": subject.fingerprint,
        "pins_before": len(package.pins),
        "pins_after": len(pruned.pins),
        "placed": bool(pruned.pins.digits),
        "warm_chunks": len(pruned.warm),
        "tokens_per_byte_before": before.tokens_per_byte,
        "tokens_per_byte_after": after.tokens_per_byte,
        "whole_chunks_before": before.whole,
        "whole_chunks_after": after.whole,
    }
    mapping = id_mapping(subject.tokenizer.codec, pruned.codec())
    return _save(run.output, pruned, {**summary, **mapping}, _metrics(run.model), texts) | summary


def warm_chunks(package: Package, counts: Mapping[bytes, int], most: int) -> dict[str, Spelling]:
    """The commonest chunks with their ids in compact form: the permanent part of a tokenizer's table."""
    codec = replace(package, warm={}).codec("compact")
    common = sorted(counts, key=lambda chunk: (-counts[chunk], chunk))
    texts = (text for chunk in common[:most] if len(text := to_text(chunk)) <= LONGEST_KEPT)
    return {text: codec.spell(text) for text in texts}


def _with_pins(package: Package, pieces: Mapping[bytes, int], run: TokenizerPruneRun) -> Package:
    """The package with the pins that are worth it, on the grid of its network where that has room."""
    chosen = package if len(package.pins) else replace(package, pins=_first_pins(pieces, run))
    pins = prune_pins(chosen, pieces, run.top_k, by=run.by, min_count=run.min_count)
    network = package.network
    if network is not None and not pins.digits and len(pins) <= network.quantizer.total_vocab_size:
        pins = place_pins(network, pins)
    return replace(package, pins=pins, warm={})


def _first_pins(pieces: Mapping[bytes, int], run: TokenizerPruneRun) -> PinTable:
    if run.by == "saving":
        return select_pins(pieces, run.top_k)
    common = sorted((p for p in pieces if len(p) > 1), key=lambda piece: (-pieces[piece], piece))[: run.top_k]
    return PinTable(tuple(common), tuple(pieces[piece] for piece in common))


def _metrics(model: Path) -> dict[str, Any]:
    """What the training had measured, to go along; {} where the model says nothing."""
    path = model / METRICS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: not the JSON object that a training wrote; mend or remove it") from None


def _save(
    output: Path, package: Package, mapping: dict[str, Any], metrics: dict[str, Any], texts: Sequence[str]
) -> dict[str, Any]:
    """Writes, loads and checks under another name, which then becomes the output."""
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        fingerprint = save_with_fast(package, part)
        if metrics:
            write_json(part / METRICS, metrics)
        write_text(part / MAPPING, json.dumps({"fingerprint": fingerprint, **mapping}) + "\n")
        _verify(AutoEncoderTokenizer.load(part), texts)
        part.rename(output)
    except BaseException:
        for path in part.iterdir() if part.is_dir() else ():
            path.unlink()
        if part.is_dir():
            part.rmdir()
        raise
    return {"output": str(output), "fingerprint": fingerprint}


def _verify(tokenizer: AutoEncoderTokenizer, texts: Sequence[str]) -> None:
    left = VERIFIED_BYTES
    for data in (bytes(range(256)), *(to_bytes(escaped(text)) for text in texts)):
        part = data[:left]
        left -= len(part)
        if tokenizer.decode_bytes(tokenizer.encode_bytes(part)) != part:
            raise AssertionError("a pruned tokenizer does not give its corpus back")
        if not left:
            return
