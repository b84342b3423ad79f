"""What a table of another toolkit's keys is made of: a name there, a key here, and how a value is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from tokenkit.config import Config, UserError

NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})  # values that ask for nothing


@dataclass(frozen=True)
class Key:
    """A key of the guide."""

    name: str
    """Dotted, as the guide writes it."""
    to: str = ""
    """The key here, as it is shown; empty for a key without effect."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values there, as text, and what they are here; others stay."""
    closed: bool = False
    """Whether other values are refused."""
    section: str = ""
    """The function of the table that reads this key together with others; empty: it is read by itself."""
    note: str = ""
    """What is not the same; of a key without effect, why that is so."""
    refused: bool = False
    """A value that asks for something is an error, because leaving it out would give another model."""
    mapping_is_ours: bool = False
    """The key exists here too, as a section: a mapping is read as that."""
    replaces: tuple[str, ...] = ()
    """Sections of the run file that this key says anew, so that what stood there before goes."""

    def here(self, value: Any) -> dict[str, Any]:
        """Keys and values of the run file for a value of the guide."""
        if not self.to:
            if self.refused and value not in NOTHING:
                raise UserError(f"{self.name}: {value!r}, {self.note}")
            return {}
        return {self.to: self.value_of(value)}

    def value_of(self, value: Any) -> Any:
        """The value here; UserError where the guide has no such value."""
        word = text_of(value)
        if word in self.values:
            return self.values[word]
        if self.closed:
            raise UserError(f"{self.name}: {value!r} is not known; write one of {', '.join(self.values)}")
        return value


@dataclass
class Given:
    """What was written: keys of the guide, keys of the run file, and in which order."""

    values: dict[str, Any] = field(default_factory=dict)
    """The guide's keys, dotted."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Which of two that mean the same goes before: the later one."""
    own: list[tuple[int, str, Any]] = field(default_factory=list)
    """Rank, key and value of what is written in the form of the run file."""
    notices: list[str] = field(default_factory=list)
    """What is worth a line to whoever wrote it."""
    warnings: list[str] = field(default_factory=list)
    """What was written and changes nothing."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the guide."""
        return self.values.get(name, default)

    def first(self, *names: str) -> Any:
        """The value of that of several names of one thing which was written last; None without any."""
        found = [name for name in names if name in self.values]
        return self.values[max(found, key=self.ranks.__getitem__)] if found else None

    def names_ours(self, path: str) -> bool:
        """Whether the run file's own form names this key, or one inside it."""
        return any(key == path or key.startswith(f"{path}.") for _, key, _ in self.own)

    def drop_ours(self, path: str) -> None:
        """Forgets what the run file's own form said of a key and all that is inside it."""
        self.own = [entry for entry in self.own if entry[1] != path and not entry[1].startswith(f"{path}.")]

    def own_values(self) -> dict[str, Any]:
        """The values in the run file's own form, nested."""
        found: dict[str, Any] = {}
        for _, path, value in sorted(self.own, key=lambda entry: entry[0]):
            put(found, path, value)
        return found


Section = Callable[[Given], dict[str, Any]]
"""Reads keys that belong together: dotted keys of the run file and their values."""


@dataclass(frozen=True)
class Guide:
    """The keys of one of the guide's commands, over the run file of a verb."""

    script: str
    verb: str
    schema: Callable[[], type[Config]]
    keys: tuple[Key, ...]
    sections: Mapping[str, Section] = field(default_factory=dict)
    defaults: Callable[[Given], dict[str, Any]] | None = None
    """What stands in for keys that are not written."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the run file that the command begins with."""
    switches: tuple[str, ...] = ("dry_run",)
    """Options that the verb has."""
    about: str = ""
    """How the guide calls the command."""

    @cached_property
    def named(self) -> dict[str, Key]:
        """The keys by their names in the guide."""
        return {key.name: key for key in self.keys}

    @cached_property
    def prefixes(self) -> set[str]:
        """Names of the guide's own sections, which may also be ones of the run file (`data`, `eval`)."""
        parts = [key.name.split(".") for key in self.keys]
        return {".".join(names[:end]) for names in parts for end in range(1, len(names))}


def text_of(value: Any) -> str:
    """A value as the guide's YAML shows it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted key of nested values, or sees that a section is there; UserError where it stands in no section."""
    *above, last = path.split(".")
    node = values
    for depth, name in enumerate(above):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"{path}: {'.'.join(above[: depth + 1])} holds {child!r}, which has no keys inside")
        node = child
    if value != {} or not isinstance(node.get(last), dict):
        node[last] = value


def is_ours(schema: type[Config], path: str) -> bool:
    """Whether a run file of this schema may have a key; what is inside lists and plain mappings is not looked at."""
    node: type[Config] | None = schema
    for name in path.split("."):
        if node is None:
            return True
        if name not in node.model_fields:
            return False
        node = section_of(node.model_fields[name].annotation)
    return True


def leaves(schema: type[Config], path: str, value: Any) -> list[tuple[str, Any]]:
    """A value of a run file's key as those of the keys inside it, where it is a section; else as it is."""
    node: type[Config] | None = schema
    for name in path.split("."):
        node = (
            section_of(node.model_fields[name].annotation) if node is not None and name in node.model_fields else None
        )
    if node is None or not isinstance(value, dict) or not value:
        return [(path, value)]
    return [leaf for name, inner in value.items() for leaf in leaves(schema, f"{path}.{name}", inner)]


def section_of(annotation: Any) -> type[Config] | None:
    """The section that a key holds, if it holds one."""
    choices = [annotation, *get_args(annotation)]
    return next((c for c in choices if isinstance(c, type) and issubclass(c, Config)), None)


def dotted_keys(schema: type[Config], prefix: str = "") -> list[str]:
    """Every key of a run file."""
    found = []
    for name, about in schema.model_fields.items():
        found.append(f"{prefix}{name}")
        inner = section_of(about.annotation)
        if inner is not None:
            found += dotted_keys(inner, f"{prefix}{name}.")
    return found
