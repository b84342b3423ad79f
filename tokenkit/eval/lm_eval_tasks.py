"""Tasks of lm-evaluation-harness by name: its own, and those of YAML files whose `${placeholders}` are filled in.

A file may build on one of the harness (`include: ${lm_eval}/tasks/piqa/piqa.yaml`) and read local data
(`data_files: {validation: ${data}/piqa/validation.jsonl.gz}`); it is filled in a temporary folder, where its functions
(`!function rows.one_language`) are found beside it.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenkit.config import UserError
from tokenkit.eval.harness import BUILTIN

PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
COPIED = (".yaml", ".yml", ".py", "")  # a template that others include often has no suffix
SHOWN = 3  # near names in a message


class TaskFolders:
    """The YAML tasks of some folders, filled in. The harness must be importable."""

    def __init__(self, folders: Sequence[Path] = (), placeholders: Mapping[str, str] | None = None) -> None:
        """UserError for a folder that is not there, a placeholder without a value, or a file that is no YAML."""
        self.values = {"lm_eval": str(_package()), **(placeholders or {})}
        self.root = Path(tempfile.mkdtemp(prefix="tokenkit-tasks-"))
        weakref.finalize(self, shutil.rmtree, self.root, True)
        for number, folder in enumerate(folders):
            if not folder.is_dir():
                raise UserError(f"eval.harness.include_path: {folder}: no such folder; write one with YAML task files")
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.suffix in COPIED and "__pycache__" not in path.parts:
                    self._fill(path, self.root / str(number) / path.relative_to(folder))
        self._check()

    def manager(self, names: Sequence[str]) -> Any:
        """The harness's TaskManager that knows these names, its own tasks included where they are needed (seconds)."""
        closed = all(_is_closed(self._own.task_index, name) for name in names)
        return self._own if closed else self._with_defaults

    @functools.cached_property
    def _with_defaults(self) -> Any:
        found = copy.copy(_stock())
        found._index = {**found.task_index, **self._own.task_index}  # reading its thousands of files takes seconds
        return found

    @functools.cached_property
    def _own(self) -> Any:
        manager = importlib.import_module("lm_eval.tasks").TaskManager
        return manager(include_path=str(self.root), include_defaults=False)

    def require(self, names: Sequence[str]) -> None:
        """UserError for a name that no task, group or tag has."""
        known = self.manager(names).task_index
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, [*BUILTIN, *known], n=SHOWN)
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists them"
                raise UserError(
                    f"eval.harness.tasks: no task, group or tag {name!r} in lm-eval or include_path; {hint}"
                )

    def load(self, name: str) -> dict[str, dict[str, Any]]:
        """The harness's objects by name, `tasks`, `groups` and `group_map`: data are read here."""
        return self.manager([name]).load([name])

    def members(self, name: str) -> list[str]:
        """A name and all that it consists of."""
        return sorted(_members(self.manager([name]).task_index, name))

    def definition(self, name: str) -> Any:
        """Everything in files that a task's figures hang on: settings with what they include, data, functions."""
        index = self.manager([name]).task_index
        found = {one: self._settings(index[one]) for one in sorted(_members(index, name))}
        files = sorted({path for one in found.values() for path in _local_files(one)})
        code = sorted(self.root.rglob("*.py"))
        return {
            "tasks": {one: self._placeless(str(settings)) for one, settings in found.items()},
            "files": [_sha256(path) for path in files],
            "code": [_sha256(path) for path in code],
        }

    def _settings(self, entry: Any) -> Any:
        if entry.yaml_path is None:
            return {}
        return _load_yaml()(entry.yaml_path, resolve_func=False)

    def _placeless(self, text: str) -> str:
        for name, value in {"root": str(self.root), **self.values}.items():
            text = text.replace(value, f"${{{name}}}")
        return text

    def _fill(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".py":
            shutil.copyfile(source, target)
            return

        def value(match: re.Match[str]) -> str:
            if match[1] not in self.values:
                raise UserError(
                    f"{source}: {match[0]} has no value; write eval.harness.placeholders={{{match[1]}: ...}}"
                )
            return self.values[match[1]]

        try:
            target.write_text(PLACEHOLDER.sub(value, source.read_text("utf-8")), "utf-8")
        except UnicodeDecodeError:
            if source.suffix:
                raise UserError(f"{source}: not UTF-8 text, so no YAML of a task") from None

    def _check(self) -> None:
        for path in sorted(self.root.rglob("*.y*ml")):
            shown = "/".join(path.relative_to(self.root).parts[1:])
            try:
                _load_yaml()(path, resolve_func=False)
            except yaml.MarkedYAMLError as error:
                line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
                raise UserError(f"{shown}{line}: not valid YAML: {error.problem}") from None
            except (OSError, ValueError) as error:
                raise UserError(f"{shown}: cannot be read as a task: {_placed(error)}") from None


def _placed(error: Exception) -> str:
    return " ".join(str(error).split())


def _package() -> Path:
    file = importlib.import_module("lm_eval").__file__
    assert file is not None
    return Path(file).parent


def _load_yaml() -> Any:
    return importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml


@functools.cache
def _stock() -> Any:
    return importlib.import_module("lm_eval.tasks").TaskManager()


def _children(entry: Any) -> list[str]:
    """The names that a group or a tag stands for."""
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    names = [one if isinstance(one, str) else one.get("task", one.get("group")) for one in listed or []]
    return [*(name for name in names if isinstance(name, str)), *(entry.tags if entry.kind.name == "TAG" else ())]


def _members(index: Mapping[str, Any], name: str, found: set[str] | None = None) -> set[str]:
    """A name and everything below it that the index knows."""
    found = set() if found is None else found
    if name in index and name not in found:
        found.add(name)
        for child in _children(index[name]):
            _members(index, child, found)
    return found


def _is_closed(index: Mapping[str, Any], name: str) -> bool:
    return name in index and all(
        child in index for member in _members(index, name) for child in _children(index[member])
    )


def _local_files(value: Any) -> list[Path]:
    """The files named anywhere in settings that are there."""
    if isinstance(value, Mapping):
        return [path for one in value.values() for path in _local_files(one)]
    if isinstance(value, list):
        return [path for one in value for path in _local_files(one)]
    if isinstance(value, str) and "/" in value and "\n" not in value:
        with contextlib.suppress(OSError):
            return [Path(value)] if Path(value).is_file() else []
    return []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
