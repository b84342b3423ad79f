"""Writes docs/reference.md (verbs, run-file keys, losses, initialisers) and docs/guide_keys.md, from the code."""

from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokenkit.config import Config
from tokenkit.losses import LOSSES
from tokenkit.transfer import INITIALIZERS
from tokenkit.verbs import RUNS, run_schema
from tokenkit.verbs.guide.page import guide_page

TARGET = Path(__file__).parents[1] / "docs" / "reference.md"
GUIDE_PAGE = TARGET.with_name("guide_keys.md")


def reference() -> str:
    """The whole page."""
    parts = ["# Reference\n\nWritten by `make docs` from the code; do not edit.\n"]
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
        found.append(f"| `{key}` | {kind(field)} | {default(field)} | {' '.join((field.description or '').split())} |")
        section = section_of(field.annotation)
        if section is not None and name != "losses":
            found += rows(section, f"{key}.")
    return found


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
    TARGET.write_text(reference(), "utf-8")
    GUIDE_PAGE.write_text(guide_page(), "utf-8")
