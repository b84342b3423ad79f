"""Reads the fenced blocks of the pages: language, the comments above that say how to run them, the commands inside."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
FENCE = re.compile(r"^(\s*)(```+|~~~+)\s*(\S*)")
DIRECTIVE = re.compile(r"^\s*<!--\s*([a-z]+)(?::\s*(.*?))?\s*-->\s*$")
DIRECTIVES = {
    "run": "overrides for the commands of the block; with several such lines, one line for each command",
    "exit": "the exit code of the block's last command, where its point is an error message",
    "output": "a text block: what the command before it prints, up to white space; `...` stands for anything",
    "verb": "a yaml block: the verb whose run file it is, or is a part of",
    "file": "the block is written to this file, as a reader would save it; a later block has to name the file",
    "slow": "the fast suite runs the block's commands with --dry-run only",
    "report": "a json block that the page of a run is drawn from",
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    directives: list[tuple[str, str]] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def has(self, name: str) -> bool:
        return any(found == name for found, _ in self.directives)

    def all(self, name: str) -> list[str]:
        return [value for found, value in self.directives if found == name]

    def one(self, name: str, otherwise: str = "") -> str:
        return next((value for found, value in self.directives if found == name), otherwise)


def page_name(path: Path) -> str:
    """`docs/guides/privacy.md` → `guides/privacy`: the name of its test."""
    inside = path.relative_to(ROOT).with_suffix("")
    return str(inside.relative_to("docs") if inside.parts[0] == "docs" else inside)


def read_blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks: list[Block] = []
    lines = path.read_text("utf-8").splitlines()
    number = 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        indent, fence, language = opened.groups()
        start = number
        number += 1
        inside = []
        while not lines[number].strip().startswith(fence):
            inside.append(lines[number].removeprefix(indent))
            number += 1
        directives = _directives_above(lines, start)
        blocks.append(Block(page_name(path), start + 1, language, "\n".join(inside), directives))
        number += 1
    return blocks


def _directives_above(lines: list[str], start: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in reversed(lines[:start]):
        match = DIRECTIVE.match(line)
        if match is None:
            break
        found.insert(0, (match[1], match[2] or ""))
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one per entry: lines joined at backslashes and open quotes, comments left out."""
    commands: list[str] = []
    open_line = ""
    for line in block.text.splitlines():
        line = re.sub(r"\s+#\s.*", "", line)
        open_line = f"{open_line}\n{line}" if open_line else line
        if open_line.endswith("\\"):
            open_line = open_line[:-1].rstrip()
            continue
        try:
            words = shlex.split(open_line, comments=True)
        except ValueError:  # a quote is still open
            continue
        if words:
            commands.append(open_line.strip())
        open_line = ""
    if open_line:
        raise ValueError(f"{block.place}: the last command does not end: {open_line}")
    return commands
