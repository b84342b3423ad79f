"""Finished runs, as their folders tell: results.json, report.json, run.yaml, provenance.json, metrics.jsonl."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenkit.config import UserError, read_run_file
from tokenkit.models.count import inventory_of
from tokenkit.models.load import BASE
from tokenkit.report.content import REPORT, Bar, Kind, Report, read_report
from tokenkit.report.curves import Point, read_metrics

RESULTS, RUN_FILE, METRICS, PROVENANCE = "results.json", "run.yaml", "metrics.jsonl", "provenance.json"


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with results; `report` where the run wrote a page."""

    name: str
    folder: Path
    report: Report | None
    results: dict[str, Any]
    values: dict[str, Any]
    """Its run file, as resolved."""
    provenance: dict[str, Any]

    @property
    def verb(self) -> str:
        """Which command made it."""
        return self.provenance.get("verb", "demo" if "targets" in self.values else "distill")

    @property
    def bars(self) -> tuple[Bar, ...]:
        """Its bits per byte; of a run without a page, such as pretraining, the one figure that its results hold."""
        if self.report is not None:
            return self.report.bars
        before, after = (self.results.get(f"{name}bits_per_byte") for name in ("zero_shot_", "trained_"))
        after = after if after is not None else self.results.get("bits_per_byte")
        teacher = self.results.get("teacher_bits_per_byte")
        found: list[tuple[Kind, float | None]] = [("teacher", teacher), ("zero_shot", before), ("trained", after)]
        return tuple(
            Bar(group="–", label=self.objective, kind=kind, bits_per_byte=value)
            for kind, value in found
            if value is not None
        )

    @property
    def objective(self) -> str:
        """The losses by name, or the verb of a run that names none."""
        return " + ".join(self.results.get("losses", ())) or self.verb

    @property
    def curves(self) -> list[tuple[str, Path]]:
        """(label, metrics) of each training in the folder."""
        if self.report is not None:
            return [(curve.label, self.folder / curve.metrics) for curve in self.report.curves]
        path = self.folder / METRICS
        return [(self.objective, path)] if path.is_file() else []

    @cached_property
    def seconds(self) -> float | None:
        """Of its optimizer steps, from its metrics; without measurements, export and start."""
        many = [training_seconds(read_metrics(path, ["time/step"])["time/step"]) for _, path in self.curves]
        return sum(many) or None

    @cached_property
    def parameters(self) -> int | None:
        """Of the exported model; headers of files are read, no weight."""
        folder = self.folder / "model"
        if not folder.is_dir():
            return self.results.get("parameters")
        return inventory_of(str(folder / BASE if (folder / BASE).is_dir() else folder)).parameters

    @property
    def held_out(self) -> "HeldOut | None":
        """The text it was measured on; None where the run file says nothing of it."""
        facts, evaluated = self.provenance.get("data", {}), self.values.get("eval") or {}
        if evaluated.get("source") is None:
            return None
        source = json.dumps({key: value for key, value in evaluated["source"].items() if value is not None})
        return HeldOut(facts.get("held_out_sha256"), facts.get("held_out_bytes"), source)


@dataclass(frozen=True)
class HeldOut:
    """A held-out text: its digest where the run noted one (older runs did not), and where it came from."""

    sha256: str | None
    bytes: int | None
    source: str

    @property
    def key(self) -> str:
        """Equal for runs that were measured on the same text."""
        return self.sha256 or f"{self.bytes} {self.source}"

    @property
    def digest(self) -> str:
        """The beginning of its digest."""
        return self.sha256[:8] if self.sha256 else "no digest"

    @property
    def shown(self) -> str:
        """Its size, and the beginning of its digest."""
        return self.digest if self.bytes is None else f"{self.bytes:,} bytes, {self.digest}"


def training_seconds(points: Sequence[Point]) -> float:
    """The time of a training from (step, mean seconds of a step since the point before)."""
    return sum(seconds * (step - before) for (before, _), (step, seconds) in pairwise([(0.0, 0.0), *points]))


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs of these folders, by names that tell them apart; a folder of several runs stands for those.

    UserError where one is no finished run, or is named twice.
    """
    found = [child for index, folder in enumerate(folders) for child in _children(folder, f"runs.{index}")]
    seen: dict[Path, Path] = {}
    for folder in found:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UserError(f"runs: {folder}, named twice; leave one of them out")
    return [_read(folder, name) for folder, name in zip(found, distinct_names(found))]


def _children(folder: Path, key: str) -> list[Path]:
    """The folder itself, or the finished runs of a sweep, or the stages of a run."""
    if not folder.is_dir():
        raise UserError(f"{key}: {folder}, no such folder; give folders of finished runs")
    if (folder / REPORT).is_file():
        return [folder]
    if not (folder / RESULTS).is_file():
        begun = (folder / RUN_FILE).is_file()
        why = "not finished; continue it with --resume" if begun else f"no {RESULTS} inside; give folders of runs"
        raise UserError(f"{key}: {folder}, {why}")
    stages = _object(folder / RESULTS).get("stages", {})
    many = [*(folder / name for name in stages), *sorted((folder / "runs").glob("*/"))]
    return [child for child in many if (child / RESULTS).is_file()] or [folder]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Of each path as few of its last parts as tell all of them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max((len(parts) for parts in whole), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> FinishedRun:
    report = read_report(folder) if (folder / REPORT).is_file() else None
    run_file = folder / RUN_FILE
    return FinishedRun(
        name,
        folder,
        report,
        _object(folder / RESULTS),
        read_run_file(run_file) if run_file.is_file() else {},
        _object(folder / PROVENANCE),
    )


def _object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; an empty one where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, where an object is expected")
    return value
