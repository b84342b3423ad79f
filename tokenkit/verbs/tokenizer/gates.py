"""`tokenkit tokenizer gates`: the go or no-go decisions about a learned tokenizer."""

from collections.abc import Callable
from pathlib import Path

from tokenkit.config import Config
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.eval.edge_corpora import EdgesConfig
from tokenkit.eval.edges import edge_battery, edge_line, try_strings
from tokenkit.eval.tokenizer_gates import Evidence, GatesConfig, decide
from tokenkit.eval.tokenizer_results import EdgeResult, Gate, SuiteResults, save_results
from tokenkit.eval.tokenizer_test import EXAMPLES, MORE_EXAMPLES, Subject, examine, held_out_figures, open_subject
from tokenkit.tokenizers.autoencoder.package import Kind

Tell = Callable[[str], None]
MEASURED = SourceConfig(stdlib="held_out", max_bytes=200_000)  # where no corpus is given: every machine has it


class TokenizerGatesRun(Config):
    """A run file of `tokenkit tokenizer gates`."""

    model: Path
    """The folder of a learned tokenizer, or a checkpoint."""
    kind: Kind | None = None
    """compact or open; by default what the package is, and open for a checkpoint."""
    corpus: SourceConfig | None = None
    """Held-out text: learned accuracy, bits per byte, speed and a round trip are measured on it."""
    edges: EdgesConfig = EdgesConfig(random_strings=1000, text_bytes=1 << 20)
    """How much of the strings that tokenizers stumble over."""
    gates: GatesConfig = GatesConfig()
    """What is asked for."""
    output: Path | None = None
    """Where everything that was found goes as JSON."""


def tokenizer_gates(run: TokenizerGatesRun, tell: Tell | None = None) -> tuple[Gate, ...]:
    """The four decisions with their figures; `tell` gets a line per corpus of strings."""
    subject = open_subject(run.model, kind=run.kind)
    results = comprehensive(subject, run.corpus, run.edges, run.gates, run.model, tell)
    if run.output:
        save_results(results, run.output)
    return results.gates


def comprehensive(
    subject: Subject,
    corpus: SourceConfig | None,
    edges: EdgesConfig,
    gates: GatesConfig,
    model: Path | None,
    tell: Tell | None = None,
) -> SuiteResults:
    """Examples, held-out text, all strings that tokenizers stumble over, and the gates."""
    documents = read_documents(corpus) if corpus else read_documents(MEASURED)
    results = examine(subject, "final", more=MORE_EXAMPLES)
    if corpus:
        held_out = held_out_figures(subject.tokenizer, documents)
        results = results.model_copy(update={"held_out": held_out})
    tried = edge_battery(subject.tokenizer, edges, tell)
    tried = (*tried, *_examples_and_corpus(subject, documents, tell))
    evidence = Evidence(subject, results, tried, documents, model)
    return results.model_copy(update={"edges": tried, "gates": decide(evidence, gates)})


def gate_lines(gates: tuple[Gate, ...]) -> list[str]:
    """PASS, FAIL or NOT RUN for every gate, and below it its figures."""
    lines = []
    for gate in gates:
        note = f" ({gate.note})" if gate.note else ""
        lines.append(f"{gate.verdict}  {gate.name} {gate.title}{note}")
        for check in gate.checks:
            mark = "ok  " if check.passed else "FAIL"
            lines.append(f"    {mark} {check.what}: {check.value} ({check.target})")
    return lines


def failed_gates(gates: tuple[Gate, ...]) -> list[str]:
    """One line for every gate that failed."""
    return [
        f"gate {gate.name} failed: " + "; ".join(f"{c.what} {c.value}, {c.target}" for c in gate.checks if not c.passed)
        for gate in gates
        if gate.passed is False
    ]


def _examples_and_corpus(subject: Subject, documents: list[str], tell: Tell | None) -> list[EdgeResult]:
    corpora = {"examples": [*EXAMPLES, *MORE_EXAMPLES], "corpus": documents}
    found = [try_strings(subject.tokenizer, name, strings) for name, strings in corpora.items()]
    if tell:
        for result in found:
            tell(edge_line(result))
    return found
