"""An audit for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenkit.align.doctor_show import MARKS
from tokenkit.align.show import readable
from tokenkit.config import dump_yaml
from tokenkit.eval.audit_facts import Audit

SUSPECTS = 5


def render_audit(audit: Audit) -> RenderableType:
    """The findings, the most suspicious rows, and the lines that mend them."""
    facts = audit.facts
    parts: list[RenderableType] = [Text(audit.name, style="bold")]
    parts.append(Text(f"{facts['rows']:,} rows of {facts['width']:,}, {facts['tokens']:,} tokens", "dim"))
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=20)
    table.add_column()
    for finding in audit.findings:
        mark, style = MARKS[finding.level]
        table.add_row(Text(mark, style), Text(finding.topic, style), Text(_plain(finding.sentence)))
    levels = [finding.level for finding in audit.findings]
    counts = f"{levels.count('warning')} warnings, {levels.count('note')} notes, {levels.count('ok')} in order"
    parts += [table, Text(counts, "dim")]
    if audit.breakers:
        parts += [Text(""), _suspects(audit)]
    if audit.override:
        lines = dump_yaml({"transfer": {"override": audit.override}})
        parts += [Text(""), Text("To make these tokens of their own pieces, transfer again with", "dim"), Text(lines)]
    return Group(*parts)


def _plain(sentence: str) -> str:
    """A sentence safe for a terminal: what a vocabulary holds may be control characters."""
    return " ".join(readable(word) for word in sentence.split(" "))


def _suspects(audit: Audit) -> Table:
    """The loudest new rows: what they take, and places at which they win here and in what they are held against."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("loudest new rows", overflow="fold", max_width=18)
    for column in ("id", "takes", "wins", "before", "norm z", "|weights|"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in audit.breakers[:SUSPECTS]:
        weights = f"{one['absolute']:.1f}" if "absolute" in one else "–"
        cells = (
            one["id"],
            f"{100 * one['score']:.1f} %",
            one["wins"],
            one["wins_other"],
            f"{one['norm_z']:.1f}",
            weights,
        )
        table.add_row(one["token"], *map(str, cells))
    return table
