"""Draws docs/pipeline.svg: what becomes of the states of two models before a loss compares them.

The words in the boxes are those that a run file may say; they come from the code. Run it after a change of those.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from xml.sax.saxutils import escape

from tokenkit.losses.aligned import Layers, Norm, Projector

TARGET = Path(__file__).parents[1] / "docs" / "pipeline.svg"
WIDTH, HEIGHT = 1000, 388
TEACHER, STUDENT, NEUTRAL = "#2f6f9f", "#b3541e", "#444444"
UPPER, LOWER, BOX = 62, 196, 92  # where the lanes begin, and how high their boxes are
CENTRE = (UPPER + LOWER + BOX) // 2


def words(option: Any) -> list[str]:
    """What an option may say, in the order of the code; of a union, its words."""
    found = [get_args(choice) or (choice,) for choice in get_args(option)]
    return [word for choice in found for word in choice if isinstance(word, str)]


def lines(of: Sequence[str], width: int) -> list[str]:
    """Words joined to lines of at most so many characters."""
    found = [""]
    for word in of:
        longer = f"{found[-1]} {word}".strip()
        if len(longer) > width and found[-1]:
            found.append(word)
        else:
            found[-1] = longer
    return found


def text(x: int, y: int, content: str, *, size: int = 13, colour: str = NEUTRAL, bold: bool = False) -> str:
    """One centred line."""
    style = f'font-size="{size}" fill="{colour}" text-anchor="middle"' + (' font-weight="bold"' if bold else "")
    return f'<text x="{x}" y="{y}" {style}>{escape(content)}</text>'


def box(x: int, y: int, width: int, height: int, colour: str, title: str, about: Sequence[str]) -> list[str]:
    """A titled box with lines below the title, centred in it."""
    middle, first = x + width // 2, y + height // 2 - 8 * len(about)
    below = [text(middle, first + 20 + 16 * i, line, size=11) for i, line in enumerate(about)]
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#ffffff" stroke="{colour}"/>'
    return [shape, text(middle, first + 4, title, colour=colour, bold=True), *below]


def arrow(colour: str, *points: tuple[int, int]) -> str:
    """A line through points with a head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    (left, before), (x, y) = points[-2:]
    back = 8 if y < before else -8
    aside = 8 if x < left else -8
    base = f"{x + aside},{y - 4} {x + aside},{y + 4}" if y == before else f"{x - 4},{y + back} {x + 4},{y + back}"
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}"/><polygon points="{x},{y} {base}" fill="{colour}"/>'
    )


def lane(colour: str, y: int, stops: Sequence[tuple[int, int]]) -> list[str]:
    """Arrows from box to box at the height of a lane's middle."""
    return [arrow(colour, (start, y + BOX // 2), (end, y + BOX // 2)) for start, end in stops]


def picture() -> str:
    """The whole file."""
    tall = LOWER + BOX - UPPER
    norms, projectors = (lines([w for w in words(option) if w != "none"], 24) for option in (Norm, Projector))
    parts = [
        text(WIDTH // 2, 24, "From the states of two models to a loss", size=15, bold=True),
        *box(16, UPPER, 132, BOX, TEACHER, "teacher", ["no gradient,", "live or recorded"]),
        *box(16, LOWER, 132, BOX, STUDENT, "student", ["any depth, width", "and weights"]),
        *box(196, UPPER, 168, tall, NEUTRAL, "mapper: layers", lines(words(Layers), 20)),
        *box(412, LOWER, 148, BOX, STUDENT, "projector", projectors),
        *box(608, UPPER, 184, BOX, TEACHER, "norm", norms),
        *box(608, LOWER, 184, BOX, STUDENT, "norm", ["the same, or none:", "norm_sides: teacher"]),
        *box(840, UPPER, 144, tall, NEUTRAL, "loss", ["at each position,", "pairs by their", "weights"]),
        *lane(TEACHER, UPPER, [(148, 196), (364, 608), (792, 840)]),
        *lane(STUDENT, LOWER, [(148, 196), (364, 412), (560, 608), (792, 840)]),
        text(486, UPPER + BOX // 2 - 10, "[B T P E]", size=11, colour=TEACHER),
        text(584, LOWER + BOX // 2 - 10, "[.. E]", size=11, colour=STUDENT),
        text(388, LOWER + BOX // 2 - 10, "[.. D]", size=11, colour=STUDENT),
        text(486, CENTRE, "norm_first turns the order round", size=11),
        arrow(TEACHER, (82, UPPER), (82, 42), (912, 42), (912, UPPER)),
        arrow(STUDENT, (82, LOWER + BOX), (82, 312), (912, 312), (912, LOWER + BOX)),
        text(486, 304, "logits and what follows from them need neither mapper nor projector nor norm", size=11),
        text(486, 344, "minimised: the sum over losses of weight x schedule x mean,"),
        text(486, 362, "a mean being the sum over the positions that count / their number, both of the whole step"),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fbfbf8"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture(), "utf-8")
    print(TARGET)
