"""What to expect of a pair of tokenizers before any hour is spent on it: facts, and findings made of them."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from tokenkit.align.doctor_advice import advise
from tokenkit.align.doctor_facts import Facts, Finding, ModelFacts, Side
from tokenkit.align.doctor_findings import examine
from tokenkit.align.doctor_measure import known_tokens, measure, total
from tokenkit.align.doctor_schemes import profile
from tokenkit.align.doctor_texts import BUILT_IN, PROBES
from tokenkit.align.doctor_vocabulary import coverage, entries
from tokenkit.tokenizers.base import Tokenizer


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The facts about a pair, and what follows from them, in the order of a reader's questions."""

    facts: Facts
    findings: tuple[Finding, ...]

    def finding(self, topic: str) -> Finding:
        """The finding of one topic."""
        return next(finding for finding in self.findings if finding.topic == topic)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"findings": [asdict(finding) for finding in self.findings], **asdict(self.facts)}


def diagnose(
    source: Tokenizer,
    target: Tokenizer,
    *,
    corpus: Sequence[str] | None = None,
    model: ModelFacts | None = None,
    initializers: Collection[str] = (),
    losses: Collection[str] = (),
) -> Diagnosis:
    """What moving a model from `source` to `target` meets; the names are those that may be recommended."""
    known = known_tokens(source, target)
    probes = tuple(measure(source, target, known, name, [text]) for name, text in PROBES.items())
    facts = Facts(
        source=_side(source),
        target=_side(target),
        same=source.vocab_size == target.vocab_size and source.fingerprint == target.fingerprint,
        scripts=coverage(source, target),
        probes=probes,
        all_probes=total(BUILT_IN, [probe for probe in probes if probe.whole]),
        corpus=None if corpus is None else measure(source, target, known, "the corpus", corpus),
        model=model,
    )
    return Diagnosis(facts, (*examine(facts), *advise(facts, initializers, losses)))


def short_name(tokenizer: Tokenizer) -> str:
    """The last part of a tokenizer's folder or hub id."""
    path = PurePath(tokenizer.name)
    return path.parent.name if path.name.startswith("tokenizer.json") and path.parent.name else path.name


def _side(tokenizer: Tokenizer) -> Side:
    literals = {index: literal for literal, index in tokenizer.special_tokens.items()}
    begin, end, pad = (
        None if index is None else literals.get(index, str(index))
        for index in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    )
    return Side(short_name(tokenizer), begin, end, pad, entries(tokenizer), profile(tokenizer))
