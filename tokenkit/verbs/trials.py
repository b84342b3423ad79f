"""A trial: the runs of one point of a space, one per seed, taken from rung to rung until they end or are given up."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenkit.config import UserError
from tokenkit.eval.summary import Direction, score
from tokenkit.report.sweep import Unit
from tokenkit.verbs.figures import read_readings, steps_of
from tokenkit.verbs.points import Point, Verb, beside, make_point
from tokenkit.verbs.runner import Outcome, Runner

TrialStatus = Literal["done", "pruned", "failed", "invalid"]
Prune = Callable[[int, float], bool]
"""Whether a trial is given up, told the step it has come to and its score there."""


@dataclass(frozen=True)
class Trial:
    """What became of a point. `scores` are at steps, the last one at its end; more is better."""

    number: int
    values: dict[str, Any]
    status: TrialStatus
    scores: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over the seeds, where the trial ended."""
    runs: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def score(self) -> float | None:
        """At the end, of a trial that came to it."""
        return [*self.scores.values()][-1] if self.status == "done" else None


@dataclass(frozen=True)
class Trials:
    """How the points of a search are tried."""

    runner: Runner
    verb: Verb
    base: Mapping[str, Any]
    seeds: Sequence[int]
    rungs: Sequence[int]
    """Steps at which every trial is looked at, beside its end."""
    metrics: Mapping[str, Direction]
    references: Mapping[str, float]
    unit: Unit

    def points(self, number: int, values: Mapping[str, Any]) -> list[Point]:
        """The runs of a trial; UserError where its values make none."""
        entry = beside({"name": f"trial {number}"}, values)
        return [make_point(self.verb, self.base, entry, seed) for seed in self.seeds]

    def stops(self, points: Sequence[Point]) -> list[int]:
        """The steps at which a trial is looked at, its last one included."""
        steps, _ = steps_of(points[0].values)
        return [*(rung for rung in sorted(set(self.rungs)) if rung < steps), steps]

    def check(self, number: int, values: Mapping[str, Any]) -> Trial | None:
        """The trial that it is at once if its values make no run."""
        try:
            self.points(number, values)
        except UserError as error:
            return Trial(number, dict(values), "invalid", error=str(error))
        return None

    def take(self, number: int, values: Mapping[str, Any], prune: Prune, *, until: int | None = None) -> Trial:
        """Tries a point to its end, or to the stop `until`, or to where it is given up.

        What its folders hold already is not done again, so a trial goes on where it was cut off.
        """
        invalid = self.check(number, values)
        if invalid is not None:
            return invalid
        values, points = dict(values), self.points(number, values)
        ids, scores, metrics = [point.id for point in points], {}, {}
        stops = self.stops(points)
        for stop in stops:
            last = stop == stops[-1]
            for point in points:
                failed = self._run(point, None if last else stop, stops)
                if failed is not None:
                    status = "invalid" if refused(failed) else "failed"
                    return Trial(number, values, status, scores, metrics, ids, f"{failed.error}; see {failed.log}")
            metrics = self.measured(points, stop)
            scores[stop] = statistics.fmean(
                score(one, self.references, self.metrics)[1] for one in self._values(points, stop)
            )
            if not last and (stop == until or prune(stop, scores[stop])):
                return Trial(number, values, "pruned", scores, metrics, ids)
        return Trial(number, values, "done", scores, metrics, ids)

    def _run(self, point: Point, stop: int | None, stops: Sequence[int]) -> Outcome | None:
        """Brings a run to a stop; what became of it if it failed."""
        folder = self.runner.folder(point)
        if stop is not None and all(stop in at for at in self._readings(folder).values()):
            return None  # was there before; `train.stop_after` looks only after a step
        outcome = self.runner.run_one(point, measured_at=stops, stop_after=stop)
        self.runner.check()
        return outcome if outcome.status == "failed" else None

    def _readings(self, folder: Path) -> dict[str, dict[float, float]]:
        found = read_readings(folder, list(self.metrics), self.unit)
        return {name: {reading.step: reading.value for reading in many} for name, many in found.items()}

    def _values(self, points: Sequence[Point], stop: int) -> list[dict[str, float]]:
        found = []
        for point in points:
            readings = self._readings(self.runner.folder(point))
            for name, at in readings.items():
                if stop not in at:
                    raise UserError(
                        f"metrics.{name}: not measured at step {stop} of {point.id}, only at "
                        f"{', '.join(f'{step:.0f}' for step in at) or 'no step'}; choose rungs where it is, or another"
                    )
            found.append({name: at[stop] for name, at in readings.items()})
        return found

    def measured(self, points: Sequence[Point], stop: int) -> dict[str, float]:
        """The metrics at a stop, means over the seeds."""
        values = self._values(points, stop)
        return {name: statistics.fmean(one[name] for one in values) for name in self.metrics}


def refused(outcome: Outcome) -> bool:
    """Whether a run was refused before its first step, as one is whose values do not fit together."""
    return outcome.exit_code == 2 and not (outcome.folder / "metrics.jsonl").is_file()
