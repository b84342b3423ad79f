"""Strings that tokenizers stumble over, corpus by corpus, the same every time."""

import base64
import itertools
import json
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field

from tokenkit.config import Config
from tokenkit.data.source import SourceConfig

Strings = Iterator[bytes | str]
MARKUP = ("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|endoftext|>", "<|im_start|>", "<0x41>", "<c:1,2,3>")
ROW = 128  # code points; every block begins at a multiple of 16, and nearly all at one of 128
LINE_ENDS = ("\r", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", " ", "a")
BIDI = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
RIGHT_TO_LEFT = ("שלום עולם", "مرحبا بالعالم", "سلام\u200cدنیا ۱۲۳", "ܫܠܡܐ", "ދިވެހި", "ߒߞߏ", "𐤀𐤁𐤂")
REPEATED = ("a", " ", "\n", "\0", "é", "🙂")
SKIN = ("", *(chr(point) for point in range(0x1F3FB, 0x1F400)))
ZWJ = "\u200d"


class EdgesConfig(Config):
    """How much of the corpora that have no end."""

    random_strings: int | None = Field(None, ge=0)
    """Random byte strings of 0 to 64 bytes; by default 100000, or 1000 where codes of a network are tried."""
    large_bytes: int = Field(1 << 20, ge=0)
    """Bytes of one character, again and again."""
    text_bytes: int = Field(10 << 20, ge=0)
    """Bytes of one text of words with the frequencies of words."""
    texts: SourceConfig | None = None
    """Further texts, each of which must come back."""
    seed: int = 0


def edge_corpora(config: EdgesConfig, random_strings: int, literals: Sequence[str] = ()) -> dict[str, Strings]:
    """Name → strings, made as they are asked for; `literals` are those of the special tokens."""
    draw = partial(np.random.default_rng, config.seed)
    makers: dict[str, Callable[[], Strings]] = {
        "empty": lambda: iter(["", b""]),
        "every byte": lambda: (bytes([byte]) for byte in range(256)),
        "every pair of bytes": lambda: (bytes(pair) for pair in itertools.product(range(256), repeat=2)),
        "random bytes": lambda: random_bytes(random_strings, draw()),
        "Unicode blocks": unicode_rows,
        "emoji": emoji,
        "combining stacks": combining_stacks,
        "right to left": right_to_left,
        "byte order marks": byte_order_marks,
        "line ends": line_ends,
        "lone surrogates": lone_surrogates,
        "NULs": nuls,
        "one character": lambda: ((c * (config.large_bytes // len(c.encode()))) for c in REPEATED),
        "a long text": lambda: iter([shuffled_words(config.text_bytes, draw())]),
        "formats": lambda: formats(draw()),
        "special-token literals": lambda: special_literals(literals),
    }
    return {name: make() for name, make in makers.items()}


def random_bytes(count: int, draw: np.random.Generator) -> Strings:
    """Uniform bytes, 0 to 64 of them."""
    for _ in range(count):
        yield draw.bytes(int(draw.integers(0, 65)))


def unicode_rows() -> Strings:
    """The characters of every row of the code space that has any, and of the others some."""
    for start in range(0, 0x110000, ROW):
        if 0xD800 <= start < 0xE000:
            continue
        row = [chr(point) for point in range(start, start + ROW)]
        known = [character for character in row if unicodedata.category(character) not in ("Cn", "Co")]
        if known or start % (64 * ROW) == 0:
            yield "".join(known[:: max(1, len(known) // 16)] or row[:: ROW - 1])


def emoji() -> Strings:
    """Sequences joined by ZWJ, with and without skin tones, flags, keycaps and tags."""
    people, acts, signs = "👩👨🧑", "🏃🏊🏄🚴🤷🙋🧙🧜🤽💆🚶⛹🏋🕵", ("♀\ufe0f", "♂\ufe0f")
    jobs = (*"🌾🍳🎓🎤🎨🏫🏭💻💼🔧🔬🚀🚒", "⚕\ufe0f", "⚖\ufe0f", "✈\ufe0f")
    yield from (person + skin + ZWJ + job for person in people for skin in SKIN for job in jobs)
    yield from (act + skin + ZWJ + sign for act in acts for skin in SKIN for sign in signs)
    hearts = (f"{ZWJ}❤\ufe0f{ZWJ}", f"{ZWJ}❤\ufe0f{ZWJ}💋{ZWJ}", f"{ZWJ}🤝{ZWJ}")
    yield from map("".join, itertools.product(people, SKIN, hearts, people, SKIN))
    parents = [*people[:2], *map(ZWJ.join, itertools.product(people[:2], repeat=2))]
    children = [*"👧👦", *map(ZWJ.join, itertools.product("👧👦", repeat=2))]
    yield from (f"{family}{ZWJ}{kids}" for family in parents for kids in children)
    yield from map("".join, itertools.product(map(chr, range(0x1F1E6, 0x1F200)), repeat=2))
    yield from (f"{key}\ufe0f\u20e3" for key in "0123456789#*")
    for country in ("gbeng", "gbsct", "gbwls"):
        yield "🏴" + "".join(chr(0xE0000 + ord(letter)) for letter in country) + "\U000e007f"
    joined = ("🏳\ufe0f 🌈", "🏳\ufe0f ⚧\ufe0f", "🏴 ☠\ufe0f", "🐻 ❄\ufe0f", "👁\ufe0f 🗨\ufe0f", "😮 💨", "❤\ufe0f 🔥")
    yield from (pair.replace(" ", ZWJ) for pair in joined)
    yield from (ZWJ, "\ufe0f", f"🙂{ZWJ}", f"{ZWJ}🙂", "🏻")


def combining_stacks() -> Strings:
    """Letters under 1 to 100 marks, marks alone, and syllables in pieces."""
    marks = [chr(point) for point in range(0x300, 0x370)] + ["\u20dd", "\u0489", "\u0e38", "\u0e49", "\u093f", "\u3099"]
    yield from marks
    for count in (1, 2, 3, 5, 8, 13, 40, 100):
        for first in range(0, len(marks), 9):
            stack = "".join(itertools.islice(itertools.cycle(marks), first, first + count))
            yield from (f"{base}{stack}" for base in ("a", "Z", " ", "é", "漢", ""))
    yield "".join(letter + "".join(marks[n : n + 30]) for n, letter in enumerate("zalgo comes"))
    yield from ("e\u0301 \u00e9", "\u1112\u1161\u11ab \ud55c", "\u0ba8\u0bbf", "\u0e01\u0e33")
    yield from ("\u1e9b\u0323", "\ufb01 \u212a \u212b \u2126")


def right_to_left() -> Strings:
    """Words of scripts that run leftwards, among others, with every control of direction around them."""
    for word in RIGHT_TO_LEFT:
        yield from (word, f"abc {word} 123, {word}!", f"({word})", word[::-1])
        yield from (f"{a}{word}{b}x" for a in BIDI for b in BIDI)


def byte_order_marks() -> Strings:
    """In front, inside, behind, alone, and those of other encodings."""
    yield from ("\ufeff", "\ufeffab", "a\ufeffb", "ab\ufeff", "\ufeff\ufeff", "\ufffe", "\ufffd\ufffd")
    yield from (b"\xff\xfe", b"\xfe\xffa\0b", b"\xef\xbb", b"\xef\xbb\xbf\xef\xbb", b"\xff\xfe\0\0")
    yield from (f"\ufeff{text}".encode(codec) for text in ("hello", "héllo 🙂") for codec in ("utf-16", "utf-32"))


def line_ends() -> Strings:
    """Every sequence of one to three of the ways to end a line or to leave room, between letters and not."""
    for length in (1, 2, 3):
        for parts in itertools.product(LINE_ENDS, repeat=length):
            yield "".join(parts)
            yield f"x{''.join(parts)}y"


def lone_surrogates() -> Strings:
    """Every half of a pair alone, some in words, and pairs the wrong way round."""
    yield from (chr(point) for point in range(0xD800, 0xE000))
    yield from (f"ab {chr(point)}c é" for point in range(0xD800, 0xE000, 17))
    yield from ("\udc00\ud800", "\ud83d \ude00", "\ud83d\ud83d\ude00", "\ud83d\ude00", "\udcff\udc80")


def nuls() -> Strings:
    """Runs of zero bytes, alone and between letters."""
    for count in (*range(1, 66), 255, 256, 1000):
        yield from ("\0" * count, f"a{chr(0) * count}b", " \0" * count)


def shuffled_words(num_bytes: int, draw: np.random.Generator) -> str:
    """A text of invented words, the n-th most frequent of which has a share of 1/n."""
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    chances = 1 / np.arange(1, 27)
    words = [
        bytes(draw.choice(letters, int(draw.integers(1, 12)), p=chances / chances.sum())).decode() for _ in range(2000)
    ]
    shares = 1 / np.arange(1, len(words) + 1)
    longest = max(1, num_bytes // 4)
    order = draw.choice(len(words), longest, p=shares / shares.sum())
    ends = (" ", " ", " ", " ", ", ", ". ", "\n")
    breaks = draw.choice(len(ends), longest)
    return "".join(words[n] + ends[b] for n, b in zip(order.tolist(), breaks.tolist()))[:num_bytes]


def formats(draw: np.random.Generator) -> Strings:
    """JSON, source code, base64 and hexadecimal."""
    nested = {"a": [1, 2.5e-300, None, True, {"ключ": 'значение\n\t"\\'}], "": {}, "long": "x" * 300, "n": [[]] * 20}
    yield from (json.dumps(nested, ensure_ascii=e, indent=i) for e in (True, False) for i in (None, 2, "\t"))
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from ((library / name).read_bytes() for name in ("json/decoder.py", "textwrap.py", "keyword.py"))
    for size in (1, 2, 3, 16, 57, 1000, 4000):
        data = draw.bytes(size)
        yield from (base64.b64encode(data), base64.encodebytes(data), base64.b85encode(data))
        yield from (data.hex(), data.hex(" "), data.hex(":").upper(), " ".join(f"0x{byte:02x}" for byte in data))


def special_literals(literals: Sequence[str]) -> Strings:
    """What special tokens look like, as text of a user."""
    for literal in (*literals, *MARKUP):
        yield from (literal, f"a{literal}b", f" {literal} ", literal * 3, literal[:-1], literal.upper())
    yield "".join(literals)
