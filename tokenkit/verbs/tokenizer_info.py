"""`tokenkit tokenizer-info`: two tokenizers counted on a text, what they share, and their tokenisation bias."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray
from pydantic import Field
from safetensors.numpy import save

from tokenkit.align.bias import PairBias, save_bias, save_bias_npz, write_whole_with
from tokenkit.align.counts import SMOOTHING, CountBatches
from tokenkit.align.covers import Model
from tokenkit.align.pair_bias import BiasBlocks, bias_blocks
from tokenkit.align.parts import run_parts
from tokenkit.config import Config, UserError, resolved
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.report.progress import stages
from tokenkit.tokenizers.base import Tokenizer, utf8
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.version import __version__

CHARACTERS_PER_PART = 4_000_000  # of text that is counted at once
FREE = ("workers", "npz")  # what does not change the result


class TokenizerInfoRun(Config):
    """A run file of `tokenkit tokenizer-info`."""

    teacher: str
    """Folder, tokenizer.json, hub id or `byte`."""
    student: str
    """Folder, tokenizer.json, hub id or `byte`."""
    source: SourceConfig
    """The text on which tokens are counted, without special tokens."""
    output: Path
    """Folder for info.json, counts.safetensors, bias.safetensors and the parts of an unfinished run."""
    smoothing: float = Field(SMOOTHING, gt=0, le=1)
    """Share of all counts that every token is given on top of its own."""
    npz: bool = False
    """Also write bias1_matrix.npz and bias2_matrix.npz, which `scipy.sparse.load_npz` reads."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Processes; the result does not depend on them."""


def tokenizer_info(run: TokenizerInfoRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Writes the output folder and returns what info.json holds."""
    teacher, student = load_tokenizer(run.teacher), load_tokenizer(run.student)
    for tokenizer in (teacher, student):
        Model(tokenizer)  # refuses what has no bias before anything is written
    documents = read_documents(run.source)
    corpus = _corpus(run.source, documents)
    claimed = {key: value for key, value in resolved(run).items() if key not in FREE}
    RunFolder(run.output).claim(claimed, resume=resume)
    identity = {"teacher": teacher.fingerprint, "student": student.fingerprint, "corpus": corpus["sha256"]}
    identity["version"] = __version__  # parts may be cut in another way
    _claim_pair(run.output / "pair.json", identity)
    parts = run.output / "parts"
    with stages(quiet) as stage:
        batches = list(_batches(documents))
        counting = CountBatches(teacher, student)
        found = run_parts(parts, "counts", counting, batches, run.workers, stage("counting", len(batches)))
        counts = {side: np.sum([part[side] for part in found], axis=0) for side in ("teacher", "student")}
        write_whole_with(run.output / "counts.safetensors", lambda path: path.write_bytes(save(counts)))
        work = bias_blocks(teacher, student, counts["teacher"], counts["student"], run.smoothing)
        blocks = range(len(work.pairs.blocks))
        results = run_parts(parts, "bias", work, blocks, run.workers, stage("bias", len(blocks)))
    bias = _joined(work, results)
    save_bias(run.output, bias, teacher, student)
    if run.npz:
        save_bias_npz(run.output, bias)
    shared = set(teacher.token_bytes) & set(student.token_bytes) - {b""}
    summary = _bias_summary(bias, work.pairs.blank)
    sides = {
        "teacher": _side(run.teacher, teacher, counts["teacher"], shared, corpus["bytes"]),
        "student": _side(run.student, student, counts["student"], shared, corpus["bytes"]),
    }
    info = {**sides, "corpus": corpus, "shared_spellings": len(shared), "smoothing": run.smoothing, "pairs": summary}
    write_json(run.output / "info.json", info)
    return info


def _corpus(source: SourceConfig, documents: list[str]) -> dict[str, Any]:
    digest, num_bytes = hashlib.sha256(), 0
    for text in documents:
        raw = utf8(text, describe(source))
        digest.update(len(raw).to_bytes(8, "little") + raw)
        num_bytes += len(raw)
    return {"text": describe(source), "documents": len(documents), "bytes": num_bytes, "sha256": digest.hexdigest()}


def _claim_pair(path: Path, identity: dict[str, str]) -> None:
    """Writes what the parts belong to, or checks it: files under the same names may have changed."""
    if not path.is_file():
        return write_json(path, identity)
    kept = json.loads(path.read_text("utf-8"))
    changed = [key for key, value in identity.items() if kept.get(key) != value]
    if changed:
        raise UserError(f"{path.parent}: holds the parts of another {changed[0]}; write output=... with a new name")
    return None


def _batches(documents: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= CHARACTERS_PER_PART:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(work: BiasBlocks, results: list[dict[str, ndarray]]) -> PairBias:
    pairs = work.pairs
    columns = np.ones((2, len(pairs.blank)), np.float32)  # 1 where one side is white space only
    for rows, result in zip(pairs.blocks, results):
        columns[:, rows] = result["bias1"], result["bias2"]
    shape = (len(work.teacher.counts), len(work.student.counts))
    return PairBias(pairs.teacher_ids, pairs.student_ids, columns[0], columns[1], shape)


def _side(
    spec: str, tokenizer: Tokenizer, counts: Int64[ndarray, "V"], shared: set[bytes], num_bytes: int
) -> dict[str, Any]:
    spelled = {word for word in tokenizer.token_bytes if word}
    common = np.array([word in shared for word in tokenizer.token_bytes], np.bool_)
    return {
        "tokenizer": spec,
        "fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocab_size,
        "special": len(tokenizer.special_ids),
        "distinct_spellings": len(spelled),
        "tokens": int(counts.sum()),
        "tokens_per_byte": int(counts.sum()) / num_bytes,
        "ids_seen": int((counts > 0).sum()),
        "shared_of_vocabulary": len(shared) / len(spelled),
        "shared_of_tokens": int(counts[common].sum()) / int(counts.sum()),
    }


def _bias_summary(bias: PairBias, blank: Bool[ndarray, "P"]) -> dict[str, int]:
    return {
        "listed": len(bias),
        "white_space": int(blank.sum()),
        "nonzero_bias1": int((bias.bias1 > 0).sum()),
        "nonzero_bias2": int((bias.bias2 > 0).sum()),
    }
