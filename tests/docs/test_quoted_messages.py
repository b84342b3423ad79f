"""What the pages quote of error messages is still what the source says, word for word."""

import ast
import re
from functools import cache

import pytest

from tests.docs.snippets import ROOT, read_blocks

PAGES = ("troubleshooting", "privacy", "your_tokenizer")
PREFIX = "tokenkit: "
LEAST = 20  # characters of a message that are the same every time
SHARE = 0.4  # of a quoted message that has to be such


@cache
def templates() -> list[tuple[int, re.Pattern[str]]]:
    """Every string of the package of some length: how much of it is fixed, and what it looks like when filled in."""
    found = {}
    for path in (ROOT / "tokenkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else None for p in parts]
            fixed = sum(len(text) for text in texts if text)
            if fixed >= LEAST:
                pattern = "".join(r"[\s\S]*?" if text is None else re.escape(text) for text in texts)
                found[pattern] = fixed
    return [(fixed, re.compile(pattern)) for pattern, fixed in found.items()]


def quoted(page: str) -> list[str]:
    """The messages in the text blocks of a page; a wrapped one goes on in the next line."""
    messages: list[str] = []
    for block in read_blocks(ROOT / f"docs/{page}.md"):
        lines = block.text.splitlines() if block.language == "text" else []
        for line in lines if lines and lines[0].startswith(PREFIX) else []:
            if line.startswith(PREFIX):
                messages.append(line.removeprefix(PREFIX))
            else:
                messages[-1] += " " + line.strip()
    return messages


def in_source(message: str) -> bool:
    """Whether some string of the package, filled in, makes up enough of the message."""
    least = SHARE * len(message.replace("…", ""))
    return any(fixed >= least and pattern.search(message) for fixed, pattern in templates())


@pytest.mark.parametrize("page", PAGES)
def test_quoted_messages_are_those_of_the_source(page):
    messages = quoted(page)
    assert messages
    assert [message for message in messages if not in_source(message)] == []


def test_a_message_that_nobody_prints_is_found_out():
    kept = "…: holds another run; add --resume to continue it, or write output=... with a new name"
    assert in_source(kept)
    assert not in_source(kept.replace("another run", "other runs"))
