"""Metrics over steps as inline SVG: read from `metrics.jsonl`, thinned, drawn."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from markupsafe import Markup

from tokenkit.config import UserError
from tokenkit.report.content import Curve

Point = tuple[float, float]
MOST_POINTS = 600
WIDTH, HEIGHT = 520, 306
LEFT, RIGHT, TOP, BOTTOM = 54, 498, 10, 262
FEW_POINTS = 30
DASHES = 3
PANELS = (("loss", "Training loss"), ("bits_per_byte", "Bits per byte"))
LOG_FROM = 8.0  # a largest value this many times the smallest is drawn on a log scale


@dataclass(frozen=True)
class Line:
    """One curve of a panel; `dash` tells apart the curves of one kind."""

    label: str
    kind: str
    dash: int
    points: list[Point]


@dataclass(frozen=True)
class Panel:
    """One drawn set of axes."""

    title: str
    lines: list[Line]
    svg: Markup


def read_metrics(path: Path, names: Sequence[str]) -> dict[str, list[Point]]:
    """(step, value) per name, by step; a step written again after a resume counts once, a NaN or cut-off line never."""
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    broken = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if broken:
                    raise UserError(f"{path}: line {broken} is not a JSON object; remove that line")
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    broken = number  # the last line may be cut off by a crash; a line in the middle may not
                    continue
                for name in names:
                    if _finite(record.get("step")) and _finite(record.get(name)):
                        found[name][float(record["step"])] = float(record[name])
    except OSError as error:
        raise UserError(f"{path}: the report names these metrics, but: {error.strerror}") from None
    return {name: sorted(values.items()) for name, values in found.items()}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the first, the last, and the lowest and highest of equal stretches between them."""
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return [*kept, points[-1]]


def smooth(points: list[Point]) -> list[Point]:
    """The centred running mean over a thirtieth of the curve."""
    half = len(points) // 60
    sums = [0.0, *accumulate(value for _, value in points)]
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(step, (sums[end] - sums[start]) / (end - start)) for (step, _), (start, end) in zip(points, ends)]


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten."""
    if log:
        powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        marks = [factor * power for power in powers for factor in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    else:
        unit = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next((factor * unit for factor in (5, 2) if factor * unit * 4 <= high - low), unit)
        marks = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [mark for mark in marks if low <= mark <= high]


def draw(title: str, lines: list[Line]) -> Panel:
    """The panel of the lines; at least one of them has a point."""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    y_low, y_high = _padded(min(values), max(values), log)

    def place(point: Point) -> Point:
        low, high, value = (math.log(v) if log else v for v in (y_low, y_high, point[1]))
        x = LEFT + (RIGHT - LEFT) * (point[0] - x_low) / (x_high - x_low)
        return x, BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    x_marks = [(place((mark, y_low))[0], _step(mark)) for mark in ticks(x_low, x_high)]
    y_marks = [(place((x_low, mark))[1], f"{mark:g}") for mark in ticks(y_low, y_high, log)]
    shapes = _axes(x_marks, y_marks) + [stroke for line in lines for stroke in _strokes(line, place)]
    name = f"{title}, {'log' if log else 'linear'} scale"
    frame = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{} over steps: {}">{}</svg>')
    labels = ", ".join(line.label for line in lines)
    return Panel(name, lines, frame.format(WIDTH, HEIGHT, name, labels, Markup("").join(shapes)))


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / (high / low) ** 0.04, high * (high / low) ** 0.04
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _step(mark: float) -> str:
    return f"{mark / 1000:g}k" if mark >= 10_000 else f"{mark:g}"


def _axes(x_marks: list[tuple[float, str]], y_marks: list[tuple[float, str]]) -> list[Markup]:
    shapes = [Markup('<path class="axis" d="M{},{}H{}"/>').format(LEFT, BOTTOM, RIGHT)]
    for y, text in y_marks:
        shapes.append(Markup('<path class="grid" d="M{},{:.1f}H{}"/>').format(LEFT, y, RIGHT))
        shapes.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(LEFT - 7, y + 4, text))
    for x, text in x_marks:
        shapes.append(Markup('<path class="axis" d="M{:.1f},{}v5"/>').format(x, BOTTOM))
        shapes.append(Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(x, BOTTOM + 19, text))
    return [*shapes, Markup('<text class="x" x="{}" y="{}">step</text>').format((LEFT + RIGHT) // 2, HEIGHT - 7)]


def _strokes(line: Line, place: Callable[[Point], Point]) -> list[Markup]:
    """The smoothed curve over the faint measured one; few points are measured values and get a dot each."""
    path = Markup('<path class="{} {} dash{}" d="M{}"><title>{}</title></path>')
    drawn = [("curve", smooth(line.points))]
    if len(line.points) > FEW_POINTS:
        drawn.insert(0, ("raw", line.points))
    shapes = []
    for role, points in drawn:
        places = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in thin(points))
        shapes.append(path.format(role, line.kind, line.dash, places, line.label))
    if len(line.points) <= FEW_POINTS:
        dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: {:.4g} at step {:g}</title></circle>')
        shapes += [dot.format(line.kind, *place(point), line.label, point[1], point[0]) for point in line.points]
    return shapes


@dataclass(frozen=True)
class Training:
    """Metrics to be drawn: `kind` is a class of the page's style, which gives the colour."""

    label: str
    kind: str
    dash: int
    metrics: Path


def panels(folder: Path, curves: Sequence[Curve]) -> list[Panel]:
    """The panels of one report; curves of one kind are told apart by their dashes."""
    kinds = [curve.kind for curve in curves]
    return drawn(
        [
            Training(curve.label, curve.kind, kinds[:index].count(curve.kind) % DASHES, folder / curve.metrics)
            for index, curve in enumerate(curves)
        ]
    )


def drawn(trainings: Sequence[Training]) -> list[Panel]:
    """Training loss, then bits per byte; a panel without a single point is left out."""
    metrics = [read_metrics(training.metrics, [name for name, _ in PANELS]) for training in trainings]
    found: list[Panel] = []
    for name, title in PANELS:
        lines = [
            Line(training.label, training.kind, training.dash, values[name])
            for training, values in zip(trainings, metrics)
            if values[name]
        ]
        if lines:
            found.append(draw(title, lines))
    return found
