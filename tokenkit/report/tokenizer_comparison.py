"""Two tests of a learned tokenizer, before and after: what became better, and what still fails."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from tokenkit.config import UserError
from tokenkit.eval.tokenizer_results import Example, Figures, SuiteResults
from tokenkit.report.page import write_html
from tokenkit.version import __version__

Side = Literal["learned", "system"]
SHARES = {
    "char_accuracy_positional": "character accuracy, by position",
    "char_accuracy_aligned": "character accuracy, aligned",
    "word_accuracy_positional": "word accuracy, by position",
    "word_accuracy_bag": "word accuracy, as a bag",
    "byte_accuracy": "byte accuracy",
    "chunk_exact": "chunks exact",
}
NUMBERS = {
    "mean_edit_distance": "mean edit distance",
    "reconstruction_perplexity": "reconstruction perplexity",
    "bytes_per_token": "bytes per token",
}
SIDES: dict[Side, str] = {"learned": "Network and quantiser alone", "system": "The whole tokenizer"}
BAR_WIDTH, BAR_HEIGHT, BAR_GAP = 240, 9, 3
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Delta:
    """One figure before and after."""

    name: str
    title: str
    before: float
    after: float
    is_share: bool
    """Whether it is drawn as a bar, and its change counted in percentage points."""

    @property
    def change(self) -> float:
        """After less before: percentage points of a share, else as it is."""
        return (self.after - self.before) * (100 if self.is_share else 1)

    def shown(self) -> tuple[str, str, str]:
        """Before, after and change for people."""
        if self.is_share:
            return f"{self.before:.1%}", f"{self.after:.1%}", _signed(f"{self.change:+.1f}") + " points"
        return f"{self.before:.4g}", f"{self.after:.4g}", _signed(f"{self.change:+.4g}")

    def bars(self) -> Markup:
        """Two bars of a share, before above after."""
        parts = [
            f'<rect class="{kind}" x="0" y="{n * (BAR_HEIGHT + BAR_GAP)}" height="{BAR_HEIGHT}"'
            f' width="{max(value * BAR_WIDTH, 1):.2f}" rx="2" data-value="{value}"/>'
            for n, (kind, value) in enumerate((("before", self.before), ("after", self.after)))
        ]
        height = 2 * BAR_HEIGHT + BAR_GAP
        label = f"{self.shown()[0]} before, {self.shown()[1]} after"
        frame = f'<svg class="pair" viewBox="0 0 {BAR_WIDTH} {height}" role="img" aria-label="{label}">'
        return Markup(f"{frame}{''.join(parts)}</svg>")


@dataclass(frozen=True)
class Failure:
    """A text that the later tokenizer still does not give back."""

    side: Side
    text: str
    output: str
    diagnosis: str


@dataclass(frozen=True)
class Comparison:
    """Figures of both sides, and what still fails."""

    before: SuiteResults
    after: SuiteResults
    deltas: Mapping[Side, Sequence[Delta]]
    failing: Sequence[Failure]

    def as_json(self) -> dict[str, Any]:
        """Plain values: per side and figure before, after and change (of shares: percentage points)."""
        sides = {
            side: {d.name: {"before": d.before, "after": d.after, "change": d.change} for d in deltas}
            for side, deltas in self.deltas.items()
        }
        return {**sides, "still_failing": [vars(failure) for failure in self.failing]}

    def lines(self) -> list[str]:
        """The same for people, line by line."""
        lines = [f"{self.before.model} → {self.after.model}"]
        for side, deltas in self.deltas.items():
            lines.append(f"{SIDES[side]}{'before':>{42 - len(SIDES[side])}}{'after':>12}{'change':>16}")
            for delta in deltas:
                before, after, change = delta.shown()
                lines.append(f"  {delta.title:30}{before:>10}{after:>12}{change:>16}")
        lines += [f"still fails ({f.side}): {f.text!r} as {f.output!r}: {f.diagnosis}" for f in self.failing]
        return lines if self.failing else [*lines, "nothing fails any more"]


def compare(before: SuiteResults, after: SuiteResults) -> Comparison:
    """What changed; UserError where the two were measured on different texts."""
    texts, others = (_standard(results) for results in (before, after))
    if texts != others:
        odd = next(iter({*texts} ^ {*others}), "their order")
        raise UserError(f"compare: the two were measured on different examples ({odd!r}); test both on the same ones")
    deltas: dict[Side, list[Delta]] = {}
    if before.learned is not None and after.learned is not None:
        deltas["learned"] = _deltas(before.learned, after.learned)
    deltas["system"] = _deltas(before.system, after.system)
    failing = [failure for side in SIDES for example in after.examples for failure in _failures(side, example)]
    return Comparison(before, after, deltas, failing)


def write_comparison_page(found: Comparison, path: Path) -> None:
    """One HTML file that needs nothing else, replaced whole or not at all."""
    values = {"found": found, "titles": SIDES, "facts": _facts(found), "records": _records(found)}
    write_html(path, "tokenizer_comparison.html.jinja", version=__version__, **values)


def _standard(results: SuiteResults) -> list[str]:
    return [example.text for example in results.examples if example.standard]


def _deltas(before: Figures, after: Figures) -> list[Delta]:
    old, new = before.model_dump(), after.model_dump()
    found = [Delta(name, title, old[name], new[name], True) for name, title in SHARES.items() if name in old]
    share, now = before.perfect / before.examples, after.perfect / after.examples
    found.append(Delta("perfect", f"perfect, of {after.examples}", share, now, True))
    return found + [Delta(name, title, old[name], new[name], False) for name, title in NUMBERS.items() if name in old]


def _failures(side: Side, example: Example) -> list[Failure]:
    outcome = example.learned if side == "learned" else example.system
    if outcome is None or outcome.exact:
        return []
    return [Failure(side, example.text, outcome.output, outcome.diagnosis or "differs")]


def _facts(found: Comparison) -> list[tuple[str, str]]:
    facts = []
    for side, results in (("before", found.before), ("after", found.after)):
        step = "" if results.step is None else f", step {results.step:,}"
        facts.append((side, f"{results.model}{step}"))
        facts.append((f"{side}, tested", results.timestamp))
        if results.fingerprint:
            facts.append((f"{side}, fingerprint", results.fingerprint[:16]))
    return facts


def _records(found: Comparison) -> list[tuple[str, str, str, bool]]:
    """Every text with what became of it before and after, learned where there is a network, and whether it is right."""
    old = {example.text: example for example in found.before.examples}
    rows = []
    for example in found.after.examples:
        now, then = example.learned or example.system, old.get(example.text)
        earlier = "" if then is None else (then.learned or then.system).output
        rows.append((example.text, earlier, now.output, now.exact))
    return rows


def _signed(number: str) -> str:
    return number.replace("-", MINUS)
