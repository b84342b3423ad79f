"""From a run file with `stages:` to the run file of each stage, as plain values."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenkit.config import UserError

FIXED = ("stages", "output", "model", "plugins")  # what the run alone says
WHOLE = ("losses", "teacher", "target_tokenizer", "student")  # sections that a stage replaces; into others it writes
ONCE = ("target_tokenizer", "student", "expand_inputs")  # what is done to the student in the first stage
TEACHERS = ("teacher", "teachers", "record")
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


def stage_values(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of each stage by its name, from those that a run file gives; UserError for a stage that is none."""
    stages, found = run["stages"], {}
    base = {key: value for key, value in run.items() if key != "stages"}
    for number, stage in enumerate(stages):
        name = _name(stage, number, found)
        values = _merged(base, {key: value for key, value in stage.items() if key != "name"})
        values["output"] = str(Path(run["output"]) / name)
        if number + 1 < len(stages):
            values["push_to_hub"] = bool(stage.get("push_to_hub", False))
        if number == 0:
            base = _after_the_first(base, values)
        found[name] = values
        base["model"] = {**_trust(base["model"]), "source": str(Path(values["output"]) / "model")}
    return found


def _name(stage: Any, number: int, found: Mapping[str, Any]) -> str:
    name = stage.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"stages.{number}.name: {name!r}, where the name of a folder is needed; write name: embeddings")
    if name in found:
        raise UserError(f"stages.{number}.name: {name!r} stands twice; every stage has a folder of its own")
    for key in FIXED:
        if key in stage:
            raise UserError(f"stages.{name}.{key}: the run alone says this; leave it out of the stage")
    return name


def _merged(base: Mapping[str, Any], stage: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """The stage's keys over the run's: section by section, but `WHOLE` ones as they are."""
    merged = dict(base)
    for key, value in stage.items():
        old = merged.get(key)
        into = isinstance(value, dict) and isinstance(old, dict) and not (depth == 0 and key in WHOLE)
        merged[key] = _merged(old, value, depth + 1) if into else value
    return merged


def _after_the_first(base: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """What later stages begin from: the run, without what has been done, under the teacher of the first stage."""
    later = {key: value for key, value in base.items() if key not in (*ONCE, *TEACHERS)}
    train = {key: value for key, value in base["train"].items() if key != "prefix"}
    taught = {key: first[key] for key in TEACHERS if first.get(key)}
    return {**later, "train": train, **(taught or {"teacher": dict(base["model"])})}


def _trust(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model[key] for key in ("trust_remote_code",) if key in model}
