"""The runs of a sweep: values over a base run, each with a name that says what it is and a hash that tells it apart."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenkit.config import Config, UserError, build, read_run_file, resolved
from tokenkit.verbs import run_schema

Verb = Literal["distill", "pretrain"]
SEED = "train.seed"
NAME_LENGTH = 60


@dataclass(frozen=True)
class Point:
    """One run: what it changes, the whole run, and who it is.

    `id` is made of the whole resolved run without its output, `group` of that without the seed: equal in runs that
    differ in nothing else.
    """

    id: str
    name: str
    group: str
    seed: int
    changes: dict[str, Any]
    values: dict[str, Any]
    """The run as it is given to the verb, without `output`."""


def read_base(base: Path | Mapping[str, Any]) -> dict[str, Any]:
    """The values every run begins with: a run file's or those given, without an output."""
    values = read_run_file(base) if isinstance(base, Path) else copy.deepcopy(dict(base))
    return {key: value for key, value in values.items() if key != "output"}


def assign(values: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value at a dotted key, in place; UserError where something without keys is in the way."""
    *parents, last = path.split(".")
    node = values
    for depth, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"{path}: {'.'.join(parents[: depth + 1])} holds {node!r}, which has no keys inside")
    node[last] = copy.deepcopy(value)


def beside(entry: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with further changes, which its name then tells too.

    An entry's `name` is no key of the run: it is what the entry is called.
    """
    keys = {key: value for key, value in entry.items() if key != "name"}
    called = str(entry["name"]) if "name" in entry else readable(keys)
    return {**keys, **changes, "name": ", ".join(filter(None, [called, readable(changes)]))}


def crossed(grid: Mapping[str, Sequence[Any]], entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every entry with every combination of the grid, in their order; the last key of the grid changes fastest."""
    cells = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return [beside(entry, cell) for entry in entries for cell in cells]


def make_point(verb: Verb, base: Mapping[str, Any], changes: Mapping[str, Any], seed: int) -> Point:
    """The run of some changes; UserError where they make no valid run. `name` among them is its name, not a key."""
    keys = {key: value for key, value in changes.items() if key != "name"}
    values = copy.deepcopy(dict(base))
    for key, value in keys.items():
        assign(values, key, value)
    assign(values, SEED, seed)
    whole = {key: value for key, value in resolved(validated(verb, values)).items() if key != "output"}
    train = whole["train"]
    name = str(changes.get("name") or readable(keys) or "base")
    called = f"{name}, seed {train['seed']}"
    return Point(
        id=f"{slug(called)}-{short_hash(whole)}",
        name=name,
        group=short_hash({**whole, "train": {key: value for key, value in train.items() if key != "seed"}}),
        seed=train["seed"],
        changes=keys,
        values=values,
    )


def validated(verb: Verb, values: Mapping[str, Any]) -> Config:
    """The run of a verb, with some output; UserError with one line where it is none."""
    return build(run_schema(verb), {**copy.deepcopy(dict(values)), "output": "-"})


def readable(changes: Mapping[str, Any]) -> str:
    """Changes in a few words: last parts of the keys, and values; of sections their keys."""
    words = []
    for key, value in changes.items():
        shown = f"{value:g}" if type(value) is float else value
        if isinstance(value, dict):
            shown = "+".join(map(str, value))
        words.append(f"{key.rpartition('.')[2]}={shown}")
    return ", ".join(words)


def slug(text: str) -> str:
    """A part of a file name; it may be cut, since a hash follows it. No `=`, which makes a word an assignment."""
    return re.sub(r"[^\w.+]+", "_", text, flags=re.ASCII).strip("_.")[:NAME_LENGTH].rstrip("_.") or "run"


def short_hash(values: Any) -> str:
    """Twelve hexadecimal digits of plain values, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
