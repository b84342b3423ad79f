"""Results of benchmarks as tables for a terminal and for Markdown, and as one picture for each claim."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from tokenkit.report.claims import Claim, Machine, Row

HEADER = ("tokenkit", "beside", "unit", "ours", "peer", "times as good")
INK, PALE = "#1b1f24", "#f7f8fa"


def number(value: float | None) -> str:
    """Three figures or more, as one reads them."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4g}"


def ratio_cell(row: Row) -> str:
    """The ratio with its extremes, or why there is none."""
    if row.ratio is None:
        return row.note or "–"
    extremes = f" ({row.ratio.min:.2f} to {row.ratio.max:.2f})" if row.repeats > 1 else ""
    return f"{row.ratio.median:.2f}{extremes}" + (f"; {row.note}" if row.note else "")


def cells(row: Row) -> list[str]:
    """A row of every table. Seconds are left to the files: between machines only ratios mean something."""
    sides = ["", ""] if "seconds" in row.unit else [number(row.ours), number(row.peer)]
    return [row.what, row.beside, row.unit, *sides, ratio_cell(row)]


def claims_tables(claims: Sequence[Claim]) -> Group:
    """A table for each claim, in a terminal; narrow ones fold the words."""
    shown: list[Table | str] = []
    for claim in claims:
        table = Table(box=None, title=claim.title, title_justify="left", title_style="bold", header_style="dim")
        for name in HEADER:
            right = name in ("ours", "peer")
            table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for row in claim.rows:
            table.add_row(*map(escape, cells(row)))
        shown += [table, ""]
    return Group(*shown)


def comparison_lines(changed: Sequence[str], alone: Sequence[str], same: int) -> list[str]:
    """What two sets of results say of each other: a line each, and a last one with the counts."""
    lines = [f"changed: {line}" for line in changed] + [f"not compared: {line}" for line in alone]
    rest = f", {len(alone)} in one of the two alone" if alone else ""
    words = f"{len(changed)} changed" if changed else "none changed"
    return [*lines, f"{same} orderings are the same, {words}{rest}"]


def machine_words(machine: Machine) -> str:
    """The machine in a few words."""
    more = "" if machine.accelerator == "none" else f", {machine.accelerator}"
    return f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB{more}"


def claim_markdown(claim: Claim, picture: str | None) -> str:
    """A section of docs/results.md."""
    versions = ", ".join(f"{name} {version}" for name, version in claim.versions.items())
    lines = [f"## {claim.title}", "", *textwrap.wrap(claim.sentence, 125), "", f"`{claim.command}`", ""]
    lines += [f"{machine_words(claim.machine)}; {claim.date}; {versions}.", ""]
    lines += ["| " + " | ".join(HEADER) + " | repeats |", "|---|---|---|---:|---:|---|---:|"]
    lines += ["| " + " | ".join([*cells(row), str(row.repeats)]) + " |" for row in claim.rows]
    if picture is not None:
        lines += [
            "",
            f"![{claim.title}: how many times as good as the peer, with the spread of the repeats]({picture})",
        ]
    return "\n".join(lines) + "\n"


def plot_claim(claim: Claim, path: Path) -> bool:
    """The ratios of a claim with their spread, as SVG on a ground of its own, so that it is read on any page."""
    rows = [row for row in claim.rows if row.ratio is not None]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": claim.claim, "font.size": 10, "text.color": INK}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#8a919c"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained", facecolor=PALE)
        axes.set_facecolor(PALE)
        for height, row in enumerate(reversed(rows)):
            assert row.ratio is not None
            colour = "#1a6e6a" if row.ratio.median >= 1 else "#b1471b"
            axes.plot([row.ratio.min, row.ratio.max], [height, height], color=colour, linewidth=2.5, alpha=0.5)
            axes.plot([row.ratio.median], [height], "o", color=colour)
            axes.annotate(f"{row.ratio.median:.3g}", (row.ratio.median, height), (0, 6), textcoords="offset points",
                          ha="center", fontsize=8, color=INK)  # fmt: skip
        axes.axvline(1, color="#8a919c", linewidth=1)
        axes.set_xscale("log")
        low = min(1.0, *(row.ratio.min for row in rows if row.ratio))
        high = max(1.0, *(row.ratio.max for row in rows if row.ratio))
        margin = max((high / low) ** 0.08, 1.05)
        axes.set_xlim(low / margin, high * margin)
        fine = (0.7, 1.5) if high / low < 8 else ()
        every = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, *fine)
        marks = [mark for mark in every if low / margin < mark < high * margin]
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), [f"{row.what}\n/ {row.beside}: {row.unit}" for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.3)
        axes.set_xlabel("times as good as the peer")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return True
