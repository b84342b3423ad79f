"""`tokenkit transfer`: a model and another tokenizer in, a working model folder out, without training."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.huggingface import export_huggingface, refuse_existing
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.own import require_kept
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.transfer import INITIALIZERS, Initializer
from tokenkit.transfer.apply import TransferReport, transfer_model
from tokenkit.transfer.evidence import Evidence, Texts
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.plan import RULES, Rule, Side
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.shards import Checkpoint, local_folder, open_checkpoint
from tokenkit.transfer.stream import Body, stream_transfer
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair, refuse_quantized, stored_format, whole_only
from tokenkit.verbs.transfer_streamed import (
    Writing,
    kept_template,
    stoppable,
    write_reversed,
    write_streamed,
    write_with_delta,
)

SIDES: tuple[Side, Side] = ("input", "head")


def _section(entry: Initializer) -> type[Config]:
    """The options of an initialiser, as a section of a run file."""
    fields: dict[str, Any] = {name: (p.annotation, p.default) for name, p in entry.options.items()}
    return create_model(f"{entry.name.title()}Options", __base__=Config, __doc__=entry.summary, **fields)


class TransferSection(Config):
    """How the rows of a new vocabulary are made."""

    initializer: str = "fvt"
    head_initializer: str | None = None
    """Of the output rows; null: the same. A model with one matrix for both takes `initializer`."""
    seed: int = 0
    pad_to_multiple_of: int = Field(1, ge=1)
    """Round the number of rows up; the added rows stand for no token."""
    untie: bool = False
    """Give the output head a matrix of its own where it shares the input embedding's."""
    rules: list[Rule] = list(RULES)
    """Numbers (`digits`) and runs of `white_space` get the mean of their pieces, whatever the initialiser makes of
    other tokens; [] leaves these to it too."""
    override: dict[str, str | int] = {}
    """Target token to source text, or source id: rows chosen by hand."""
    donor: str | None = None
    """A folder or hub id of a model with the target tokenizer, whose embeddings omp, clp and nearest go by."""
    texts: SourceConfig | None = None
    """What focus, wechsel, tokalign and token_distillation learn from; `tokenkit distill` takes its own text."""
    hypernet: Path | None = None
    """A folder of `tokenkit train-hypernet`."""

    def choice(self) -> Choice:
        """The initialisers and their options."""
        given = {name: self.__dict__[name] for name in SECTIONS if self.__dict__.get(name) is not None}
        options = {name: {key: one.__dict__[key] for key in one.model_fields_set} for name, one in given.items()}
        return Choice(self.initializer, self.head_initializer, options, self.seed, tuple(self.rules))

    def evidence(
        self,
        source: Tokenizer,
        target: Tokenizer,
        model: PreTrainedModel | None = None,
        documents: Callable[[], list[str]] | None = None,
    ) -> Evidence:
        """What initialisers may ask for; `documents` gives texts where the section names none."""
        needs = {need for side in SIDES for need in INITIALIZERS[self.choice().of(side)].needs}
        texts = None
        if "texts" in needs and self.texts is not None:
            texts = Texts(read_documents(self.texts))
        elif "texts" in needs and documents is not None:
            texts = Texts(documents())
        donor = donor_rows(self.donor, target) if self.donor is not None else {}
        return Evidence(source, target, donor, texts, model, self.hypernet)


SECTIONS: dict[str, Any] = {
    name: (_section(entry) | None, None) for name, entry in INITIALIZERS.items() if entry.options
}
TransferOptions = create_model("TransferOptions", __base__=TransferSection, __doc__=TransferSection.__doc__, **SECTIONS)


def donor_rows(donor: str, target: Tokenizer) -> dict[Side, Rows]:
    """The matrices of a donor model; UserError where its tokenizer is not the target."""
    folder = local_folder(donor)
    own = load_tokenizer(str(folder))
    if own.token_bytes != target.token_bytes:
        raise UserError(
            f"transfer.donor: {donor} has another tokenizer than {target.name}, and its rows are of other tokens; "
            "take a model with the target tokenizer"
        )
    checkpoint = open_checkpoint(folder)
    tables = checkpoint.tables
    return {"input": checkpoint.rows(tables.input), "head": checkpoint.rows(tables.head or tables.input)}


def transferred(
    options: TransferSection,
    model: PreTrainedModel,
    source: Tokenizer,
    target: Tokenizer,
    documents: Callable[[], list[str]] | None = None,
) -> TransferReport:
    """Gives a model in memory the rows of another tokenizer, as a run file says."""
    return transfer_model(
        model,
        source,
        target,
        options.choice(),
        evidence=options.evidence(source, target, model, documents),
        override=options.override,
        pad_to_multiple_of=options.pad_to_multiple_of,
        untie=options.untie,
    )


class TransferRun(Config):
    """A run file of `tokenkit transfer`."""

    output: Path
    """A new folder."""
    model: ModelChoice
    target_tokenizer: TokenizerSpec | None = None
    """`NAME` or `NAME:target=KIND:conversion=...`, or these keys; null where `model.delta` or `reverse` says which."""
    transfer: TransferOptions = TransferOptions()
    reverse: bool = False
    """Give the model the tokenizer back that it had before a transfer with `keep_reverse`."""
    reverse_from: Path | None = None
    """The folder that the transfer wrote, where the model was trained since and stands in another."""
    delta: bool = False
    """Write new rows and tokenizer only: a folder for `model.delta`, beside the same base."""
    keep_reverse: bool = False
    """Keep inside the model what `reverse` needs: the rows of the old tokenizer that the new one does not have."""
    rows: bool = True
    """Write a table of what every row was made of."""
    body: Body = "copy"
    """Files without embeddings are copied, or linked to: hardlink takes no space, on one file system."""
    in_memory: bool | None = None
    """Load the whole model; null: only where that is needed, else the weights go from file to file."""
    export_dtype: ExportType | None = None
    """Number format of the weights; null: as they are stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def transfer(run: TransferRun) -> dict[str, Any]:
    """Writes the transferred model, or its delta, to `output`; what was copied, averaged and guessed."""
    refuse_existing(run.output)
    refuse_quantized(run.model)
    with stoppable():
        if run.reverse or (run.target_tokenizer is None and run.model.delta is not None):
            return _known_rows(run)
        if run.target_tokenizer is None:
            raise UserError("target_tokenizer: nothing; write the tokenizer that the model is to have")
        target = load_tokenizer(run.target_tokenizer)
        require_lossless(target, "the target of a transfer")
        require_kept(target, load_tokenizer)
        checkpoint, why = _streamable(run)
        if checkpoint is None:
            return _in_memory(run, target, why)
        return _streamed(run, checkpoint, target)


def reverse_words(words: list[str]) -> list[str]:
    """The words of `tokenkit transfer --reverse MODEL OUTPUT KEY=VALUE ...` as a run file's keys."""
    plain = [word for word in words if "=" not in word]
    if len(plain) not in (0, 2):
        raise UserError(f"--reverse: {len(plain)} words without =; write MODEL OUTPUT: what to read, a new folder")
    keys = [f"{key}={word}" for key, word in zip(("model.source", "output"), plain)]
    return [*keys, *(word for word in words if "=" in word), "reverse=true"]


def _known_rows(run: TransferRun) -> dict[str, Any]:
    """A delta put on its base, or the way back."""
    if run.reverse and (run.target_tokenizer is not None or run.model.delta is not None):
        raise UserError("reverse: the model says itself which tokenizer it had; leave target_tokenizer and delta out")
    if run.delta or run.keep_reverse or run.in_memory or run.export_dtype or run.model.adapter:
        raise UserError(
            "transfer: rows that are known already are written as they are; leave delta, keep_reverse, in_memory, "
            "export_dtype and model.adapter out"
        )
    checkpoint = open_checkpoint(local_folder(run.model.source, run.model.revision))
    source = load_tokenizer(run.model.tokenizer or TokenizerSpec(name=str(checkpoint.folder)))
    if run.model.delta is not None:
        return write_with_delta(checkpoint, source, run.model.delta, run.output, run.body)
    return write_reversed(checkpoint, source, run.reverse_from or checkpoint.folder, run.output, run.body)


def _streamable(run: TransferRun) -> tuple[Checkpoint | None, str]:
    """The checkpoint where its weights can go from file to file, else why they cannot."""
    checkpoint = None
    why = "in_memory=true" if run.in_memory is True else whole_only(run.model)
    if why is None:
        checkpoint = open_checkpoint(local_folder(run.model.source, run.model.revision))
        stored = checkpoint.rows(checkpoint.tables.input).dtype
        if run.export_dtype is not None and DTYPES[run.export_dtype] != stored:
            why = f"export_dtype={run.export_dtype}"
    if why is not None and run.in_memory is False:
        raise UserError(f"in_memory: false, and {why} needs the whole model; leave one of them out")
    return (checkpoint, "") if why is None else (None, why)


def _streamed(run: TransferRun, checkpoint: Checkpoint, target: Tokenizer) -> dict[str, Any]:
    options = run.transfer
    needs = {need for side in SIDES for need in INITIALIZERS[options.choice().of(side)].needs}
    live = None
    if "model" in needs and run.in_memory is None:
        live, source = load_pair(run.model, pick_device(run.device))  # to learn from; its weights are still streamed
    else:
        source = load_tokenizer(run.model.tokenizer or TokenizerSpec(name=str(checkpoint.folder)))
    require_lossless(source, "the source of a transfer")
    made = stream_transfer(
        checkpoint,
        source,
        target,
        options.choice(),
        evidence=options.evidence(source, target, live),
        override=options.override,
        pad_to_multiple_of=options.pad_to_multiple_of,
        untie=options.untie,
    )
    writing = Writing(run.body, run.delta, run.keep_reverse, run.rows)
    return write_streamed(made, source, target, run.output, writing)


def _in_memory(run: TransferRun, target: Tokenizer, why: str) -> dict[str, Any]:
    if run.delta or run.keep_reverse:
        key = "delta" if run.delta else "keep_reverse"
        raise UserError(f"{key}: true, and {why} needs the whole model in memory, which keeps no files to go by")
    model, source = load_pair(run.model, pick_device(run.device))
    require_lossless(source, "the source of a transfer")
    report = transferred(run.transfer, model, source, target)
    template = kept_template(source, target)
    files = {} if template is None else {"chat_template.jinja": template}
    dtype = DTYPES[run.export_dtype or stored_format(run.model)]
    export_huggingface(model, target, run.output, dtype=dtype, extra_files=files)
    return asdict(report)
