"""Why two checkpoints differ in size: every stored element of the difference under the name of its cause."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tokenkit.models.count import Entry, Inventory, is_mask

CAUSES = {  # how a cause is explained; {more} and {less} are the names of the two
    "causal-mask buffers": "constants of the attention that old files held and newer ones leave out, not weights",
    "other buffers": "tables that are stored beside the weights and are computed, not trained",
    "tied duplicate": "{more} stores once more a table that it shares with the input embedding",
    "output matrix": "{more} has an output matrix of its own, {less} uses its input embedding",
    "layers": "{more} has more layers",
    "vocabulary": "{more} has rows for more tokens",
    "position table": "{more} has rows for more positions, {less} for fewer or none",
    "sizes": "these tensors are larger in {more}",
    "tensors of A alone": "B has none of these",
    "tensors of B alone": "A has none of these",
}


@dataclass(frozen=True)
class Group:
    """The tensors of one name, over the layers, on both sides; None where a side has none."""

    pattern: str
    kind: str
    a: tuple[Entry, ...]
    b: tuple[Entry, ...]


@dataclass(frozen=True)
class Cause:
    """One cause, and how many stored elements A has more for it (fewer if negative)."""

    cause: str
    elements: int
    share: float
    """Of the stored elements of the side that has more of them in all, in percent."""
    patterns: tuple[str, ...]
    sentence: str


@dataclass(frozen=True)
class Difference:
    """Two inventories and why they differ."""

    a: Inventory
    b: Inventory
    causes: tuple[Cause, ...]
    sentences: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values: totals of both sides, groups, causes, sentences."""
        return {
            "a": summary(self.a),
            "b": summary(self.b),
            "groups": [
                {"pattern": group.pattern, "kind": group.kind, "a": _plain(group.a), "b": _plain(group.b)}
                for group in groups(self.a, self.b)
            ],
            "causes": [asdict(cause) for cause in self.causes],
            "sentences": [*self.sentences],
        }


def summary(inventory: Inventory) -> dict[str, Any]:
    """Totals of one side."""
    return {
        "name": inventory.name,
        "source": inventory.source,
        "parameters": inventory.parameters,
        "stored_elements": inventory.stored_elements,
        "stored_bytes": inventory.stored_bytes,
    }


def inventory_json(inventory: Inventory) -> dict[str, Any]:
    """Plain values of one side: its totals and its groups."""
    rows = [{"pattern": group.pattern, "kind": group.kind, **(_plain(group.a) or {})} for group in groups(inventory)]
    return {**summary(inventory), "groups": rows}


def groups(a: Inventory, b: Inventory | None = None) -> list[Group]:
    """The tensors of both sides by name (a star for the number of a layer) and kind, in A's order."""
    sides = [_grouped(a), _grouped(b) if b is not None else {}]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [Group(*key, *(tuple(side.get(key, ())) for side in sides)) for key in keys]


def difference(a: Inventory, b: Inventory) -> Difference:
    """The causes, largest first; their elements add up to A's stored elements less B's."""
    parts: dict[str, Counter[str]] = {}
    sides = _stored(a), _stored(b)
    for pattern in dict.fromkeys([*sides[0], *sides[1]]):
        for cause, elements in _causes(pattern, a, b, sides[0].get(pattern, []), sides[1].get(pattern, [])):
            if elements:
                parts.setdefault(cause, Counter())[pattern] += elements
    whole = max(a.stored_elements, b.stored_elements, 1)
    made = [_cause(cause, of, a, b, whole) for cause, of in parts.items()]
    causes = tuple(sorted(made, key=lambda cause: -abs(cause.elements)))
    return Difference(a, b, causes, tuple(_sentences(a, b, causes)))


def _grouped(inventory: Inventory) -> dict[tuple[str, str], list[Entry]]:
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in inventory.entries:
        found.setdefault((entry.pattern, entry.kind), []).append(entry)
    return found


def _stored(inventory: Inventory) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in inventory.stored:
        found.setdefault(entry.pattern, []).append(entry)
    return found


def _causes(
    pattern: str, a: Inventory, b: Inventory, mine: list[Entry], theirs: list[Entry]
) -> Iterable[tuple[str, int]]:
    """Where the difference in elements of the tensors of one name comes from."""
    total = _elements(mine) - _elements(theirs)
    first = (mine or theirs)[0]
    if first.kind == "persistent buffer":
        return [("causal-mask buffers" if is_mask(first.name, first.shape) else "other buffers", total)]
    if not mine or not theirs:
        more, less = (a, b) if mine else (b, a)
        if first.kind == "tied duplicate":
            return [("tied duplicate", total)]
        if any(entry.pattern == pattern and entry.kind == "tied duplicate" for entry in less.entries):
            return [("output matrix", total)]
        positions = len(first.shape) == 2 and first.shape[0] == more.positions
        return [("position table" if positions else f"tensors of {'A' if mine else 'B'} alone", total)]
    shapes = {entry.shape for entry in mine}, {entry.shape for entry in theirs}
    if max(map(len, shapes)) > 1 or len(first.shape) != len(theirs[0].shape) or not first.shape:
        return [("sizes", total)]
    each = first.elements - theirs[0].elements
    layers = (len(mine) - len(theirs)) * theirs[0].elements
    rows = (first.shape[0] - theirs[0].shape[0]) * (theirs[0].elements // max(theirs[0].shape[0], 1))
    found = [("layers", layers), ("sizes", len(mine) * (each - rows))]
    return [*found, (_of_rows(first, theirs[0], a, b), len(mine) * rows)]


def _of_rows(mine: Entry, theirs: Entry, a: Inventory, b: Inventory) -> str:
    rows = mine.shape[0], theirs.shape[0]
    if rows == (a.vocabulary, b.vocabulary):
        return "vocabulary"
    return "position table" if rows == (a.positions, b.positions) else "sizes"


def _elements(entries: Iterable[Entry]) -> int:
    return sum(entry.elements for entry in entries)


def _cause(cause: str, parts: Counter[str], a: Inventory, b: Inventory, whole: int) -> Cause:
    elements = sum(parts.values())
    more, less = ("A", "B") if elements >= 0 else ("B", "A")
    share = 100 * abs(elements) / whole
    why = CAUSES[cause].format(more=more, less=less)
    biggest = [name for name, _ in sorted(parts.items(), key=lambda part: -abs(part[1]))]
    names = ", ".join(biggest[:3]) + (f" and {len(biggest) - 3} more" if len(biggest) > 3 else "")
    side = "larger" if a.stored_elements != b.stored_elements else "either"
    sentence = (
        f"{cause}: {more} stores {abs(elements):,} elements more ({share:.2f} % of the {side} side's {whole:,}): "
        f"{names}; {why}."
    )
    return Cause(cause, elements, round(share, 4), tuple(parts), sentence)


def _sentences(a: Inventory, b: Inventory, causes: tuple[Cause, ...]) -> Iterable[str]:
    if a.parameters == b.parameters:
        yield f"Both have {a.parameters:,} parameters."
    else:
        (less, small), (more, large) = sorted([(a.parameters, "A"), (b.parameters, "B")])
        share = 100 * (more - less) / more
        yield (f"A has {a.parameters:,} parameters, B {b.parameters:,}: {small} is {share:.2f} % smaller than {large}.")
    yield from (cause.sentence for cause in causes)
    if not causes:
        yield "Both store the same number of elements."
    types = _types(a), _types(b)
    if types[0] != types[1]:
        yield (
            f"dtype: A stores {' and '.join(types[0])}, B {' and '.join(types[1])}: {a.stored_bytes:,} and "
            f"{b.stored_bytes:,} bytes."
        )


def _types(inventory: Inventory) -> list[str]:
    return sorted({entry.dtype for entry in inventory.stored if entry.kind != "persistent buffer"})


def _plain(entries: tuple[Entry, ...]) -> dict[str, Any] | None:
    if not entries:
        return None
    return {
        "tensors": len(entries),
        "shape": [*entries[0].shape] if len({entry.shape for entry in entries}) == 1 else None,
        "dtype": sorted({entry.dtype for entry in entries}),
        "elements": _elements(entries),
        "bytes": sum(entry.elements * entry.itemsize for entry in entries),
        "stored": any(entry.stored for entry in entries),
    }
