"""`tokenkit distill`: a model moved to another tokenizer, or a student under a teacher: trained, measured, exported."""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tokenkit.config import UserError, resolved
from tokenkit.data.ahead import Numbered, made_ahead
from tokenkit.data.batch import Batches, reading_of
from tokenkit.data.corpus import read_training_rows
from tokenkit.data.records import Record
from tokenkit.data.source import read_documents
from tokenkit.data.stream import Rows, held
from tokenkit.eval.agreement import agreement
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.export.adapter import export_adapter
from tokenkit.export.expanded import export_model
from tokenkit.export.hub import push
from tokenkit.export.ternary import export_latent, export_ternary
from tokenkit.export.ternary_layout import stock_layout
from tokenkit.models.attention import whole_precision
from tokenkit.models.hypernet import Hypernet, hypernet_for
from tokenkit.models.mixture import views_of
from tokenkit.models.packed import check_packing
from tokenkit.models.ternary import set_strength, strength_at
from tokenkit.models.ternary_watch import TernaryWatch
from tokenkit.models.view import ModelView
from tokenkit.objective import Objective
from tokenkit.quantities import TAPPED
from tokenkit.report.page import write_page
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.train.balance import build_balance, last_layer
from tokenkit.train.checkpoint import Progress
from tokenkit.train.counted import Counted
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.train.loop import train
from tokenkit.train.on_policy import OnPolicyBatches
from tokenkit.train.parallel import first, leaders, leads, processes, ranks
from tokenkit.train.sharding import sharded
from tokenkit.train.sinks import Sinks
from tokenkit.train.tasks.distill import TextTask
from tokenkit.verbs.benchmarks import benchmarked, check_evaluation
from tokenkit.verbs.card import begin_card, finish_card
from tokenkit.verbs.card_content import data_facts, distilled
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.distill_page import report_of
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import DTYPES
from tokenkit.verbs.own_losses import keep_plugins
from tokenkit.verbs.prepare import continuations, prepare
from tokenkit.verbs.record import evaluated_on
from tokenkit.verbs.sides import Sides, check_record, objective_of, pair_of, wanted_of
from tokenkit.verbs.statistics import measure_teacher
from tokenkit.verbs.trained_part import has_base

log = logging.getLogger(__name__)


def distill(run: DistillRun, *, resume: bool = False, quiet: bool = False, brief: bool = False) -> dict[str, Any]:
    """Trains, measures, exports and reports; the results that are also in `output/results.json`.

    Of a run without stages: `stages.distill_stages` does those. `brief` is for one of many runs: a progress bar and no
    line beside it; `quiet` leaves out both.
    """
    assert not run.stages
    with processes(run.train.parallel, pick_device(run.train.device, "train.device")):
        trained, leading = _train(run, resume, quiet, brief), leads()
    return _finish(run, trained) if leading else {}


@dataclass(frozen=True)
class _Trained:
    """What is left of the training for the export and the report."""

    sides: Sides
    objective: Objective
    task: TextTask
    folder: RunFolder
    progress: Progress
    rows: Rows
    held_out: list[str]
    rows_read: dict[str, int]
    counts: dict[str, int]
    before: dict[str, Any]
    after: dict[str, float]


def _train(run: DistillRun, resume: bool, quiet: bool, brief: bool) -> _Trained:
    rows = read_training_rows(run.data)
    sides = prepare(run, rows)
    objective = objective_of(run.losses, sides)
    held_out = read_documents(run.eval.source)
    _refuse_early(run, sides, objective, rows)
    teacher = sides.teacher if isinstance(sides.teacher, ModelView) else None
    with sharded(sides.student, teacher, ranks()):
        made = batches_of(run, sides, objective, rows)
        task = sides.student.whole(lambda: task_of(run, sides, objective))
        folder = RunFolder(run.output, Sinks(run.train.sinks if leads() else [], run.train.project))
        first(lambda: _claim(run, folder, resume))
        if leads():
            say(f"attention: {sides.made['attention']}", quiet or brief)
        measure_teacher(run, task, sides, rows)
        measure = _measurement(run, sides, task, held_out)
        before = _before_training(run, sides, held_out, measure)
        with made_ahead(made, run.data.workers) as ahead:
            batches, label = Counted(ahead), "+".join(objective.weights())
            progress = train(task, batches, run.train, folder, measure, label=label, quiet=quiet)
        after = leaders(measure())
    read = made.rows_read(progress.step)
    return _Trained(sides, objective, task, folder, progress, rows, held_out, read, batches.counts, before, after)


def _finish(run: DistillRun, trained: _Trained) -> dict[str, Any]:
    sides, folder, held_out = trained.sides, trained.folder, trained.held_out
    trained.task.materialise()
    if trained.progress.step not in folder.logged("bits_per_byte"):
        folder.log({"step": trained.progress.step, **trained.after})
    folder.sinks.close()
    _export(run, sides)
    results = _results(run, trained)
    report = report_of(run, sides, held_out, results, trained.before["samples"])
    results |= benchmarked(run, sides, held_out)  # gives back what the training held in memory
    write_json(run.output / "results.json", results)
    write_json(run.output / "report.json", report.model_dump(mode="json"))
    write_page(run.output)
    facts = data_facts(trained.rows, held_out, trained.rows_read)
    finish_card(run.output, run.card, lambda: distilled(run, trained.objective, facts, trained.counts))
    if run.push_to_hub and run.hub is not None:
        push(run.output / "model", run.hub)
    return results


def say(line: str, quiet: bool) -> None:
    """A line beside the progress bar, where there is one; of several processes the first one talks."""
    if not quiet and leads():
        print(line, file=sys.stderr)


def _refuse_early(run: DistillRun, sides: Sides, objective: Objective, rows: Rows) -> None:
    """UserError for what does not fit, before a file is written."""
    check_evaluation(run.eval)
    heads = TAPPED | {"attentions"}
    asked = [name for name in objective.names if name.partition("_")[2] in heads]
    if run.train.parallel.model > 1 and asked:
        raise UserError(
            f"train.parallel.model: {run.train.parallel.model}, but a loss reads {asked[0]} of all heads, and each "
            "process has some of them; write train.parallel.model=1"
        )
    if run.data.packing:
        check_packing(sides.student, sides.student_tokenizer.start_id())
        for view in views_of(sides.teacher if isinstance(sides.teacher, ModelView) else None):
            check_packing(view, sides.teacher_tokenizer.start_id())
    if isinstance(sides.teacher, Record):
        check_record(sides.teacher, objective, run.data, held(rows), sides, run.teacher)
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
        trained=sides.trained,
    )


def _hypernet(run: DistillRun, sides: Sides) -> Hypernet | None:
    """The network that is learnt along, as wide as the rows that the student begins with."""
    if run.hypernet is None:
        return None
    made = hypernet_for(run.hypernet, sides.student.model, sides.student_tokenizer.vocab_size, seed=run.train.seed)
    made.byte_rows.requires_grad_(False)  # every row has one of its own
    return made


def _export(run: DistillRun, sides: Sides) -> None:
    """`model/`, as it is trained on; of ternary matrices also `ternary/`, four to a byte; of adapters `adapter/`."""
    model, tokenizer, dtype = sides.student.model, sides.student_tokenizer, DTYPES[run.export_dtype]
    if not (run.output / "model").exists():
        if run.ternary is None:
            export_model(model, tokenizer, run.output / "model", dtype=dtype)
        else:
            export_latent(model, tokenizer, run.output / "model", dtype=dtype)
    if run.ternary is not None and not (run.output / "ternary").exists():
        export_ternary(model, tokenizer, run.output / "ternary")
    if has_base(run, model) and not (run.output / "adapter").exists():
        export_adapter(
            model,
            tokenizer,
            run.output / "adapter",
            base=run.model.source,
            revision=run.model.revision,
            trust_remote_code=run.model.trust_remote_code,
            tables=sides.transfer is not None or run.hypernet is not None or run.model.delta is not None,
        )


def _results(run: DistillRun, trained: _Trained) -> dict[str, Any]:
    before, progress, sides = trained.before, trained.progress, trained.sides
    teacher, reached = before["teacher"], trained.after["bits_per_byte"]
    return {
        "name": run.output.name,
        "losses": list(trained.objective.weights()),
        "plugins": {str(plugin.path): plugin.sha256 for plugin in run.own_losses},
        "teacher_bits_per_byte": teacher,
        "zero_shot_bits_per_byte": before["zero_shot"]["bits_per_byte"],
        "trained_bits_per_byte": reached,
        "retention": teacher / reached if teacher is not None else None,  # of bits less is better, so 1 is the teacher
        "zero_shot": before["zero_shot"],
        "trained": trained.after,
        "bits_per_byte_at": {str(step): value for step, value in trained.folder.logged("bits_per_byte").items()},
        "steps": progress.step,
        "tokens": progress.num_tokens,
        "bytes": progress.num_bytes,
        "transfer": asdict(sides.transfer) if sides.transfer else None,
        **sides.made,
    }


def batches_of(run: DistillRun, sides: Sides, objective: Objective, rows: Rows) -> Numbered:
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
        pack_bytes=run.data.pack_bytes,
    )
    if run.on_policy is None:
        return batches
    if run.data.workers:
        raise UserError(
            f"data.workers: {run.data.workers} beside on_policy, whose rows are drawn by the model at their step; "
            "write workers=0"
        )
    live = sides.teacher if isinstance(sides.teacher, ModelView) else None
    return OnPolicyBatches(batches, run.on_policy, sides.student, live)


def _claim(run: DistillRun, folder: RunFolder, resume: bool) -> None:
    folder.claim(resolved(run), resume=resume)
    keep_plugins(run.own_losses, run.output)
    begin_card(run.output, "distill")


def measurement(
    config: EvalConfig, view: ModelView, tokenizer: Tokenizer, held_out: list[str], teacher: ModelView | None = None
) -> Callable[[], dict[str, float]]:
    """A function that measures a model as it stands; beside a teacher of the same tokenizer also how alike they are."""

    def measure() -> dict[str, float]:
        options = config.windows()
        with whole_precision(*(one.model for one in [*views_of(view), *views_of(teacher)])):
            found = {"bits_per_byte": view.whole(lambda: bits_per_byte(view, tokenizer, held_out, **options).value)}
            if teacher is not None:
                alike = view.whole(lambda: teacher.whole(lambda: agreement(view, teacher, tokenizer, held_out, config)))
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
    tokenizers = sides.student_tokenizer, sides.teacher_tokenizer
    samples = sides.student.whole(lambda: continuations(run, sides.student.model, *tokenizers))
    return {"teacher": teacher, "zero_shot": measure(), "samples": samples}
