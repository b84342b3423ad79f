"""`tokenkit tokenizer compare`: two tests of a learned tokenizer beside each other."""

from pathlib import Path

from tokenkit.config import Config
from tokenkit.eval.tokenizer_results import read_results
from tokenkit.report.tokenizer_comparison import Comparison, compare, write_comparison_page


class TokenizerCompareRun(Config):
    """A run file of `tokenkit tokenizer compare`."""

    before: Path
    """What `tokenkit tokenizer test` wrote before training."""
    after: Path
    """And after it."""
    report: Path | None = None
    """Where the page goes, one HTML file."""


def compare_tests(run: TokenizerCompareRun) -> Comparison:
    """Every figure before and after, and what still fails; the page is written where one is named."""
    found = compare(read_results(run.before), read_results(run.after))
    if run.report:
        write_comparison_page(found, run.report)
    return found
