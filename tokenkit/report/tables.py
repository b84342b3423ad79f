"""Bits per byte as tables and sentences: per target, how much of the gap to the teacher each training closes."""

from collections.abc import Sequence

from rich.table import Table

from tokenkit.report.content import Bar, Kind

KINDS: dict[Kind, str] = {
    "teacher": "teacher",
    "zero_shot": "zero-shot",
    "clm": "CLM",
    "alm": "ALM",
    "trained": "trained",
}


def grouped(bars: Sequence[Bar]) -> dict[str, list[Bar]]:
    """The bars of each group; groups in order of appearance, bars from teacher to trained."""
    groups: dict[str, list[Bar]] = {}
    for bar in bars:
        groups.setdefault(bar.group, []).append(bar)
    return {group: sorted(members, key=lambda bar: list(KINDS).index(bar.kind)) for group, members in groups.items()}


def gap_closed(group: Sequence[Bar]) -> list[tuple[str, float]]:
    """(name, share of the distance from zero-shot to teacher) per trained bar, best first; empty without a gap."""
    teachers = [bar.bits_per_byte for bar in group if bar.kind == "teacher"]
    starts = [bar.bits_per_byte for bar in group if bar.kind == "zero_shot"]
    if len(teachers) != 1 or len(starts) != 1:
        return []
    kinds = [bar.kind for bar in group]
    shares = [
        (
            KINDS[bar.kind] if kinds.count(bar.kind) == 1 and bar.kind != "trained" else bar.label,
            share_closed(teachers[0], starts[0], bar.bits_per_byte),
        )
        for bar in group
        if bar.kind not in ("teacher", "zero_shot")
    ]
    return sorted(((name, share) for name, share in shares if share is not None), key=lambda share: -share[1])


def share_closed(teacher: float, before: float, after: float) -> float | None:
    """The part of the way from before to the teacher that a training went; None where there is none to go."""
    return (before - after) / (before - teacher) if before > teacher else None


def percent(share: float) -> str:
    """A share as whole per cent, with a true minus sign."""
    return f"{100 * share:.0f} %".replace("-0 %", "0 %").replace("-", "\N{MINUS SIGN}")


def gap_sentence(group: Sequence[Bar]) -> str:
    """What the trainings of one group closed, or the empty string where there is no gap to close."""
    shares = gap_closed(group)
    if not shares:
        return ""
    (name, share), *others = shares
    rest = "".join(f", {other} {percent(value)}" for other, value in others)
    return f"{name} closes {percent(share)} of the gap between zero-shot and teacher{rest}."


def bits_per_byte_rows(bars: Sequence[Bar]) -> list[list[str]]:
    """A header row, then one row per target: bits per byte by kind, and the gap closed."""
    kinds = [kind for kind in KINDS if any(bar.kind == kind for bar in bars)]
    rows = [["target", *(KINDS[kind] for kind in kinds), "gap closed"]]
    for group, members in grouped(bars).items():
        cells = [[_value(bar) for bar in members if bar.kind == kind] for kind in kinds]
        closed = ", ".join(f"{name} {percent(share)}" for name, share in gap_closed(members))
        rows.append([group, *(" / ".join(cell) or "–" for cell in cells), closed or "–"])
    return rows


def _value(bar: Bar) -> str:
    return f"{bar.bits_per_byte:.3f}" + (f" ± {bar.sd:.3f}" if bar.sd is not None else "")


def bits_per_byte_table(bars: Sequence[Bar]) -> Table:
    """The same rows for a terminal."""
    header, *rows = bits_per_byte_rows(bars)
    table = Table(title="bits per byte")
    for column in header:
        table.add_column(column, justify="left" if column == "target" else "right")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))  # rich would read [x] as a style
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first one being the header; a trailing newline."""
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"
