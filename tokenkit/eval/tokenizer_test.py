"""What becomes of example texts: by network and quantiser alone, and by the whole tokenizer, beside each other."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenkit.config import UserError, digest, resolved
from tokenkit.data.chunks import ChunkTable, count_chunks
from tokenkit.eval.reconstruction import HeldOut, answers, measure
from tokenkit.eval.tokenizer_results import (
    Example,
    Figures,
    LearnedFigures,
    Outcome,
    Phase,
    SuiteResults,
    SystemFigures,
)
from tokenkit.tokenizers.autoencoder.bundle import read_state
from tokenkit.tokenizers.autoencoder.chunkers import cut, escaped, to_bytes
from tokenkit.tokenizers.autoencoder.config import TokenizerConfig, load_config
from tokenkit.tokenizers.autoencoder.metrics import Closeness
from tokenkit.tokenizers.autoencoder.network import symbols_of
from tokenkit.tokenizers.autoencoder.package import WEIGHTS, Kind, Package, fingerprint_of, is_package, read_config
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, checkpoint_package
from tokenkit.version import __version__

EXAMPLES = (
    "hello world",
    "The quick brown fox jumps over the lazy dog",
    "How are you today?",
    "1234567890",
    "!@#$%^&*()",
    "auto-encoder tokenizer",
    "a",
    "A tokenizer is tested on a long sentence with many words, some commas, and a full stop at its very end.",
    "CamelCaseIdentifier",
    "snake_case_identifier",
)
MORE_EXAMPLES = ("The quick brown fox", "123 test")  # measured too, and in no mean
MOST_CHUNKS = 20_000  # distinct ones of a corpus that the network reads; they stand for the others
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Subject:
    """A tokenizer under test, and what it is called."""

    tokenizer: AutoEncoderTokenizer
    model: str
    config_hash: str
    fingerprint: str | None = None
    step: int | None = None

    @classmethod
    def of(cls, tokenizer: AutoEncoderTokenizer, model: str = UNTRAINED) -> "Subject":
        """A tokenizer that is at hand."""
        return cls(tokenizer, model, digest(resolved(tokenizer.package.config)))


def open_subject(model: Path | None, config: Path | None = None, kind: Kind | None = None) -> Subject:
    """A package folder with its network, a checkpoint file, or the untrained tokenizer of a configuration."""
    if model is None:
        settings = TokenizerConfig() if config is None else load_config(config)
        return Subject(AutoEncoderTokenizer(settings, kind=kind), UNTRAINED, digest(resolved(settings)))
    if config is not None:
        raise UserError(f"config: {config} describes an untrained tokenizer, and model is {model}; leave one out")
    if not model.exists():
        raise UserError(f"model: {model} does not exist; write the folder of a learned tokenizer or a checkpoint")
    return _open_package(model, kind) if model.is_dir() else _open_checkpoint(model, kind)


def _open_package(folder: Path, kind: Kind | None) -> Subject:
    if not is_package(folder):
        raise UserError(f"model: {folder} has no fsq_config.json; write the folder of a learned tokenizer")
    settings = read_config(folder)
    has_network = settings.network is not None and (folder / WEIGHTS).is_file()
    package = Package.load(folder, "open" if has_network else "compact")
    tokenizer = AutoEncoderTokenizer(package=package, kind=kind or settings.kind)
    return Subject(tokenizer, str(folder), digest(resolved(settings)), fingerprint_of(folder))


def _open_checkpoint(path: Path, kind: Kind | None) -> Subject:
    package, state = checkpoint_package(path), read_state(path)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    hashed = state.get("config_hash") or digest(package.config.network)
    return Subject(AutoEncoderTokenizer(package=package, kind=kind), str(path), hashed, fingerprint, state["step"])


def examine(
    subject: Subject, phase: Phase, texts: Sequence[str] = EXAMPLES, more: Sequence[str] = (), **parts: Any
) -> SuiteResults:
    """The figures over `texts`, and a record of each of them and of `more`; `parts` are further fields."""
    if not texts:
        raise UserError("examples: none; give at least one text")
    tokenizer = subject.tokenizer
    examples = [_example(tokenizer, text, True) for text in texts] + [_example(tokenizer, text, False) for text in more]
    standard = examples[: len(texts)]
    return SuiteResults(
        phase=phase,
        model=subject.model,
        step=subject.step,
        config_hash=subject.config_hash,
        fingerprint=subject.fingerprint,
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        learned=_learned_figures(tokenizer, standard),
        system=_system_figures(tokenizer, standard),
        examples=tuple(examples),
        **parts,
    )


def pieces_of(tokenizer: AutoEncoderTokenizer, text: str, max_bytes: int) -> list[bytes]:
    """The byte strings that a network of chunks of `max_bytes` reads of a text."""
    return [piece for chunk in tokenizer.codec.split(text) for piece in cut(to_bytes(chunk), max_bytes)]


def diagnose(pieces: Sequence[bytes], said: Sequence[bytes]) -> str | None:
    """One line on the chunks that came back otherwise; None where all are the same."""
    wrong = [place for place, (piece, other) in enumerate(zip(pieces, said)) if piece != other]
    if not wrong:
        return None
    piece, other = pieces[wrong[0]], said[wrong[0]]
    missed = sum(a != b for a, b in zip(piece, other))
    parts = [f"{missed} of {len(piece)} bytes wrong"] if missed else []
    if len(other) < len(piece):
        parts.append(f"ends {len(piece) - len(other)} bytes early")
    if len(other) > len(piece):
        parts.append(f"ends {len(other) - len(piece)} bytes late")
    shown = [part.decode("utf-8", "replace") for part in (piece, other)]
    place = f"chunk {wrong[0] + 1}" if len(wrong) == 1 else f"the first is chunk {wrong[0] + 1}"
    return f"{len(wrong)} of {len(pieces)} chunks wrong; {place}, {shown[0]!r} as {shown[1]!r}: {', '.join(parts)}"


def held_out_figures(tokenizer: AutoEncoderTokenizer, documents: Sequence[str]) -> dict[str, float]:
    """Learned figures on the chunks of documents, by occurrence and by distinct chunk, and bytes per token."""
    bytes_per_token, tiers = spending(tokenizer, documents)
    found = {"bytes_per_token": bytes_per_token, **{f"share_{tier}": share for tier, share in tiers.items()}}
    network = tokenizer.package.network
    if network is None:
        return found
    table = ChunkTable.of(count_chunks(documents, tokenizer.codec.chunker))
    learned = measure(network, HeldOut.of(table, ChunkTable.of({}), network.max_bytes, most=MOST_CHUNKS), shortest=True)
    return {key: value for key, value in learned.items() if "seen" not in key} | found  # what training saw is unknown


def spending(tokenizer: AutoEncoderTokenizer, texts: Iterable[str]) -> tuple[float, dict[str, float]]:
    """Bytes per token over texts, and the share of each tier of ids; special tokens are not counted."""
    size, tiers = 0, Counter[str]()
    for text in texts:
        size += len(to_bytes(escaped(text)))
        counts = Counter(tokenizer.encode(text, add_special_tokens=False))
        for index, times in counts.items():
            tiers[tokenizer.codec.layout.tier(index)] += times
    total = max(1, tiers.total())
    return size / total, {tier: tiers[tier] / total for tier in ("byte", "pin", "open")}


def _example(tokenizer: AutoEncoderTokenizer, text: str, standard: bool) -> Example:
    found = tokenizer.test_reconstruction(text)
    learned = None
    if found.learned is not None and found.learned_reconstruction is not None:
        codes = tokenizer.codec.open_codes or tokenizer.package.open_codes()
        pieces = pieces_of(tokenizer, text, codes.max_bytes)
        why = None if found.learned.exact else diagnose(pieces, codes.learned(pieces))
        learned = _outcome(found.learned_reconstruction, found.learned, why)
    why = None if found.system.exact else _first_difference(text, found.reconstruction)
    system = _outcome(found.reconstruction, found.system, why)
    return Example(text=text, standard=standard, ids=tuple(found.ids), learned=learned, system=system)


def _outcome(output: str, found: Closeness, diagnosis: str | None) -> Outcome:
    return Outcome(output=output, diagnosis=diagnosis, **found.as_json())


def _first_difference(text: str, other: str) -> str:
    place = next((n for n, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
    return f"differs from character {place + 1} on: {text[place : place + 8]!r} as {other[place : place + 8]!r}"


def _means(outcomes: Sequence[Outcome], texts: Sequence[str]) -> dict[str, Any]:
    found = {name: fmean(getattr(outcome, name) for outcome in outcomes) for name in MEANS}
    return {
        "examples": len(outcomes),
        "perfect": sum(outcome.exact for outcome in outcomes),
        "mean_edit_distance": fmean(outcome.edit_distance for outcome in outcomes),
        "failures": tuple(text for text, outcome in zip(texts, outcomes) if not outcome.exact),
        **found,
    }


MEANS = [name for name in Figures.model_fields if name in Outcome.model_fields]


def _system_figures(tokenizer: AutoEncoderTokenizer, examples: Sequence[Example]) -> SystemFigures:
    texts = [example.text for example in examples]
    bytes_per_token, tiers = spending(tokenizer, texts)
    means = _means([example.system for example in examples], texts)
    return SystemFigures(**means, bytes_per_token=bytes_per_token, tiers=tiers)


def _learned_figures(tokenizer: AutoEncoderTokenizer, examples: Sequence[Example]) -> LearnedFigures | None:
    network = tokenizer.package.network
    outcomes = [example.learned for example in examples if example.learned is not None]
    if network is None or not outcomes:
        return None
    texts = [example.text for example in examples]
    pieces = [piece for text in texts for piece in pieces_of(tokenizer, text, network.max_bytes)]
    found = answers(network, symbols_of(pieces, network.max_bytes))
    return LearnedFigures(
        **_means(outcomes, texts),
        byte_accuracy=float(found.right_bytes.sum() / max(1.0, found.num_bytes.sum())),
        chunk_exact=float(found.exact.mean()) if pieces else 1.0,
        reconstruction_perplexity=math.exp(min(float(found.nats.sum() / max(1.0, found.scored.sum())), 700.0)),
    )
