"""`tokenkit audit`: what is wrong with a model's rows and ids, of any model folder; after a transfer, what it did."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tokenkit.align.doctor_texts import PROBES
from tokenkit.config import Config, UserError, load
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.audit_facts import Audit, AuditOptions
from tokenkit.eval.breaker_audit import Transferred
from tokenkit.eval.row_audit import Reference, Subject, audit_rows
from tokenkit.models.load import BASE, EXPANSION, head_matrix, input_matrix
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import require_lossless
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.folder import write_json
from tokenkit.transfer.mixture import pieces_mixture
from tokenkit.transfer.plan import Side, TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.shards import Checkpoint, local_folder, open_checkpoint
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.transfer import TransferOptions


class AuditRun(Config):
    """A run file of `tokenkit audit`."""

    model: ModelChoice
    """A folder or hub id, or these keys."""
    reference: ModelChoice | None = None
    """The model before the transfer: then kept rows and the body are held against it."""
    transfer: TransferOptions | None = None
    """The `transfer:` section of the run that made the model: then its new rows are searched for planted ones."""
    text: SourceConfig | None = None
    """Held-out text; null: short built-in texts in fifteen languages, code and numbers."""
    contexts: int = Field(2048, ge=1)
    """Places in the text at which the model is asked what follows."""
    context_tokens: int = Field(256, ge=2)
    """Tokens of a window of the text."""
    weights_only: bool = False
    """Read the rows from the files, a block at a time, and do not run the model."""
    options: AuditOptions = AuditOptions()
    output: Path | None = None
    """A JSON file of everything that was found."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("model", "reference", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> "AuditRun":
        if self.transfer is not None and self.reference is None:
            raise UserError("transfer: new rows are made again of the model before; write reference=FOLDER")
        if self.transfer is not None and self.weights_only:
            raise UserError("weights_only: the search for planted tokens runs the model; leave out one of them")
        if self.output is not None and self.output.exists():
            raise UserError(f"output: {self.output} is there already; name another file")
        return self


def load_audit(words: list[str]) -> AuditRun:
    """A run of `MODEL KEY=VALUE ...`, or of a run file and overrides."""
    named = [f"model.source={word}" if _names_model(word) else word for word in words]
    return load(AuditRun, named)


def _names_model(word: str) -> bool:
    return "=" not in word and not word.endswith((".yaml", ".yml"))


def audit(run: AuditRun) -> Audit:
    """What was found of the model."""
    subject = _subject(run.model, run)
    documents = [*PROBES.values()] if run.text is None else read_documents(run.text)
    reference = transferred = None
    if run.reference is not None:
        before = _subject(run.reference, run)
        require_lossless(before.tokenizer, "the source of a transfer")
        override = {} if run.transfer is None else run.transfer.override
        rows = min(before.input.shape[0], before.output.shape[0])
        plan = plan_transfer(before.tokenizer, subject.tokenizer, source_rows=rows, override=override)
        reference = Reference(before, plan)
        if run.transfer is not None:
            transferred = _transferred(run, run.transfer, subject, before, plan)
    found = audit_rows(
        subject,
        documents,
        options=run.options,
        contexts=run.contexts,
        context_tokens=run.context_tokens,
        reference=reference,
        transferred=transferred,
    )
    if run.output is not None:
        run.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(run.output, found.as_json())
    return found


def _subject(choice: ModelChoice, run: AuditRun) -> Subject:
    checkpoint = _checkpoint(choice)
    if run.weights_only:
        if checkpoint is None:
            raise UserError("weights_only: rows with an adapter are not in the files; leave out model.adapter")
        tokenizer = load_tokenizer(choice.tokenizer or str(checkpoint.folder))
        tables = checkpoint.tables
        head = None if tables.head is None else checkpoint.rows(tables.head)
        rows, view = checkpoint.rows(tables.input), None
    else:
        model, tokenizer = load_pair(choice, pick_device(run.device))
        embedding, output = input_matrix(model), head_matrix(model)
        rows, view = TensorRows(embedding.detach()), ModelView(model)
        head = None if output is embedding else TensorRows(output.detach())
    folder = local_folder(choice.source, choice.revision) if checkpoint is None else checkpoint.folder
    settings = [_settings(folder / name) for name in ("config.json", "generation_config.json")]
    return Subject(choice.source, tokenizer, rows, head, settings[0] or {}, settings[1], checkpoint, view)


def _checkpoint(choice: ModelChoice) -> Checkpoint | None:
    """The files of a model; None with an adapter, whose rows and body are in no file."""
    if choice.adapter is not None:
        return None
    folder = local_folder(choice.source, choice.revision)
    return open_checkpoint(folder / BASE if (folder / EXPANSION).is_file() else folder)


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    return found if isinstance(found, dict) else None


def _transferred(
    run: AuditRun, options: TransferOptions, subject: Subject, before: Subject, plan: TransferPlan
) -> Transferred:
    """The output rows made again, and the donor, if there is one."""
    side: Side = "input" if subject.head is None else "head"
    source = before.input if side == "input" else before.output
    assert before.view is not None
    evidence = options.evidence(before.tokenizer, subject.tokenizer, before.view.model)
    maker = options.choice().maker(side, source, plan, evidence)
    donor = None
    if options.donor is not None:
        donor = ModelView(load_pair(ModelChoice(source=options.donor), pick_device(run.device))[0])
    return Transferred(plan, maker, pieces_mixture(source, plan, side, seed=options.seed), donor)
