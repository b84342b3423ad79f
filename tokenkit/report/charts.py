"""Charts as inline SVG for any page: lines, bars, histograms, heat maps, points. Their colours come from the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from tokenkit.report.aligned import token
from tokenkit.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks

Number = float | int
Pair = tuple[Number, Number]
TONES = 6
MOST_LETTERS = 25  # of the name of a bar
ROW, LABELS, VALUES = 22, 180, 70  # of horizontal bars: height, and room on both sides


@dataclass(frozen=True)
class Figure:
    """A chart with its caption; `legend` pairs tones with names."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """An axis: where a value lies between its ends."""

    low: Number
    high: Number
    log: bool = False
    label: str = ""

    def share(self, value: Number) -> float:
        """0 at the low end, 1 at the high one."""
        at = max(self.low, min(value, self.high))
        low, high, at = (math.log(v) if self.log else float(v) for v in (self.low, self.high, at))
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on it."""
        return ticks(float(self.low), float(self.high), self.log)


@dataclass(frozen=True)
class Series:
    """A named line."""

    label: str
    points: Sequence[Pair]
    tone: int = 0
    dots: bool = False


def scale_of(values: Sequence[Number], label: str, *, log: bool = False, room: Number = 0.0) -> Scale:
    """An axis over these values; without a spread it gets one. `room` is left free above, as a share of the axis."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    if log:
        least = max(least, 1e-12)
        most = max(most, least * 10)
        return Scale(least, most * (most / least) ** room, True, label)
    most = most if most > least else least + 1.0
    return Scale(least, most + room * (most - least), False, label)


def short(value: Number) -> str:
    """A number for an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def line_chart(
    name: str, lines: Sequence[Series], x: Scale, y: Scale, marks: Mapping[Number, str] | None = None
) -> Markup:
    """Lines over both axes, and upright dashed lines where `marks` says, with its words."""
    shapes = _axes(x, y)
    for value, text in (marks or {}).items():
        if x.low <= value <= x.high:
            at = _across(x, value)
            shapes.append(Markup('<path class="mark" d="M{:.1f},{}V{}"/>').format(at, TOP, BOTTOM))
            shapes.append(Markup('<text x="{:.1f}" y="{}">{}</text>').format(at + 4, BOTTOM - 6, text))
    for line in lines:
        places = [(_across(x, a), _up(y, b)) for a, b in line.points]
        course = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        path = Markup('<path class="curve t{}" d="M{}"><title>{}</title></path>')
        shapes.append(path.format(line.tone % TONES, course, line.label))
        if line.dots:
            dot = Markup('<circle class="t{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: {} at {}</title></circle>')
            for (a, b), (over, value) in zip(places, line.points):
                shapes.append(dot.format(line.tone % TONES, a, b, line.label, short(value), short(over)))
    return _frame(name, shapes)


def histogram_chart(
    name: str, edges: Sequence[Number], stacks: Sequence[tuple[str, Sequence[Number]]], x: str, y: Scale
) -> Markup:
    """Bars between edges, each series standing on the one before; tones in order."""
    across, shapes = Scale(edges[0], edges[-1], False, x), []
    base = [0.0] * (len(edges) - 1)
    for tone, (label, values) in enumerate(stacks):
        for place, value in enumerate(values):
            if value > 0:
                left, right = _across(across, edges[place]), _across(across, edges[place + 1])
                foot, head = _up(y, base[place]), _up(y, base[place] + value)
                tip = f"{label}, {short(edges[place])} to {short(edges[place + 1])}: {value:.2%}"
                shapes.append(_box(left + 0.5, head, right - left - 1, foot - head, tone, tip))
                base[place] += value
    return _frame(name, _axes(across, y) + shapes)


def column_chart(name: str, columns: Mapping[str, Number], x: str, y: Scale) -> Markup:
    """One upright bar for each name."""
    shapes = _axes(Scale(0, 1, False, x), y, x_ticks=False)
    width = (RIGHT - LEFT) / max(1, len(columns))
    for place, (label, value) in enumerate(columns.items()):
        left, head = LEFT + place * width, _up(y, value)
        shapes.append(_box(left + 0.15 * width, head, 0.7 * width, BOTTOM - head, 0, f"{label}: {value:,g}"))
        shapes.append(
            Markup('<text class="x" x="{:.1f}" y="{:.1f}">{}</text>').format(left + width / 2, head - 4, short(value))
        )
        shapes.append(
            Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(left + width / 2, BOTTOM + 19, label)
        )
    return _frame(name, shapes)


def bar_chart(name: str, groups: Mapping[str, Sequence[tuple[int, Number, str]]]) -> Markup:
    """Lying bars under a name for each group: (tone, value, what stands behind the bar)."""
    most = max((value for bars in groups.values() for _, value, _ in bars), default=1.0) or 1.0
    shapes, top = [], 4.0
    for label, bars in groups.items():
        middle = top + ROW * len(bars) / 2 + 4
        text = label if len(label) <= MOST_LETTERS else label[: MOST_LETTERS - 1] + "…"
        shapes.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(LABELS - 8, middle, text))
        for tone, value, written in bars:
            length = (WIDTH - LABELS - VALUES) * max(value, 0.0) / most
            shapes.append(_box(LABELS, top + 2, length, ROW - 4, tone, f"{label}: {written}"))
            place = Markup('<text x="{:.1f}" y="{:.1f}">{}</text>')
            shapes.append(place.format(LABELS + length + 6, top + ROW / 2 + 4, written))
            top += ROW
        top += 8
    return _frame(name, shapes, height=top)


def small_multiples(name: str, panels: Sequence[tuple[str, Sequence[Number]]], each_row: int) -> Markup:
    """A little histogram for each list of shares, with a line where all would be equal."""
    width, height = WIDTH / each_row, 62.0
    shapes, most = [], max((max(shares) for _, shares in panels), default=1.0)
    for number, (label, shares) in enumerate(panels):
        left, top = (number % each_row) * width, (number // each_row) * (height + 20) + 6
        step = (width - 10) / len(shares)
        for place, share in enumerate(shares):
            tall = height * share / most
            tip = f"{label}, digit {place}: {share:.1%}"
            shapes.append(_box(left + place * step, top + height - tall, step - 1, tall, 0, tip))
        level = top + height - height / len(shares) / most
        shapes.append(Markup('<path class="mark" d="M{:.1f},{:.1f}h{:.1f}"/>').format(left, level, width - 11))
        middle = left + (width - 10) / 2
        shapes.append(
            Markup('<text class="x" x="{:.1f}" y="{:.1f}">{}</text>').format(middle, top + height + 13, label)
        )
    rows = -(-len(panels) // each_row)
    return _frame(name, shapes, height=rows * (height + 20) + 8)


def heat_map(name: str, matrix: Sequence[Sequence[Number]], labels: Sequence[str], most: Number, unit: str) -> Markup:
    """A square of cells whose depth is their value over `most`; the diagonal is left blank."""
    size = len(matrix)
    cell = min((WIDTH - 60) / size, 44.0)
    shapes = []
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            if row != column:
                tip = f"{labels[row]} and {labels[column]}: {value:.4f} {unit}"
                depth = min(max(value / most, 0.0), 1.0) if most else 0.0
                box = _box(40 + column * cell, 4 + row * cell, cell - 1, cell - 1, 0, tip, depth)
                shapes.append(box)
    every = 1 if cell >= 22 else 2 if cell >= 15 else 4
    for place in range(0, size, every):
        at = (place + 0.5) * cell
        shapes.append(Markup('<text class="y" x="36" y="{:.1f}">{}</text>').format(at + 8, labels[place]))
        shapes.append(
            Markup('<text class="x" x="{:.1f}" y="{:.1f}">{}</text>').format(40 + at, size * cell + 18, labels[place])
        )
    return _frame(name, shapes, height=size * cell + 26)


def point_chart(name: str, points: Sequence[tuple[Number, Number, int, str]]) -> Markup:
    """Points with a tone and a string that shows when one points at them."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x, y = scale_of(xs, "first direction"), scale_of(ys, "second direction", room=0.08)
    dot = Markup('<circle class="t{} dot" cx="{:.1f}" cy="{:.1f}" r="2.2"><title>{}</title></circle>')
    shapes = [dot.format(tone % TONES, _across(x, a), _up(y, b), token(text)) for a, b, tone, text in points]
    return _frame(name, _axes(x, y) + shapes)


def _across(scale: Scale, value: Number) -> float:
    return LEFT + (RIGHT - LEFT) * scale.share(value)


def _up(scale: Scale, value: Number) -> float:
    return BOTTOM - (BOTTOM - TOP) * scale.share(value)


def _box(
    left: Number, top: Number, width: Number, height: Number, tone: int, tip: str, depth: Number | None = None
) -> Markup:
    opacity = Markup("") if depth is None else Markup(' fill-opacity="{:.3f}"').format(depth)
    box = Markup('<rect class="t{}"{} x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
    return box.format(tone % TONES, opacity, left, top, max(width, 0.0), max(height, 0.0), tip)


def _axes(x: Scale, y: Scale, x_ticks: bool = True) -> list[Markup]:
    shapes = [Markup('<path class="axis" d="M{},{}H{}"/>').format(LEFT, BOTTOM, RIGHT)]
    for value in y.ticks():
        at = _up(y, value)
        shapes.append(Markup('<path class="grid" d="M{},{:.1f}H{}"/>').format(LEFT, at, RIGHT))
        shapes.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(LEFT - 7, at + 4, short(value)))
    for value in x.ticks() if x_ticks else []:
        at = _across(x, value)
        shapes.append(Markup('<path class="axis" d="M{:.1f},{}v5"/>').format(at, BOTTOM))
        shapes.append(Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(at, BOTTOM + 19, short(value)))
    middle, words = (LEFT + RIGHT) // 2, Markup('<text class="x" x="{}" y="{}">{}</text>')
    shapes.append(words.format(middle, HEIGHT - 7, x.label))
    if y.label:
        shapes.append(Markup('<text x="{}" y="{}">{}</text>').format(LEFT + 4, TOP + 9, y.label))
    return shapes


def _frame(name: str, shapes: Sequence[Markup], height: Number = HEIGHT) -> Markup:
    frame = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>')
    return frame.format(WIDTH, height, name, Markup("").join(shapes))
