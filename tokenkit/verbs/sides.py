"""Student and teacher of a run side by side, and what is refused because they do not fit each other or the losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenkit.config import UserError
from tokenkit.data.batch import DataConfig
from tokenkit.data.example import Row
from tokenkit.data.pair import Pair
from tokenkit.data.records import Record, Wanted
from tokenkit.models.attention import attention_of
from tokenkit.models.mixture import views_of
from tokenkit.models.view import ModelView, state_shape
from tokenkit.objective import LossesSection, Objective
from tokenkit.quantities import SIDES
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.tasks.distill import TOP, common_rows
from tokenkit.train.trained import Trained
from tokenkit.transfer.apply import TransferReport
from tokenkit.verbs.model import ModelChoice
from tokenkit.verbs.record import data_identity, teacher_identity


@dataclass
class Sides:
    """Student and teacher of a run, ready to be trained and compared."""

    student: ModelView
    student_tokenizer: Tokenizer
    teacher: ModelView | Record
    teacher_tokenizer: Tokenizer
    transfer: TransferReport | None
    teacher_samples: list[str]
    made: dict[str, Any] = field(default_factory=dict)
    """What was done to make the student: by section of the run file, as plain values."""
    trained: Trained | None = None
    """Which gradients of the student count; None: all."""


def objective_of(losses: LossesSection, sides: Sides) -> Objective:
    """The objective of a `losses:` section; UserError where it does not fit the vocabularies or the models."""
    own = sides.student_tokenizer
    objective = check_losses(losses, own, sides.teacher_tokenizer)
    views = [sides.student, *views_of(sides.teacher if isinstance(sides.teacher, ModelView) else None)]
    sides.made["attention"] = read_attention_maps(objective, *views)
    if isinstance(sides.teacher, ModelView):
        common_rows(objective, sides.student, own, sides.teacher)
        _check_states(objective, sides.student, sides.teacher)
    _check_width(objective, sides)
    return objective


def check_losses(losses: LossesSection, own: Tokenizer, other: Tokenizer) -> Objective:
    """The objective of a `losses:` section; UserError where it does not fit the vocabularies of student and teacher."""
    objective = Objective.of(losses)
    objective.check_text()
    objective.check_vocabularies(own.vocab_size, other.vocab_size, own.fingerprint == other.fingerprint)
    return objective


def pair_of(data: DataConfig, sides: Sides) -> Pair:
    """Both tokenizers with the rows of their heads, for the tables over two vocabularies."""
    teacher = sides.teacher
    rows = sides.teacher_tokenizer.vocab_size if isinstance(teacher, Record) else teacher.vocab_rows
    return Pair(
        sides.student_tokenizer,
        sides.teacher_tokenizer,
        sides.student.vocab_rows,
        rows,
        mined=data.mined,
        bias=data.bias,
        bias_threshold=data.bias_threshold,
    )


def _check_states(objective: Objective, student: ModelView, teacher: ModelView) -> None:
    whole = {name for term in objective.terms if not term.loss.paired for name in term.names}
    for name in ("layers", "qkv"):
        if f"student_{name}" in whole:
            own, theirs = state_shape(student, name), state_shape(teacher, name)
            if own != theirs:
                raise UserError(
                    f"losses.hidden_states.states: the student's {name} are {own[0]} of {own[1]} channels, the "
                    f"teacher's {theirs[0]} of {theirs[1]}; write states=last, and project=true where widths differ"
                )


def read_attention_maps(objective: Objective, *views: ModelView) -> str:
    """Lets models compute attention in the way that returns its maps, where a loss asks for them.

    How the attention of the student and of its teachers is computed, in one line; why, where it is not as chosen.
    """
    mapped = any(f"{side}_attentions" in objective.names for side in SIDES)
    for view in views if mapped else ():
        view.model.set_attn_implementation("eager")
    names = ["student", *["teacher"] * (len(views) - 1)]
    line = ", ".join(f"{attention_of(view.model)} ({name})" for view, name in zip(views, names))
    return f"{line}; a loss reads attention maps, which eager alone returns" if mapped else line


def _check_width(objective: Objective, sides: Sides) -> None:
    teacher, own = sides.teacher, sides.student.head().shape[1]
    theirs = teacher.manifest.hidden_width if isinstance(teacher, Record) else teacher.head().shape[1]
    if "student_chunk_hidden" in objective.names and theirs is not None and own != theirs:
        raise UserError(
            f"losses.hidden_states: the student's states have {own} channels and the teacher's {theirs}; write "
            "losses.hidden_states.project=true"
        )


def wanted_of(objective: Objective) -> Wanted:
    """What the losses ask of a record."""
    return Wanted(frozenset(objective.needs("teacher")), objective.option(TOP, "top_k"))


def check_record(
    record: Record,
    objective: Objective,
    data: DataConfig,
    rows: Sequence[Row],
    sides: Sides,
    teacher: ModelChoice | None,
) -> None:
    """UserError where the record holds something else than the live teacher would say to these losses."""
    record.check_needs(wanted_of(objective), objective.weights())
    record.check(data_identity(data, rows, sides.teacher_tokenizer))
    if teacher is not None:
        named = load_tokenizer(teacher.tokenizer or TokenizerSpec(name=teacher.source))
        record.check(data_identity(data, rows, named) | teacher_identity(teacher))
