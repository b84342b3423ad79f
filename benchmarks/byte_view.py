"""The byte view of every tokenizer of the shared folder on 200,000 distinct strings each, as a Markdown table.

The strings: multilingual corpora, every assigned code point between letters (ideographs, syllables and private use in
groups), white space runs, CRLF, NUL, emoji, combining marks, right-to-left text, seeded random text. What is checked:
ids equal the library's own; spans tile the text; tokens spell their spans, exactly or, where a normalizer changed the
text, after normalising the span. Usage: python benchmarks/byte_view.py [--every 1] [NAME ...]
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import gzip
import json
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import space_mark, unknown_id

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FOLDER, CORPORA = SHARED / "data/tokenizers", SHARED / "data/corpora"
BATCH = 256
GROUP = 16  # code points per string where a block is one kind of letter
EDGES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\0",
    "\x0b",
    "\x0c",
    "\x1f",
    "\x7f",
    "\x85",
    "\xa0",
    "\xad",
]
EDGES += [
    "\u200b",
    "\u200d",
    "\u2028",
    "\u2060",
    "\u3000",
    "\ufeff",
    "\ufe0f",
    "e\u0301",
    "\u0301",
    "\u1112\u1161\u11ab",
]
EDGES += [
    "👩‍👩‍👧",
    "🇩🇪",
    "1️⃣",
    "שלום",
    "مرحبا",
    "\u202eabc\u202c",
    "中文",
    "日本語",
    "한국어",
    "ไทย",
    "हिन्दी",
    "ﬁ",
    "①",
    "İ",
    "ß",
    "Σς",
]
EDGES += [
    "▁",
    "Ġ",
    "##",
    "</w>",
    "the",
    "The CAT",
    "12345",
    "user",
    "...",
    "'s",
    "_",
    "x" * 120,
    "À",
    "𝔘",
    "\U0010ffff",
]


def code_points() -> Iterator[str]:
    """Every assigned code point that is no surrogate: between letters, or in groups of one kind of letter."""
    group = ""
    for code in range(0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Cn", "Cs"):
            continue
        if category == "Co" or unicodedata.name(character, "").startswith(("CJK UNIFIED", "CJK COMPAT", "HANGUL SYL")):
            group += character
            if len(group) == GROUP:
                yield group
                group = ""
        else:
            yield f"a{character}b {character}"
    yield group


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Strings of edge cases, letters and any characters."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = [
            draw.choice(EDGES)
            if draw.random() < 0.6
            else chr(draw.choice((0x80, 0x800, 0xD000)) - draw.randrange(1, 128))
            for _ in range(draw.randrange(1, 10))
        ]
        yield "".join(parts)


def corpus_texts() -> Iterator[str]:
    """Lines and documents of the corpora, 380 languages and code among them."""
    for name in (
        "ntrex/train",
        "ntrex/valid",
        "udhr",
        "c4_en_mini/train",
        "code/multipl_e_humaneval",
        "instruct/train",
    ):
        with gzip.open(CORPORA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from _leaves(json.loads(line), whole="ntrex" in name or "c4" in name)


def _leaves(value: object, whole: bool) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if whole else [value[:1500], *value.splitlines(keepends=True)]
    elif isinstance(value, dict):
        for child in value.values():
            yield from _leaves(child, whole)
    elif isinstance(value, list):
        for child in value:
            yield from _leaves(child, whole)


@dataclass
class Found:
    """Counts of one tokenizer."""

    strings: int = 0
    ids: int = 0
    tiled: int = 0
    exact: int = 0
    after_space: int = 0
    by_offsets: int = 0
    tokens: int = 0
    alone: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    wrong: int = 0
    failures: list[str] = field(default_factory=list)


class Checker:
    """One tokenizer beside the library's own."""

    def __init__(self, ours: HFTokenizer) -> None:
        self.ours, self.found = ours, Found()
        definition = ours.definition
        self.library = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self.library.encode_special_tokens = True
        self.mark, self.unknown = space_mark(definition), unknown_id(definition)
        self.adds_space = b"".join(ours.token_bytes[index] for index in ours.encode("a").ids) == b" a"
        self.literals = re.compile("|".join(map(re.escape, ours.special_tokens)) or r"(?!)")

    def check(self, texts: list[str]) -> None:
        """Adds what is found of these texts; those with a special token's literal are left out."""
        texts = [text for text in texts if not self.literals.search(text)]
        for begin in range(0, len(texts), BATCH):
            batch = texts[begin : begin + BATCH]
            try:
                encodings: list[Encoding | None] = [*self.ours.encode_batch(batch)]
            except UserError:
                encodings = [self._one(text) for text in batch]
            theirs = self.library.encode_batch(batch, add_special_tokens=False)
            for text, encoding, other in zip(batch, encodings, theirs):
                self.found.strings += 1
                if encoding is not None:
                    self._compare(text, encoding, other.ids)

    def _one(self, text: str) -> Encoding | None:
        try:
            return self.ours.encode(text)
        except UserError as error:
            character = text[int(re.search(r"character (\d+),", str(error))[1])]
            reason = re.search(r", ((belongs|leaves|is spelled|becomes) [^;]*);", str(error))[1]
            if "belongs" in reason:
                reason += f" ({unicodedata.category(character)})"
            self.found.refused[reason] += 1
            self.found.examples.setdefault(reason, f"U+{ord(character):04X}")
            return None

    def _compare(self, text: str, encoding: Encoding, ids: list[int]) -> None:
        raw, found, table = text.encode(), self.found, self.ours.token_bytes
        same = encoding.ids.tolist() == ids
        starts, ends = encoding.starts, encoding.ends
        tiled = np.array_equal(starts, np.append(0, ends[:-1])[: len(ids)]) and bool((ends >= starts).all())
        tiled = tiled and (int(ends[-1]) if len(ids) else 0) == len(raw)
        found.ids += same
        found.tiled += tiled
        spelled = [table[index] for index in ids]
        joined = b"".join(spelled)
        if joined in (raw, b" " + raw) and (joined == raw or self.adds_space):
            spans = [raw[s:e] for s, e in zip(starts.tolist(), ends.tolist())]
            right = b"".join(spans) == raw and spelled[1:] == spans[1:]
            found.exact += joined == raw
            found.after_space += joined != raw
        else:
            right = self._normalised_spans(raw, encoding, spelled)
            found.by_offsets += 1
            found.tokens += len(ids)
        if not (same and tiled and right):
            found.wrong += 1
            found.failures.append(f"{text!r}: ids {same}, tiled {tiled}, spelled {right}")

    def _normalised_spans(self, raw: bytes, encoding: Encoding, spelled: list[bytes]) -> bool:
        """Whether the tokens spell, besides white space, what the normalizer makes of their spans.

        A token is compared alone, or with those that follow where it is a piece of a character.
        """
        begin, run, unknown = 0, [], False
        for index, end, token in zip(encoding.ids.tolist(), encoding.ends.tolist(), spelled):
            run.append(token)
            unknown = unknown or index == self.unknown
            if end == begin and unknown:
                continue  # a piece of a character: what it stands for shows with those that follow
            if self._is_spelled(raw[begin:end], run, unknown):
                self.found.alone += len(run) == 1
                begin, run, unknown = end, [], False
        return begin == len(raw)

    def _is_spelled(self, span: bytes, tokens: list[bytes], unknown: bool) -> bool:
        try:
            text, wanted = span.decode(), "".join(b"".join(tokens).decode().split())
        except UnicodeDecodeError:
            return False
        # A charsmap looks at clusters first: what it makes of a cut one it may make of its characters one by one only.
        for made in (self._normalised(text), "".join(map(self._normalised, text))):
            left = iter(made)
            if made == wanted or (unknown and all(character in left for character in wanted)):
                return True  # an unknown token stands for anything
        return False

    def _normalised(self, text: str) -> str:
        made = text if self.library.normalizer is None else self.library.normalizer.normalize_str(text)
        return "".join((made.replace(self.mark, " ") if self.mark else made).split())


def row(name: str, found: Found) -> str:
    """The table's row of one tokenizer."""
    reasons = "; ".join(f"{n:,} {reason}, e.g. {found.examples[reason]}" for reason, n in found.refused.most_common())
    accepted = found.strings - found.refused.total()
    cells = [found.strings, accepted, found.ids, found.tiled, found.exact, found.after_space, found.by_offsets]
    alone = f"{found.alone / found.tokens:.1%}" if found.tokens else "–"
    return f"| {name} | {' | '.join(f'{n:,}' for n in cells)} | {alone} | {found.wrong} | {reasons or '–'} |"


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--every", type=int, default=1, help="take one of so many strings")
    arguments = parser.parse_args()
    names = arguments.names or sorted(path.name for path in FOLDER.iterdir() if any(path.glob("tokenizer.json*")))
    texts = list(dict.fromkeys([*corpus_texts(), *code_points(), *EDGES, *random_texts(40_000, 0)]))[:: arguments.every]
    print(f"{len(texts):,} distinct strings, {sum(len(text.encode()) for text in texts):,} bytes\n")
    print("| tokenizer | strings | accepted | ids equal | spans tile | spelled exactly | after a dummy space ", end="")
    print("| by offsets ", end="")
    print(
        "| one by one | wrong | refused |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    )
    for name in names:
        path = FOLDER / name
        checker = Checker(load_tokenizer(str(path)))
        checker.check(texts)
        print(row(name, checker.found), flush=True)
        for failure in checker.found.failures[:10]:
            print(f"{name}: {failure[:400]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
