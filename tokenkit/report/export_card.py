"""The card of a model that was only put into another container: what it was made of, and what the comparison found."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from tokenkit.export.private import redacted
from tokenkit.report.card import PRIVACY, TASK
from tokenkit.report.card_facts import figure
from tokenkit.report.tables import markdown_table
from tokenkit.version import __version__

NO_LICENSE = "No licence was chosen here; that of the model it was made of holds in any case."


def render_export_card(name: str, base: str, on_hub: bool, figures: Mapping[str, Any]) -> str:
    """README.md of an exported folder; only facts. `on_hub`: the base is a hub id, which the metadata may name."""
    data = ModelCardData(
        model_name=name, library_name="transformers", pipeline_tag=TASK, base_model=base if on_hub else None
    )
    rows = [("figure", "value"), *((key.replace("_", " "), _shown(value)) for key, value in _flat(figures).items())]
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{base}, written by `tokenkit export` {__version__} and verified: "
        f"the folder was loaded again and its answers compared.\n\n{NO_LICENSE}\n\n## Figures\n\n"
        f"{markdown_table(rows)}\n## Privacy\n\n{PRIVACY}\n"
    )
    return redacted(text).rstrip() + "\n"


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{key} {inner}": item for inner, item in value.items()}
        elif key != "output":
            found[key] = value
    return found


def _shown(value: Any) -> str:
    return figure(value) if isinstance(value, float) else str(value)
