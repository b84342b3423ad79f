"""Draws docs/how_*.svg, one picture per layer, for docs/how_it_works.md.

What the pictures show is computed: tokens, chunks, weights of rows, names of tensors. Run it after a change of those.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from draw_pipeline import NEUTRAL, STUDENT, TEACHER, arrow, box, escape

from tokenkit.align.spans import Alignment, align
from tokenkit.losses import LOSSES
from tokenkit.quantities import inputs_of
from tokenkit.tokenizers.autoencoder.config import QuantizerSection
from tokenkit.tokenizers.autoencoder.quantizer import FSQLayer
from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.fvt import fvt
from tokenkit.transfer.mixture import Mixture, Origin
from tokenkit.transfer.plan import plan_transfer
from tokenkit.transfer.rows import TensorRows

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tokenkit" / "assets"
WIDTH = 700
FILLS = ("#dce8f1", "#f5e2d6")  # chunks in turn
MONO = 'font-family="monospace"'


def label(x: float, y: float, content: str, size: int = 14, colour: str = NEUTRAL, anchor: str = "middle") -> str:
    """One line of text; what stands in backticks all around is set in a fixed width."""
    code = content.startswith("`") and content.endswith("`")
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"' + (f" {MONO}" if code else "")
    return f'<text x="{x:g}" y="{y:g}" xml:space="preserve" {style}>{escape(content.strip("`"))}</text>'


def cell(x: float, y: float, width: float, height: float, content: str, fill: str, size: int = 14) -> list[str]:
    """A filled box with code in its middle."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{NEUTRAL}"/>'
    return [shape, label(x + width / 2, y + height / 2 + size * 0.35, f"`{content}`", size)]


def drawing(height: int, title: str, parts: Iterable[str]) -> str:
    """The whole file; on a light ground, so that it reads in the dark too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
    ground = f'<title>{escape(title)}</title>\n<rect width="{WIDTH}" height="{height}" rx="8" fill="#fbfbf8"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def seen(spelling: bytes) -> str:
    """A token for the eye: a space is a low line, a byte that is no character is its number."""
    try:
        return spelling.decode().replace(" ", "␣")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02x}" for byte in spelling)


def spellings(encoding: Encoding, text: str) -> list[str]:
    raw = text.encode()
    return [seen(raw[start:end]) for start, end in zip(encoding.starts, encoding.ends)]


def tokens(encoding: Encoding, text: str, y: float, unit: float, fills: Sequence[str]) -> list[str]:
    """A row of tokens, each over the bytes that it spells."""
    parts = []
    for start, end, shown, fill in zip(encoding.starts, encoding.ends, spellings(encoding, text), fills):
        size = 14 if len(shown) * 9 < (end - start) * unit else 10
        parts += cell(LEFT + start * unit, y, (end - start) * unit, 34, shown, fill, size)
    return parts


LEFT = 96


def spans(teacher: Tokenizer, unigram: Tokenizer) -> str:
    """Three tokenisations of a text over its bytes."""
    text = "Hello, wörld"
    unit = (WIDTH - LEFT - 14) / len(text.encode())
    parts, at = [label(12, 51, "text", anchor="start"), label(12, 93, "bytes", anchor="start")], 0
    for character in text:
        width = len(character.encode()) * unit
        parts += cell(LEFT + at * unit, 30, width, 32, seen(character.encode()), "#ffffff")
        at += len(character.encode())
    for i, byte in enumerate(text.encode()):
        parts += cell(LEFT + i * unit, 72, unit, 32, f"{byte:02x}", "#ffffff", 13)
        parts.append(label(LEFT + i * unit, 20, str(i), 12))
    parts.append(label(LEFT + at * unit, 20, str(at), 12))
    for row, (name, tokenizer) in enumerate([("BPE", teacher), ("Unigram", unigram), ("byte", load_tokenizer("byte"))]):
        y, encoding = 124 + row * 74, tokenizer.encode(text)
        fills = [FILLS[i % 2] for i in range(len(encoding))]
        parts += [label(12, y + 22, name, anchor="start"), *tokens(encoding, text, y, unit, fills)]
        for i, start, end in zip(encoding.ids, encoding.starts, encoding.ends):
            parts.append(label(LEFT + (start + end) / 2 * unit, y + 50, f"`{i}`", 12))
    parts.append(
        label(12, 348, "the number under a token is its id; its span is [first byte, end)", 13, anchor="start")
    )
    return drawing(362, "Three tokenisations of one text over its bytes", parts)


def chunks(teacher: Tokenizer, unigram: Tokenizer) -> str:
    """Two tokenisations and their chunks."""
    text = "Hello, wörld"
    a, b = teacher.encode(text), unigram.encode(text)
    found: Alignment = align(a, b)
    unit = (WIDTH - LEFT - 14) / len(text.encode())
    fills = [
        [FILLS[chunk % 2] if chunk >= 0 else "#ffffff" for chunk in side] for side in (found.chunk_a, found.chunk_b)
    ]
    parts = [label(12, 42, "teacher", anchor="start", colour=TEACHER), *tokens(a, text, 20, unit, fills[0])]
    parts += [label(12, 152, "student", anchor="start", colour=STUDENT), *tokens(b, text, 130, unit, fills[1])]
    parts.append(label(12, 97, "chunk", anchor="start"))
    for number, (first, last, _, _) in enumerate(found.spans):
        left, right = (LEFT + at * unit for at in (a.starts[first], a.ends[last - 1]))
        parts.append(f'<path d="M{left:g} 60 V124 M{right:g} 60 V124" stroke="{NEUTRAL}" stroke-dasharray="3 3"/>')
        parts.append(label((left + right) / 2, 97, f"{number}"))
    for row, (name, side) in enumerate([("chunk_a", found.chunk_a), ("chunk_b", found.chunk_b)]):
        parts.append(label(12, 196 + 24 * row, f"`{name} = {side.tolist()}`", 14, anchor="start"))
    return drawing(236, "Two tokenisations of one text, and the chunks that both spell with whole tokens", parts)


def chosen_rows(mixture: Mixture, teacher: Tokenizer, unigram: Tokenizer) -> list[int]:
    """Two target ids that are copies, one of two pieces, one of three: the first words of each kind."""
    wanted, found = [(Origin.COPIED, 1, 2), (Origin.PIECES, 2, 1), (Origin.PIECES, 3, 1)], []
    for origin, pieces, number in wanted:
        of = [
            i
            for i in range(len(mixture))
            if mixture.origin[i] == origin
            and len(mixture.sources(i)) == pieces
            and unigram.token_bytes[i].isalpha()
            and all(teacher.token_bytes[s].isalpha() for s, _ in mixture.sources(i))
            and len(unigram.token_bytes[i]) > 3
        ]
        found += of[:number]
    return found


def rows(teacher: Tokenizer, unigram: Tokenizer) -> str:
    """A part of the sparse matrix that makes new rows of old ones."""
    size = teacher.vocab_size
    source = TensorRows(torch.zeros(size, 1))
    mixture = fvt(source, plan_transfer(teacher, unigram, source_rows=size), side="input")
    targets = chosen_rows(mixture, teacher, unigram)
    columns = list(dict.fromkeys(piece for i in targets for piece, _ in mixture.sources(i)))
    left, unit, top = 130, (WIDTH - 150) / len(columns), 56
    parts = [label(left, 22, "rows of the source model", 13, TEACHER, "start")]
    parts += [
        label(left + (c + 0.5) * unit, 46, f"`{seen(teacher.token_bytes[p])}`", 13, TEACHER)
        for c, p in enumerate(columns)
    ]
    for r, i in enumerate(targets):
        y, weights = top + 40 * r, dict(mixture.sources(i))
        parts.append(label(left - 10, y + 25, f"`{seen(unigram.token_bytes[i])}`", 13, STUDENT, "end"))
        for c, piece in enumerate(columns):
            shown = str(Fraction(weights[piece]).limit_denominator(9)) if piece in weights else ""
            parts += cell(left + c * unit, y, unit, 40, shown, FILLS[0] if shown else "#ffffff")
    below = top + 40 * len(targets) + 24
    parts.append(
        label(
            12,
            below,
            "new rows = this matrix × the source's rows; most of it is empty and never stored",
            13,
            anchor="start",
        )
    )
    return drawing(below + 16, "Weights of source rows in new rows", parts)


def tensors() -> str:
    """What two losses ask for, and what that is made of."""
    asked = {
        name: [t.removeprefix("student_") for t in LOSSES[name].tensors if t.startswith("student_")]
        for name in ("clm", "alm")
    }
    derived = [
        n for n in dict.fromkeys(n for names in asked.values() for n in names) if len(inputs_of(f"student_{n}")) > 0
    ]
    made = {n: [i.removeprefix("student_") for i in inputs_of(f"student_{n}")] for n in derived}
    leaves = list(dict.fromkeys(n for names in [*asked.values(), *made.values()] for n in names if n not in derived))
    height = 70 + 56 * max(len(leaves), len(derived))
    place = {n: (12, 48 + 56 * i) for i, n in enumerate(leaves)}
    place |= {n: (262, 76 + 56 * i) for i, n in enumerate(derived)}
    place |= {f"loss {n}": (560, 60 + 90 * i) for i, n in enumerate(asked)}
    edges = [(i, n) for n, inputs in made.items() for i in inputs]
    edges += [(n, f"loss {loss}") for loss, names in asked.items() for n in names]
    wide = {n: 190 if n in leaves else 210 if n in derived else 128 for n in place}
    parts = [
        f'<path d="M{place[a][0] + wide[a]} {place[a][1] + 18} L{place[b][0]} {place[b][1] + 18}" stroke="#999999"/>'
        for a, b in edges
    ]
    heads = [(107, "of data and models"), (367, "made of those"), (624, "losses")]
    parts += [label(x, 26, words, 13) for x, words in heads]
    for name, (x, y) in place.items():
        fill = FILLS[1] if name in derived else "#ffffff" if name in leaves else FILLS[0]
        parts += cell(x, y, wide[name], 36, name.removeprefix("loss "), fill)
    return drawing(height, "The tensors that two losses ask for", parts)


def step() -> str:
    """A step of three microbatches in two passes."""
    parts = [label(12, 30, "first pass", 13, anchor="start"), label(12, 236, "second pass", 13, anchor="start")]
    for i in range(3):
        x = 110 + 150 * i
        parts += box(x, 14, 130, 66, TEACHER, f"microbatch {i + 1}", ["teacher reads;", "units are known"])
        parts += box(x, 220, 130, 66, STUDENT, f"microbatch {i + 1}", ["student forward", "and backward"])
        parts += [arrow(TEACHER, (x + 65, 80), (x + 65, 122)), arrow(STUDENT, (x + 65, 178), (x + 65, 220))]
    parts += box(
        110, 122, 430, 56, NEUTRAL, "counts of the whole step, over all processes", ["what every mean is divided by"]
    )
    parts += [arrow(STUDENT, (540, 253), (566, 253)), *box(566, 220, 124, 66, STUDENT, "optimizer", ["one step"])]
    parts.append(
        label(
            12,
            318,
            "loss = sum over microbatches of (mask × value) / count of the step, so 4 = 2+2 = 3+1",
            13,
            anchor="start",
        )
    )
    return drawing(334, "A step: counts before the first forward pass of the student", parts)


def parallel() -> str:
    """Four processes: two shares of the rows, two shares of each matrix."""
    parts = [label(185 + 230 * c, 26, f"half {c + 1} of each matrix", 13) for c in range(2)]
    for r in range(2):
        parts.append(label(12, 76 + 110 * r, f"rows {r + 1} of 2", 13, anchor="start"))
        for c in range(2):
            parts += box(
                100 + 230 * c,
                40 + 110 * r,
                170,
                70,
                STUDENT,
                f"process {2 * r + c}",
                ["weights, gradients and", "optimizer state in pieces"],
            )
        parts.append(arrow(NEUTRAL, (270, 75 + 110 * r), (330, 75 + 110 * r)))
        parts.append(arrow(NEUTRAL, (330, 75 + 110 * r), (270, 75 + 110 * r)))
    for c in range(2):
        parts.append(arrow(NEUTRAL, (185 + 230 * c, 110), (185 + 230 * c, 150)))
        parts.append(arrow(NEUTRAL, (185 + 230 * c, 150), (185 + 230 * c, 110)))
    words = [
        "across: activations",
        "(train.parallel.model)",
        "",
        "down: counts, means,",
        "gradients",
        "(train.parallel.data)",
    ]
    parts += [label(520, 62 + 22 * i, line, 13, anchor="start") for i, line in enumerate(words)]
    return drawing(276, "Four processes: rows of text one way, matrices the other", parts)


def learned() -> str:
    """A string as bytes, coordinates, levels, one integer, and back."""
    string, quantizer = "wörld", FSQLayer(QuantizerSection().levels)
    digits = [5, 2, 7, 0, 3, 4, 1, 2]
    number = quantizer.code_to_token_id(digits)
    parts = box(12, 60, 104, 64, NEUTRAL, string, [" ".join(f"{b:02x}" for b in string.encode())])
    parts += [
        arrow(NEUTRAL, (116, 92), (140, 92)),
        *box(140, 60, 84, 64, STUDENT, "encoder", ["network"]),
        arrow(STUDENT, (224, 92), (250, 92)),
    ]
    for d, (digit, levels) in enumerate(zip(digits, quantizer.levels)):
        x, bottom, top = 268 + 24 * d, 150, 34
        parts.append(f'<path d="M{x} {bottom} V{top}" stroke="{NEUTRAL}"/>')
        for level in range(levels):
            y = bottom - (bottom - top) * level / (levels - 1)
            filled = level == digit
            parts.append(
                f'<circle cx="{x}" cy="{y:g}" r="{6 if filled else 3}" fill="{STUDENT if filled else "#bbbbbb"}"/>'
            )
        parts.append(label(x, 174, f"`{digit}`", 13))
    parts += [
        arrow(STUDENT, (446, 92), (470, 92)),
        *box(470, 60, 100, 64, NEUTRAL, "code", [f"{number:,}", f"of {quantizer.total_vocab_size:,}"]),
    ]
    parts += [arrow(NEUTRAL, (570, 92), (594, 92)), *box(594, 60, 94, 64, STUDENT, "decoder", ["network"])]
    parts += [
        arrow(NEUTRAL, (641, 124), (641, 214)),
        *box(470, 214, 218, 58, NEUTRAL, "the same bytes, by a margin?", ["yes: the string is this code"]),
    ]
    parts += [
        arrow(NEUTRAL, (470, 243), (400, 243)),
        *box(196, 214, 204, 58, NEUTRAL, "no: bytes", ["256 ids that spell anything"]),
    ]
    parts += box(12, 214, 150, 58, NEUTRAL, "pins", ["a table, asked first"])
    parts.append(
        label(
            12, 300, "of pins, codes and bytes the cheapest spelling wins; every string comes back", 13, anchor="start"
        )
    )
    return drawing(316, "Finite scalar quantisation: a string as one integer, checked", parts)


def verified() -> str:
    """What leaves the house is read back by whoever will use it."""
    parts = box(12, 70, 130, 66, STUDENT, "model", ["in memory"])
    parts += box(196, 70, 130, 66, NEUTRAL, "files", ["written"])
    parts += box(380, 70, 160, 66, TEACHER, "the consumer's loader", ["transformers, ONNX", "Runtime, llama.cpp"])
    parts += [arrow(NEUTRAL, (142, 103), (196, 103)), arrow(NEUTRAL, (326, 103), (380, 103))]
    parts += box(594, 70, 94, 66, NEUTRAL, "compare", ["ids, logits,", "tensors"])
    parts += [arrow(NEUTRAL, (540, 103), (594, 103)), arrow(STUDENT, (77, 70), (77, 30), (641, 30), (641, 70))]
    parts += [label(359, 24, "the same texts", 13), arrow(NEUTRAL, (641, 136), (641, 176))]
    parts.append(label(688, 198, "equal up to rounding: done, with figures.  Otherwise: an error.", 13, anchor="end"))
    return drawing(214, "Export: written, reloaded, compared", parts)


def pictures() -> dict[Path, str]:
    """Every file, and what stands in it."""
    teacher, unigram = (load_tokenizer(str(ASSETS / name)) for name in ("demo_teacher", "demo_unigram"))
    drawn = {
        "spans": spans(teacher, unigram),
        "chunks": chunks(teacher, unigram),
        "rows": rows(teacher, unigram),
        "tensors": tensors(),
        "step": step(),
        "parallel": parallel(),
        "learned": learned(),
        "verified": verified(),
    }
    return {ROOT / "docs" / f"how_{name}.svg": content for name, content in drawn.items()}


if __name__ == "__main__":
    for path, content in pictures().items():
        path.write_text(content, "utf-8")
        print(path)
