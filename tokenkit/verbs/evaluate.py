"""`tokenkit eval`: bits per byte of a model folder, how its tokenizer cuts the text, and tasks; before and after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator
from rich.table import Table

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.eval.builtin_tasks import HeldOut
from tokenkit.eval.harness import Evaluation
from tokenkit.eval.tokenizer_use import tokenizer_use
from tokenkit.models.factorised_view import view_of
from tokenkit.report.card_facts import figure, retention
from tokenkit.tokenizers.base import require_lossless
from tokenkit.train.folder import write_json
from tokenkit.verbs.benchmarks import benchmarks, check_evaluation
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair

SHOWN = (
    "bits_per_byte",
    "bytes",
    "tokens",
    "bytes_per_token",
    "tokens_per_word",
    "byte_fallback",
    "ids_used",
    "vocabulary_used",
)


class ModelEvaluation(Evaluation):
    """What `tokenkit eval` measures."""

    source: SourceConfig | None = None  # pyrefly: ignore [bad-override] (of a finished model tasks may be enough)
    """Held-out text for bits per byte, the tokenizer's figures and built-in tasks; null: tasks bring theirs."""

    @model_validator(mode="after")
    def _something(self) -> "ModelEvaluation":
        if self.source is not None:
            return self
        if self.harness is None:
            raise UserError("eval.source: missing; write {path: FILE}, or eval.harness with tasks of lm-eval")
        needy = [task for task in self.harness.jobs().get("builtin", []) if task != "cloze"]
        if needy or self.metrics:
            raise UserError(
                f"eval.source: missing, and {needy[0] if needy else 'eval.metrics'} needs it; write {{path: FILE}}"
            )
        return self


class EvalRun(Config):
    """A run file of `tokenkit eval`."""

    model: ModelChoice
    before: ModelChoice | None = None
    """What the model was before its tokenizer was changed: the same figures stand beside."""
    teacher: ModelChoice | None = None
    """What it is compared with, by the tasks of `eval.harness`."""
    eval: ModelEvaluation
    output: Path | None = None
    """Where the figures are written as JSON; standard output has them in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def evaluate(run: EvalRun) -> dict[str, Any]:
    """The figures of one model, and of what it was before."""
    check_evaluation(run.eval)
    documents = [] if run.eval.source is None else read_documents(run.eval.source)
    figures: dict[str, Any] = {"model": run.model.source}
    if run.eval.source is not None:
        figures["text"] = describe(run.eval.source)
        figures |= _on_text(run, run.model, documents)
        if run.before is not None:
            figures["before"] = {"model": run.before.source, **_on_text(run, run.before, documents)}
    if run.eval.harness is not None or run.eval.metrics:
        options = {"device": run.device, "before": run.before}
        figures["benchmarks"] = benchmarks(run.eval, run.model, run.teacher, documents, **options)
    if run.output:
        write_json(run.output, figures)
    return figures


def _on_text(run: EvalRun, choice: ModelChoice, documents: list[str]) -> dict[str, Any]:
    """Bits per byte, and how the text is cut."""
    model, tokenizer = load_pair(choice, pick_device(run.device), codes=True)
    require_lossless(tokenizer, "measured in bits per byte")
    found = bits_per_byte(view_of(model), tokenizer, documents, **HeldOut(documents, run.eval).options())
    return {
        "bits_per_byte": found.value,
        "bytes": found.num_bytes,
        "tokens": found.num_tokens,
        "bytes_per_token": found.bytes_per_token,
        **tokenizer_use(tokenizer, documents).figures(),
    }


def before_after_table(figures: Mapping[str, Any]) -> Table:
    """Both models on the held-out text, for a terminal."""
    table = Table(title="before and after")
    for column in ("", "before", "after", "kept"):
        table.add_column(column, justify="right" if column else "left")
    for name in SHOWN:
        before, after = figures["before"][name], figures[name]
        kept = retention(after, before, "min") if name == "bits_per_byte" else ""
        whole = isinstance(before, int)
        cells = (f"{before:,}", f"{after:,}") if whole else (figure(before), figure(after))
        table.add_row(name.replace("_", " "), *cells, kept)
    return table
