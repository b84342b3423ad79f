"""`tokenkit tokenizer test`: what becomes of example texts before, after and at the end of training."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.edge_corpora import EdgesConfig
from tokenkit.eval.edges import edge_battery, edge_line
from tokenkit.eval.tokenizer_gates import GatesConfig
from tokenkit.eval.tokenizer_results import Phase, SuiteResults, save_results
from tokenkit.eval.tokenizer_test import MORE_EXAMPLES, examine, held_out_figures, open_subject
from tokenkit.tokenizers.autoencoder.package import Kind
from tokenkit.verbs.tokenizer.gates import Tell, comprehensive, failed_gates, gate_lines


class TokenizerTestRun(Config):
    """A run file of `tokenkit tokenizer test`."""

    phase: Phase
    """before training, after it, or final: the packaged tokenizer."""
    model: Path | None = None
    """The folder of a learned tokenizer, or a checkpoint; before training it may be left out."""
    config: Path | None = None
    """The JSON configuration of the untrained tokenizer, where there is no model; by default the preset small."""
    kind: Kind | None = None
    """compact or open; by default what the package is, and open for a checkpoint."""
    output: Path | None = None
    """Where everything that was found goes as JSON."""
    comprehensive: bool = False
    """Also try every string that tokenizers stumble over; in the final phase the gates are decided as well."""
    corpus: SourceConfig | None = None
    """Held-out text, to be measured on too."""
    edges: EdgesConfig = EdgesConfig()
    """How much of the strings that tokenizers stumble over."""
    gates: GatesConfig = GatesConfig()
    """What the gates ask for."""

    @model_validator(mode="after")
    def _has_a_model(self) -> "TokenizerTestRun":
        if self.phase != "before" and self.model is None:
            raise UserError(f"model: missing in phase {self.phase}; write the folder of a tokenizer or a checkpoint")
        return self


def run_tokenizer_test(run: TokenizerTestRun, tell: Tell | None = None) -> SuiteResults:
    """Everything that was found, also written to `output`; `tell` gets a line per corpus of strings."""
    subject = open_subject(run.model, run.config, run.kind)
    if run.phase == "final" and run.comprehensive:
        results = comprehensive(subject, run.corpus, run.edges, run.gates, run.model, tell)
    else:
        results = examine(subject, run.phase, more=MORE_EXAMPLES)
        changes: dict[str, Any] = {}
        if run.corpus:
            changes["held_out"] = held_out_figures(subject.tokenizer, read_documents(run.corpus))
        if run.comprehensive:
            changes["edges"] = edge_battery(subject.tokenizer, run.edges, tell)
        results = results.model_copy(update=changes)
    if run.output:
        save_results(results, run.output)
    return results


def failures(results: SuiteResults) -> list[str]:
    """One line for every gate that failed, and for every corpus of which a string did not come back."""
    decided = any(gate.name == "G1" for gate in results.gates)  # which says so too
    lost = [] if decided else [edge_line(result) for result in results.edges if result.wrong]
    return [*failed_gates(results.gates), *lost]


def result_lines(results: SuiteResults) -> list[str]:
    """The figures for people: learned and whole beside each other, what fails, strings tried, gates."""
    learned, system = results.learned, results.system
    sides = [side for side in (learned, system) if side is not None]
    lines = [f"{results.phase}: {results.model}", f"{'':34}{'learned' if learned else '':>12}{'system':>12}"]
    if learned is None:
        lines[0] += " (no network in this package, so nothing learned to measure)"
    for name, title in TITLES.items():
        cells = [f"{side.model_dump()[name]:.4f}" for side in sides]
        lines.append(f"{title:34}" + "".join(f"{cell:>12}" for cell in cells).rjust(24))
    perfect = "".join(f"{f'{side.perfect}/{side.examples}':>12}" for side in sides)
    lines.append(f"{'perfect':34}{perfect.rjust(24)}")
    if learned:
        lines.append(f"{'reconstruction perplexity':34}{learned.reconstruction_perplexity:>12.4g}")
    tiers = ", ".join(f"{tier} {share:.0%}" for tier, share in system.tiers.items())
    lines.append(f"{'bytes per token':34}{system.bytes_per_token:>24.3f}  ({tiers})")
    lines += [f"held-out {name}: {value:.5g}" for name, value in (results.held_out or {}).items()]
    for example in results.examples:
        side = example.learned or example.system
        if side.diagnosis:
            lines.append(f"fails: {example.text!r}: {side.diagnosis}")
    if results.edges:
        wrong, tried = sum(result.wrong for result in results.edges), sum(result.tried for result in results.edges)
        lines.append(f"{wrong:,} wrong of {tried:,} strings in {len(results.edges)} corpora")
    return lines + gate_lines(results.gates)


TITLES = {
    "char_accuracy_positional": "character accuracy, by position",
    "char_accuracy_aligned": "character accuracy, aligned",
    "word_accuracy_positional": "word accuracy, by position",
    "word_accuracy_bag": "word accuracy, as a bag",
    "mean_edit_distance": "mean edit distance",
}
