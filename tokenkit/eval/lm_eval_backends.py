"""lm-evaluation-harness as a backend: over our models, or through its own classes. Imported when it is used."""

import gc
import importlib
import importlib.metadata
import json
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from tokenkit.align.bias import write_whole_with
from tokenkit.eval.builtin_tasks import Loader
from tokenkit.eval.harness import EvalRow, HarnessConfig, NotRun, Subject, not_run
from tokenkit.eval.lm_eval_tasks import TaskFolders

FIRST = ("acc_norm", "acc", "exact_match", "bits_per_byte", "word_perplexity")  # what counts, where a task has it
SEED = 1234  # the harness's own, for examples and draws


class LmEvalBackend:
    """Tasks of lm-evaluation-harness. `tokenkit` reads any model of ours; `hf` and `vllm` are the harness's classes and
    read a plain folder, `vllm` holding a model on the GPU only while it measures."""

    def __init__(
        self, name: Literal["tokenkit", "hf", "vllm"], asked: HarnessConfig, *, device: str, load: Loader | None = None
    ) -> None:
        """`load` gives the model and the tokenizer of a subject, for `tokenkit`."""
        self.name: str = name
        self.asked, self.device, self.load = asked, device, load
        self._folders: TaskFolders | None = None

    def version(self) -> str:
        """Those of the packages that answer."""
        packages = ("lm_eval", "vllm") if self.name == "vllm" else ("lm_eval",)
        return ", ".join(f"{package} {_version(_imported(package))}" for package in packages)

    def depends_on(self, task: str) -> dict[str, Any]:
        """What else a result hangs on, as plain values."""
        ours = ("add_bos", "max_length") if self.name == "tokenkit" else ("dtype",)
        shared = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction", "generation")
        how = self.asked.model_dump(mode="json", include={*ours, *shared})
        return {**how, "definition": self.folders().definition(task)}

    def members(self, task: str) -> list[str]:
        """The names that rows of a task come under, those of a group's tasks too."""
        return self.folders().members(task)

    def folders(self) -> TaskFolders:
        """The YAML tasks of the run; UserError where they cannot be read."""
        if self._folders is None:
            _imported("lm_eval")
            self._folders = TaskFolders(self.asked.include_path, self.asked.placeholders)
        return self._folders

    def evaluate(
        self, subject: Subject, tasks: Sequence[str], *, limit: int | None, num_fewshot: int | None
    ) -> list[EvalRow]:
        """What the harness reports of these tasks, in its own units; a row that says why for a task that cannot run."""
        folders, version = self.folders(), self.version()
        folders.require(tasks)
        rows: list[EvalRow] = []
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for task in tasks:
            try:
                for kind, found in self._prepared(folders, task, num_fewshot).items():
                    loaded[kind] |= found
            except NotRun as error:
                rows += not_run(self.name, [task], limit, num_fewshot, str(error))
        if not loaded["tasks"]:
            return rows
        try:
            with _same_draws():
                model = self._model(subject)
                found = _imported("lm_eval").evaluate(
                    lm=model,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=self.asked.log_samples is not None,
                    apply_chat_template=self.asked.apply_chat_template,
                    fewshot_as_multiturn=self.asked.fewshot_as_multiturn,
                    system_instruction=self.asked.system_instruction,
                    confirm_run_unsafe_code=self.asked.confirm_run_unsafe_code,
                )
        finally:
            release()
        if self.asked.log_samples is not None:
            write_samples(self.asked.log_samples / subject.label, found["samples"])
        return rows + rows_of_results(found, self.name, version, limit, num_fewshot)

    def _prepared(self, folders: TaskFolders, name: str, num_fewshot: int | None) -> dict[str, dict[str, Any]]:
        """The harness's objects of a name, with the shots and the options of generation that the run asks for."""
        try:
            found = folders.load(name)
        except (OSError, ImportError) as error:  # the hub's errors are OSErrors
            first = " ".join(str(error).split("\n")[0].split())
            raise NotRun(
                f"the data of {name} are not here ({first}); fetch them once with a network, or write a task over "
                "local files (eval.harness.include_path)"
            ) from None
        for task in found["tasks"].values():
            self._set(task, num_fewshot)
        return found

    def _set(self, task: Any, num_fewshot: int | None) -> None:
        if task.config.unsafe_code and not self.asked.confirm_run_unsafe_code:
            raise NotRun(
                f"{task.task_name} runs code that the model wrote; write eval.harness.confirm_run_unsafe_code=true if "
                "this machine may"
            )
        fixed = task.get_config("num_fewshot")
        if fixed is None or (num_fewshot is not None and fixed != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
        if self.asked.generation and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", self.asked.generation, update=True)

    def _model(self, subject: Subject) -> Any:
        """What the harness asks: our class, or one of its own."""
        if self.name == "tokenkit":
            from tokenkit.eval.lm_eval_model import HowRead, TokenkitLM  # imports lm_eval

            assert self.load is not None
            view, tokenizer = self.load(subject)
            how = HowRead(
                add_bos=self.asked.add_bos,
                max_length=self.asked.max_length,
                batch_tokens=self.asked.batch_tokens,
                chat=self.asked.apply_chat_template,
            )
            return TokenkitLM(view, tokenizer, how)
        arguments: dict[str, Any] = {"pretrained": subject.source, "dtype": self.asked.dtype}
        if subject.revision is not None:
            arguments["revision"] = subject.revision
        kind = importlib.import_module("lm_eval.api.registry").get_model(self.name)
        return kind.create_from_arg_obj(arguments, {"device": self.device})


def release() -> None:
    """Gives back what a model held on a GPU, where there is one."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _same_draws() -> Iterator[None]:
    """Inside, what tasks draw (examples, orders) is the same every time; outside, nothing has been drawn."""
    kept, kept_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (theirs)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(SEED)
            np.random.seed(SEED)  # noqa: NPY002 (theirs)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)  # noqa: NPY002 (theirs)


def _imported(package: str) -> ModuleType:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the harness forks while it maps rows
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every key that a task leaves to its default
    try:
        return importlib.import_module(package)
    except ImportError:
        pip = {"lm_eval": "lm-eval"}.get(package, package)
        raise NotRun(f"the package {pip} is not installed; pip install {pip}, or write backend=builtin") from None


def _version(module: ModuleType) -> str:
    try:
        return importlib.metadata.version(module.__name__)
    except importlib.metadata.PackageNotFoundError:
        return str(vars(module).get("__version__", "unknown"))


def rows_of_results(
    found: Mapping[str, Any], backend: str, version: str, limit: int | None, num_fewshot: int | None
) -> list[EvalRow]:
    """A row per task and metric, those that count first; `metric,filter` is called by both where the filter is not
    `none`. Counts, names and standard errors, which stand beside the metrics, are no figures."""
    rows = []
    for task, figures in found["results"].items():
        config = found.get("configs", {}).get(task, {})
        better = found.get("higher_is_better", {}).get(task, {})
        own = []
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or isinstance(value, bool) or not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            finite = math.isfinite(value)
            row = EvalRow(
                task=task,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=float(value) if finite else None,
                direction=None if better.get(metric) is None else "max" if better[metric] else "min",
                backend=backend,
                version=version,
                task_version=str(found.get("versions", {}).get(task, "")),
                num_fewshot=found.get("n-shot", {}).get(task, num_fewshot),
                limit=limit,
                dataset=_dataset(config, task),
                config=config.get("dataset_name"),
                split=config.get("test_split") or config.get("validation_split"),
                note="" if finite else f"not a finite number: {value}",
            )
            own.append((FIRST.index(metric) if metric in FIRST else len(FIRST), row))
        rows += [row for _, row in sorted(own, key=lambda pair: pair[0])]
    return rows


def _dataset(config: Mapping[str, Any], task: str) -> str:
    """Where the rows come from; of local files the names alone."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, Mapping):
        return ", ".join(dict.fromkeys(Path(str(file)).name for file in files.values()))
    return str(config.get("dataset_path") or task)


def write_samples(folder: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One JSON-lines file per task: every document with what was asked and answered."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        name = f"{task.replace('/', '_')}.jsonl"
        write_whole_with(folder / name, lambda path, text=lines: path.write_text(text, "utf-8"))
