"""What a finished run left in its folder, as the figures of a sweep's table."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenkit.report.curves import read_metrics
from tokenkit.report.sweep import Reading, RunFigures, Unit
from tokenkit.verbs.runner import Outcome


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a finished run."""
    return json.loads((folder / "results.json").read_text("utf-8"))


def read_readings(folder: Path, metrics: Sequence[str], unit: Unit) -> dict[str, list[Reading]]:
    """Per metric what metrics.jsonl and results.json say of it, in order of steps.

    Lines of measurements do not say how much text was read: it is taken from the lines of training around them.
    """
    path = folder / "metrics.jsonl"
    found = read_metrics(path, [unit, *metrics]) if path.is_file() else {name: [] for name in (unit, *metrics)}
    texts = [(0.0, 0.0), *found[unit]]
    known = {name: dict(found[name]) for name in metrics}
    if (folder / "results.json").is_file():
        results = read_results(folder)
        for name in metrics:
            for key in (name, f"trained_{name}"):
                if _number(results.get(key)):
                    known[name][float(results["steps"])] = float(results[key])
        texts.append((float(results["steps"]), float(results[unit])))
    return {
        name: [Reading(step, _read_by(texts, step), value) for step, value in sorted(values.items())]
        for name, values in known.items()
    }


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_by(texts: Sequence[tuple[float, float]], step: float) -> float:
    """The text read by a step, in a straight line between the lines that say it."""
    places = sorted(dict(texts).items())
    for (a, low), (b, high) in pairwise(places):
        if a <= step <= b:
            return low + (high - low) * (step - a) / (b - a)
    return places[-1][1] if step >= places[-1][0] else places[0][1]


def figures(outcome: Outcome, metrics: Sequence[str], also: Sequence[str], unit: Unit) -> RunFigures:
    """The figures of one run; `also` are medians over its lines of metrics."""
    point, folder = outcome.point, outcome.folder
    readings, beside = {}, {}
    if outcome.status == "done":
        readings = read_readings(folder, metrics, unit)
        path = folder / "metrics.jsonl"
        lines = read_metrics(path, also) if path.is_file() else {}
        beside = {name: statistics.median(value for _, value in many) for name, many in lines.items() if many}
    failed = outcome.status == "failed"
    return RunFigures(
        id=point.id,
        name=point.name,
        group=point.group,
        seed=point.seed,
        status=outcome.status,
        folder=str(folder),
        error=outcome.error,
        log=str(outcome.log) if failed else None,
        readings=readings,
        also=beside,
    )


def teacher_references(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> dict[str, float]:
    """The teacher's value of each metric, where all runs that are done say the same one."""
    found: dict[str, float] = {}
    results = [read_results(outcome.folder) for outcome in outcomes if outcome.status == "done"]
    for name in metrics:
        values = [one.get(f"teacher_{name}") for one in results]
        known = [float(value) for value in values if value is not None]
        if known and len(known) == len(values) and math.isclose(min(known), max(known), rel_tol=1e-6):
            found[name] = known[0]
    return found


def steps_of(values: Mapping[str, Any]) -> tuple[int, int]:
    """(steps, rows per step) of a run's values."""
    train = values["train"]
    return train["steps"], train.get("batch_size", 16)
