"""The checklist's tester: a view of the test, of its file and of the comparison page."""

from collections.abc import Sequence
from pathlib import Path

from tokenkit.config import UserError
from tokenkit.eval.tokenizer_results import Phase, SuiteResults, read_results, save_results
from tokenkit.eval.tokenizer_test import EXAMPLES, MORE_EXAMPLES, UNTRAINED, Subject, examine
from tokenkit.report.tokenizer_comparison import Comparison, compare, write_comparison_page
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer


class TokenizerReconstructionTester:
    """Tests one tokenizer, and remembers what it found."""

    def __init__(self, tokenizer: AutoEncoderTokenizer, model: str = UNTRAINED) -> None:
        """`model` is what the tokenizer is called in files and on pages."""
        self.subject = Subject.of(tokenizer, model)
        self.history: list[SuiteResults] = []
        self._compared: Comparison | None = None

    def test_before_training(self) -> SuiteResults:
        """The standard examples, as of an untrained tokenizer."""
        return self._run("before", EXAMPLES, MORE_EXAMPLES)

    def test_after_training(self) -> SuiteResults:
        """The standard examples, as of a trained tokenizer."""
        return self._run("after", EXAMPLES, MORE_EXAMPLES)

    def run_test_suite(self, examples: Sequence[str] = EXAMPLES, phase: Phase = "after") -> SuiteResults:
        """The figures over any examples, learned and whole, and a record of each."""
        return self._run(phase, examples, ())

    def save_results(self, path: Path | str) -> None:
        """Writes what was found last as JSON."""
        save_results(self._last(), path)

    def compare_results(self, before: Path | str, after: Path | str) -> Comparison:
        """What changed between two files; `generate_report` is about it then."""
        self._compared = compare(read_results(before), read_results(after))
        return self._compared

    def generate_report(self, path: Path | str) -> None:
        """Writes the page of what was compared last, else of the first and the last test."""
        if self._compared is None and len(self.history) < 2:
            raise UserError("generate_report: nothing to compare yet; test twice, or call compare_results first")
        write_comparison_page(self._compared or compare(self.history[0], self._last()), Path(path))

    def _run(self, phase: Phase, examples: Sequence[str], more: Sequence[str]) -> SuiteResults:
        found = examine(self.subject, phase, examples, more)
        self.history.append(found)
        return found

    def _last(self) -> SuiteResults:
        if not self.history:
            raise UserError("save_results: nothing was tested yet; call run_test_suite first")
        return self.history[-1]
