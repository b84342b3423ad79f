"""`tokenkit align`: two tokenisations of one text, side by side."""

import sys
from pathlib import Path
from typing import Literal

from tokenkit.align.show import Comparison, compare
from tokenkit.config import Config, UserError
from tokenkit.report.pair import write_pair_page
from tokenkit.tokenizers.load import load_tokenizer


class AlignRun(Config):
    """A run file of `tokenkit align`."""

    teacher: str
    """A folder, a tokenizer.json, a hub id, or `byte`."""
    student: str
    text: str
    """The text, or `@FILE`, or `-` for standard input; `@@` begins a text with an at sign."""
    mode: Literal["unconstrained", "space"] = "unconstrained"
    """Every chunk, or chunks that end where both sides go on with a space."""
    special: bool = False
    """Begin the text as each tokenizer begins a document."""
    html: Path | None = None
    """Write a page here."""


def compare_run(run: AlignRun) -> Comparison:
    """Both tokenisations of the run's text, aligned; the page, if one is asked for, is written."""
    teacher, student = load_tokenizer(run.teacher), load_tokenizer(run.student)
    found = compare(read_text(run.text), teacher, student, special=run.special, mode=run.mode)
    if run.html is not None:
        write_pair_page(found, run.html)
    return found


def read_text(word: str) -> str:
    """The text that a word of the command line stands for."""
    if word == "-":
        raw, name = sys.stdin.buffer.read(), "standard input"
    elif word.startswith("@") and not word.startswith("@@"):
        raw, name = _read(Path(word[1:])), word[1:]
    else:
        return word[1:] if word.startswith("@@") else word
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text at byte {error.start}; convert it to UTF-8") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"text '@{path}': {error.strerror}; write @FILE, or @@ to begin a text with @") from None
