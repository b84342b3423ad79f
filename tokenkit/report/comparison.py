"""Several runs on one self-contained HTML page: a table, what their run files differ in, curves, texts, samples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenkit.config import UserError, differences
from tokenkit.report.aligned import FULL_COLOUR
from tokenkit.report.card_facts import figure
from tokenkit.report.content import Output, Sample
from tokenkit.report.curves import DASHES, Training, drawn
from tokenkit.report.page import Shown, shown_text, write_html
from tokenkit.report.runs import FinishedRun
from tokenkit.report.tables import grouped, percent, share_closed
from tokenkit.version import __version__

TONES = 6  # colours of runs, defined in comparison.css
NOTHING = "–"
NOT_COMPARED = ("output",)
GENERATOR = '<meta name="generator" content="tokenkit">'


@dataclass(frozen=True)
class Entry:
    """A trained model: a row of the table. A run folder has one, that of a demo several."""

    run: FinishedRun
    name: str
    tone: str
    target: str
    objective: str
    teacher: float | None
    before: float | None
    after: float
    sd: float | None
    closed: float | None
    """The share of the distance from before to the teacher."""

    @property
    def held_out(self) -> str:
        """Equal where bits per byte may be compared; "" where nothing is known of the text."""
        return self.run.held_out.key if self.run.held_out else ""


@dataclass(frozen=True)
class ShownBar:
    """A bar of the page: `kind` is a class of its style."""

    label: str
    kind: str
    bits_per_byte: float
    sd: float | None = None


@dataclass(frozen=True)
class Runs:
    """What the page shows of several runs."""

    runs: Sequence[FinishedRun]

    @cached_property
    def entries(self) -> list[Entry]:
        """The trained models of all runs, in their order."""
        return [entry for index, run in enumerate(self.runs) for entry in _entries(run, tone(index))]

    @cached_property
    def texts(self) -> dict[str, list[Entry]]:
        """The entries by the text that they were measured on."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.held_out, []).append(entry)
        return found

    def bars(self) -> dict[str, list[ShownBar]]:
        """Per held-out text the teacher, where all have the same, and what each run came to."""
        found: dict[str, list[ShownBar]] = {}
        for key, entries in self.texts.items():
            held_out = entries[0].run.held_out
            title = f"Held-out text: {held_out.shown}" if held_out and key else "Held-out text not known"
            teachers = {round(entry.teacher, 6) for entry in entries if entry.teacher is not None}
            bars = [ShownBar("teacher", "teacher", teachers.pop())] if len(teachers) == 1 else []
            bars += [ShownBar(entry.name, entry.tone, entry.after, entry.sd) for entry in entries]
            found[title] = bars
        return found

    def best(self) -> set[str]:
        """The names of the entries with the fewest bits per byte among those measured on their text."""
        return {min(entries, key=lambda entry: entry.after).name for entries in self.texts.values() if len(entries) > 1}

    def rows(self) -> list[tuple[Entry, dict[str, str]]]:
        """Of each entry the cells of the table, by column; columns that say nothing of any run are left out."""
        found = [(entry, _cells(entry)) for entry in self.entries]
        empty = {name for name in found[0][1] if all(cells[name] == NOTHING for _, cells in found)} if found else set()
        return [(entry, {name: cell for name, cell in cells.items() if name not in empty}) for entry, cells in found]

    def different(self) -> list[tuple[str, list[str]]]:
        """(key, a value per run) of the keys of the run files that are not the same in all; "–" where there is none."""
        first, *others = [run.values for run in self.runs]
        keys = dict.fromkeys(key for other in others for key in differences(first, other))
        top = [key for key in keys if not any(key.startswith(f"{other}.") for other in keys)]
        found = [(key, [_value(run.values, key) for run in self.runs]) for key in top if key not in NOT_COMPARED]
        return [(key, values) for key, values in found if len(set(values)) > 1]

    def trainings(self) -> list[Training]:
        """The curves, in the colours of their runs."""
        return [
            Training(
                run.name if len(run.curves) == 1 else f"{run.name} · {label}",
                f"{tone(index)} of{index}",  # the second class is what its box in the legend hides
                dash(index, number),
                metrics,
            )
            for index, run in enumerate(self.runs)
            for number, (label, metrics) in enumerate(run.curves)
        ]

    def aligned(self) -> list[tuple[str, Shown]]:
        """(name, text) for each text that a run shows in both tokenisations."""
        return [
            (run.name if len(run.report.aligned) == 1 else f"{run.name} · {text.title}", shown_text(text))
            for run in self.runs
            if run.report is not None
            for text in run.report.aligned
        ]

    def samples(self) -> list[Sample]:
        """Per prompt what the models of all runs wrote; a text that several have word for word stands once."""
        found: dict[str, dict[tuple[str, str], list[str]]] = {}
        for run in self.runs:
            for sample in run.report.samples if run.report is not None else ():
                texts = found.setdefault(sample.prompt, {})
                for output in sample.outputs:
                    texts.setdefault((output.label, output.text), []).append(run.name)
        return [
            Sample(prompt=prompt, outputs=tuple(_outputs(texts, len(self.runs)))) for prompt, texts in found.items()
        ]

    def benchmarks(self) -> list[tuple[str, str, list[str]]]:
        """(task, metric, a figure per run) of what the harness measured."""
        measured = [_benchmarks(run.results.get("benchmarks") or {}) for run in self.runs]
        keys = dict.fromkeys(key for one in measured for key in one)
        return [(task, metric, [one.get((task, metric), NOTHING) for one in measured]) for task, metric in keys]

    def facts(self) -> dict[str, str]:
        """What goes for all of them."""
        devices = dict.fromkeys(
            str(made["device"]) for run in self.runs for made in run.provenance.get("made_with", ())[-1:]
        )
        versions = dict.fromkeys(
            str(made["version"]) for run in self.runs for made in run.provenance.get("made_with", ())[-1:]
        )
        teachers = {round(entry.teacher, 3) for entry in self.entries if entry.teacher is not None}
        found = {"runs": str(len(self.runs)), "device": ", ".join(devices), "tokenkit": ", ".join(versions)}
        if len(teachers) == 1:
            found["teacher"] = f"{teachers.pop():.3f} bits per byte"
        return {name: value for name, value in found.items() if value}


def tone(index: int) -> str:
    """The colour of the n-th run, as a class of the page's style."""
    return f"run{index % TONES}"


def dash(index: int, number: int) -> int:
    """How a curve is dashed: neighbours differ in it, and runs of one colour do, for those who see no colours."""
    return (index + index // TONES + number) % DASHES


def write_comparison(runs: Sequence[FinishedRun], page: Path) -> Path:
    """The page of the runs at `page`, replaced whole or not at all; no other file than such a page is replaced."""
    if page.is_file() and GENERATOR not in page.read_text("utf-8", errors="replace")[:2000]:
        raise UserError(f"output: {page}, holds something else than a page of this package; choose another name")
    shown = Runs(runs)
    bars = shown.bars()
    panels = drawn(shown.trainings())
    write_html(
        page,
        "comparison.html.jinja",
        version=__version__,
        runs=runs,
        names=[run.name for run in runs],
        tones=[(run.name, tone(index), dash(index, 0)) for index, run in enumerate(runs)],
        facts=shown.facts(),
        bars=bars,
        longest=max((bar.bits_per_byte + (bar.sd or 0.0) for many in bars.values() for bar in many), default=1.0),
        texts=shown.texts,
        rows=shown.rows(),
        best=shown.best(),
        different=shown.different(),
        panels=panels,
        aligned=shown.aligned(),
        samples=shown.samples(),
        benchmarks=shown.benchmarks(),
        full_colour=FULL_COLOUR,
    )
    return page


def _entries(run: FinishedRun, colour: str) -> list[Entry]:
    """The trained bars of a run; one alone goes by the name of the run."""
    found = []
    for group, bars in grouped(run.bars).items():
        known = {bar.kind: bar.bits_per_byte for bar in bars}
        teacher, before = known.get("teacher"), known.get("zero_shot")
        for bar in bars:
            if bar.kind not in ("teacher", "zero_shot"):
                value = bar.bits_per_byte
                closed = None if teacher is None or before is None else share_closed(teacher, before, value)
                name = f"{run.name} · {group} · {bar.label}"
                found.append(Entry(run, name, colour, group, bar.label, teacher, before, value, bar.sd, closed))
    return [replace(found[0], name=run.name)] if len(found) == 1 else found


def _cells(entry: Entry) -> dict[str, str]:
    """A row of the table; "–" for what is not known."""
    run, held_out = entry.run, entry.run.held_out
    before = "" if entry.before is None else f"{entry.before:.3f} → "
    deviation = "" if entry.sd is None else f" ± {entry.sd:.3f}"
    return {
        "target": entry.target,
        "objective": entry.objective,
        "steps": _count(run.results.get("steps")),
        "bytes read": _count(run.results.get("bytes")),
        "bits per byte": f"{before}{entry.after:.3f}{deviation}",
        "gap closed": NOTHING if entry.closed is None else percent(entry.closed),
        "held-out text": NOTHING if held_out is None else held_out.digest,
        "training": NOTHING if run.seconds is None else duration(run.seconds),
        "parameters": _count(run.parameters),
    }


def duration(seconds: float) -> str:
    """Seconds, or hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _value(values: Mapping[str, Any], key: str) -> str:
    """What stands at a dotted key of a run file."""
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return NOTHING
        node = node[part]
    if isinstance(node, Mapping):
        return "\n".join(f"{name}: {_plain(value)}" for name, value in node.items() if value is not None)
    return _plain(node)


def _plain(value: Any) -> str:
    """A value in a line; null as what is not there."""
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _outputs(texts: Mapping[tuple[str, str], Sequence[str]], count: int) -> list[Output]:
    """What stands under a prompt, with the runs that it is of where not all say it."""
    return [
        Output(label=label if len(runs) == count or runs == [label] else f"{label} · {', '.join(runs)}", text=text)
        for (label, text), runs in texts.items()
    ]


def _benchmarks(found: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    return {
        (row["task"], row["metric"]): NOTHING if row["value"] is None else figure(row["value"])
        for row in found.get("trained", ())
    }
