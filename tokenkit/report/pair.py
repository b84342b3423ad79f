"""One self-contained HTML page of two tokenisations of a text."""

from pathlib import Path

from tokenkit.align.show import Comparison, Token, rows
from tokenkit.config import UserError
from tokenkit.report.page import write_html
from tokenkit.version import __version__

TONES = 6  # colours, defined in pair.css


def write_pair_page(found: Comparison, path: Path) -> None:
    """The page at `path`, replaced whole or not at all."""
    try:
        write_html(path, "pair.html.jinja", found=found, counts=found.counts, sides=_sides(found), version=__version__)
    except UserError as error:
        raise UserError(f"--html {error}; name another file") from None


def _sides(found: Comparison) -> list[list[dict[str, object]]]:
    """Per side the boxes in order: chunk (-1: none), tone, labels, tooltip, and whether a line ends there."""
    made: tuple[list[dict[str, object]], list[dict[str, object]]] = ([], [])
    for row in rows(found):
        tip = _tip(found, row.chunk, row.a, row.b)
        for boxes, tokens in zip(made, (row.a, row.b)):
            if tokens:
                boxes.append(
                    {
                        "chunk": row.chunk,
                        "tone": "alone" if row.chunk < 0 else f"tone{row.chunk % TONES}",
                        "labels": [token.label for token in tokens],
                        "tip": tip,
                        "ends_line": (tokens[-1].text or "").endswith("\n"),
                    }
                )
    return [*made]


def _tip(found: Comparison, chunk: int, a: tuple[Token, ...], b: tuple[Token, ...]) -> str:
    """First the chunk, then a line `id: bytes, place` per token of either side."""
    lines = ["in no chunk" if chunk < 0 else f"chunk {chunk}"]
    for name, tokens in zip("AB", (a, b)):
        for token in tokens:
            place = "stands for no byte of the text" if token.start == token.end else f"bytes {token.start}–{token.end}"
            own = f"{token.label} = {token.spaced_hex}" if token.hex else token.label
            lines.append(f"{name} {token.id}: {own}, {place}")
    return "\n".join(lines)
