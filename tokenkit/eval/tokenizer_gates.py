"""The checklist's go or no-go decisions: core, pre-training, integration, speed; every figure beside its target."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import Field

from tokenkit.config import Config, UserError
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.eval.tokenizer_cost import disk_bytes, resident_bytes
from tokenkit.eval.tokenizer_results import Check, EdgeResult, Gate, SuiteResults
from tokenkit.eval.tokenizer_speed import SHORT_BYTES, latencies, ratios, speeds
from tokenkit.eval.tokenizer_speed import Subject as Timed
from tokenkit.eval.tokenizer_test import Subject
from tokenkit.models.generate import generate
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.autoencoder.chunkers import cut, escaped, to_bytes
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, symbols_of
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.word import WordTokenizer

TITLES = {
    "G1": "core components work, and every string comes back",
    "G2": "the auto-encoder has learnt to reconstruct",
    "G3": "a language model on it writes coherent text",
    "G4": "it is fast and small enough",
}
WORDS = re.compile(r"[^\W\d_]+")
PROBES = (b"hello", b"world", b"a", b"", b"\x00\xff", b"\xf0\x9f\x99\x82")
PROMPTS, PROMPT_CHARACTERS, WRITTEN_TOKENS = 8, 40, 48
SEQUENCES, SEQUENCE_LENGTH = 64, 64
TIMED_CHARACTERS, TIMED_CHUNKS = 200_000, {False: 400, True: 50}  # fewer where the network is asked about each


class GatesConfig(Config):
    """What the gates ask for."""

    min_char_accuracy: float = Field(0.9, ge=0, le=1)
    """G2: learned, of the standard examples, and of the corpus where there is one."""
    language_model: Path | None = None
    """G3: the folder of a causal language model that has this tokenizer."""
    max_bits_per_byte: float = Field(2.0, gt=0)
    """G3: on the corpus. English takes more than 4 by the frequencies of bytes, and about 2.5 well compressed."""
    min_known_words: float = Field(0.8, ge=0, le=1)
    """G3: share of the words in what the model writes that stand in the corpus."""
    max_encode_ms: float = Field(0.5, gt=0)
    """G4: per chunk of 16 characters, without a cache, of one core."""
    max_decode_ms: float = Field(1.0, gt=0)
    """G4: per id, without a cache."""
    min_characters_per_second: float = Field(100_000.0, gt=0)
    min_ids_per_second: float = Field(10_000.0, gt=0)
    max_over_word_tokenizer: float = Field(2.0, gt=0)
    """G4: time of a warm encoding over that of a word tokenizer made of the same text."""
    max_megabytes: float = Field(100.0, gt=0)
    """G4: in memory, and on disk."""


@dataclass(frozen=True)
class Evidence:
    """What the gates look at."""

    subject: Subject
    results: SuiteResults
    edges: tuple[EdgeResult, ...]
    documents: Sequence[str]
    """Text to be measured on."""
    model: Path | None
    """Where the tokenizer is saved."""


def decide(evidence: Evidence, config: GatesConfig) -> tuple[Gate, ...]:
    """The four decisions."""
    tokenizer = evidence.subject.tokenizer
    return (
        _gate("G1", [*_core(tokenizer), _lossless(evidence.edges)]),
        _pretraining(evidence.results, config),
        _integration(tokenizer, evidence.documents, config),
        _gate("G4", _performance(evidence, config)),
    )


def _gate(name: str, checks: Sequence[Check], note: str = "", undecided: bool = False) -> Gate:
    passed = all(check.passed for check in checks)
    return Gate(
        name=name, title=TITLES[name], passed=None if passed and undecided else passed, checks=tuple(checks), note=note
    )


def _most(what: str, value: float, most: float, unit: str = "") -> Check:
    return Check(what=what, value=f"{value:.4g}{unit}", target=f"at most {most:g}{unit}", passed=value <= most)


def _least(what: str, value: float, least: float) -> Check:
    return Check(what=what, value=f"{value:.4g}", target=f"at least {least:g}", passed=value >= least)


def _is(what: str, passed: bool) -> Check:
    return Check(what=what, value="yes" if passed else "no", target="yes", passed=passed)


def _lossless(edges: Sequence[EdgeResult]) -> Check:
    wrong, tried = sum(result.wrong for result in edges), sum(result.tried for result in edges)
    what = f"strings that do not come back, of {tried:,} in {len(edges)} corpora"
    return Check(what=what, value=f"{wrong:,}", target="0 of at least 1", passed=not wrong and tried > 0)


@torch.inference_mode()
def _core(tokenizer: AutoEncoderTokenizer) -> list[Check]:
    """Quantiser, encoder and decoder by themselves; none where the package has no network."""
    network = tokenizer.package.network
    return [] if network is None else [*_quantiser(network), *_network(network)]


def _quantiser(network: AutoEncoder) -> list[Check]:
    quantizer = network.quantizer
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(quantizer.total_vocab_size, (10_000,), generator=generator)
    same = torch.equal(quantizer.code_to_token_id(quantizer.token_id_to_code(ids)), ids)
    swept = torch.linspace(-20, 20, 4001).unsqueeze(1).expand(-1, quantizer.num_dimensions)
    reached = math.prod(len(column.unique()) for column in quantizer.digits(swept).T)
    return [
        _is("quantiser: ids and digits are the same thing", same),
        _is("quantiser: every usable code can be reached", reached == quantizer.num_usable),
    ]


def _network(network: AutoEncoder) -> list[Check]:
    probes = [probe[: network.max_bytes] for probe in PROBES]
    symbols = symbols_of(probes, network.max_bytes)
    latents, alone = network.latents(symbols), network.latents(symbols[:1])
    logits = network.logits(network.quantizer.dequantize(network.quantizer.digits(latents)))
    sums = logits.softmax(-1).sum(-1)
    return [
        _is("encoder: finite numbers", bool(latents.isfinite().all())),
        _is("encoder: alone as in a batch", torch.allclose(latents[:1], alone, atol=1e-4)),
        _is("encoder: different strings differ", len(latents.flatten(1).unique(dim=0)) == len(set(probes))),
        _is("decoder: a distribution at every place", torch.allclose(sums, torch.ones_like(sums), atol=1e-3)),
        _is("decoder: as many places as a chunk has bytes", logits.shape[1] == network.max_bytes),
    ]


def _pretraining(results: SuiteResults, config: GatesConfig) -> Gate:
    if results.learned is None:
        return Gate(name="G2", title=TITLES["G2"], passed=None, checks=(), note="this package has no network")
    least, learned = config.min_char_accuracy, results.learned
    checks = [_least("learned character accuracy of the examples", learned.char_accuracy_positional, least)]
    if results.held_out is not None:
        checks.append(_least("learned byte accuracy of the corpus", results.held_out["learned_byte_accuracy"], least))
    return _gate("G2", checks)


def _integration(tokenizer: AutoEncoderTokenizer, documents: Sequence[str], config: GatesConfig) -> Gate:
    checks = [_is("any sequence of ids decodes", _decodes_anything(tokenizer))]
    if config.language_model is None:
        return _gate("G3", checks, "no text was written; name the folder of a language model", undecided=True)
    return _gate("G3", checks + _language_model(tokenizer, documents, config, config.language_model))


def _decodes_anything(tokenizer: AutoEncoderTokenizer) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(tokenizer.vocab_size, (SEQUENCES, SEQUENCE_LENGTH), generator=generator).tolist()
    return all(isinstance(text, str) for text in tokenizer.decode_batch(rows))


@torch.inference_mode()
def _language_model(
    tokenizer: AutoEncoderTokenizer, documents: Sequence[str], config: GatesConfig, folder: Path
) -> list[Check]:
    if not documents:
        raise UserError("gates.language_model: needs text to be measured on; give a corpus")
    model, own = load_model(str(folder), device="cpu"), load_tokenizer(str(folder))
    sample = documents[0][:2000]
    ids = own.encode(sample).ids.tolist()
    same = ids == tokenizer.encode(sample, add_special_tokens=False)
    prompt = torch.tensor([[own.start_id(), *ids[:15]]])
    shape = tuple(model(prompt).logits.shape)
    found = bits_per_byte(ModelView(model), own, [*documents])
    prompts = [text[:PROMPT_CHARACTERS] for text in documents[:PROMPTS]]
    written = generate(model, own, prompts, max_new_tokens=WRITTEN_TOKENS, temperature=0.7, seed=0)
    known = {word.lower() for text in documents for word in WORDS.findall(text)}
    words = [word.lower() for text in written for word in WORDS.findall(text)]
    return [
        _is("the language model has this tokenizer", same),
        _is("logits of (batch, length, vocabulary)", shape[:2] == prompt.shape and shape[2] >= own.vocab_size),
        _most("bits per byte of the corpus", found.value, config.max_bits_per_byte),
        _least(
            "known words in what it writes", sum(w in known for w in words) / max(1, len(words)), config.min_known_words
        ),
    ]


def _performance(evidence: Evidence, config: GatesConfig) -> list[Check]:
    tokenizer, most = evidence.subject.tokenizer, config.max_megabytes
    is_open = tokenizer.kind == "open"
    settings = tokenizer.package.config.model_copy(update={"kind": tokenizer.kind})
    package = replace(tokenizer.package, config=settings)
    texts = _at_most(evidence.documents, TIMED_CHARACTERS)
    pieces = [piece for text in texts for piece in cut(to_bytes(escaped(text)), SHORT_BYTES)]
    alone = latencies(package, pieces[: TIMED_CHUNKS[is_open]])
    words, learned = Timed.of("words", WordTokenizer.train(texts)), Timed.learned("learned", package)
    times = speeds([words, learned], texts, repeats=1 if is_open else 5)
    rate = alone["open_ids_per_second" if is_open else "pinned_ids_per_second"]
    decode_ms = alone["open_id_milliseconds"] if is_open else 1000 / rate
    characters = sum(map(len, texts)) / max(times["learned"]["warm"], 1e-9)
    checks = [
        _most("encoding a chunk of 16 bytes, no cache", alone["chunk_milliseconds"], config.max_encode_ms, " ms"),
        _most("decoding an id, no cache", decode_ms, config.max_decode_ms, " ms"),
        _least("characters a second", characters, config.min_characters_per_second),
        _least("ids decoded a second", rate, config.min_ids_per_second),
        _most(
            "time over a word tokenizer's", ratios(times, "words")["learned"]["warm"], config.max_over_word_tokenizer
        ),
    ]
    if evidence.model is not None:
        checks.append(_most("on disk", disk_bytes(evidence.model) / 1e6, most, " MB"))
        memory = resident_bytes(evidence.model, tokenizer.kind)
        if memory is not None:
            checks.append(_most("in memory", memory / 1e6, most, " MB"))
    return checks


def _at_most(texts: Sequence[str], characters: int) -> list[str]:
    kept, left = [], characters
    for text in texts:
        if left <= 0:
            break
        kept.append(text[:left])
        left -= len(text)
    return kept
