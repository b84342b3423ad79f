"""What a run of `tokenkit distill` begins with: student and teacher in memory, everything changed that is to change."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.data.corpus import read_texts, read_training_rows
from tokenkit.data.example import Window
from tokenkit.data.records import TOKENIZER, Record
from tokenkit.data.stream import Rows
from tokenkit.models.attention import check_attention, set_attention, whole_precision
from tokenkit.models.expand import attach_expansion, old_inputs
from tokenkit.models.generate import generate
from tokenkit.models.load import head_matrix, input_matrix, output_head
from tokenkit.models.mixture import MixtureView, views_of
from tokenkit.models.student import build_student
from tokenkit.models.ternary import attach_ternary
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer, require_lossless
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.own import require_kept
from tokenkit.train.parallel import ranks
from tokenkit.transfer.apply import TransferReport
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.model import ModelChoice, load_pair, tokenizer_of
from tokenkit.verbs.sides import Sides, check_losses
from tokenkit.verbs.trained_part import choose_trained, freeze, trained_of
from tokenkit.verbs.transfer import transferred

CALIBRATION_ROWS = 16  # of the training text, on which pruning and norms of ternary layers are measured


def prepare(run: DistillRun, rows: Rows | None = None) -> Sides:
    """Both sides in memory: shape and tokenizer changed, matrices made ternary, adapters attached, the rest frozen.

    `rows` are those of the training text, read here where they are needed and not given.
    """
    device = pick_device(run.train.device, "train.device")
    check_attention(run.train.attention, device, run.train.precision)
    device = device if ranks().mesh is None else "cpu"  # what is spread over GPUs need not fit on one
    torch.manual_seed(run.train.seed)  # adapters begin at random
    target = load_tokenizer(run.target_tokenizer) if run.target_tokenizer else None
    source = tokenizer_of(run.model)
    for tokenizer in (source, target or source):
        require_lossless(tokenizer, "a student's tokenizer")
    (target or source).start_id()  # every document begins with it: refused here, before a folder is claimed
    require_kept(target or source, load_tokenizer)
    record = Record(run.record) if run.record is not None else None
    theirs = _teacher_tokenizers(run)
    check_losses(run.losses, target or source, theirs[0] if theirs else source)  # what weights cannot mend
    model, _ = load_pair(run.model, device, tokenizer=source)
    other = _teacher(run, device, theirs) if record is None else None
    changed = run.student is not None or run.ternary is not None
    shared_body = run.record is None and other is None and run.train.mode != "full" and not changed
    tables = _tables(model) if shared_body else {}
    if run.record is None and other is None and not shared_body:
        other = ModelView(copy.deepcopy(model)), source
    samples: list[str] = []
    if run.record is None:
        samples = continuations(run, *((other[0].model, other[1]) if other else (model, source)), source)
    if run.expand_inputs and (not isinstance(target, ByteTokenizer) or shared_body):
        raise UserError("expand_inputs: only with target_tokenizer=byte, and train.mode=full or a teacher of its own")
    model, report, made = _student(run, model, source, target, rows, shared_body)
    trained = trained_of(run, model, source, target, report)
    for one in (model, *(view.model for view in views_of(other[0] if other else None))):
        set_attention(one, run.train.attention)
    if record is not None:
        teacher, teacher_tokenizer = record, theirs[0]
    elif other is None:
        teacher, teacher_tokenizer = ModelView(model, tables=tables, adapters=False), source
    else:
        teacher, teacher_tokenizer = other[0], other[1]
        teacher.model.requires_grad_(False)
    if run.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return Sides(ModelView(model), target or source, teacher, teacher_tokenizer, report, samples, made, trained)


def _student(
    run: DistillRun,
    model: PreTrainedModel,
    source: Tokenizer,
    target: Tokenizer | None,
    rows: Rows | None,
    shared_body: bool,
) -> tuple[PreTrainedModel, TransferReport | None, dict[str, Any]]:
    """The model that is trained, with another shape, tokenizer or kind of weights, and what was done for that."""
    made: dict[str, Any] = {}
    if run.student is not None:
        calibration = _calibration(run, rows, source) if run.student.prune is not None else []
        built = build_student(model, run.student, seed=run.train.seed, calibration=calibration)
        model, made["student"] = built.model, built.report
    old = old_inputs(model, source.token_bytes) if run.expand_inputs else None
    texts = partial(read_texts, run.data)
    report = transferred(run.transfer, model, source, target, texts) if target else None
    if old is not None:
        attach_expansion(model, *old)
    if run.ternary is not None:
        calibration = _calibration(run, rows, target or source) if run.ternary.calibrate else []
        made["ternary"] = asdict(attach_ternary(model, run.ternary, calibration=calibration))
    choose_trained(model, run.train, shared_body=shared_body)
    freeze(model, made.get("student", {}).get("frozen", []))
    return model, report, made


def _choices(run: DistillRun) -> Sequence[ModelChoice]:
    return [run.teacher] if run.teacher else run.teachers


def _teacher_tokenizers(run: DistillRun) -> list[Tokenizer]:
    """Those of the record, or of the teachers, that a run names, which are one; none where it names none."""
    if run.record is not None:
        return [load_tokenizer(str(run.record / TOKENIZER))]
    choices = _choices(run)
    found = [tokenizer_of(choice) for choice in choices]
    for choice, tokenizer in zip(choices, found):
        if tokenizer.fingerprint != found[0].fingerprint:
            raise UserError(
                f"teachers: {choice.source} has another tokenizer than {choices[0].source}; probabilities of different "
                "tokens have no mean: take teachers of one tokenizer"
            )
    return found


def _teacher(run: DistillRun, device: str, tokenizers: list[Tokenizer]) -> tuple[ModelView, Tokenizer] | None:
    """The teacher that a run names, or several of them as one; None without any."""
    loaded = [
        load_pair(choice, device, teacher=True, tokenizer=tokenizer)
        for choice, tokenizer in zip(_choices(run), tokenizers, strict=True)
    ]
    for model, _ in loaded:
        model.requires_grad_(False)
    if len(loaded) < 2:
        return (ModelView(loaded[0][0]), loaded[0][1]) if loaded else None
    views = [ModelView(model) for model, _ in loaded]
    return MixtureView(views, [choice.weight for choice in run.teachers]), loaded[0][1]


def _calibration(run: DistillRun, rows: Rows | None, tokenizer: Tokenizer) -> list[Tensor]:
    """The first rows of the training text in a tokenizer's ids, each after the start token."""
    some = (read_training_rows(run.data) if rows is None else rows)[:CALIBRATION_ROWS]
    texts = [row.text for row in some if isinstance(row, Window)]
    if not texts:
        raise UserError(
            "data.format: 'chat', but pruning and norms of ternary layers are measured on plain text; "
            "write data.format=text, or ternary.calibrate=false"
        )
    start = tokenizer.start_id()
    return [torch.tensor([[start, *encoding.ids.tolist()]]) for encoding in tokenizer.encode_batch(texts)]


def _tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the embedding, the head and its bias as they are now; one copy where they are one matrix."""
    table, head, bias = input_matrix(model), head_matrix(model), output_head(model).bias
    copied = table.detach().clone()
    tables = {"input": copied, "head": copied if head is table else head.detach().clone()}
    return tables if bias is None else {**tables, "bias": bias.detach().clone()}


def continuations(run: DistillRun, model: PreTrainedModel, tokenizer: Tokenizer, unit: Tokenizer) -> list[str]:
    """Greedy continuations of the prompts, as long as `max_new_tokens` tokens of the `unit` tokenizer."""
    prompts = run.report.prompts
    if not prompts:
        return []
    ratio = len(tokenizer.encode(" ".join(prompts))) / max(1, len(unit.encode(" ".join(prompts))))
    with whole_precision(model):
        return generate(model, tokenizer, prompts, max_new_tokens=max(1, round(run.report.max_new_tokens * ratio)))
