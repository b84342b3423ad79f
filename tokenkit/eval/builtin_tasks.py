"""Benchmarks without another package or a network: perplexity, a cloze test, agreement with a teacher, own metrics."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenkit.config import Config, UserError, build, digest
from tokenkit.data.source import describe
from tokenkit.eval.agreement import agreement
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.byte_agreement import byte_agreement
from tokenkit.eval.byte_ensemble import room
from tokenkit.eval.harness import COMPARING, TASK_VERSION, EvalRow, Subject, failure
from tokenkit.eval.metrics import LoadedMetric
from tokenkit.eval.next_byte import ByteModel, CoverConfig
from tokenkit.eval.pairs import tokens_before
from tokenkit.eval.summary import Direction
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.version import __version__

Loader = Callable[[Subject], tuple[ModelView, Tokenizer]]
LARGEST = 700.0  # nats whose exponential a float64 still holds


class Question(Config):
    """A line of a cloze file."""

    context: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class HeldOut:
    """Texts, and the context they are read with."""

    documents: list[str]
    reading: EvalConfig

    def options(self) -> dict[str, Any]:
        """How they are read, as `bits_per_byte` takes it."""
        return self.reading.windows()

    def fingerprint(self) -> str:
        """A digest of the texts and of how they are read."""
        return digest([self.options(), self.documents])

    def place(self) -> dict[str, Any]:
        """Where the texts come from, as a row says it; of local files the name alone."""
        source = self.reading.source
        local = source.path is not None or Path(source.hub or "").exists()
        name = Path(describe(source)).name if local and source.stdlib is None else describe(source)
        return {"dataset": name, "split": source.split if source.hub is not None else None}


class BuiltinBackend:
    """Tasks of this package."""

    name = "builtin"

    def __init__(self, load: Loader, held_out: HeldOut, *, cloze: Path | None = None, teacher: Subject | None = None):
        self.load, self.held_out, self.teacher = load, held_out, teacher
        self.cloze, self.questions = cloze, [] if cloze is None else read_questions(cloze)

    def version(self) -> str:
        """That of the package."""
        return __version__

    def depends_on(self, task: str) -> dict[str, Any]:
        """What else a result hangs on, as plain values."""
        if task == "cloze":
            asked = [question.model_dump() for question in self.questions]
            return {"questions": digest(asked), "context": self.held_out.reading.context_tokens}
        found: dict[str, Any] = {"text": self.held_out.fingerprint()}
        if task in COMPARING and self.teacher is not None:
            found["teacher"] = self.teacher.identity
        return found

    def members(self, task: str) -> list[str]:
        """The task alone; none is a group."""
        return [task]

    def evaluate(
        self, subject: Subject, tasks: Sequence[str], *, limit: int | None, num_fewshot: int | None
    ) -> list[EvalRow]:
        """In nats, bits and shares; each model is read once for each task."""
        view, tokenizer = self.load(subject)
        rows: list[EvalRow] = []
        for task in tasks:
            if task == "perplexity":
                rows += self._perplexity(view, tokenizer, limit)
            elif task == "cloze":
                rows += self._cloze(view, tokenizer, limit, num_fewshot or 0)
            elif task == "agreement":
                rows += self._agreement(view, tokenizer, limit)
            elif task == "byte_agreement":
                rows += self._byte_agreement(view, tokenizer, limit)
        return rows

    def _perplexity(self, view: ModelView, tokenizer: Tokenizer, limit: int | None) -> list[EvalRow]:
        documents = self.held_out.documents[:limit]
        found = bits_per_byte(view, tokenizer, documents, **self.held_out.options())
        words = sum(len(document.split()) for document in documents)
        rows = [self._row("perplexity", "bits_per_byte", found.value, "min", limit, self.held_out.place())]
        units: tuple[tuple[str, int, Direction | None], ...] = (
            ("token", found.num_tokens, None),  # of another tokenizer's tokens it says nothing
            ("byte", found.num_bytes, "min"),
            ("word", words, "min"),
        )
        for name, count, way in units:
            nats, place = found.nats / max(1, count), self.held_out.place()
            value = math.exp(nats) if nats < LARGEST else None
            note = "" if value is not None else f"exp({nats:.0f}) is too large for a number"
            rows.append(self._row("perplexity", f"{name}_perplexity", value, way, limit, place, note=note))
        return rows

    def _cloze(self, view: ModelView, tokenizer: Tokenizer, limit: int | None, shots: int) -> list[EvalRow]:
        if shots >= len(self.questions):
            raise UserError(f"eval.harness.num_fewshot: {shots}, and {self.cloze} has {len(self.questions)} questions")
        solved = "".join(f"{q.context}{q.choices[q.answer]}\n\n" for q in self.questions[:shots])
        asked = self.questions[shots:][:limit]
        right = right_by_bytes = 0
        for question in asked:
            context = solved + question.context
            logp = cloze_scores(view, tokenizer, context, question.choices, self.held_out.reading.context_tokens)
            lengths = [max(1, len(choice.encode())) for choice in question.choices]
            by_bytes = [value / length for value, length in zip(logp, lengths)]
            right += logp.index(max(logp)) == question.answer
            right_by_bytes += by_bytes.index(max(by_bytes)) == question.answer
        place = {"dataset": "" if self.cloze is None else self.cloze.name}
        return [
            self._row("cloze", name, value / len(asked), "max", limit, place, shots)
            for name, value in (("accuracy", right), ("accuracy_by_bytes", right_by_bytes))
        ]

    def _agreement(self, view: ModelView, tokenizer: Tokenizer, limit: int | None) -> list[EvalRow]:
        place = self.held_out.place()
        names: tuple[tuple[str, Direction], ...] = (("kl_to_teacher", "min"), ("top1_agreement", "max"))
        if self.teacher is None:
            note = "not run: no teacher that can be loaded"
            return [self._row("agreement", name, None, way, limit, place, note=note) for name, way in names]
        teacher, other = self.load(self.teacher)
        if not same_ids(tokenizer, other, self.held_out.documents[:limit]):
            note = "not run: the teacher has another tokenizer"
            return [self._row("agreement", name, None, way, limit, place, note=note) for name, way in names]
        found = agreement(view, teacher, tokenizer, self.held_out.documents[:limit], self.held_out.reading)
        values = {"kl_to_teacher": found.kl, "top1_agreement": found.top1}
        return [self._row("agreement", name, values[name], way, limit, place) for name, way in names]

    def _byte_agreement(self, view: ModelView, tokenizer: Tokenizer, limit: int | None) -> list[EvalRow]:
        place = self.held_out.place()
        names: tuple[tuple[str, Direction], ...] = (("kl_to_teacher_per_byte", "min"), ("top1_byte_agreement", "max"))
        if self.teacher is None:
            note = "not run: no teacher that can be loaded"
            return [self._row("byte_agreement", name, None, way, limit, place, note=note) for name, way in names]
        sides = (view, tokenizer), self.load(self.teacher)
        student, teacher = (ByteModel(one.model, ids, CoverConfig()) for one, ids in sides)
        context_bytes = room([student, teacher], self.held_out.reading.context_tokens)
        found = byte_agreement(student, teacher, self.held_out.documents[:limit], context_bytes=context_bytes)
        values = (found.kl, found.top1)
        return [
            self._row("byte_agreement", name, value, way, limit, place)
            for (name, way), value in zip(names, values, strict=True)
        ]

    def _row(
        self,
        task: str,
        metric: str,
        value: float | None,
        direction: Direction | None,
        limit: int | None,
        place: dict[str, Any],
        shots: int = 0,
        note: str = "",
    ) -> EvalRow:
        how = (self.name, __version__, TASK_VERSION, shots, limit)
        return EvalRow(task, metric, value, direction, *how, **place, note=note)


class OwnBackend:
    """Functions of the user's own."""

    name = "own"

    def __init__(self, load: Loader, held_out: HeldOut, metrics: Sequence[LoadedMetric]):
        self.load, self.held_out = load, held_out
        self.metrics = {metric.name: metric for metric in metrics}

    def version(self) -> str:
        """That of the package."""
        return __version__

    def depends_on(self, task: str) -> dict[str, Any]:
        """What else a result hangs on, as plain values."""
        return {"text": self.held_out.fingerprint(), "code": self.metrics[task].sha256}

    def members(self, task: str) -> list[str]:
        """The task alone; none is a group."""
        return [task]

    def evaluate(
        self, subject: Subject, tasks: Sequence[str], *, limit: int | None, num_fewshot: int | None
    ) -> list[EvalRow]:
        """One row per function; its version is the fingerprint of its file."""
        view, tokenizer = self.load(subject)
        rows = []
        for task in tasks:
            metric, value, note = self.metrics[task], None, ""
            try:
                value = metric(view.model, tokenizer, self.held_out.documents[:limit])
            except Exception as error:  # whatever the user's function raises, the other figures are good
                note = f"not run: {failure(error, f'eval.metrics: {task}')}"
            how = (self.name, __version__, metric.sha256[:12], None, limit)
            rows.append(EvalRow(task, task, value, metric.direction, *how, **self.held_out.place(), note=note))
        return rows


def read_questions(path: Path) -> list[Question]:
    """The questions of a cloze file; UserError with the line that is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a cloze file: {' '.join(str(error).split())}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = build(Question, json.loads(line))
        except (ValueError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path}, line {number}: {' '.join(str(error).split())}") from None
        if not 0 <= question.answer < len(question.choices):
            raise UserError(
                f"{path}, line {number}: answer: {question.answer}, of {len(question.choices)} choices counted from 0"
            )
        found.append(question)
    if not found:
        raise UserError(f"{path}: no question in it; write lines of context, choices, answer")
    return found


def same_ids(a: Tokenizer, b: Tokenizer, documents: Sequence[str]) -> bool:
    """Whether two tokenizers have one vocabulary and write these texts with the same ids.

    Their files may differ: an exported one puts the start token first by itself.
    """
    if a.fingerprint == b.fingerprint:
        return True
    if a.token_bytes != b.token_bytes or a.start_id() != b.start_id():
        return False
    pairs = zip(a.encode_batch([*documents]), b.encode_batch([*documents]))
    return all(one.ids.tolist() == two.ids.tolist() for one, two in pairs)


@torch.no_grad()
def cloze_scores(
    view: ModelView, tokenizer: Tokenizer, context: str, choices: Sequence[str], context_tokens: int
) -> list[float]:
    """Natural log-probability of each choice after the context; a token across the border belongs to the choice.

    Where both together are longer than the model may read, the beginning of the context is left out.
    """
    border, scores = len(context.encode()), []
    for choice in choices:
        encoding = tokenizer.encode(context + choice)
        ids = [tokenizer.start_id(), *encoding.ids.tolist()]
        first = 1 + tokens_before(encoding, border)
        cut = max(0, len(ids) - context_tokens)
        ids, first = [ids[0], *ids[cut + 1 :]], max(1, first - cut)
        inputs = torch.tensor([ids], device=view.model.device)
        labels = torch.full_like(inputs, -1)
        labels[0, first - 1 : -1] = inputs[0, first:]
        scores.append(view.leaves({"label_logp"}, inputs, labels)["label_logp"].double().sum().item())
    return scores
