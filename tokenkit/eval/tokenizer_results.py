"""What a test of a learned tokenizer found, as the closed schema of its JSON file."""

import json
from pathlib import Path
from typing import Literal

from tokenkit.config import Config, UserError, resolved
from tokenkit.tokenizers.json_config import read_config
from tokenkit.tokenizers.whole_file import write_whole

Phase = Literal["before", "after", "final"]
LONGEST_MESSAGE = 200  # characters of what is wrong with a file


class Figures(Config):
    """Means over examples; shares are in [0, 1], distances count code points."""

    examples: int
    perfect: int
    char_accuracy_positional: float
    char_accuracy_aligned: float
    character_error_rate: float
    word_accuracy_positional: float
    word_accuracy_bag: float
    mean_edit_distance: float
    failures: tuple[str, ...] = ()
    """The texts that do not come back."""


class LearnedFigures(Figures):
    """Network and quantiser alone: no table, no check, no escape."""

    byte_accuracy: float
    chunk_exact: float
    """Share of the chunks of which all bytes and the end come back."""
    reconstruction_perplexity: float
    """exp of the cross-entropy per byte, the end of a chunk counted as one."""


class SystemFigures(Figures):
    """The whole tokenizer."""

    bytes_per_token: float
    """Escapes and parts of chunks included, special tokens not."""
    tiers: dict[str, float]
    """Share of the ids that are bytes, pins and open codes."""


class Outcome(Config):
    """What became of one text on one side; the figures are those of `Figures`."""

    output: str
    exact: bool
    char_accuracy_positional: float
    char_accuracy_aligned: float
    character_error_rate: float
    word_accuracy_positional: float
    word_accuracy_bag: float
    edit_distance: int
    diagnosis: str | None = None
    """One line; None where the text came back."""


class Example(Config):
    """One text."""

    text: str
    standard: bool
    """Whether it is one of those that the figures are means of."""
    ids: tuple[int, ...]
    learned: Outcome | None
    """None where the package has no network."""
    system: Outcome


class EdgeResult(Config):
    """One corpus of strings that tokenizers stumble over."""

    corpus: str
    tried: int
    bytes: int
    wrong: int
    first_wrong: str | None = None
    """The first string that did not come back, and what did."""
    seconds: float


class Check(Config):
    """One figure against its target."""

    what: str
    value: str
    target: str
    passed: bool


class Gate(Config):
    """A go or no-go decision; `passed` is None where it could not be taken."""

    name: str
    title: str
    passed: bool | None
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL or NOT RUN."""
        return "NOT RUN" if self.passed is None else "PASS" if self.passed else "FAIL"


class SuiteResults(Config):
    """The whole file."""

    format: Literal[1] = 1
    phase: Phase
    model: str
    """The path, or `untrained`."""
    step: int | None = None
    """Of the checkpoint."""
    config_hash: str
    fingerprint: str | None = None
    """Of the package or of the checkpoint file; None for a tokenizer that was never saved."""
    timestamp: str
    version: str
    learned: LearnedFigures | None
    system: SystemFigures
    examples: tuple[Example, ...]
    held_out: dict[str, float] | None = None
    """Learned figures on the chunks of a corpus, and what the whole tokenizer spends on it."""
    edges: tuple[EdgeResult, ...] = ()
    gates: tuple[Gate, ...] = ()


def save_results(results: SuiteResults, path: Path | str) -> None:
    """Writes the file, whole or not at all. Half a surrogate pair stands in it as JSON's own escape."""
    text = json.dumps(resolved(results), indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def read_results(path: Path | str) -> SuiteResults:
    """What `save_results` wrote; UserError with one line for another file."""
    try:
        return read_config(SuiteResults, path)
    except UserError as error:
        raise UserError(f"{_shortened(str(error))}; give a file that `tokenizer test` wrote") from None


def _shortened(message: str) -> str:
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} …"
