"""`tokenkit distill`: a model moved to another tokenizer, or a student under a teacher: trained, measured, exported."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from tokenkit.config import resolved
from tokenkit.data.batch import Batches, read_training_rows, reading_of
from tokenkit.data.example import Row
from tokenkit.data.records import Record
from tokenkit.data.source import read_documents
from tokenkit.eval.agreement import agreement
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.export.expanded import export_model
from tokenkit.export.hub import push
from tokenkit.export.ternary import export_latent, export_ternary
from tokenkit.export.ternary_layout import stock_layout
from tokenkit.models.hypernet import Hypernet, hypernet_for
from tokenkit.models.ternary import set_strength, strength_at
from tokenkit.models.ternary_watch import TernaryWatch
from tokenkit.models.view import ModelView
from tokenkit.objective import Objective
from tokenkit.report.page import write_page
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.train.balance import build_balance, last_layer
from tokenkit.train.checkpoint import Progress
from tokenkit.train.counted import Counted
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.on_policy import OnPolicyBatches
from tokenkit.train.tasks.distill import TextTask
from tokenkit.verbs.benchmarks import benchmarked, check_evaluation
from tokenkit.verbs.card import begin_card, finish_card
from tokenkit.verbs.card_content import distilled
from tokenkit.verbs.distill_page import report_of
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import DTYPES
from tokenkit.verbs.own_losses import keep_plugins
from tokenkit.verbs.prepare import continuations, prepare
from tokenkit.verbs.record import evaluated_on
from tokenkit.verbs.sides import Sides, check_record, objective_of, pair_of, wanted_of
from tokenkit.verbs.statistics import measure_teacher

log = logging.getLogger(__name__)


def distill(run: DistillRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains, measures, exports and reports; the results that are also in `output/results.json`."""
    rows = read_training_rows(run.data)
    sides = prepare(run, rows)
    objective = objective_of(run.losses, sides)
    batches = Counted(batches_of(run, sides, objective, rows))
    held_out = read_documents(run.eval.source)
    _refuse_early(run, sides, objective, rows)
    task = task_of(run, sides, objective)
    folder = _claim(run, resume)
    begin_card(run.output, "distill")
    measure_teacher(run, task, sides, rows)
    measure = _measurement(run, sides, task, held_out)
    before = _before_training(run, sides, held_out, measure)
    progress = train(task, batches, run.train, folder, measure, label="+".join(objective.weights()), quiet=quiet)
    after = measure()
    task.materialise()
    if progress.step not in folder.logged("bits_per_byte"):
        folder.log({"step": progress.step, **after})
    _export(run, sides)
    results = _results(run, sides, objective, progress, folder, before, after)
    report = report_of(run, sides, held_out, results, before["samples"])
    results |= benchmarked(run, sides, held_out)  # gives back what the training held in memory
    write_json(run.output / "results.json", results)
    write_json(run.output / "report.json", report.model_dump(mode="json"))
    write_page(run.output)
    finish_card(run.output, run.card, lambda: distilled(run, objective, rows, held_out, batches.counts))
    if run.push_to_hub and run.hub is not None:
        push(run.output / "model", run.hub)
    return results


def _refuse_early(run: DistillRun, sides: Sides, objective: Objective, rows: Sequence[Row]) -> None:
    """UserError for what does not fit, before a file is written."""
    check_evaluation(run.eval)
    if isinstance(sides.teacher, Record):
        check_record(sides.teacher, objective, run.data, rows, sides, run.teacher)
    build_balance(run.train.balance, list(objective.weights()), partial(last_layer, sides.student.model), [])
    if run.ternary is not None:
        set_strength(sides.student.model, 1.0)  # as it will be in the end
        stock_layout(sides.student.model)
        set_strength(sides.student.model, strength_at(run.ternary, 0))


def task_of(run: DistillRun, sides: Sides, objective: Objective) -> TextTask:
    """What is trained, and what its losses ask of both sides."""
    record = sides.teacher if isinstance(sides.teacher, Record) else None
    return TextTask(
        objective,
        sides.student,
        sides.student_tokenizer,
        None if isinstance(sides.teacher, Record) else sides.teacher,
        sides.teacher_tokenizer,
        precision=run.train.precision,
        pair=pair_of(run.data, sides).tensors(objective.pair_needs()),
        teacher_width=record.manifest.hidden_width if record is not None else None,
        seed=run.train.seed,
        ternary=run.ternary,
        hypernet=_hypernet(run, sides),
    )


def _hypernet(run: DistillRun, sides: Sides) -> Hypernet | None:
    """The network that is learnt along, as wide as the rows that the student begins with."""
    if run.hypernet is None:
        return None
    made = hypernet_for(run.hypernet, sides.student.model, sides.student_tokenizer.vocab_size, seed=run.train.seed)
    made.byte_rows.requires_grad_(False)  # every row has one of its own
    return made


def _export(run: DistillRun, sides: Sides) -> None:
    """`model/`, as it is trained on; of ternary matrices also `ternary/`, four of them a byte."""
    model, tokenizer, dtype = sides.student.model, sides.student_tokenizer, DTYPES[run.export_dtype]
    if not (run.output / "model").exists():
        if run.ternary is None:
            export_model(model, tokenizer, run.output / "model", dtype=dtype)
        else:
            export_latent(model, tokenizer, run.output / "model", dtype=dtype)
    if run.ternary is not None and not (run.output / "ternary").exists():
        export_ternary(model, tokenizer, run.output / "ternary")


def _results(
    run: DistillRun,
    sides: Sides,
    objective: Objective,
    progress: Progress,
    folder: RunFolder,
    before: dict[str, Any],
    after: dict[str, float],
) -> dict[str, Any]:
    teacher, trained = before["teacher"], after["bits_per_byte"]
    return {
        "name": run.output.name,
        "losses": list(objective.weights()),
        "plugins": {str(plugin.path): plugin.sha256 for plugin in run.own_losses},
        "teacher_bits_per_byte": teacher,
        "zero_shot_bits_per_byte": before["zero_shot"]["bits_per_byte"],
        "trained_bits_per_byte": trained,
        "retention": teacher / trained if teacher is not None else None,  # of bits less is better, so 1 is the teacher
        "zero_shot": before["zero_shot"],
        "trained": after,
        "bits_per_byte_at": {str(step): value for step, value in folder.logged("bits_per_byte").items()},
        "steps": progress.step,
        "tokens": progress.num_tokens,
        "bytes": progress.num_bytes,
        "transfer": asdict(sides.transfer) if sides.transfer else None,
        **sides.made,
    }


def batches_of(run: DistillRun, sides: Sides, objective: Objective, rows: Sequence[Row]) -> Batches | OnPolicyBatches:
    """The batches of a run, some rows of which may go on as one of its models writes them."""
    student, teacher = sides.student_tokenizer, sides.teacher_tokenizer
    batches = Batches(
        rows,
        student,
        teacher,
        batch_size=run.train.batch_size,
        seed=run.train.seed,
        reading=reading_of(run.data, student, teacher, objective.shared_needs()),
        record=sides.teacher if isinstance(sides.teacher, Record) else None,
        wanted=wanted_of(objective),
    )
    if run.on_policy is None:
        return batches
    live = sides.teacher if isinstance(sides.teacher, ModelView) else None
    return OnPolicyBatches(batches, run.on_policy, sides.student, live)


def _claim(run: DistillRun, resume: bool) -> RunFolder:
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=resume)
    keep_plugins(run.own_losses, run.output)
    return folder


def measurement(
    config: EvalConfig, view: ModelView, tokenizer: Tokenizer, held_out: list[str], teacher: ModelView | None = None
) -> Callable[[], dict[str, float]]:
    """A function that measures a model as it stands; beside a teacher of the same tokenizer also how alike they are."""

    def measure() -> dict[str, float]:
        options = config.model_dump(include={"context_tokens", "stride_tokens", "batch_tokens"})
        found = {"bits_per_byte": bits_per_byte(view, tokenizer, held_out, **options).value}
        if teacher is not None:
            alike = agreement(view, teacher, tokenizer, held_out, config)
            found |= {"kl_to_teacher": alike.kl, "top1_agreement": alike.top1}
        return found

    return measure


def _measurement(run: DistillRun, sides: Sides, task: TextTask, held_out: list[str]) -> Callable[[], dict[str, float]]:
    """What a run is measured by; matrices on their way to ternary are measured as what they will be exported as."""
    own, model = sides.student_tokenizer, sides.student.model
    one_tokenizer = own.fingerprint == sides.teacher_tokenizer.fingerprint
    teacher = sides.teacher if isinstance(sides.teacher, ModelView) and one_tokenizer else None
    measure = measurement(run.eval, sides.student, own, held_out, teacher)
    if run.ternary is None:
        return measure
    watch = TernaryWatch(model)

    def measure_ternary() -> dict[str, float]:
        set_strength(model, 1.0)
        found = measure()
        task.stepped(task.step, run.train.horizon)
        found |= watch.measure(task.step)
        for line in watch.warnings():
            log.warning(line)
        return found

    return measure_ternary


def _before_training(
    run: DistillRun, sides: Sides, held_out: list[str], measure: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    if isinstance(sides.teacher, Record):
        known = sides.teacher.manifest
        teacher = known.teacher_bits_per_byte if known.evaluated_on == evaluated_on(run.eval, held_out) else None
    else:
        teacher = measurement(run.eval, sides.teacher, sides.teacher_tokenizer, held_out)()["bits_per_byte"]
    samples = continuations(run, sides.student.model, sides.student_tokenizer, sides.teacher_tokenizer)
    return {"teacher": teacher, "zero_shot": measure(), "samples": samples}
