"""`tokenkit tokenizer benchmark`: speed, latency and size of a learned tokenizer, beside others on the same text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.tokenizer_cost import disk_bytes, resident_bytes
from tokenkit.eval.tokenizer_speed import Subject, latencies, met, ratios, speeds
from tokenkit.tokenizers.autoencoder.package import Kind, Package, is_package
from tokenkit.tokenizers.factory import create_tokenizer
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.word import WordTokenizer
from tokenkit.tokenizers.word_config import WordConfig
from tokenkit.train.folder import write_json

LEARNED, WORD = "learned", "word"


class TokenizerBenchmarkRun(Config):
    """A run file of `tokenkit tokenizer benchmark`."""

    model: Path
    """The folder of a learned tokenizer."""
    kind: Kind | None = None
    """compact or open, where it is not to be the folder's own."""
    source: SourceConfig
    """Text to encode and decode."""
    words_from: SourceConfig | None = None
    """Text that the word tokenizer, the baseline, is made of; by default the text itself."""
    beside: list[str] = []
    """Folders of other tokenizers (tokenizer.json)."""
    tiktoken: list[str] = []
    """Folders of byte-level BPE tokenizers that tiktoken is to run as well."""
    repeats: int = Field(5, ge=1)
    output: Path | None = None
    """A JSON file."""


def benchmark(run: TokenizerBenchmarkRun) -> dict[str, Any]:
    """Times over those of the word tokenizer, limits of the checklist with what was measured, sizes."""
    if not is_package(run.model):
        raise UserError(f"{run.model}: no learned tokenizer in it; write the folder of one")
    texts = read_documents(run.source)
    words = read_documents(run.words_from) if run.words_from else texts
    package = Package.load(run.model, run.kind)
    package = replace(package, config=package.config.model_copy(update={"kind": run.kind or package.config.kind}))
    word = WordTokenizer.train(words, WordConfig())
    subjects = [Subject.of(WORD, word), Subject.learned(LEARNED, package)]
    subjects += [Subject.of(Path(path).name, create_tokenizer({"tokenizer_type": f"hf:{path}"})) for path in run.beside]
    subjects += [Subject.tiktoken(f"{Path(path).name} by tiktoken", _bpe(path)) for path in run.tiktoken]
    chunks = [piece for text in texts[:50] for piece in _pieces(text)][:400]
    found = latencies(package, chunks)
    size = disk_bytes(run.model) / 1e6
    memory = (resident_bytes(run.model, package.config.kind) or 0) / 1e6
    results = {
        "model": str(run.model),
        "ratios": ratios(speeds(subjects, texts, run.repeats), WORD),
        "limits": met(found | {"megabytes": memory}),
        "package_megabytes": round(size, 2),
        "memory_megabytes": round(memory, 1),
    }
    if run.output is not None:
        write_json(run.output, results)
    return results


def _bpe(path: str) -> HFTokenizer:
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, HFTokenizer):
        raise UserError(f"tiktoken: {path} is no byte-level BPE; leave it out")
    return tokenizer


def _pieces(text: str) -> list[bytes]:
    data = text.encode()
    return [data[start : start + 16] for start in range(0, min(len(data), 1600), 16)]
