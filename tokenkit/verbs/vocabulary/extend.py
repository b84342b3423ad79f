"""`tokenkit vocabulary extend`: further tokens by continued BPE, and the model that has rows for them."""

from typing import Any

from pydantic import Field

from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.tokenizers.base import require_lossless
from tokenkit.tokenizers.surgery.extend import LONGEST, extend
from tokenkit.tokenizers.surgery.reachable import reachability
from tokenkit.verbs.transfer import TransferOptions
from tokenkit.verbs.vocabulary.changed import VocabularyRun, left_over, measured, script_counts, write


class VocabularyExtendRun(VocabularyRun):
    """A run file of `tokenkit vocabulary extend`."""

    texts: SourceConfig
    """What the new tokens are to spell; training text, never what is evaluated on."""
    tokens: int = Field(1000, ge=1)
    """New tokens at most."""
    min_count: int = Field(2, ge=1)
    """A pair must occur so often to become a token."""
    coverage: float = Field(0.9995, ge=0, le=1)
    """Share of the characters that shall be tokens, in vocabularies that spell others in bytes."""
    longest: int = Field(LONGEST, ge=2)
    """Characters of a new token at most; bytes, where the vocabulary is written in bytes."""
    transfer: TransferOptions = TransferOptions()
    """How the rows of the new tokens are made."""


def extend_vocabulary(run: VocabularyExtendRun) -> dict[str, Any]:
    """Writes the tokenizer, or the model with it, and `vocabulary.json`: the figures, and the new tokens by id."""
    source = run.subject()
    if run.model is not None:
        require_lossless(source, "given further rows")
    texts = read_documents(run.texts)
    limits = {"min_count": run.min_count, "coverage": run.coverage, "longest": run.longest}
    found = extend(source, texts, run.tokens, **limits)
    target = found.tokenizer
    spelling = [target.token_bytes[i] for i in found.new]
    report: dict[str, Any] = {
        "tokenizer": source.name,
        "texts": describe(run.texts),
        "ids": {"before": source.vocab_size, "after": target.vocab_size},
        "new": len(found.new),
        "characters": found.characters,
        "revived": len(found.revived),
        "scripts": script_counts(spelling),
        "unreachable": left_over(reachability(source), reachability(target)),
        **measured(run, run.texts, source, target),
    }
    tokens = {str(i): one.decode(errors="replace") for i, one in zip(found.new, spelling, strict=True)}
    mapping = {"tokens": tokens, "revived_ids": found.revived}
    return write(run, source, target, found.kept, run.transfer, report, mapping, lambda: texts)
