"""Writes the pages of docs/ that come from the code.

reference.md: verbs, run-file keys, losses, initialisers. guide_keys.md: the user guide's commands and keys. cli.md: the
help of every command. api/: one page per package, which the site fills with signatures and docstrings.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from tokenkit.cli import app
from tokenkit.config import Config
from tokenkit.losses import LOSSES
from tokenkit.transfer import INITIALIZERS
from tokenkit.verbs import RUNS, run_schema
from tokenkit.verbs.guide.page import guide_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDE_PAGE = DOCS / "guide_keys.md"
HAND = "Written by `make docs` from the code; do not edit."
TOP = "tokenkit"  # the page of the modules that stand alone


def pages() -> dict[Path, str]:
    """Every page that is written from the code, and what stands in it."""
    fixed = {"reference.md": reference(), GUIDE_PAGE.name: guide_page(), "cli.md": command_line()}
    api = {f"api/{name}.md": api_page(name, modules) for name, modules in public_modules().items()}
    return {DOCS / name: text for name, text in (fixed | api).items()}


def command_line() -> str:
    """The help of every command, as a terminal of 80 columns shows it without colour."""
    parts = [f"# Command line\n\n{HAND}\n"]
    parts.append("What `--help` says. The keys of each run file are in the [reference](reference.md).\n")
    for words in commands(get_command(app), ()):
        narrow = {"COLUMNS": "80", "NO_COLOR": "1"}
        asked = CliRunner().invoke(app, [*words, "--help"], prog_name="tokenkit", env=narrow)
        name = " ".join(("tokenkit", *words))
        shown = "\n".join(line.rstrip() for line in asked.output.strip().splitlines())
        parts.append(f"## {name}\n\n```text\n{shown}\n```\n")
    return "\n".join(parts)


def commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The words of a command and of those below it, in the order of the help."""
    yield words
    for name in command.list_commands(None) if isinstance(command, TyperGroup) else ():
        yield from commands(command.commands[name], (*words, name))


def public_modules() -> dict[str, list[str]]:
    """Pages of the Python reference → their modules: one page per package, one for the modules that stand alone.

    Public is what has no underscore before its name. Left out are the command line and the code that is copied beside
    exported models.
    """
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tokenkit").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1].startswith("cli") or {"assets", "remote_code"} & set(parts):
            continue
        package = parts[1:-1]
        found.setdefault("_".join(package) or TOP, []).append(".".join(p for p in parts if p != "__init__"))
    return found


def api_page(name: str, modules: list[str]) -> str:
    """A page of instructions for mkdocstrings."""
    title = modules[0] if name != TOP else "tokenkit: modules that stand alone"
    lines = [f"# {title}\n", f"{HAND} The site shows signatures and docstrings here.\n"]
    return "\n".join([*lines, *(f"::: {module}\n" for module in modules)])


def reference() -> str:
    """The whole page."""
    parts = [f"# Reference\n\n{HAND}\n"]
    for verb in RUNS:
        schema = run_schema(verb)
        parts.append(
            f"## tokenkit {verb}\n\n{first_line(schema)}\n\n| key | type | default | what |\n|---|---|---|---|"
        )
        parts.append("\n".join(rows(schema)) + "\n")
    parts.append("## Losses\n")
    for name, entry in LOSSES.items():
        options = ", ".join(f"`{n}={p.default}`" for n, p in entry.options.items()) or "none"
        about = " ".join(f"{entry.paper} {entry.fn.__doc__}".split())
        parts.append(f"**{name}**, per {entry.per}. {about}\nOptions: {options}.\n")
    parts.append("## Initialisers\n")
    parts += [f"**{name}**. {entry.summary}\n" for name, entry in INITIALIZERS.items()]
    return "\n".join(parts)


def first_line(schema: type[Config]) -> str:
    return (schema.__doc__ or "").strip().splitlines()[0]


def rows(schema: type[Config], prefix: str = "") -> list[str]:
    """One table row per key; a section's keys follow it, except losses, which have a chapter."""
    found = []
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        found.append(f"| `{key}` | {kind(field)} | {default(field)} | {about(field)} |")
        section = section_of(field.annotation)
        if section is not None and name != "losses":
            found += rows(section, f"{key}.")
    return found


def about(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def section_of(annotation: Any) -> type[Config] | None:
    choices = [annotation, *get_args(annotation)]
    return next((c for c in choices if isinstance(c, type) and issubclass(c, Config)), None)


def kind(field: FieldInfo) -> str:
    text = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    for module in ("typing.", "pathlib.", "tokenkit."):
        text = text.replace(module, "")
    return text.replace("|", "\\|") if section_of(field.annotation) is None else "section"


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "" if value is PydanticUndefined or isinstance(value, Config) else f"`{value}`".replace("|", "\\|")


if __name__ == "__main__":
    written = pages()
    for old in (DOCS / "api").glob("*.md"):
        if old not in written and old.name != "index.md":
            old.unlink()
    for path, text in written.items():
        path.write_text(text, "utf-8")
