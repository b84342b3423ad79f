"""One checkpoint or two, tensor by tensor, for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenkit.eval.size_difference import Difference, groups
from tokenkit.models.count import KINDS, Entry, Inventory


def render_inventory(inventory: Inventory) -> RenderableType:
    """The tensors by name and kind, the totals of each kind, and what is stored."""
    table = _table("shape", "dtype", "elements", "bytes")
    for group in groups(inventory):
        table.add_row(group.pattern, group.kind, *_cells(group.a))
    return Group(Text(inventory.name, style="bold"), table, Text(""), *_totals(inventory))


def render_difference(found: Difference) -> RenderableType:
    """Both sides' tensors by name and kind, the totals, and why they differ."""
    table = _table("A", "dtype", "elements", "B", "dtype", "elements")
    for group in groups(found.a, found.b):
        table.add_row(group.pattern, group.kind, *_cells(group.a)[:3], *_cells(group.b)[:3])
    parts: list[RenderableType] = [table, Text("")]
    for letter, side in (("A", found.a), ("B", found.b)):
        parts += [Text(f"{letter}: {side.name}", style="bold"), *_totals(side)]
    return Group(*parts, Text(""), *(Text(sentence) for sentence in found.sentences))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("tensors", no_wrap=True)
    table.add_column("kind")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cells(entries: tuple[Entry, ...]) -> list[str]:
    """Count and shape, dtype, elements, bytes; brackets around what no file holds."""
    if not entries:
        return ["", "", "", ""]
    shapes = list(dict.fromkeys(entry.shape for entry in entries))
    shape = " x ".join(map(str, shapes[0])) if len(shapes) == 1 else "various"
    count = f"{len(entries)} of " if len(entries) > 1 else ""
    elements = sum(entry.elements for entry in entries)
    size = sum(entry.elements * entry.itemsize for entry in entries)
    numbers = [f"{elements:,}", f"{size:,}"]
    if not any(entry.stored for entry in entries):
        numbers = [f"({number})" for number in numbers]
    return [count + (shape or "1"), ", ".join(sorted({entry.dtype for entry in entries})), *numbers]


def _totals(inventory: Inventory) -> list[Text]:
    """A line on parameters, one on what is stored, and one on each kind beside trainable tensors."""
    verb = "stores" if inventory.source == "file" else "would store"
    lines = [
        f"{inventory.parameters:,} parameters, each once",
        f"{verb} {inventory.stored_elements:,} elements, {inventory.stored_bytes:,} bytes",
    ]
    for kind in KINDS[1:]:
        some = [entry for entry in inventory.entries if entry.kind == kind]
        if some:
            note = "" if any(entry.stored for entry in some) else ", not stored"
            lines.append(f"{kind}: {sum(entry.elements for entry in some):,} elements{note}")
    return [Text(f"  {line}") for line in lines]
