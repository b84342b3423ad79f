"""`tokenkit vocabulary prune`: fewer tokens, by use, script or list, and the model without their rows."""

import difflib
import json
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from numpy import ndarray
from pydantic import Field, field_validator

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.surgery.library import count_ids
from tokenkit.tokenizers.surgery.prune import By, prune
from tokenkit.tokenizers.surgery.reachable import reachability
from tokenkit.verbs.transfer import TransferSection
from tokenkit.verbs.vocabulary.changed import VocabularyRun, left_over, measured, script_counts, scripts_of, write


class VocabularyPruneRun(VocabularyRun):
    """A run file of `tokenkit vocabulary prune`."""

    texts: SourceConfig | None = None
    """What the tokenizer is to be good at: it says how often every token occurs."""
    size: int | None = Field(None, ge=1)
    """Ids that are left, special tokens and bytes included; null: only what scripts, keep and reachability say."""
    by: By = "leaf_frequency"
    """leaf_frequency: the rarest token that no kept one is made with; frequency; last: the largest id of those."""
    scripts: list[str] | None = None
    """Tokens with letters of other scripts go: Latin, Cyrillic, Han, ...; digits, signs and white space stay."""
    keep: Path | None = None
    """A JSON list of token texts and ids: only these stay, and what they are made of."""
    keep_used: int = Field(1, ge=0)
    """Tokens that occur so often in `texts` stay, whatever their script and outside `keep`; 0: none for that reason."""
    keep_unreachable: bool = False
    """Let tokens stay that no text becomes."""
    keep_ids: bool = False
    """Leave holes where tokens were: ids stay as they are, and the old model can be used without them."""
    pad_to_multiple_of: int = Field(1, ge=1)
    """Round the number of the model's rows up."""

    @field_validator("scripts")
    @classmethod
    def _named(cls, scripts: list[str] | None) -> list[str] | None:
        return None if scripts is None else [name.strip().title() for name in scripts]


def prune_vocabulary(run: VocabularyPruneRun) -> dict[str, Any]:
    """Writes the tokenizer, or the model with it, and `vocabulary.json`: the figures, and old id → new id."""
    source = run.subject()
    counts = None
    if run.texts is not None:
        counts = count_ids(source.definition, read_documents(run.texts), source.vocab_size)
    before = reachability(source)
    unwanted = unwanted_ids(run, source, counts)
    if not run.keep_unreachable:
        unwanted |= set(before.unreachable.tolist())
    found = prune(source, size=run.size, by=run.by, counts=counts, unwanted=unwanted, keep_ids=run.keep_ids)
    target = found.tokenizer
    report: dict[str, Any] = {
        "tokenizer": source.name,
        "texts": None if run.texts is None else describe(run.texts),
        "ids": {"before": source.vocab_size, "after": target.vocab_size},
        "gone": len(found.gone),
        "scripts_gone": script_counts([source.token_bytes[i] for i in found.gone]),
        "unreachable": left_over(before, reachability(target)),
        **measured(run, run.texts, source, target),
    }
    mapping = {"mapping": {str(old): new for old, new in sorted(found.mapping.items())}}
    options = TransferSection(pad_to_multiple_of=run.pad_to_multiple_of)
    return write(run, source, target, found.kept, options, report, mapping)


def unwanted_ids(run: VocabularyPruneRun, source: HFTokenizer, counts: Int64[ndarray, "V"] | None) -> set[int]:
    """What scripts and list take away, and no text has use for."""
    found: set[int] = set()
    if run.scripts is not None:
        found |= _foreign(source, run.scripts)
    if run.keep is not None:
        found |= {*range(source.vocab_size)} - _listed(source, run.keep)
    if counts is not None and run.keep_used:
        found -= set((counts >= run.keep_used).nonzero()[0].tolist())
    return found


def _foreign(source: HFTokenizer, scripts: list[str]) -> set[int]:
    """Tokens with a letter of another script, and parts of characters, which stay where others need them."""
    wanted, known, found = {*scripts}, set(), set()
    for i, spelling in enumerate(source.token_bytes):
        try:
            own = scripts_of(spelling.decode())
        except UnicodeDecodeError:
            found.add(i)
            continue
        known |= own
        if own - wanted:
            found.add(i)
    for name in scripts:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1) or sorted(known)[:8]
            raise UserError(f"scripts: {name!r} is the script of no token of {source.name}; write {', '.join(close)}")
    return found


def _listed(source: HFTokenizer, path: Path) -> set[int]:
    """The ids that a list names."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"keep: {path}: cannot be read ({error.strerror}); write a file with a JSON list") from None
    except ValueError as error:
        raise UserError(f"keep: {path}: not JSON ({error}); write a list of token texts and ids") from None
    if not isinstance(values, list) or not all(type(value) in (str, int) for value in values):
        raise UserError(f"keep: {path}: holds something else than texts and ids; write a JSON list of them")
    by_bytes: dict[bytes, list[int]] = {}
    for i, spelling in enumerate(source.token_bytes):
        by_bytes.setdefault(spelling, []).append(i)
    found: set[int] = set()
    for value in values:
        ids = [value] if isinstance(value, int) else by_bytes.get(value.encode(), []) if value else []
        if not ids or not 0 <= ids[0] < source.vocab_size:
            raise UserError(f"keep: {path}: {value!r} is no token of {source.name}; take it out")
        found.update(ids)
    return found
