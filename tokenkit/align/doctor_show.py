"""A diagnosis for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenkit.align.doctor import Diagnosis
from tokenkit.align.doctor_facts import Facts, Level
from tokenkit.align.show import readable

MARKS: dict[Level, tuple[str, str]] = {"ok": ("✓", "green"), "note": ("•", "yellow"), "warning": ("!", "bold red")}
SCRIPTS = 12


def render(diagnosis: Diagnosis) -> RenderableType:
    """The findings, then tokens per script and per text."""
    facts = diagnosis.facts
    title = Text(f"From {facts.source.name} to {facts.target.name}", style="bold")
    findings = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for finding in diagnosis.findings:
        mark, style = MARKS[finding.level]
        findings.add_row(Text(mark, style), Text(finding.topic, style), Text(_plain(finding.sentence)))
    levels = [finding.level for finding in diagnosis.findings]
    counts = f"{levels.count('warning')} warnings, {levels.count('note')} notes, {levels.count('ok')} in order"
    return Group(title, findings, Text(counts, "dim"), Text(""), _scripts(facts), Text(""), _texts(facts))


def _plain(sentence: str) -> str:
    """A sentence safe for a terminal: what a vocabulary holds may be control characters."""
    return " ".join(readable(word) for word in sentence.split(" "))


def _scripts(facts: Facts) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(f"tokens of {facts.target.name}")
    for column in ("tokens", "same bytes", f"{facts.source.name} tokens for one"):
        table.add_column(column, justify="right")
    for script in facts.scripts[:SCRIPTS]:
        pieces = "–" if script.pieces is None else f"{script.pieces:.1f}"
        table.add_row(script.script, f"{script.tokens:,}", f"{script.same:,}", pieces)
    rest = facts.scripts[SCRIPTS:]
    if rest:
        tokens, same = (sum(counts) for counts in zip(*((script.tokens, script.same) for script in rest)))
        table.add_row(f"{len(rest)} more scripts", f"{tokens:,}", f"{same:,}", "")
    return table


def _texts(facts: Facts) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("text")
    for column in ("bytes", facts.source.name, facts.target.name, "ratio", "known"):
        table.add_column(column, justify="right")
    for one in (*facts.probes, *([facts.corpus] if facts.corpus else [])):
        counts = (f"{number:,}" for number in (one.bytes, one.source_tokens, one.target_tokens))
        table.add_row(one.text, *counts, f"{one.ratio:.2f}" if one.whole else "–", f"{100 * one.known_share:.0f} %")
    return table
