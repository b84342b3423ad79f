"""`tokenkit tokenizer analyze`: how a learned tokenizer uses its ids and its codes on text, as files and a page."""

import csv
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from tokenkit.config import Config, UserError
from tokenkit.data.chunk_corpus import ChunkDataConfig, read_corpus
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.codebook import Analysis, analyse
from tokenkit.eval.codebook_table import codebook_rows, vocabulary
from tokenkit.eval.id_usage import CountedCorpus, count_corpus
from tokenkit.eval.tokenizer_test import Subject, open_subject
from tokenkit.report.aligned import visible
from tokenkit.report.codebook import codebook_page
from tokenkit.report.curves import read_metrics
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker
from tokenkit.tokenizers.autoencoder.package import Kind
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.checkpoint_files import TRAINING_STATE
from tokenkit.train.folder import write_json, write_text
from tokenkit.version import __version__

ANALYSIS, TABLE, PAGE, VOCABULARY = "analysis.json", "codebook.csv", "report.html", "vocab.json"
LOGGED = ("loss", "learned_byte_accuracy", "digit_entropy_mean")  # utilisation is the last
TEXTS_AT_ONCE = 64


class UsageGates(Config):
    """What the analysis must find; a gate that is left out is not held."""

    u1: float | None = Field(None, ge=0, le=1)
    """Least share of the ids that the text uses; meant for 100 MB and more."""
    u3: float | None = Field(None, ge=0, le=1)
    """Least entropy of every digit, over its maximum."""
    collisions: float | None = Field(None, ge=0, le=1)
    """Most distinct strings that share all their codes with another one."""


class TokenizerAnalyzeRun(Config):
    """A run file of `tokenkit tokenizer analyze`."""

    model: Path
    """The folder of a learned tokenizer, or a checkpoint."""
    corpora: dict[str, SourceConfig]
    """Text by name: a domain or a language each; or one source."""
    output: Path
    """A new folder, or that of an earlier analysis."""
    kind: Kind | None = None
    """compact or open; by default what the package is, and open for a checkpoint."""
    training: ChunkDataConfig | None = None
    """The text of the training, to tell what it had often, seldom and never."""
    history: Path | None = None
    """metrics.jsonl or training_state.json of the training; by default what lies beside the model."""
    tokenizers: dict[str, TokenizerSpec] = {}
    """Other tokenizers by name, whose bytes per token stand beside."""
    baseline: Path | None = None
    """analysis.json of another analysis, to compare with."""
    top_k: int | None = Field(None, ge=1)
    """Rows of codebook.csv; by default all."""
    max_network_chunks: int = Field(65536, ge=2)
    """Distinct strings that the network is asked about at most; these then stand for all."""
    seed: int = 0
    gates: UsageGates = UsageGates()

    @field_validator("corpora", mode="before")
    @classmethod
    def _one_or_named(cls, value: Any) -> Any:
        keys = {"path", "hub", "stdlib"}
        one = isinstance(value, dict) and any(isinstance(value.get(key), str) for key in keys)
        return {"corpus": value} if one else value

    @field_validator("corpora")
    @classmethod
    def _some(cls, value: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        if not value:
            raise UserError("corpora: none; write corpora.path=FILE, or a source by name")
        return value


def analyze_tokenizer(run: TokenizerAnalyzeRun) -> dict[str, Any]:
    """Writes analysis.json, codebook.csv, vocab.json and report.html; the figures that two analyses are compared by.

    UserError, once everything is written, where a gate does not hold.
    """
    if run.output.exists() and (not run.output.is_dir() or _foreign(run.output)):
        raise UserError(f"{run.output}: holds other files; nothing is overwritten, choose a new output")
    subject = open_subject(run.model, kind=run.kind)
    package, kind = subject.tokenizer.package, subject.tokenizer.kind
    baseline = None if run.baseline is None else _read_analysis(run.baseline)
    others = {name: load_tokenizer(spec) for name, spec in run.tokenizers.items()}
    history = training_history(run.history, run.model)
    training = None if run.training is None else _training_counts(run.training, subject)
    corpora, beside = _read(run, package.config.chunker, others)
    found = analyse(package, corpora, kind=kind, training=training, most=run.max_network_chunks, seed=run.seed)
    gates = check_gates(run.gates, found.figures)
    values = {
        "model": str(run.model),
        "fingerprint": subject.fingerprint,
        "step": subject.step,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        **found.values,
        "others": beside,
        "history": history,
        "baseline": baseline,
        "gates": gates,
    }
    _write(run, found, values)
    failed = [gate["says"] for gate in gates if not gate["passed"]]
    if failed:
        raise UserError(f"gates: {', '.join(failed)} (everything is in {run.output})")
    return {"output": str(run.output), **found.figures}


def check_gates(gates: UsageGates, figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """What each gate that is held says, and whether it passed; a figure that there is none of fails."""
    found = []
    for name, wanted in gates.model_dump(exclude_none=True).items():
        value, most = figures.get(name), name == "collisions"
        passed = value is not None and (value <= wanted if most else value >= wanted)
        is_ = "has no value without codes" if value is None else f"is {value:.5f}"
        says = f"{name} {is_}; at {'most' if most else 'least'} {wanted:g} is asked"
        found.append({"gate": name, "passed": passed, "says": says})
    return found


def training_history(given: Path | None, model: Path) -> dict[str, list[list[float]]]:
    """Loss, accuracy and utilisation over steps, as far as the file has them; {} where none lies beside the model."""
    folders = (model.parent, model.parent / "checkpoints" if model.is_dir() else model.parent.parent)
    beside = [folder / name for name in ("metrics.jsonl", TRAINING_STATE) for folder in folders]
    path = given or next((path for path in beside if path.is_file()), None)
    if path is None:
        return {}
    if path.suffix == ".jsonl":
        return {name: [[*point] for point in points] for name, points in read_metrics(path, LOGGED).items() if points}
    try:
        state = json.loads(path.read_text("utf-8"))
        curves = {"loss": state["loss_curve"], state["metric"]: state["accuracy_curve"]}
        return {str(name): [[float(s), float(v)] for s, v in points] for name, points in curves.items() if points}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"history: {path} is no training_state.json or metrics.jsonl; leave it out") from None


def _foreign(folder: Path) -> bool:
    return any(folder.iterdir()) and not (folder / ANALYSIS).is_file()


def _read_analysis(path: Path) -> dict[str, Any]:
    path = path / ANALYSIS if path.is_dir() else path
    try:
        values = json.loads(path.read_text("utf-8"))
        return {"model": str(values["model"]), "figures": {k: float(v) for k, v in values["figures"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"baseline: {path} is no analysis.json; write that of an earlier analysis") from None


def _training_counts(data: ChunkDataConfig, subject: Subject) -> dict[bytes, int]:
    """How often training saw each string that the network is given; empty without a network."""
    package = subject.tokenizer.package
    if package.network is None:
        raise UserError("training: tells what the network had seen, and this tokenizer has none; leave it out")
    chunker = package.config.chunker
    corpus = read_corpus(data if data.prepared else data.model_copy(update={"chunker": chunker}))
    if corpus.chunker != chunker:
        raise UserError(f"training: was prepared with chunker {corpus.chunker}, and the tokenizer has {chunker}")
    return corpus.train.cut(package.network.max_bytes).as_dict()


def _read(
    run: TokenizerAnalyzeRun, chunker: str, others: Mapping[str, Tokenizer]
) -> tuple[list[CountedCorpus], dict[str, dict[str, float]]]:
    """The counted corpora, and bytes per token of other tokenizers on each of them."""
    corpora, beside = [], {name: {} for name in others}
    for name, source in run.corpora.items():
        texts = read_documents(source)
        corpora.append(count_corpus(name, texts, make_chunker(chunker)))
        for other, tokenizer in others.items():
            batches = (texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE))
            tokens = sum(len(encoding) for batch in batches for encoding in tokenizer.encode_batch(batch))
            beside[other][name] = corpora[-1].num_bytes / max(1, tokens)
    return corpora, beside


def _write(run: TokenizerAnalyzeRun, found: Analysis, values: dict[str, Any]) -> None:
    folder = run.output
    write_text(folder / TABLE, _table(found, run.top_k))
    write_text(folder / VOCABULARY, _vocabulary(found, values))
    write_text(folder / PAGE, codebook_page(values).encode("utf-8", "backslashreplace").decode())
    write_json(folder / ANALYSIS, values)


def _table(found: Analysis, top_k: int | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "ids", "tier", "count", "share", "cumulative_share", "bytes", "hex", "text", "code"])
    for row in islice(codebook_rows(found.codec, found.usage, found.spelled), top_k):
        shares = (f"{row.share:.3e}", f"{row.cumulative_share:.6f}")
        shown = visible(row.string.decode("utf-8", "backslashreplace"))
        ids, codes = " ".join(map(str, row.ids)), " ".join(".".join(map(str, code)) for code in row.codes)
        writer.writerow([row.rank, ids, row.tier, row.count, *shares, len(row.string), row.string.hex(), shown, codes])
    return text.getvalue()


def _vocabulary(found: Analysis, values: Mapping[str, Any]) -> str:
    """One entry a line."""
    layout = found.codec.layout
    head = {
        "fingerprint": values["fingerprint"],
        "kind": values["vocabulary"]["kind"],
        "vocab_size": layout.vocab_size,
        "special": layout.special_names,
        "open_base": layout.open_base if layout.num_codes else None,
    }
    entries = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in vocabulary(found.codec))
    return json.dumps(head, ensure_ascii=False)[:-1] + f', "entries": [\n{entries}\n]}}\n'
