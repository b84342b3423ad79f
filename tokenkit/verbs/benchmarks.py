"""What a finished folder and its teacher are measured on: tasks of `eval.harness`, functions of `eval.metrics`."""

import contextlib
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
from tokenkit.eval.builtin_tasks import BuiltinBackend, HeldOut, Loader, OwnBackend, read_questions
from tokenkit.eval.harness import COMPARING, Backend, EvalRow, Evaluation, NotRun, Subject, benchmark, over_tasks
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
SIDES = ("trained", "before", "teacher")
logger = logging.getLogger(__name__)


def check_evaluation(evaluation: Evaluation) -> None:
    """UserError, before anything is trained, for a function, a task or a file of questions that cannot be read.

    Runs the user's files.
    """
    load_metrics(evaluation.metrics)
    harness = evaluation.harness
    if harness is None:
        return
    if harness.cloze is not None:
        read_questions(harness.cloze)
    for name, tasks in harness.jobs().items():
        if name != "builtin":
            with contextlib.suppress(NotRun):  # a run without the package warns, and ends well
                LmEvalBackend(name, harness, device="cpu").folders().require(tasks)


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
    before: ModelChoice | None = None,
) -> dict[str, Any]:
    """Rows of the student, of the teacher and of the model before it was changed, and how good the first is beside
    each of the others over all tasks."""
    place, harness = pick_device(device), evaluation.harness
    sides = {name: choice for name, choice in zip(SIDES, (student, before, teacher)) if choice is not None}
    subjects = {name: subject_of(choice) for name, choice in sides.items()}
    choices = {subjects[name]: choice for name, choice in sides.items()}

    def load(subject: Subject) -> tuple[ModelView, Tokenizer]:
        model, tokenizer = load_pair(choices[subject], place, codes=codes, teacher=subject == subjects.get("teacher"))
        return view_of(model.eval()), tokenizer

    jobs = _jobs(evaluation, load, HeldOut(documents, evaluation), subjects.get("teacher"), place)
    kept = harness.cache if harness is not None and harness.cache is not None else cache
    reuse = harness is None or harness.log_samples is None
    found: dict[str, list[EvalRow]] = {name: [] for name in SIDES}
    for name, subject in subjects.items():
        if name == "teacher" and harness is not None and not harness.teacher:
            continue
        for backend, tasks, options in jobs:
            asked = [task for task in tasks if name != "teacher" or task not in COMPARING or backend.name != "builtin"]
            found[name] += benchmark(backend, subject, asked, **options, cache=kept, reuse=reuse)
        release()
        if name == "trained":
            _warn(found[name])
    own = [row for backend, tasks, _ in jobs for row in counting(found["trained"], backend, tasks)]
    beside = {f"beside_{name}": over_tasks(own, found[name]) for name in SIDES[1:]}
    result = {name: [asdict(row) for row in rows] for name, rows in found.items()} | beside
    return {key: value for key, value in result.items() if before is not None or not key.endswith("before")}


def counting(rows: Sequence[EvalRow], backend: Backend, tasks: Sequence[str]) -> list[EvalRow]:
    """The rows of a backend's tasks that a mean goes over: of a group with a figure of its own that one alone."""
    measured = {row.task for row in rows if row.backend == backend.name and row.value is not None}
    inside = {name for task in tasks if task in measured for name in backend.members(task)} - {*tasks}
    return [row for row in rows if row.backend == backend.name and row.task in measured - inside]


def benchmark_table(found: Mapping[str, Any]) -> Table:
    """The figures of a model, of what it was before and of its teacher, for a terminal; the last rows are the means of
    how good it is beside them."""
    others = [name for name in ("before", "teacher") if found.get(name)]
    known = {name: {(row["task"], row["metric"]): row["value"] for row in found[name]} for name in others}
    table = Table(title="benchmarks")
    columns = ["task", "metric", *(name for name in others if name == "before"), "model"]
    columns += ["of before"] * ("before" in others) + ["teacher", "kept"] * ("teacher" in others)
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in found["trained"]:
        key, value, way = (row["task"], row["metric"]), row["value"], row["direction"]
        cells = {"task": row["task"], "metric": row["metric"]}
        cells["model"] = figure(value) if value is not None else row["note"]
        for name, share in (("before", "of before"), ("teacher", "kept")):
            other = known[name].get(key) if name in known else None
            cells |= {name: figure(other), share: retention(value, other, way)}
        table.add_row(*(cells[column] for column in columns))
    for label, key in (("mean", "mean"), ("geometric mean", "geometric_mean")):
        shares = {
            share: f"{100 * beside[key]:.1f} %"
            for name, share in (("before", "of before"), ("teacher", "kept"))
            if (beside := found.get(f"beside_{name}"))
        }
        if shares:
            table.add_row(*({"task": label, **shares}.get(column, "") for column in columns))
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


def _jobs(
    evaluation: Evaluation, load: Loader, held_out: HeldOut, teacher: Subject | None, place: str
) -> list[tuple[Backend, Sequence[str], dict[str, Any]]]:
    """What measures, its tasks, and on how much."""
    jobs: list[tuple[Backend, Sequence[str], dict[str, Any]]] = []
    if (harness := evaluation.harness) is not None:
        options = {"limit": harness.limit, "num_fewshot": harness.num_fewshot}
        for name, tasks in harness.jobs().items():
            if name == "builtin":
                jobs.append((BuiltinBackend(load, held_out, cloze=harness.cloze, teacher=teacher), tasks, options))
            else:
                jobs.append((LmEvalBackend(name, harness, device=place, load=load), tasks, options))
    if evaluation.metrics:
        metrics = OwnBackend(load, held_out, load_metrics(evaluation.metrics))
        jobs.append((metrics, [*metrics.metrics], {"limit": None, "num_fewshot": None}))
    return jobs


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
