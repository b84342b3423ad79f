"""What `extend` and `prune` share: the tokenizer that is changed, the model that goes along, the figures."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from tokenkit.align.doctor_vocabulary import DIGITS, PARTIAL, SPACE, SYMBOLS, script_of
from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.export.huggingface import drafted, export_huggingface, refuse_existing
from tokenkit.models.load import input_matrix
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.tokenizers.surgery.bpe import require_plain
from tokenkit.tokenizers.surgery.library import count_ids
from tokenkit.tokenizers.surgery.reachable import Reachability
from tokenkit.tokenizers.whole_file import write_whole
from tokenkit.transfer import INITIALIZERS
from tokenkit.transfer.apply import TransferReport, transfer_model
from tokenkit.transfer.shards import Checkpoint, local_folder, open_checkpoint
from tokenkit.transfer.stream import stream_transfer
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ModelChoice, load_pair, stored_format, whole_only
from tokenkit.verbs.transfer import SIDES, TransferSection
from tokenkit.verbs.transfer_streamed import Writing, stoppable, write_streamed

REPORT = "vocabulary.json"
Figures = dict[str, Any]
Device = Literal["auto", "cpu", "cuda"]


class VocabularyRun(Config):
    """What a change of a vocabulary is told whichever way it goes."""

    output: Path
    """A new folder."""
    tokenizer: TokenizerSpec | None = None
    """What is changed; by default the tokenizer of the model."""
    model: ModelChoice | None = None
    """Write this model too, with the rows of the tokens that stay bit for bit; null: a tokenizer only."""
    held_out: SourceConfig | None = None
    """Text on which bytes per token are measured; by default `texts`."""
    device: Device = "auto"

    def subject(self) -> HFTokenizer:
        """The tokenizer that is changed; UserError where none is named, or one of another kind."""
        refuse_existing(self.output)
        if self.model is None:
            if self.tokenizer is None:
                raise UserError("tokenizer: missing; write tokenizer=FOLDER, or model.source=FOLDER for both")
            return require_plain(load_tokenizer(self.tokenizer), "a change of the vocabulary")
        if self.tokenizer is not None:
            raise UserError("tokenizer: the model's own is changed; write model.tokenizer where that lies elsewhere")
        for key in ("adapter", "delta"):
            if self.model.__dict__[key] is not None:
                raise UserError(f"model.{key}: the vocabulary of a whole model is changed; write that model first")
        spec = self.model.tokenizer or TokenizerSpec(name=self.model.source, revision=self.model.revision)
        return require_plain(load_tokenizer(spec), "a change of the vocabulary")


def bytes_per_token(before: HFTokenizer, after: HFTokenizer, texts: list[str], name: str) -> Figures:
    """Of the same texts under both tokenizers, without special tokens."""
    total = sum(len(text.encode()) for text in texts)
    counts = {
        when: int(count_ids(one.definition, texts, one.vocab_size).sum())
        for when, one in {"before": before, "after": after}.items()
    }
    return {"text": name, **{when: round(total / max(1, count), 4) for when, count in counts.items()}}


def measured(run: VocabularyRun, texts: SourceConfig | None, before: HFTokenizer, after: HFTokenizer) -> Figures:
    """Bytes per token on the held-out text, or on the other; nothing where there is none."""
    source = run.held_out or texts
    if source is None:
        return {}
    return {"bytes_per_token": bytes_per_token(before, after, read_documents(source), describe(source))}


def scripts_of(text: str) -> set[str]:
    """The scripts of all letters."""
    return set(map(script_of, text)) - {DIGITS, SPACE, SYMBOLS}


def script_counts(spelling: list[bytes]) -> dict[str, int]:
    """Tokens per script of their first letter, most first."""
    texts = (one.decode(errors="replace") for one in spelling)
    return dict(Counter(PARTIAL if "\ufffd" in text else script_of(text) for text in texts).most_common())


def left_over(before: Reachability, after: Reachability) -> dict[str, int]:
    """How many ordinary tokens no text became, and becomes."""
    return {"before": len(before.unreachable), "after": len(after.unreachable)}


def write(
    run: VocabularyRun,
    source: HFTokenizer,
    target: HFTokenizer,
    kept: Mapping[int, int],
    options: TransferSection,
    report: Figures,
    mapping: Figures,
    documents: Callable[[], list[str]] | None = None,
) -> Figures:
    """Writes the tokenizer, or the model with it, and `vocabulary.json` beside; the report with figures of the model.

    `documents` gives texts to initialisers that learn from some.
    """
    if run.model is None:
        with drafted(run.output) as draft:
            target.save(draft)
            _check_written(draft, target)
            write_whole(draft / REPORT, _text(report | mapping))
        return report
    with stoppable():
        checkpoint = _streamable(run.model, options)
        if checkpoint is None:
            moved, width = _in_memory(run, source, target, kept, options, documents)
        else:
            evidence = options.evidence(source, target, None, documents)
            made = stream_transfer(
                checkpoint, source, target, options.choice(), evidence=evidence, override=options.override, kept=kept,
                pad_to_multiple_of=options.pad_to_multiple_of, untie=options.untie,
            )  # fmt: skip
            write_streamed(made, source, target, run.output, Writing(rows=False))
            moved, width = made[2], checkpoint.rows(checkpoint.tables.input).shape[1]
    report = {**report, "embedding_parameters": _parameters(moved, width, options.untie), "rows": moved.origins}
    write_whole(run.output / REPORT, _text(report | mapping))
    return report


def _text(values: Figures) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()


def _check_written(folder: Path, tokenizer: HFTokenizer) -> None:
    if load_tokenizer(str(folder)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder}: the tokenizer read back is not the one that was written; see to the disk")


def _parameters(moved: TransferReport, width: int, untied: bool) -> dict[str, int]:
    """Of input and output matrix together."""
    after = 1 if moved.tied else 2
    before = 1 if moved.tied or untied else 2
    return {"before": before * moved.source_rows * width, "after": after * moved.rows * width}


def _streamable(choice: ModelChoice, options: TransferSection) -> Checkpoint | None:
    """The checkpoint, where its weights can go from file to file."""
    needs = {need for side in SIDES for need in INITIALIZERS[options.choice().of(side)].needs}
    if whole_only(choice) is not None or "model" in needs:
        return None
    return open_checkpoint(local_folder(choice.source, choice.revision))


def _in_memory(
    run: VocabularyRun,
    source: HFTokenizer,
    target: HFTokenizer,
    kept: Mapping[int, int],
    options: TransferSection,
    documents: Callable[[], list[str]] | None,
) -> tuple[TransferReport, int]:
    assert run.model is not None
    model, _ = load_pair(run.model, pick_device(run.device))
    report = transfer_model(
        model, source, target, options.choice(), evidence=options.evidence(source, target, model, documents),
        override=options.override, kept=kept, pad_to_multiple_of=options.pad_to_multiple_of, untie=options.untie,
    )  # fmt: skip
    export_huggingface(model, target, run.output, dtype=DTYPES[stored_format(run.model)])
    return report, input_matrix(model).shape[1]
