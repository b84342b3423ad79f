"""The guide's command lines and files, as words of a run file: `steps=10` becomes `train={"steps": 10}`."""

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenkit.config import Config, UserError, parse_yaml, read_run_file
from tokenkit.verbs.guide.keys import Given, Guide, Key, dotted_keys, is_ours, leaves, put

log = logging.getLogger(__name__)
SWITCHES = {"--dry-run": "dry_run", "--cfg": "dry_run", "--resume": "resume", "--quiet": "quiet", "-q": "quiet"}


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    words: list[str]
    """Of the verb: `key=value`."""
    switches: dict[str, bool]
    """dry_run, resume and quiet, those that were written."""


def command_of(guide: Guide, arguments: Sequence[str]) -> Command:
    """The verb's words for those of a script; what was renamed is told once, on the log."""
    files, overrides, switches = _sorted(arguments)
    schema = guide.schema()
    given = Given()
    for path, value in guide.base.items():
        given.own.append((-1, path, value))
    rank = 0
    for file in files:
        for name, value in read_run_file(file).items():
            _take(guide, schema, given, name, value, rank)
            rank += 1
    for word in overrides:
        path, _, text = word.lstrip("+").partition("=")
        _take(guide, schema, given, path.strip(), parse_yaml(text, f"override {path}"), rank)
        rank += 1
    values = translated(guide, given)
    if values.pop("--dry-run", False):
        switches["dry_run"] = True
    _tell(guide, given, quiet=switches.get("quiet", False))
    known = {name: on for name, on in switches.items() if name in guide.switches}
    return Command([f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()], known)


def translated(guide: Guide, given: Given) -> dict[str, Any]:
    """The values of the run file, nested; where two say the same thing, what was written later."""
    found = list(given.own)
    defaults = guide.defaults(given) if guide.defaults is not None else {}
    for name, value in given.values.items():
        key = guide.named[name]
        if not key.section:
            found += [(given.ranks[name], path, ours) for path, ours in key.here(value).items()]
    for section, read in guide.sections.items():
        ranks = [given.ranks[key.name] for key in guide.keys if key.section == section and key.name in given.values]
        if ranks:
            found += [(max(ranks), path, value) for path, value in read(given).items()]
    values: dict[str, Any] = {}
    for path, value in defaults.items():
        put(values, path, value)
    for _, path, value in sorted(found, key=lambda entry: entry[0]):
        put(values, path, value)
    return values


def _sorted(arguments: Sequence[str]) -> tuple[list[Path], list[str], dict[str, bool]]:
    """Files, `key=value` words and switches of a command line."""
    files: list[Path] = []
    overrides: list[str] = []
    switches: dict[str, bool] = {}
    folder, named = "", ""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in ("--config", "--config-name", "--config-path"):
            if not equals and not rest:
                raise UserError(f"{option}: nothing behind it; write the name of a run file")
            value = value if equals else rest.pop(0)
            if option == "--config":
                files.append(Path(value))
            folder, named = (value, named) if option == "--config-path" else (folder, value)
            named = "" if option == "--config" else named
        elif option == "--overrides":
            overrides += [value] if equals else []
        elif option in SWITCHES:
            switches[SWITCHES[option]] = True
            if option == "--cfg" and not equals and rest and "=" not in rest[0]:
                rest.pop(0)
        elif word.startswith("-"):
            known = ["--config", "--overrides", *SWITCHES]
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"{option}: unknown option; {hint}")
        elif equals:
            overrides.append(word)
        else:
            files.append(Path(word))
    if named:
        files.insert(0, Path(folder or "configs") / (named if named.endswith((".yaml", ".yml")) else f"{named}.yaml"))
    if len(files) > 1:
        raise UserError(f"{str(files[1])!r}: the second run file; give one, and key=value overrides")
    return files, overrides, switches


def _take(guide: Guide, schema: type[Config], given: Given, path: str, value: Any, rank: int) -> None:
    """Puts a written key among the guide's or the run file's; UserError where it is neither."""
    key = guide.named.get(path)
    if key is not None and not (key.mapping_is_ours and isinstance(value, dict)):
        given.values[path], given.ranks[path] = value, rank
        for ours in key.replaces:
            given.drop_ours(ours)
    elif path in guide.prefixes and isinstance(value, dict):
        for name, inner in value.items():
            _take(guide, schema, given, f"{path}.{name}", inner, rank)
    elif is_ours(schema, path) or path.startswith("losses."):
        if isinstance(value, dict):
            given.drop_ours(path)
            if key is not None:
                given.values.pop(path, None)
        given.own += [(rank, inside, leaf) for inside, leaf in leaves(schema, path, value)]
    elif path in guide.prefixes and value is None:
        pass  # a section of the guide without anything in it
    elif (outer := _outer(guide, path)) is not None:
        inside = given.values.get(outer.name)
        kept = dict(inside) if isinstance(inside, dict) else {}
        put(kept, path.removeprefix(f"{outer.name}."), value)
        given.values[outer.name], given.ranks[outer.name] = kept, rank
    else:
        raise UserError(f"{path}: unknown key; {_hint(guide, schema, path)}")


def _outer(guide: Guide, path: str) -> Key | None:
    """The guide's key whose value is a mapping that this path points into."""
    parts = path.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    return next((guide.named[name] for name in names if name in guide.named and guide.named[name].section), None)


def _hint(guide: Guide, schema: type[Config], path: str) -> str:
    """What was probably meant, of the guide's keys and of the run file's."""
    theirs, ours = list(guide.named), dotted_keys(schema)
    close = [difflib.get_close_matches(path, keys, n=1, cutoff=0.6) for keys in (theirs, ours)]
    last = path.rpartition(".")[2]
    for place, keys in enumerate((theirs, ours)):
        if not close[place]:  # the right word in the wrong section
            ends = {key.rpartition(".")[2]: key for key in reversed(keys)}
            close[place] = [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.8)]
    found = list(dict.fromkeys(name for names in close for name in names))
    if not found:
        return f"docs/guide_keys.md has the guide's, `tokenkit schema {guide.verb}` those of a run file"
    return f"did you mean {' or '.join(map(repr, found))}?"


def _tell(guide: Guide, given: Given, *, quiet: bool) -> None:
    """One line for every key that has another name here, and for every one that changes nothing."""
    lines = []
    unused = {line.partition(" ")[0] for line in given.warnings}
    for name, value in given.values.items():
        key = guide.named[name]
        if given.ranks[name] < 0 or name in unused:
            continue  # nobody wrote it, or it is told below
        if not key.to and not key.section and value not in (None, False):
            given.warnings.append(f"{name} has no effect: {key.note}")
        elif key.to and key.to != name:
            lines.append(f"{name} is {key.to} here")
    for line in given.warnings:
        log.warning(line)
    if not quiet:
        log.setLevel(logging.INFO)  # the lines are for whoever typed the command
        for line in [*lines, *given.notices]:
            log.info(line)
