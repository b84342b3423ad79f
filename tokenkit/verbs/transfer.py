"""`tokenkit transfer`: a model and another tokenizer in, a working model folder out, without training."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.export.huggingface import export_huggingface
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.transfer import INITIALIZERS, Initializer
from tokenkit.transfer.apply import TransferReport, transfer_model
from tokenkit.transfer.evidence import Evidence, Texts
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.plan import Side
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.shards import local_folder, open_checkpoint
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import DTYPES, ExportType, ModelChoice, load_pair


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
        given = {name: self.__dict__[name] for name in INITIALIZERS if self.__dict__.get(name) is not None}
        options = {name: {key: one.__dict__[key] for key in one.model_fields_set} for name, one in given.items()}
        return Choice(self.initializer, self.head_initializer, options, self.seed)

    def evidence(
        self,
        source: Tokenizer,
        target: Tokenizer,
        model: PreTrainedModel | None = None,
        documents: Callable[[], list[str]] | None = None,
    ) -> Evidence:
        """What initialisers may ask for; `documents` gives texts where the section names none."""
        needs = {need for side in ("input", "head") for need in INITIALIZERS[self.choice().of(side)].needs}
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
    model: ModelChoice
    target_tokenizer: TokenizerSpec
    """`NAME` or `NAME:target=KIND:conversion=...`, or these keys."""
    transfer: TransferOptions = TransferOptions()
    export_dtype: ExportType = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def transfer(run: TransferRun) -> dict[str, Any]:
    """Writes the transferred model to `output`; what was copied, averaged and guessed."""
    target = load_tokenizer(run.target_tokenizer)
    require_lossless(target, "the target of a transfer")
    model, source = load_pair(run.model, pick_device(run.device))
    require_lossless(source, "the source of a transfer")
    report = transferred(run.transfer, model, source, target)
    export_huggingface(model, target, run.output, dtype=DTYPES[run.export_dtype])
    return asdict(report)
