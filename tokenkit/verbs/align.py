"""`tokenkit align`: two tokenisations of one text, side by side."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tokenkit.align.show import Comparison, compare, compare_chats
from tokenkit.config import Config, UserError
from tokenkit.data.messages import read_dialogues
from tokenkit.data.source import SourceConfig
from tokenkit.report.pair import write_pair_page
from tokenkit.tokenizers.load import load_tokenizer


class AlignRun(Config):
    """A run file of `tokenkit align`."""

    teacher: str
    """A folder, a tokenizer.json, a hub id, or `byte`."""
    student: str
    text: str | None = None
    """The text, or `@FILE`, or `-` for standard input; `@@` begins a text with an at sign."""
    messages: str | None = None
    """Instead of a text: a .jsonl file of conversations, each side written by its own chat template."""
    row: int = Field(0, ge=0)
    """Which conversation of the file, from 0."""
    mode: Literal["unconstrained", "space"] = "unconstrained"
    """Every chunk, or chunks that end where both sides go on with a space."""
    special: bool = False
    """Begin the text as each tokenizer begins a document."""
    html: Path | None = None
    """Write a page here."""

    @model_validator(mode="after")
    def _one_text(self) -> "AlignRun":
        if (self.text is None) == (self.messages is None):
            raise UserError("align: give a text, or --messages FILE, and not both")
        return self


def compare_run(run: AlignRun) -> Comparison:
    """Both tokenisations of the run's text, aligned; the page, if one is asked for, is written."""
    teacher, student = load_tokenizer(run.teacher), load_tokenizer(run.student)
    if run.messages is not None:
        dialogues = read_dialogues(SourceConfig(path=run.messages))
        if run.row >= len(dialogues):
            raise UserError(f"{run.messages}: row {run.row} of {len(dialogues)} conversations; count from 0")
        one = dialogues[run.row]
        found = compare_chats(one.messages, one.tools, teacher, student, mode=run.mode)
    else:
        found = compare(read_text(run.text or ""), teacher, student, special=run.special, mode=run.mode)
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
