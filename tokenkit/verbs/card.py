"""`tokenkit card`: the README.md of an exported model, from what its run folder holds; a run writes it by itself."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import model_validator

from tokenkit.config import Config, UserError, parse_yaml
from tokenkit.export.hub import HubConfig, check_push, push
from tokenkit.report.card import render_card
from tokenkit.report.card_facts import CardConfig
from tokenkit.report.provenance import provenance
from tokenkit.train.folder import RUN_FILE, RunFolder, write_json, write_text
from tokenkit.verbs.card_content import Known, facts_of

PROVENANCE = "provenance.json"
FOLDERS = ("model", "ternary")  # that a run exports
README = "README.md"
logger = logging.getLogger(__name__)


class CardRun(Config):
    """A run file of `tokenkit card`."""

    run: Path
    """The folder of a finished run."""
    card: CardConfig | None = None
    """Keys that are given here hold instead of the run's."""
    push_to_hub: bool = False
    """Also upload `model/` with its card."""
    hub: HubConfig | None = None

    @model_validator(mode="after")
    def _whole(self) -> "CardRun":
        check_push(self.push_to_hub, self.hub)
        return self


def card(run: CardRun) -> dict[str, Any]:
    """Writes the cards of a run again; their paths, and the address if the model was uploaded."""
    found: dict[str, Any] = {"cards": [str(path) for path in write_cards(run.run, run.card)]}
    if run.push_to_hub and run.hub is not None:
        found["hub"] = push(run.run / FOLDERS[0], run.hub)
    return found


def begin_card(folder: Path, verb: str) -> None:
    """Notes what a run begins with, and each time that it goes on with something else."""
    known = read_object(folder / PROVENANCE) or {"verb": verb, "made_with": []}
    now = provenance()
    if known["made_with"][-1:] != [now]:
        known["made_with"].append(now)
        write_json(folder / PROVENANCE, known)


def finish_card(folder: Path, config: CardConfig, more: Callable[[], Mapping[str, Any]]) -> None:
    """Notes what else is known of a finished run, and writes its cards. What goes wrong is logged: the run is good."""
    try:
        known = read_object(folder / PROVENANCE) or {}
        write_json(folder / PROVENANCE, {**known, **more()})
        if config.write:
            write_cards(folder)
    except Exception as error:  # whatever it is, the model is trained, measured and exported
        why = (str(error).splitlines() or ["no message"])[0]
        logger.warning("card: not written (%s: %s); mend it and run tokenkit card", type(error).__name__, why)


def write_cards(folder: Path, changes: CardConfig | None = None) -> list[Path]:
    """README.md in every model folder that a run has exported; UserError where there is no finished run."""
    run_file = folder / RUN_FILE
    if not run_file.is_file():
        raise UserError(f"{folder}: no {RUN_FILE} here; give the folder of a finished run")
    results = read_object(folder / "results.json")
    if results is None:
        raise UserError(f"{folder / 'results.json'}: missing; the run is not finished, continue it with --resume")
    run = parse_yaml(run_file.read_text("utf-8"), str(run_file))
    config = CardConfig.model_validate({**(run.get("card") or {}), **_given(changes)})
    losses, metrics = RunFolder(folder).logged("loss"), _metrics(folder)
    known = Known(folder, run, results, read_object(folder / PROVENANCE) or {}, losses, metrics)
    written = []
    for target in (folder / name for name in FOLDERS):
        if target.is_dir():
            write_text(target / README, render_card(facts_of(known, config, target)))
            written.append(target / README)
    if not written:
        raise UserError(f"{folder}: neither {' nor '.join(FOLDERS)} inside, so there is no model to describe")
    return written


def _given(changes: CardConfig | None) -> dict[str, Any]:
    return {} if changes is None else changes.model_dump(include=changes.model_fields_set)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no object; take the file that the run wrote")
    return value


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one cut short by a kill is left out."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
