"""`tokenkit distill`: a model moved to another tokenizer, or a student under a teacher: trained, measured, exported."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from tokenkit.config import resolved
from tokenkit.data.batch import Batches, read_training_rows, reading_of
from tokenkit.data.example import Row
from tokenkit.data.records import Record
from tokenkit.data.source import read_documents
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.export.expanded import export_model
from tokenkit.models.view import ModelView
from tokenkit.objective import Objective
from tokenkit.report.page import write_page
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.train.balance import build_balance, last_layer
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.tasks.distill import TextTask
from tokenkit.verbs.distill_page import report_of
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import DTYPES
from tokenkit.verbs.own_losses import keep_plugins
from tokenkit.verbs.prepare import continuations, prepare
from tokenkit.verbs.record import evaluated_on
from tokenkit.verbs.sides import Sides, check_record, objective_of, pair_of, wanted_of


def distill(run: DistillRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures, exports and reports; the results that are also in `output/results.json`."""
    sides = prepare(run)
    objective = objective_of(run.losses, sides)
    rows = read_training_rows(run.data)
    batches = _batches(run, sides, objective, rows)
    held_out = read_documents(run.eval.source)
    live, record = (None, sides.teacher) if isinstance(sides.teacher, Record) else (sides.teacher, None)
    if record is not None:
        check_record(record, objective, run.data, rows, sides, run.teacher)
    pair = pair_of(run.data, sides).tensors(objective.pair_needs())
    # refuses before a file is written
    build_balance(run.train.balance, list(objective.weights()), partial(last_layer, sides.student.model), [])
    folder = _claim(run, resume)
    measure = measurement(run.eval, sides.student, sides.student_tokenizer, held_out)
    before = _before_training(run, sides, held_out, measure)
    task = TextTask(
        objective,
        sides.student,
        sides.student_tokenizer,
        live,
        sides.teacher_tokenizer,
        precision=run.train.precision,
        pair=pair,
        teacher_width=record.manifest.hidden_width if record is not None else None,
        seed=run.train.seed,
    )
    progress = train(task, batches, run.train, folder, measure, label="+".join(objective.weights()), quiet=quiet)
    after = measure()
    if progress.step not in folder.logged("bits_per_byte"):
        folder.log({"step": progress.step, **after})
    results = {
        "name": run.output.name,
        "losses": list(objective.weights()),
        "plugins": {str(plugin.path): plugin.sha256 for plugin in run.own_losses},
        "teacher_bits_per_byte": before["teacher"],
        "zero_shot_bits_per_byte": before["zero_shot"],
        "trained_bits_per_byte": after["bits_per_byte"],
        "bits_per_byte_at": {str(step): value for step, value in folder.logged("bits_per_byte").items()},
        "steps": progress.step,
        "tokens": progress.num_tokens,
        "bytes": progress.num_bytes,
        "transfer": asdict(sides.transfer) if sides.transfer else None,
    }
    if not (run.output / "model").exists():
        export_model(sides.student.model, sides.student_tokenizer, run.output / "model", dtype=DTYPES[run.export_dtype])
    write_json(run.output / "results.json", results)
    report = report_of(run, sides, held_out, results, before["samples"])
    write_json(run.output / "report.json", report.model_dump(mode="json"))
    write_page(run.output)
    return results


def _batches(run: DistillRun, sides: Sides, objective: Objective, rows: Sequence[Row]) -> Batches:
    student, teacher = sides.student_tokenizer, sides.teacher_tokenizer
    return Batches(
        rows,
        student,
        teacher,
        batch_size=run.train.batch_size,
        seed=run.train.seed,
        reading=reading_of(run.data, student, teacher, objective.shared_needs()),
        record=sides.teacher if isinstance(sides.teacher, Record) else None,
        wanted=wanted_of(objective),
    )


def _claim(run: DistillRun, resume: bool) -> RunFolder:
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=resume)
    keep_plugins(run.own_losses, run.output)
    return folder


def measurement(
    config: EvalConfig, view: ModelView, tokenizer: Tokenizer, held_out: list[str]
) -> Callable[[], dict[str, float]]:
    """A function that measures a model as it stands."""

    def measure() -> dict[str, float]:
        options = config.model_dump(exclude={"source"})
        return {"bits_per_byte": bits_per_byte(view, tokenizer, held_out, **options).value}

    return measure


def _before_training(
    run: DistillRun, sides: Sides, held_out: list[str], measure: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    if isinstance(sides.teacher, Record):
        known = sides.teacher.manifest
        teacher = known.teacher_bits_per_byte if known.evaluated_on == evaluated_on(run.eval, held_out) else None
    else:
        teacher = measurement(run.eval, sides.teacher, sides.teacher_tokenizer, held_out)()["bits_per_byte"]
    samples = continuations(run, sides.student.model, sides.student_tokenizer, sides.teacher_tokenizer)
    return {"teacher": teacher, "zero_shot": measure()["bits_per_byte"], "samples": samples}
