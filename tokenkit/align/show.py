"""Two tokenisations of one text side by side: plain data, rows, and lines for a terminal with one colour per chunk."""

import unicodedata
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tokenkit.align.modes import ModeName, chunk_mode
from tokenkit.align.spans import align
from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.tokenizers.chat import encode_chat
from tokenkit.tokenizers.conversation import Message, parts_of
from tokenkit.tokenizers.template import Tools

COLOURS = ("on dark_blue", "on dark_green", "on purple4", "on dark_red", "on grey30")
ALONE = "black on bright_yellow"  # tokens in no chunk
VISIBLE = {" ": "·", "\n": "↵", "\r": "←", "\t": "⇥"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # control, format and spacing characters
MARKS = {"Mn", "Mc", "Me"}


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its id, its own bytes, and the bytes of the text that it covers."""

    id: int
    text: str | None  # what it covers, or a special token's literal; None where that is no text on its own
    hex: str  # of the token's own bytes, a dummy space included; "" for special tokens
    start: int  # bytes
    end: int
    special: bool
    chunk: int  # -1: in no chunk

    @property
    def label(self) -> str:
        """The token as a reader sees it: white space drawn, control characters escaped, part of a character in hex."""
        if self.special and self.text:
            return readable(self.text)
        if self.start == self.end:
            return "∅"
        # Bytes of a part of a character as \x escapes.
        return readable(self.text or bytes.fromhex(self.hex).decode(errors="backslashreplace"))

    @property
    def spaced_hex(self) -> str:
        """Its own bytes, two digits each."""
        return bytes.fromhex(self.hex).hex(" ")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of text that both sides cut at both ends; token ranges are half-open."""

    a: tuple[int, int]
    b: tuple[int, int]
    start: int  # bytes
    end: int
    text: str | None  # None where that is no text on its own


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two tokenisations of one text and their common chunks."""

    text: str
    mode: ModeName
    names: tuple[str, str]
    a: tuple[Token, ...]
    b: tuple[Token, ...]
    chunks: tuple[Chunk, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many bytes, tokens and chunks; chunks of one token on both sides; tokens in no chunk."""
        single = sum(one.a[1] - one.a[0] == one.b[1] - one.b[0] == 1 for one in self.chunks)
        return {
            "bytes": len(self.text.encode()),
            "tokens_a": len(self.a),
            "tokens_b": len(self.b),
            "chunks": len(self.chunks),
            "single_token_chunks": single,
            "tokens_in_no_chunk": sum(token.chunk < 0 for token in (*self.a, *self.b)),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        sides = [
            {"tokenizer": name, "tokens": [asdict(token) for token in tokens]}
            for name, tokens in zip(self.names, (self.a, self.b))
        ]
        chunks = [asdict(chunk) for chunk in self.chunks]
        named = {"a": sides[0], "b": sides[1], "chunks": chunks, "counts": self.counts}
        return {"text": self.text, "mode": self.mode, **named}


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one chunk on both sides; a run of tokens in no chunk has one side only, and chunk -1."""

    a: tuple[Token, ...]
    b: tuple[Token, ...]
    chunk: int


def compare(
    text: str, a: Tokenizer, b: Tokenizer, *, special: bool = False, mode: ModeName = "unconstrained"
) -> Comparison:
    """Both tokenisations of a text, aligned; with `special`, begun as each begins a document."""
    return compare_encodings(text, a, b, (a.encode(text, special=special), b.encode(text, special=special)), mode)


def compare_chats(
    messages: list[Message], tools: Tools, a: Tokenizer, b: Tokenizer, *, mode: ModeName = "unconstrained"
) -> Comparison:
    """A conversation as both families write it, aligned; its text is what people and models wrote, joined."""
    encodings = (encode_chat(a, messages, tools=tools).encoding, encode_chat(b, messages, tools=tools).encoding)
    return compare_encodings("".join(part.text for part in parts_of(messages)), a, b, encodings, mode)


def compare_encodings(
    text: str, a: Tokenizer, b: Tokenizer, encodings: tuple[Encoding, Encoding], mode: ModeName = "unconstrained"
) -> Comparison:
    """Two tokenisations of a text, aligned."""
    raw = text.encode()
    alignment = chunk_mode(mode, a, b)(*encodings, align(*encodings))
    tokens_a = _tokens(encodings[0], raw, a, alignment.chunk_a.tolist())
    tokens_b = _tokens(encodings[1], raw, b, alignment.chunk_b.tolist())
    starts, ends = encodings[0].starts.tolist(), encodings[0].ends.tolist()
    found = [
        Chunk((a0, a1), (b0, b1), starts[a0], ends[a1 - 1], _text(raw[starts[a0] : ends[a1 - 1]]))
        for a0, a1, b0, b1 in alignment.spans.tolist()
    ]
    return Comparison(text, mode, (a.name, b.name), tokens_a, tokens_b, tuple(found))


def rows(found: Comparison) -> list[Row]:
    """The chunks of a text in order, with the tokens of both tokenizers; every token stands in one row."""
    made: list[Row] = []
    next_a = next_b = 0
    for index, chunk in enumerate(found.chunks):
        made += _alone(found, (next_a, chunk.a[0]), (next_b, chunk.b[0]))
        made.append(Row(found.a[slice(*chunk.a)], found.b[slice(*chunk.b)], index))
        next_a, next_b = chunk.a[1], chunk.b[1]
    return made + _alone(found, (next_a, len(found.a)), (next_b, len(found.b)))


def show(found: Comparison) -> RenderableType:
    """Both tokenisations for a terminal: a colour per chunk, bars between its tokens, yellow for tokens in no chunk."""
    made = rows(found)
    lines: list[RenderableType] = []
    for name, sides in zip(found.names, ([row.a for row in made], [row.b for row in made])):
        lines.append(Text(f"{name}: {sum(map(len, sides))} tokens", style="bold"))
        line = Text()
        for row, side in zip(made, sides):
            if side:
                line.append("│".join(token.label for token in side), ALONE if row.chunk < 0 else _colour(row.chunk))
                line.append(" ")
        lines.append(line)
    counts = found.counts
    summary = (
        f"{counts['chunks']} chunks, {counts['single_token_chunks']} of one token each; "
        f"{counts['tokens_in_no_chunk']} tokens in no chunk"
    )
    return Group(*lines, Text(summary, style="dim"))


def readable(text: str) -> str:
    """The text with white space drawn, other unseen characters as escapes, and a lone mark on a dotted circle."""
    drawn = "".join(VISIBLE.get(c) or (_escape(c) if unicodedata.category(c) in UNSEEN else c) for c in text)
    return "◌" + drawn if text and unicodedata.category(text[0]) in MARKS else drawn


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _colour(chunk: int) -> str:
    return COLOURS[chunk % len(COLOURS)]


def _alone(found: Comparison, a: tuple[int, int], b: tuple[int, int]) -> list[Row]:
    """Rows of tokens in no chunk, of one side each."""
    sides = (Row(found.a[slice(*a)], (), -1), Row((), found.b[slice(*b)], -1))
    return [row for row in sides if row.a or row.b]


def _tokens(encoding: Encoding, raw: bytes, tokenizer: Tokenizer, chunks: list[int]) -> tuple[Token, ...]:
    literals = {index: literal for literal, index in tokenizer.special_tokens.items()}
    columns = (column.tolist() for column in (encoding.ids, encoding.starts, encoding.ends, encoding.special))
    return tuple(
        Token(
            index,
            (literals.get(index) or _text(tokenizer.token_bytes[index])) if special else _text(raw[start:end]),
            tokenizer.token_bytes[index].hex(),
            start,
            end,
            special,
            chunk,
        )
        for index, start, end, special, chunk in zip(*columns, chunks)
    )


def _text(covered: bytes) -> str | None:
    try:
        return covered.decode()
    except UnicodeDecodeError:
        return None
