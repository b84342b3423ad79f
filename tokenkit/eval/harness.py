"""Benchmarks of a model folder through one of several backends: rows that say what was measured, by whom, on how much.

A backend reads a folder with whole weights and a tokenizer, so what is measured is what is handed on. Results are kept
under a key of everything they depend on, so a teacher that is measured for twenty students is measured once.
"""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from tokenkit.align.bias import write_whole_with
from tokenkit.config import Config, UserError, digest
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.eval.metrics import OwnMetric
from tokenkit.eval.summary import Direction, score

BackendName = Literal["builtin", "tokenkit", "hf", "vllm"]
COMPARING = ("agreement", "byte_agreement")  # with the teacher, who is not compared with itself
BUILTIN = ("perplexity", "cloze", *COMPARING)
TASK_VERSION = "1"  # of the built-in tasks; a change of what they measure raises it
logger = logging.getLogger(__name__)


class HarnessConfig(Config):
    """Tasks that a finished model is measured on."""

    tasks: list[str] = Field(min_length=1)
    """Built in: `perplexity` (bits per byte, and perplexity per token, byte and word), `cloze` (the right one of
    several continuations), `agreement` (with the teacher's next tokens) and `byte_agreement` (with its next bytes,
    whatever the tokenizers). All others: tasks, groups and tags of lm-evaluation-harness."""
    backend: BackendName | None = None
    """Null: `builtin` for built-in tasks, `tokenkit` for all others. `tokenkit` asks lm-eval's tasks of any model that
    we can read; `hf` and `vllm` are lm-eval's own classes, for plain folders. All three need the package lm-eval,
    `vllm` also vllm; without them a run warns once and goes on."""
    limit: int | None = Field(None, ge=1)
    """Documents or questions of each task at most."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question; null: as many as the task has by itself, none in built-in ones."""
    cloze: Path | None = None
    """For `cloze`: JSON lines of `{context: text, choices: [text, ...], answer: number of the right one}`."""
    include_path: list[Path] = []
    """Folders of task files (YAML) of your own. `${lm_eval}` in them is the folder of that package."""
    placeholders: dict[str, str] = {}
    """What further `${name}` in those files stand for, a folder of data for example."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens that `tokenkit` reads together, padding included. Does not change the figures."""
    add_bos: bool | None = True
    """Of `tokenkit`: the start token stands before every text, as in training. Null: where the tokenizer's own files
    put it, which is what `hf` does."""
    max_length: int | None = Field(None, ge=2)
    """Of `tokenkit`: tokens read at most, the beginning is left out; null: as many as the model has positions."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Number format of `hf` and `vllm`. In 16 bits the perplexity of a small model can rise by 40 %."""
    apply_chat_template: bool = False
    """Ask in the form of a conversation, as the tokenizer's family writes one."""
    fewshot_as_multiturn: bool = True
    """With it: solved examples are turns of the conversation; false: all in one user's turn."""
    system_instruction: str | None = None
    """Stands before every question; the system's turn with a chat template."""
    generation: dict[str, str | int | float | bool | list[str]] = {}
    """Put over the tasks' own options of generation: `max_gen_toks`, `until`, `do_sample`, `temperature`, ..."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute code which the model wrote. Only on a machine that may be harmed."""
    log_samples: Path | None = None
    """A folder for every question, answer and figure: JSON lines per model and task. The cache is not read then."""
    teacher: bool = True
    """Measure the teacher as well, where there is one that can be loaded."""
    cache: Path | None = None
    """A folder that keeps results for other runs; null: `benchmarks/` in the run folder."""

    def jobs(self) -> dict[Literal["builtin", "tokenkit", "hf", "vllm"], list[str]]:
        """The tasks of each backend."""
        if self.backend is not None:
            return {self.backend: self.tasks}
        found: dict[Literal["builtin", "tokenkit", "hf", "vllm"], list[str]] = {}
        for task in self.tasks:
            found.setdefault("builtin" if task in BUILTIN else "tokenkit", []).append(task)
        return found

    @model_validator(mode="after")
    def _known(self) -> "HarnessConfig":
        for task in self.tasks if self.backend == "builtin" else ():
            if task not in BUILTIN:
                close = difflib.get_close_matches(task, BUILTIN, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"built in are {', '.join(BUILTIN)}"
                raise UserError(f"eval.harness.tasks: {task!r}: {hint}; tasks of lm-eval need backend=tokenkit")
        if "cloze" in self.jobs().get("builtin", []) and self.cloze is None:
            raise UserError("eval.harness.cloze: missing; write a .jsonl file of context, choices and answer")
        return self


class Evaluation(EvalConfig):
    """Held-out text, and what a finished model is measured on beside it."""

    harness: HarnessConfig | None = None
    metrics: list[OwnMetric] = []
    """Your own functions, `FILE.py:NAME` or `MODULE:NAME`: fn(model, tokenizer, documents) -> number. They are run."""


@dataclass(frozen=True)
class EvalRow:
    """One figure, or why there is none."""

    task: str
    metric: str
    value: float | None
    direction: Direction | None
    backend: str
    version: str
    """Of the package behind the backend."""
    task_version: str
    num_fewshot: int | None
    limit: int | None
    dataset: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    note: str = ""
    """Why there is no value."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured: a folder or a hub id, and a fingerprint of its weights and tokenizer."""

    source: str
    revision: str | None = None
    identity: str | None = None
    """None: results are not kept."""

    @property
    def label(self) -> str:
        """A name for files about it."""
        name = Path(self.source).name or "model"
        return name if self.identity is None else f"{name}-{self.identity[:8]}"


class NotRun(Exception):
    """A backend that cannot work here; the message says why and what to do."""


@runtime_checkable
class Backend(Protocol):
    """Something that measures a folder."""

    name: str

    def version(self) -> str:
        """Of the package that measures; NotRun where it is missing."""
        ...

    def depends_on(self, task: str) -> dict[str, Any]:
        """What else a result of this backend hangs on, as plain values."""
        ...

    def members(self, task: str) -> Sequence[str]:
        """The names that rows of a task come under: its own, and those of what a group consists of."""
        ...

    def evaluate(
        self, subject: Subject, tasks: Sequence[str], *, limit: int | None, num_fewshot: int | None
    ) -> list[EvalRow]:
        """The figures of these tasks, those that count first."""
        ...


def benchmark(
    backend: Backend,
    subject: Subject,
    tasks: Sequence[str],
    *,
    limit: int | None,
    num_fewshot: int | None,
    cache: Path | None = None,
    reuse: bool = True,
) -> list[EvalRow]:
    """The rows of all tasks in their order: from the cache where it has them. What fails becomes rows that say so.

    `reuse`: False measures again what the cache has.
    """
    try:
        version = backend.version()
        files = _files(backend, version, subject, tasks, limit, num_fewshot, cache)
        known = {task: rows for task, file in files.items() if reuse and (rows := _read(file)) is not None}
        missing = [task for task in tasks if task not in known]
        options = {"limit": limit, "num_fewshot": num_fewshot}
        measured = backend.evaluate(subject, missing, **options) if missing else []
        members = {task: backend.members(task) for task in missing}
    except NotRun as error:
        return not_run(backend.name, tasks, limit, num_fewshot, str(error))
    except Exception as error:  # a benchmark that fails must not take a trained model with it
        return not_run(backend.name, tasks, limit, num_fewshot, failure(error, f"{backend.name} benchmarks"))
    for task in missing:
        own = [row for row in measured if row.task == task]
        known[task] = own + [row for row in measured if row.task != task and row.task in members[task]]
        if task in files and known[task] and all(row.value is not None for row in known[task]):
            _write(files[task], known[task])
    return [row for task in tasks for row in known[task]]


def failure(error: Exception, what: str) -> str:
    """What is said in the place of a figure; the traceback of what is no mistake of the user's is logged."""
    if not isinstance(error, UserError):
        logger.warning("%s failed: %s", what, error, exc_info=error)
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def not_run(backend: str, tasks: Sequence[str], limit: int | None, num_fewshot: int | None, why: str) -> list[EvalRow]:
    """A row per task that says why there is no figure."""
    nothing = (None, None, backend, "", "", num_fewshot, limit, "")
    return [EvalRow(task, "", *nothing, note=f"not run: {why}") for task in tasks]


def over_tasks(trained: Sequence[EvalRow], teacher: Sequence[EvalRow]) -> dict[str, float | int]:
    """Mean and geometric mean, over tasks, of how good a model is beside its teacher: 1 is as good, more is better.

    A task counts once, with the first of its metrics of which it is known what is better. Empty where nothing can be
    compared.
    """
    reference = {(row.task, row.metric): row.value for row in teacher if row.value is not None}
    values: dict[str, float] = {}
    references: dict[str, float] = {}
    directions: dict[str, Direction] = {}
    for row in trained:
        value, known = row.value, reference.get((row.task, row.metric))
        if value is None or known is None or row.direction is None or row.task in values or min(value, known) < 0:
            continue
        values[row.task], references[row.task], directions[row.task] = value, known, row.direction
    if not values:
        return {}
    mean, geometric = score(values, references, directions)
    return {"tasks": len(values), "mean": mean, "geometric_mean": geometric}


def row_of(values: Mapping[str, Any]) -> EvalRow:
    """A row from its plain values."""
    return EvalRow(**values)


def _files(
    backend: Backend,
    version: str,
    subject: Subject,
    tasks: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    cache: Path | None,
) -> dict[str, Path]:
    """Where each task's rows are kept, named by everything that they depend on."""
    if cache is None or subject.identity is None:
        return {}
    common = {"backend": backend.name, "version": version, "model": subject.identity}
    common |= {"limit": limit, "num_fewshot": num_fewshot}
    return {task: cache / f"{digest({**common, 'task': task, **backend.depends_on(task)})}.json" for task in tasks}


def _read(file: Path) -> list[EvalRow] | None:
    try:
        return [row_of(values) for values in json.loads(file.read_text("utf-8"))]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        logger.warning("%s: damaged; measured again", file)
        return None


def _write(file: Path, rows: Sequence[EvalRow]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
    write_whole_with(file, lambda path: path.write_text(text, "utf-8"))
