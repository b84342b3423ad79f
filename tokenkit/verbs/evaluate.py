"""`tokenkit eval`: bits per byte of a model folder, comparable across tokenizers."""

from pathlib import Path
from typing import Any, Literal

from tokenkit.config import Config
from tokenkit.data.source import describe, read_documents
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.eval.builtin_tasks import HeldOut
from tokenkit.eval.harness import Evaluation
from tokenkit.models.factorised_view import view_of
from tokenkit.tokenizers.base import require_lossless
from tokenkit.train.folder import write_json
from tokenkit.verbs.benchmarks import benchmarks, check_evaluation
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair


class EvalRun(Config):
    """A run file of `tokenkit eval`."""

    model: ModelChoice
    teacher: ModelChoice | None = None
    """What it is compared with, by the tasks of `eval.harness`."""
    eval: Evaluation
    output: Path | None = None
    """Where the figures are written as JSON; standard output has them in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def evaluate(run: EvalRun) -> dict[str, Any]:
    """The figures of one model on one text."""
    documents = read_documents(run.eval.source)
    check_evaluation(run.eval)
    model, tokenizer = load_pair(run.model, pick_device(run.device), codes=True)
    require_lossless(tokenizer, "measured in bits per byte")
    found = bits_per_byte(view_of(model), tokenizer, documents, **HeldOut(documents, run.eval).options())
    figures: dict[str, Any] = {
        "model": run.model.source,
        "text": describe(run.eval.source),
        "bits_per_byte": found.value,
        "bytes": found.num_bytes,
        "tokens": found.num_tokens,
        "bytes_per_token": found.bytes_per_token,
    }
    if run.eval.harness is not None or run.eval.metrics:
        del model
        figures["benchmarks"] = benchmarks(run.eval, run.model, run.teacher, documents, device=run.device)
    if run.output:
        write_json(run.output, figures)
    return figures
