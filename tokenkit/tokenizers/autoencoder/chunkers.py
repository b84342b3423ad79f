"""Text → chunks: where a learned tokenizer may never join. Boundaries hang on content: an edit moves its own chunk.

A chunker is a regular expression with pinned Unicode classes: Python and a tokenizer.json split alike, today and after
the next Unicode version. Chunks of more than `MAX_CHUNK` bytes are cut afterwards, at ends of characters.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tokenkit.config import UserError

MAX_CHUNK = 16  # bytes
CLASSES = Path(__file__).parents[2] / "assets" / "unicode_classes.json"
LAST = 0x10FFFF
ASCII_ENDS = "(?![^\\0-\\x7f])"  # what follows is ASCII too, so no class of it can go on beyond
PATTERNS = ("joined", "word", "space", "superword")
DEFAULT = "joined"  # fewer ids than `word` on prose and code: docs/results.md
WANTED = "write joined, word, space, superword, fixed:N, or entropy:BITS"


@runtime_checkable
class Chunker(Protocol):
    """Splits text; the chunks joined are the text. Only the last chunk can change when text is appended."""

    @property
    def name(self) -> str:
        """What `make_chunker` made it of."""
        ...

    def split(self, text: str) -> list[str]:
        """The chunks of a text, in which bytes that are no UTF-8 stand as surrogate escapes."""
        ...


@dataclass(frozen=True)
class PatternChunker:
    """Chunks are the matches of a regular expression that leaves nothing out."""

    name: str
    python: str
    exported: str
    """The same split for the regular expressions of tokenizer.json."""
    _find: "re.Pattern[str]"

    def split(self, text: str) -> list[str]:
        """The matches, in order."""
        return self._find.findall(text)


@dataclass(frozen=True)
class FixedChunker:
    """Every `width` bytes, moved back to the end of a character: the checklist's own rule."""

    name: str
    width: int

    def split(self, text: str) -> list[str]:
        """Pieces of at most `width` bytes."""
        return [to_text(piece) for piece in cut(to_bytes(text), self.width)]


def make_chunker(name: str) -> Chunker:
    """The chunker of a name: joined, word, space, superword, fixed:N; UserError for another."""
    kind, _, option = name.partition(":")
    if kind == "fixed" and option.isdecimal() and 1 <= int(option) <= 64:
        return FixedChunker(name, int(option))
    if name in PATTERNS:
        return _pattern_chunker(name)
    if kind == "entropy":
        raise UserError(f"chunker {name!r}: is fitted on text; give a corpus to `tokenkit tokenizer pretrain`")
    raise UserError(f"chunker {name!r}: unknown; {WANTED}")


def cut(data: bytes, width: int = MAX_CHUNK) -> list[bytes]:
    """Pieces of at most `width` bytes that end at the largest end of a character; bytes that are no UTF-8 are cut."""
    pieces, start = [], 0
    while len(data) - start > width:
        end = start + width
        while end > start and data[end] & 0xC0 == 0x80:
            end -= 1
        end = end if end > start else start + width
        pieces.append(data[start:end])
        start = end
    if start < len(data):
        pieces.append(data[start:])
    return pieces


def to_text(data: bytes) -> str:
    """Bytes as text; what is no UTF-8 becomes surrogate escapes, which `to_bytes` turns back."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """The bytes that `to_text` made a text of."""
    return text.encode("utf-8", "surrogateescape")


def escaped(text: str) -> str:
    """A text of a user in the form of `to_text`: half a surrogate pair becomes three escapes, not another byte."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return to_text(text.encode("utf-8", "surrogatepass"))
    return text


Ranges = list[tuple[int, int]]


@functools.cache
def _classes() -> dict[str, Ranges]:
    """Letters with marks, digits, white space, and everything else."""
    read = json.loads(CLASSES.read_text("utf-8"))
    found = {name: [(a, b) for a, b in read[name]] for name in ("letters", "digits", "spaces")}
    rest, following = [], 0
    for first, last in sorted(pair for ranges in found.values() for pair in ranges):
        if following < first:
            rest.append((following, first - 1))
        following = last + 1
    return {**found, "others": [*rest, *([(following, LAST)] if following <= LAST else [])]}


@functools.cache
def _pattern_chunker(name: str) -> PatternChunker:
    """word: GPT-2's classes, marks as letters, digits by three. joined: a mark stays with the word behind it, and line
    ends with the marks before them. superword: up to three words. space: SpaceByte's rule (Slagle 2024, 2404.14408).
    """
    classes = _classes()
    plain = {key: _class(ranges) for key, ranges in classes.items()}
    quick = {key: _quick(ranges) for key, ranges in classes.items()}
    if name == "space":
        joined = {"alnum": classes["letters"] + classes["digits"], "marks": classes["spaces"] + classes["others"]}
        forms = [{key: form(sorted(ranges)) for key, ranges in joined.items()} for form in (_quick, _class)]
        python, exported = (f"{form['marks']}*{form['alnum']}+{form['marks']}?|{form['marks']}+" for form in forms)
        return PatternChunker(name, python, exported, re.compile(python))
    spaces = f"{plain['spaces']}+(?![^{_written(classes['spaces'])}])|{plain['spaces']}+"

    def general(form: dict[str, str]) -> str:
        words = {
            "word": f" ?{form['letters']}+",
            "joined": f" ?{form['others']}?{form['letters']}+",
            "superword": f" ?{form['letters']}+(?: {form['letters']}+){{0,2}}",
        }
        ends = "[\\r\\n]*" if name == "joined" else ""
        return f"{words[name]}| ?{form['digits']}{{1,3}}| ?{form['others']}+{ends}|{spaces}"

    python = f"{_ascii_only(name)}|{general(quick)}"
    return PatternChunker(name, python, general(plain), re.compile(python))


def _ascii_only(name: str) -> str:
    """The same split where nothing but ASCII is near: Python takes half the time over these classes.

    Every branch begins with a class of its own, so that one character decides which is tried.
    """
    letters, mark = "[A-Za-z]++", "[^\\t-\\r 0-9A-Za-z\\x80-\\U0010ffff]"
    ends = "[\\r\\n]*+" if name == "joined" else ""
    marks = f"{mark}(?>{letters}|{mark}*+{ends})" if name == "joined" else f"{mark}++"
    words = "" if name == "superword" else f" {letters}{ASCII_ENDS}|{letters}{ASCII_ENDS}|"
    spaces = "[\\t-\\r ]+(?=[\\t-\\r ][^\\t-\\r \\x80-\\U0010ffff])|[\\t-\\r ]+\\Z"
    return f"{words}{marks}{ASCII_ENDS}| {marks}{ASCII_ENDS}| ?[0-9]{{1,3}}+{ASCII_ENDS}|{spaces}"


def _class(ranges: Ranges) -> str:
    return f"[{_written(ranges)}]"


def _quick(ranges: Ranges) -> str:
    """One character of the ranges; Python scans ranges beyond the first plane one by one, so it looks first."""
    low = [(first, min(last, 0xFFFF)) for first, last in ranges if first <= 0xFFFF]
    high = [(max(first, 0x10000), last) for first, last in ranges if last > 0xFFFF]
    if not high:
        return _class(low)
    return f"(?:{_class(low)}|(?=[\\U00010000-\\U0010ffff]){_class(high)})"


def _written(ranges: Ranges) -> str:
    return "".join(_point(a) if a == b else f"{_point(a)}-{_point(b)}" for a, b in ranges)


def _point(point: int) -> str:
    return re.escape(chr(point)) if 32 < point < 127 else chr(point)
