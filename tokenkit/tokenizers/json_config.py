"""Configurations in JSON: one object, closed schemas, old names of keys, every mistake one line that names the file."""

import json
from pathlib import Path
from typing import Any, TypeVar

from tokenkit.config import Config, UserError, build
from tokenkit.tokenizers.whole_file import write_whole

Values = dict[str, Any]
AnyConfig = TypeVar("AnyConfig", bound=Config)


def read_config(schema: type[AnyConfig], path: Path | str) -> AnyConfig:
    """The values of a JSON file as a schema has them; UserError that names the file."""
    values = read_values(Path(path))
    try:
        return build(schema, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_values(path: Path) -> Values:
    """The object that a JSON file holds; a key that stands twice is an error."""
    try:
        values = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{path}: no configuration ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}; write one JSON object")
    return values


def write_json(path: Path | str, values: Values) -> None:
    """Writes plain values as JSON, whole or not at all."""
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def move(values: Values, alias: str, name: str) -> None:
    """Puts what stands under an alias (`section.key`) under its name; UserError where the two differ."""
    section, _, key = alias.rpartition(".")
    source = values.get(section) if section else values
    if not isinstance(source, dict) or key not in source:
        return
    value = source.pop(key)
    section, _, key = name.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    if not isinstance(target, dict):
        raise UserError(f"{section}: holds {target!r}, where a section is expected")
    if key in target and target[key] != value:
        raise UserError(f"{alias}: {value!r}, but {name} is {target[key]!r}; keep one")
    target[key] = value


def _unique(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice; keep one")
    return values
