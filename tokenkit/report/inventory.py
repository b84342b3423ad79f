"""One checkpoint or two, tensor by tensor, for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenkit.eval.size_difference import Difference, groups
from tokenkit.models.count import KINDS, Entry, Inventory


def render_inventory(inventory: Inventory) -> RenderableType:
    """The tensors by name and kind, the totals of each kind, and what is stored."""
    found = groups(inventory)
    plain = all(group.kind == KINDS[0] for group in found)  # then the kind says nothing, and there is room for names
    table = _table("shape", "dtype", "elements", kind=not plain)
    for group in found:
        table.add_row(group.pattern, *([] if plain else [group.kind]), *_cells(group.a)[:3])
    return Group(Text(inventory.name, style="bold"), table, Text(""), *_totals(inventory))


def render_difference(found: Difference) -> RenderableType:
    """Both sides' elements by name and kind of tensor, the totals, and why they differ."""
    table = _table("A", "B", "dtype")
    for group in groups(found.a, found.b):
        a, b = _cells(group.a), _cells(group.b)
        types = dict.fromkeys(cells[1] for cells in (a, b) if cells[1])
        table.add_row(group.pattern, group.kind, a[2], b[2], " → ".join(types))
    parts: list[RenderableType] = [table, Text("")]
    for letter, side in (("A", found.a), ("B", found.b)):
        parts += [Text(f"{letter}: {side.name}", style="bold"), *_totals(side)]
    return Group(*parts, Text(""), *(Text(sentence) for sentence in found.sentences))


def _table(*columns: str, kind: bool = True) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("tensors", overflow="fold")
    if kind:
        table.add_column("kind", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column != "shape")
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
