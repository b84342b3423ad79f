"""The audit of a model's rows, after a transfer or not: what is wrong with its embedding, its output matrix, its ids.

Rows are gone through in blocks, in whatever type they are stored, so that a large vocabulary needs no second copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenkit.align.doctor_facts import Number
from tokenkit.eval.audit_facts import Audit, AuditOptions, Part
from tokenkit.eval.audit_matrix import audit_matrix
from tokenkit.eval.audit_predictions import audit_predictions
from tokenkit.eval.audit_reference import audit_body, audit_drift, row_drift
from tokenkit.eval.audit_specials import audit_ids, audit_roles, audit_settings, audit_template
from tokenkit.eval.breaker_audit import Suspicion, Transferred, audit_breakers
from tokenkit.eval.contexts import find_contexts, hidden_at
from tokenkit.eval.row_facts import id_kinds, row_norms
from tokenkit.eval.row_predictions import predictions
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.rows import Rows
from tokenkit.transfer.shards import Checkpoint


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as an audit sees it. Without a `view` only its rows are looked at."""

    name: str
    tokenizer: Tokenizer
    input: Rows
    head: Rows | None
    """None where one matrix is both."""
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    checkpoint: Checkpoint | None = None
    view: ModelView | None = None

    @property
    def matrices(self) -> dict[str, tuple[Rows, Side]]:
        """Name, rows and side of each."""
        if self.head is None:
            return {"input and output": (self.input, "input")}
        return {"input": (self.input, "input"), "output": (self.head, "head")}

    @property
    def output(self) -> Rows:
        """The rows that logits are made of."""
        return self.input if self.head is None else self.head


@dataclass(frozen=True, eq=False)
class Reference:
    """The model before the transfer, and how its rows stand for the new ids."""

    subject: Subject
    plan: TransferPlan


def audit_rows(
    subject: Subject,
    documents: Sequence[str],
    *,
    options: AuditOptions | None = None,
    contexts: int = 2048,
    context_tokens: int = 256,
    reference: Reference | None = None,
    transferred: Transferred | None = None,
) -> Audit:
    """Everything that can be said of a model: of its matrices, its ids, what it predicts, what it was made of."""
    chosen = options or AuditOptions()
    rows = min(matrix.shape[0] for matrix, _ in subject.matrices.values())
    kinds = id_kinds(subject.tokenizer, rows)
    part = audit_ids(kinds, {name: matrix.shape[0] for name, (matrix, _) in subject.matrices.items()})
    part += audit_settings(subject.tokenizer, subject.output.shape[0], subject.config, subject.generation)
    part += audit_template(subject.tokenizer)
    for name, (matrix, _) in subject.matrices.items():
        whole = kinds if matrix.shape[0] == rows else id_kinds(subject.tokenizer, matrix.shape[0])
        part += audit_roles(name, row_norms(matrix), whole, chosen) + audit_matrix(name, matrix, whole, chosen)
    if subject.view is not None:
        part += _predicted(subject, documents, chosen, contexts, context_tokens)
    suspicion = Suspicion()
    if reference is not None:
        part += _against(subject, reference)
    if transferred is not None and subject.view is not None:
        suspicion = audit_breakers(
            subject.tokenizer, subject.view, subject.output, transferred, documents, chosen, contexts, context_tokens
        )
    facts: dict[str, Number] = {
        "rows": rows,
        "width": subject.input.shape[1],
        "matrices": len(subject.matrices),
        "tokens": int((kinds.ordinary | kinds.special).sum()),
    }
    return Audit(subject.name, facts, part + suspicion.part, suspicion.suspects, suspicion.override)


def _predicted(
    subject: Subject, documents: Sequence[str], options: AuditOptions, contexts: int, context_tokens: int
) -> Part:
    assert subject.view is not None
    found = find_contexts(subject.tokenizer, documents, subject.input.shape[0], count=contexts, length=context_tokens)
    hidden = hidden_at(subject.view, found)
    told = predictions(hidden, subject.output, subject.view.form(), found.labels, first=options.first)
    return audit_predictions(told, id_kinds(subject.tokenizer, subject.output.shape[0]), found, options)


def _against(subject: Subject, reference: Reference) -> Part:
    """Drift of kept rows on each side, and the body."""
    part = Part()
    before = reference.subject
    for name, (rows, side) in subject.matrices.items():
        old = before.input if side == "input" else before.output
        drift = row_drift(rows, old, reference.plan, side)
        part += audit_drift(name, drift, id_kinds(subject.tokenizer, rows.shape[0]), rows.dtype)
    if subject.checkpoint is not None and before.checkpoint is not None:
        part += audit_body(subject.checkpoint, before.checkpoint)
    return part
