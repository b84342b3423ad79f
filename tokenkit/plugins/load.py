"""A Python file with functions under `@loss` → losses of one run; the registry of the package stays as it was."""

import difflib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from tokenkit.config import UserError
from tokenkit.losses import LOSSES, UNITS_PER, Loss
from tokenkit.quantities import (
    AUTOENCODER_LEAVES,
    BOTH_SIDES,
    BY_TASK,
    DATA_LEAVES,
    DERIVED,
    MODEL_LEAVES,
    PAIR_LEAVES,
    PAIRED,
    SHARED_LEAVES,
    SIDES,
    inputs_of,
)

ALLOWED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Plugin:
    """A file of losses as it was when it was read."""

    path: Path
    source: str
    losses: Mapping[str, Loss]

    @property
    def sha256(self) -> str:
        """Of the file's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def load_plugins(paths: Iterable[Path]) -> tuple[Plugin, ...]:
    """The files, run in this order; UserError where two share a file name or the name of a loss."""
    plugins: list[Plugin] = []
    for path in paths:
        plugin = load_plugin(path)
        for other in plugins:
            if other.path.name == path.name:
                raise UserError(f"plugins: {other.path} and {path} would share a name in the run folder; rename one")
            for name in sorted(other.losses.keys() & plugin.losses.keys()):
                raise UserError(f"{path}: a loss called {name!r} stands in {other.path} already; rename one")
        plugins.append(plugin)
    return tuple(plugins)


def load_plugin(path: Path) -> Plugin:
    """The losses of one file. This runs the file's code: only a file that the user named may come here."""
    source = _read(path)
    module = ModuleType(f"tokenkit_plugin_{path.stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}")
    module.__file__ = str(path)
    known = dict(LOSSES)
    sys.modules[module.__name__] = module  # where `inspect` looks for a function's module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
        found = {name: entry for name, entry in LOSSES.items() if name not in known}
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid Python: {error.msg}") from None
    except UserError as error:
        raise UserError(f"{path}, line {_line(error, path)}: {error}") from None
    except Exception as error:  # the user's own code may raise anything
        what = " ".join(str(error).split()) or "no message"
        raise UserError(f"{path}, line {_line(error, path)}: {type(error).__name__}: {what}") from None
    finally:
        LOSSES.clear()
        LOSSES.update(known)
    if not found:
        raise UserError(f"{path}: no function in it stands under @loss(per=...) from tokenkit.losses; write one")
    for entry in found.values():
        for problem in signature_problems(entry):
            raise UserError(f"{path}: {entry.name}: {problem}")
    return Plugin(path, source, found)


def signature_problems(entry: Loss) -> list[str]:
    """What keeps a signature from being run-file keys and tensors, one line each."""
    problems = []
    for fn in (entry.fn, entry.units):
        for name, parameter in inspect.signature(fn).parameters.items() if fn else ():
            if parameter.kind not in ALLOWED:
                problems.append(f"{parameter} can name neither tensors nor options; write each one out")
            elif isinstance(parameter.annotation, str):
                problems.append(f"{name} has its annotation as text; remove `from __future__ import annotations`")
            elif parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                problems += _tensor_problems(name, parameter)
            elif fn is entry.fn:
                problems += _option_problems(name, parameter)
            elif name not in entry.options:
                problems.append(f"{name} is an option of its units, and not of the loss; give both the option")
    if entry.per not in UNITS_PER:
        problems.append(f"per={entry.per!r}; write per='token', per='chunk' or per='row'")
    if entry.paired and "layers" not in entry.options:
        problems.append("compares pairs of layers, so it needs an option layers; write layers: Layers = 'last'")
    return problems


def _tensor_problems(name: str, parameter: inspect.Parameter) -> list[str]:
    try:
        inputs_of(name)
    except KeyError:
        names = tensor_names()
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        return [f"no tensor is called {name!r}; {hint} (an option stands behind the `*`)"]
    if parameter.default is not inspect.Parameter.empty:
        return [f"{name} is a tensor and cannot have a default; options stand behind the `*`"]
    if axes_of(parameter.annotation) is None:
        return [f'{name} has no shape; annotate it as in Float[Tensor, "B T"] (docs/own_loss.md lists the shapes)']
    return []


def _option_problems(name: str, parameter: inspect.Parameter) -> list[str]:
    if parameter.annotation is inspect.Parameter.empty:
        return [f"the option {name} has no type; write {name}: float = ..."]
    if parameter.default is inspect.Parameter.empty:
        return [f"the option {name} has no default; every option needs one"]
    try:
        TypeAdapter(parameter.annotation).validate_python(parameter.default)
    except ValidationError:
        return [f"the default of the option {name}, {parameter.default!r}, is not of its type"]
    except PydanticUserError:
        return [f"the option {name} has a type that no run file can hold; use bool, int, float, str or Literal"]
    return []


def tensor_names() -> list[str]:
    """Every tensor that a loss may ask for."""
    leaves = DATA_LEAVES | MODEL_LEAVES | AUTOENCODER_LEAVES
    sided = [f"{side}_{base}" for side in SIDES for base in leaves | set(DERIVED)]
    return [*sorted({*sided, *BY_TASK}), *sorted({*PAIRED} | SHARED_LEAVES | PAIR_LEAVES), *BOTH_SIDES]


def axes_of(annotation: Any) -> list[str] | None:
    """The axes that a jaxtyping annotation names; None where it is none."""
    return annotation.dim_str.split() if type(annotation).__module__.startswith("jaxtyping") else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such plugin; paths start at the working directory") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path}: not a Python file, where a plugin is expected") from None


def _line(error: Exception, path: Path) -> int:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return frames[-1].lineno or 1 if frames else 1
