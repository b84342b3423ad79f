"""Figures of the user's own: a function named in a run file, `FILE.py:NAME` or `MODULE:NAME`, which is run.

It is called as `fn(model, tokenizer, documents)` with the transformers model, our tokenizer and the held-out texts, and
returns one number.
"""

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import model_validator

from tokenkit.config import Config, UserError

ARGUMENTS = ("model", "tokenizer", "documents")


class OwnMetric(Config):
    """A function of the user's own; a plain `FILE.py:NAME` or `MODULE:NAME` stands for one without a direction."""

    function: str
    """`my_metrics.py:fn`, a path from the working directory, or `package.module:fn`. Its code is run."""
    direction: Literal["min", "max"] | None = None
    """What is better. Null: nothing is printed bold, and it counts in no mean."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        return {"function": values} if isinstance(values, str) else values


@dataclass(frozen=True)
class LoadedMetric:
    """A function of the user's own, as it was when it was read."""

    name: str
    fn: Callable[..., Any]
    direction: Literal["min", "max"] | None
    sha256: str
    """Of the file that it stands in."""

    def __call__(self, model: Any, tokenizer: Any, documents: Sequence[str]) -> float:
        """The figure; UserError where it is none."""
        value = self.fn(model, tokenizer, [*documents])
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"eval.metrics: {self.name} returned {value!r}; return one number") from None
        if not math.isfinite(number):
            raise UserError(f"eval.metrics: {self.name} returned {number}; return a finite number")
        return number


def load_metrics(metrics: Sequence[OwnMetric]) -> list[LoadedMetric]:
    """The functions, whose files are run; UserError where one is not there, or two have one name."""
    found: dict[str, LoadedMetric] = {}
    for metric in metrics:
        loaded = _load(metric)
        if loaded.name in found:
            raise UserError(f"eval.metrics: two functions are called {loaded.name!r}; rename one")
        found[loaded.name] = loaded
    return [*found.values()]


def _load(metric: OwnMetric) -> LoadedMetric:
    home, colon, name = metric.function.rpartition(":")
    if not colon or not home or not name.isidentifier():
        raise UserError(f"eval.metrics: {metric.function!r}; write FILE.py:FUNCTION or MODULE:FUNCTION")
    module, source = _from_file(Path(home)) if home.endswith(".py") else _from_module(home)
    fn = vars(module).get(name)
    if not callable(fn):
        raise UserError(f"eval.metrics: {home} holds no function {name!r}; define {name}({', '.join(ARGUMENTS)})")
    try:
        inspect.signature(fn).bind(*ARGUMENTS)
    except TypeError as error:
        raise UserError(
            f"eval.metrics: {metric.function}: {error}; it is called as {name}({', '.join(ARGUMENTS)})"
        ) from None
    return LoadedMetric(name, fn, metric.direction, hashlib.sha256(source).hexdigest())


def _from_file(path: Path) -> tuple[ModuleType, bytes]:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"eval.metrics: {path}: cannot be read ({error.strerror})") from None
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:  # whatever the user's file raises is the user's to mend
        raise UserError(f"eval.metrics: {path}: {type(error).__name__}: {_line(error)}") from None
    return module, source


def _from_module(name: str) -> tuple[ModuleType, bytes]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises is the user's to mend
        raise UserError(f"eval.metrics: {name}: {type(error).__name__}: {_line(error)}") from None
    return module, Path(module.__file__).read_bytes() if module.__file__ else name.encode()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
