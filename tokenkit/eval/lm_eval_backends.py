"""lm-evaluation-harness as a backend: it reads a folder with transformers or vLLM, and is imported when it is used."""

import gc
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch

from tokenkit.eval.harness import EvalRow, NotRun, Subject

FIRST = ("acc_norm", "acc", "exact_match", "word_perplexity", "bits_per_byte")  # what counts, where a task has it


class LmEvalBackend:
    """Tasks of lm-evaluation-harness; `vllm` holds a model on the GPU only while it measures."""

    def __init__(self, name: Literal["hf", "vllm"], *, dtype: str, device: str):
        self.name: str = name
        self.dtype, self.device = dtype, device

    def version(self) -> str:
        packages = ("lm_eval", "vllm") if self.name == "vllm" else ("lm_eval",)
        return ", ".join(f"{package} {_version(_imported(package))}" for package in packages)

    def depends_on(self, task: str) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def evaluate(
        self, subject: Subject, tasks: Sequence[str], *, limit: int | None, num_fewshot: int | None
    ) -> list[EvalRow]:
        """What the harness reports of these tasks, in its own units."""
        harness, version = _imported("lm_eval"), self.version()
        arguments: dict[str, Any] = {"pretrained": subject.source, "dtype": self.dtype}
        if subject.revision is not None:
            arguments["revision"] = subject.revision
        try:
            found = harness.simple_evaluate(
                model=self.name,
                model_args=arguments,
                tasks=[*tasks],
                num_fewshot=num_fewshot,
                limit=limit,
                device=self.device,
                bootstrap_iters=0,
                log_samples=False,
            )
        finally:
            release()
        return _rows(found, self.name, version, limit, num_fewshot)


def release() -> None:
    """Gives back what a model held on a GPU, where there is one."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _imported(package: str) -> ModuleType:
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


def _rows(
    found: Mapping[str, Any], backend: str, version: str, limit: int | None, num_fewshot: int | None
) -> list[EvalRow]:
    """A row per task and metric; `metric,filter` is called by both where the filter is not `none`."""
    rows = []
    for task, figures in found["results"].items():
        config = found.get("configs", {}).get(task, {})
        better = found.get("higher_is_better", {}).get(task, {})
        shots = found.get("n-shot", {}).get(task, num_fewshot)
        own = []
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            row = EvalRow(
                task=task,
                metric=metric if chosen in ("", "none") else f"{metric} ({chosen})",
                value=float(value),
                direction=None if better.get(metric) is None else "max" if better[metric] else "min",
                backend=backend,
                version=version,
                task_version=str(found.get("versions", {}).get(task, "")),
                num_fewshot=shots,
                limit=limit,
                dataset=str(config.get("dataset_path") or task),
                config=config.get("dataset_name"),
                split=config.get("test_split") or config.get("validation_split"),
            )
            own.append((FIRST.index(metric) if metric in FIRST else len(FIRST), row))
        rows += [row for _, row in sorted(own, key=lambda pair: pair[0])]
    return rows
