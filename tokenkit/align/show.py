"""Two tokenisations of one text side by side: plain rows, or lines for a terminal with one colour per chunk."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from tokenkit.align.spans import align
from tokenkit.tokenizers.base import Encoding, Tokenizer

COLOURS = ("on dark_blue", "on dark_green", "on purple4", "on dark_red", "on grey30")
ALONE = "black on bright_yellow"  # tokens in no chunk
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\r": "←", "\t": "⇥"})


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one chunk on both sides, readable; a run of tokens in no chunk has one side only."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    aligned: bool


def rows(text: str, a: Tokenizer, b: Tokenizer, *, special: bool = False) -> list[Row]:
    """The chunks of a text in order, with the tokens of both tokenizers."""
    raw = text.encode()
    encodings = (a.encode(text, special=special), b.encode(text, special=special))
    alignment = align(*encodings)
    pieces_a, pieces_b = (_pieces(one, raw, tokenizer) for one, tokenizer in zip(encodings, (a, b)))
    found: list[Row] = []
    next_a = next_b = 0
    ends = [len(pieces_a), len(pieces_a), len(pieces_b), len(pieces_b)]
    for a_start, a_end, b_start, b_end in [*alignment.spans.tolist(), ends]:
        if next_a < a_start:
            found.append(Row(pieces_a[next_a:a_start], (), False))
        if next_b < b_start:
            found.append(Row((), pieces_b[next_b:b_start], False))
        if a_start < a_end:
            found.append(Row(pieces_a[a_start:a_end], pieces_b[b_start:b_end], True))
        next_a, next_b = a_end, b_end
    return found


def show(text: str, a: Tokenizer, b: Tokenizer, *, special: bool = False) -> RenderableType:
    """Both tokenisations for a terminal: a colour per chunk, bars between its tokens, yellow for tokens in no chunk."""
    found = rows(text, a, b, special=special)
    chunks = [row for row in found if row.aligned]
    equal = sum(len(row.a) == len(row.b) == 1 for row in chunks)
    lines: list[RenderableType] = []
    for tokenizer, sides in ((a, [row.a for row in found]), (b, [row.b for row in found])):
        lines.append(Text(f"{tokenizer.name}: {sum(map(len, sides))} tokens", style="bold"))
        line = Text()
        for index, (row, side) in enumerate(zip(found, sides)):
            line.append("│".join(side), style=COLOURS[index % len(COLOURS)] if row.aligned else ALONE)
            line.append(" ")
        lines.append(line)
    alone = sum(len(row.a) + len(row.b) for row in found if not row.aligned)
    lines.append(Text(f"{len(chunks)} chunks, {equal} of one token each; {alone} tokens in no chunk", style="dim"))
    return Group(*lines)


def _pieces(encoding: Encoding, raw: bytes, tokenizer: Tokenizer) -> tuple[str, ...]:
    roles = {tokenizer.pad_id: "[pad]", tokenizer.eos_id: "[eos]", tokenizer.bos_id: "[bos]"}
    columns = (column.tolist() for column in (encoding.ids, encoding.starts, encoding.ends, encoding.special))
    return tuple(
        roles.get(index, f"[{index}]") if special else _readable(raw[start:end])
        for index, start, end, special in zip(*columns)
    )


def _readable(spelled: bytes) -> str:
    """The token as text with visible white space; bytes that are no whole character in hexadecimal."""
    if not spelled:
        return "∅"
    return spelled.decode("utf-8", errors="backslashreplace").translate(VISIBLE)
