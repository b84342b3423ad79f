"""Run files: strict YAML and `key.path=value` overrides into closed, frozen schemas; every mistake is one line."""

import difflib
import hashlib
import re
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(Exception):
    """What the user can mend. The message says what, which value, and what to write instead; the exit code is 2."""


class Config(BaseModel):
    """A closed, frozen section of a run file: an unknown key is an error, a value never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def grown(cls, values: dict[str, Any]) -> Any:
        """The schema that these values are read against: this one, with the keys of the plugins that they name."""
        return cls


Schema = TypeVar("Schema", bound=Config)


class StrictLoader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's traps: `1e-5` is a number, `no` and `1:30` are words, a key may stand once."""


StrictLoader.yaml_implicit_resolvers = {}
for pattern, tag, first in (
    (r"true|false", "bool", "tf"),
    (r"[-+]?(0|[1-9][0-9_]*)", "int", "-+0123456789"),
    (r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "float", "-+.0123456789"),
    (r"~|null|", "null", "~n"),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), [*first])
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def _unique_mapping(loader: StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        if key in mapping:
            raise UserError(f"{_place(key_node.start_mark)}: the key {key!r} stands twice; keep one")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


StrictLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _place(mark: Any) -> str:
    return f"{mark.name}, line {mark.line + 1}"


def parse_yaml(text: str, source: str = "run file") -> Any:
    """The value of a YAML text; UserError with file and line where it is not one."""
    loader = StrictLoader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        where = _place(error.problem_mark) if error.problem_mark else source
        raise UserError(f"{where}: not valid YAML: {error.problem}") from None
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """A value as YAML that `parse_yaml` reads back unchanged."""

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_run_file(path: Path) -> dict[str, Any]:
    """The mapping a run file holds."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, where a run file (YAML) is expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so not a run file") from None
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, where `key: value` lines are expected")
    return value


def override(values: dict[str, Any], assignment: str) -> None:
    """Sets one `key.path=value` in place; the value is YAML, and a leading `+` or `++` is accepted and ignored."""
    path, equals, text = assignment.lstrip("+").partition("=")
    if not equals or not path:
        raise UserError(f"{assignment!r}: write key.path=value")
    keys = path.strip().split(".")
    node = values
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"{assignment}: {'.'.join(keys[: depth + 1])} holds {child!r}, which has no keys inside")
        node = child
    node[keys[-1]] = parse_yaml(text, f"override {path}")


def load(schema: type[Schema], arguments: list[str]) -> Schema:
    """A run from command-line words: at most one run file, then overrides."""
    files = [word for word in arguments if "=" not in word]
    if len(files) > 1:
        raise UserError(f"{files[1]!r}: the second run file; give one, and key=value overrides")
    values = read_run_file(Path(files[0])) if files else {}
    for word in arguments:
        if "=" in word:
            override(values, word)
    return build(schema, values)


def build(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """The schema's object for plain values; UserError with one line for the first mistake."""
    schema = schema.grown(values)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        _complain(schema, error)


def _complain(schema: type[Config], error: ValidationError) -> NoReturn:
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    first = (unknown or problems)[0]
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    cause = first.get("ctx", {}).get("error")
    if first["type"] == "extra_forbidden":
        known = _keys_at(schema, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        message = f"{place}: unknown key; {hint}"
    elif first["type"] == "missing":
        message = f"{place}: missing; write {place}=..."
    elif isinstance(cause, UserError):
        message = str(cause)
    else:
        text = first["msg"].removeprefix("Value error, ")
        message = f"{place}: {text[0].lower() + text[1:]}, not {first['input']!r}" if place else text
        if first["type"] == "literal_error":
            close = difflib.get_close_matches(str(first["input"]), re.findall(r"'([^']+)'", first["msg"]), n=1)
            message += f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(message + more) from None


def _keys_at(schema: type[Config], location: tuple[Any, ...]) -> list[str]:
    node: Any = schema
    for part in location:
        fields = node.model_fields if isinstance(node, type) and issubclass(node, Config) else {}
        if part not in fields:
            continue
        node = next((t for t in _models_in(fields[part].annotation)), None)
        if node is None:
            return []
    return list(node.model_fields)


def _models_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def resolved(config: Config) -> dict[str, Any]:
    """The plain values of a run, defaults included: what is saved beside its results."""
    return config.model_dump(mode="json")


def digest(value: Any) -> str:
    """A short fingerprint of plain values."""
    return hashlib.sha256(dump_yaml(value).encode()).hexdigest()[:16]


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two resolved runs."""
    found: list[str] = []
    for key in [*a, *(k for k in b if k not in a)]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right or (key in a) != (key in b):
            found.append(f"{prefix}{key}")
    return found
