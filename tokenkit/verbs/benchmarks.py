"""What a finished folder and its teacher are measured on: tasks of `eval.harness`, functions of `eval.metrics`."""

import gc
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from tokenkit.config import UserError, digest, resolved
from tokenkit.eval.builtin_tasks import BuiltinBackend, HeldOut, OwnBackend, read_questions
from tokenkit.eval.harness import Backend, EvalRow, Evaluation, HarnessConfig, Subject, benchmark, over_tasks
from tokenkit.eval.lm_eval_backends import LmEvalBackend, release
from tokenkit.eval.metrics import load_metrics
from tokenkit.models.factorised_view import FACTORISED, view_of
from tokenkit.models.load import BASE, EXPANSION
from tokenkit.models.mixture import MixtureView
from tokenkit.models.view import ModelView
from tokenkit.report.card_facts import figure, retention
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.record import teacher_identity
from tokenkit.verbs.sides import Sides

KEPT = "benchmarks"
logger = logging.getLogger(__name__)


def check_evaluation(evaluation: Evaluation) -> None:
    """UserError, before anything is trained, for a function or a file of questions that cannot be read. Runs the user's
    files."""
    load_metrics(evaluation.metrics)
    if evaluation.harness is not None and evaluation.harness.cloze is not None:
        read_questions(evaluation.harness.cloze)


def benchmarked(run: DistillRun, sides: Sides, held_out: list[str]) -> dict[str, Any]:
    """The figures of the exported folder and of the teacher; empty where none are asked for.

    What the training held in memory is given back first: nothing of `sides` can be used afterwards.
    """
    if run.eval.harness is None and not run.eval.metrics:
        return {}
    _free(sides)
    student = ModelChoice(source=str(run.output / "model"))
    found = benchmarks(
        run.eval, student, _teacher(run), held_out, device=run.train.device, cache=run.output / KEPT, codes=True
    )
    return {"benchmarks": found}


def benchmarks(
    evaluation: Evaluation,
    student: ModelChoice,
    teacher: ModelChoice | None,
    documents: list[str],
    *,
    device: Literal["auto", "cpu", "cuda"],
    cache: Path | None = None,
    codes: bool = True,
) -> dict[str, Any]:
    """Rows of the student and of the teacher, and how good the one is beside the other over all tasks."""
    place, harness = pick_device(device), evaluation.harness
    own, other = subject_of(student), None if teacher is None else subject_of(teacher)
    choices = {own: student} if other is None or teacher is None else {own: student, other: teacher}

    def load(subject: Subject) -> tuple[ModelView, Tokenizer]:
        model, tokenizer = load_pair(choices[subject], place, codes=codes)
        return view_of(model.eval()), tokenizer

    held_out = HeldOut(documents, evaluation)
    jobs: list[tuple[Backend, Sequence[str], dict[str, Any]]] = []
    if harness is not None:
        options = {"limit": harness.limit, "num_fewshot": harness.num_fewshot}
        jobs.append((_backend(harness, load, held_out, other, place), harness.tasks, options))
    if evaluation.metrics:
        metrics = OwnBackend(load, held_out, load_metrics(evaluation.metrics))
        jobs.append((metrics, [*metrics.metrics], {"limit": None, "num_fewshot": None}))
    kept = harness.cache if harness is not None and harness.cache is not None else cache
    rows = [row for job in jobs for row in benchmark(job[0], own, job[1], **job[2], cache=kept)]
    release()
    _warn(rows)
    teacher_rows: list[EvalRow] = []
    if other is not None and (harness is None or harness.teacher):
        for backend, tasks, options in jobs:
            alone = [task for task in tasks if task != "agreement" or backend.name != "builtin"]
            teacher_rows += benchmark(backend, other, alone, **options, cache=kept)
        release()
    return {
        "trained": [asdict(row) for row in rows],
        "teacher": [asdict(row) for row in teacher_rows],
        "beside_teacher": over_tasks(rows, teacher_rows),
    }


def benchmark_table(found: Mapping[str, Any]) -> Table:
    """The figures of a model and of its teacher, for a terminal."""
    teacher = {(row["task"], row["metric"]): row["value"] for row in found["teacher"]}
    table = Table(title="benchmarks")
    for column in ("task", "metric", "model", "teacher", "kept"):
        table.add_column(column, justify="right" if column in ("model", "teacher", "kept") else "left")
    for row in found["trained"]:
        known = teacher.get((row["task"], row["metric"]))
        own = figure(row["value"]) if row["value"] is not None else row["note"]
        table.add_row(row["task"], row["metric"], own, figure(known), retention(row["value"], known, row["direction"]))
    return table


def subject_of(choice: ModelChoice) -> Subject:
    """A model by its files: whoever has the same weights, configuration and tokenizer is the same subject."""
    folder = Path(choice.source)
    nested = (folder / EXPANSION).is_file() or (folder / FACTORISED).is_file()
    stock = choice.model_copy(update={"source": str(folder / BASE)}) if nested else choice
    try:
        parts = dict(teacher_identity(stock))
    except UserError:
        return Subject(choice.source, choice.revision)
    extra = [*sorted(folder.glob("*.safetensors")), *sorted(folder.rglob("tokenizer.json"))] if folder.is_dir() else []
    for path in extra:
        with path.open("rb") as file:
            parts[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    tokenizer = None if choice.tokenizer is None else resolved(choice.tokenizer)
    return Subject(choice.source, choice.revision, digest([parts, choice.revision, tokenizer]))


def _backend(harness: HarnessConfig, load: Any, held_out: HeldOut, teacher: Subject | None, place: str) -> Backend:
    if harness.backend == "builtin":
        return BuiltinBackend(load, held_out, cloze=harness.cloze, teacher=teacher)
    return LmEvalBackend(harness.backend, dtype=harness.dtype, device=place)


def _teacher(run: DistillRun) -> ModelChoice | None:
    """The one model that taught, where there is one on disk."""
    if run.teachers:
        return run.teachers[0] if len(run.teachers) == 1 else None
    if run.teacher is not None:
        return run.teacher
    return run.model if run.record is None else None


@torch.no_grad()
def _free(sides: Sides) -> None:
    """Gives back the memory of both sides' weights."""
    views = [sides.student, *([sides.teacher] if isinstance(sides.teacher, ModelView) else [])]
    for view in views:
        for one in view.views if isinstance(view, MixtureView) else [view]:
            one.model.to("meta")  # pyrefly: ignore [bad-argument-type] (a decorator hides the signature)
            one.tables.clear()
    gc.collect()  # optimizer states and hooks that only cycles hold
    release()


def _warn(rows: Sequence[EvalRow]) -> None:
    """One line for all that was not measured for want of a package or a teacher."""
    notes = list(dict.fromkeys(row.note for row in rows if row.note and row.value is None))
    if notes:
        names = ", ".join(dict.fromkeys(row.task for row in rows if row.value is None))
        logger.warning("benchmarks: %s: %s", names, "; ".join(notes))
