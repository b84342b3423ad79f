"""What is printed for a reader: tables that keep every figure whole at any width, on a terminal or into a pipe.

One place decides. Where a table is too wide, its columns of words are folded; where that is not enough, each row
becomes a few lines. Colours follow NO_COLOR and TERM, as `rich` reads them; a pipe gets plain text.
"""

import os
import re
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

WORDS = 14  # columns that a column of words keeps, however long its words are
UNBOUND = 100_000
DUMB = 25  # lines of a terminal that says nothing of itself


def terminal(*, stderr: bool = False) -> Console:
    """Standard output, or standard error, as wide as COLUMNS says, else as it is; 80 columns into a pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:  # rich reads it too, but not of a dumb terminal
        return Console(stderr=stderr, width=int(columns), height=DUMB)
    return Console(stderr=stderr)


def show(shown: RenderableType) -> None:
    """Prints a table or a text with styles."""
    console = terminal()
    console.print(fitted(shown, console.width))


def fitted(shown: RenderableType, width: int) -> RenderableType:
    """The same, with tables that fit: no figure is cut or folded."""
    if isinstance(shown, Group):
        return Group(*(fitted(part, width) for part in shown.renderables))
    return _fitted(shown, width) if isinstance(shown, Table) else shown


def _fitted(table: Table, width: int) -> Table | Group:
    wide = Console(width=UNBOUND)
    if Measurement.get(wide, wide.options, table).maximum <= width:
        return table
    spared = 0
    for column in table.columns:
        if column.justify == "right" or column.no_wrap:  # figures, and names that one has to type
            pieces = [piece for cell in _cells(column) for piece in re.split(r"(?<=,) ", cell.plain)]
            column.width = max(_longest(pieces), _longest(_header(column).split()))
        else:
            column.overflow = "fold"
            words = [word for cell in (Text(_header(column)), *_cells(column)) for word in cell.plain.split()]
            spared += max(0, min(_longest(words), column.max_width or UNBOUND) - WORDS)
    least = Measurement.get(wide, wide.options, table).minimum - spared
    return table if least <= width else _listed(table)


def _listed(table: Table) -> Group:
    """A row as lines: what it is called, then each figure behind the name of its column."""
    lines = [] if not table.title else [Text(str(table.title), style="italic")]
    headers = [_header(column) for column in table.columns]
    for cells in zip(*(_cells(column) for column in table.columns)):
        said = [(header, cell) for header, cell in zip(headers, cells) if cell.plain.strip()]
        for number, (header, cell) in enumerate(said):
            name = f"  {header}: " if header else "  "
            lines.append(Text.assemble(name, cell) if number else Text.assemble((cell.plain, "bold")))
    return Group(*lines)


def _cells(column: Column) -> list[Text]:
    return [cell if isinstance(cell, Text) else Text.from_markup(str(cell)) for cell in column.cells]


def _header(column: Column) -> str:
    header = column.header
    return header.plain if isinstance(header, Text) else Text.from_markup(str(header)).plain


def _longest(words: Iterable[str]) -> int:
    return max(map(cell_len, words), default=0)
