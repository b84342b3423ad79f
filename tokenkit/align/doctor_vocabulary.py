"""Two vocabularies compared by their bytes: what they share, script by script, and what lies at their edges."""

import functools
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from tokenkit.align.doctor_schemes import adds_space, encodings, unknowns
from tokenkit.tokenizers.base import Tokenizer

SAMPLE = 300  # tokens per script whose spelling is looked up, spread evenly over the vocabulary
PARTIAL, DIGITS, SPACE, SYMBOLS = "part of a character", "digits", "white space", "punctuation and symbols"
# First words of character names to scripts, where the word is not the script; the other scripts are their names.
NO_SCRIPT = {
    "COMBINING",
    "VARIATION",
    "MODIFIER",
    "MATHEMATICAL",
    "CIRCLED",
    "SUPERSCRIPT",
    "SUBSCRIPT",
    "DOUBLE-STRUCK",
    *("MASCULINE", "FEMININE", "MICRO", "SCRIPT", "BLACK-LETTER", "PLANCK", "OHM", "KELVIN", "ANGSTROM", "INFORMATION"),
}
NAMED = {"Cjk": "Han", "Ideographic": "Han", "Hiragana": "Kana", "Katakana": "Kana", "Katakana-Hiragana": "Kana"}
WIDTHS = ("FULLWIDTH", "HALFWIDTH")


@dataclass(frozen=True, slots=True)
class ScriptCoverage:
    """How the source has the target's tokens of one script."""

    script: str
    tokens: int  # target tokens; of several with the same bytes one, as only one of them is what text becomes
    same: int  # of these, how many the source has with the same bytes
    pieces: float | None  # mean source tokens per target token; None where parts of characters cannot be spelled alone
    unspelled: int  # target tokens of the sample that the source cannot spell or refuses


@dataclass(frozen=True, slots=True)
class Entries:
    """What the vocabulary of one tokenizer holds."""

    ids: int  # largest id + 1
    tokens: int  # ordinary tokens
    special: int
    holes: int  # ids that no token has
    duplicates: int  # ordinary tokens whose bytes an earlier id has
    undecodable: int  # ordinary tokens that are not UTF-8 on their own
    over_16_bytes: int
    longest: tuple[str, ...]  # the longest words, longest first
    longest_bytes: int  # of all tokens

    @property
    def spellings(self) -> int:
        """Ordinary tokens that text may become: those that are no double (`<0x41>` beside `A`)."""
        return self.tokens - self.duplicates


def entries(tokenizer: Tokenizer) -> Entries:
    """Counts over the vocabulary, and its longest words."""
    ordinary = [spelling for spelling in tokenizer.token_bytes if spelling]
    texts = [text for spelling in ordinary if (text := _as_text(spelling)) is not None]
    words = filter(_is_word, sorted(texts, key=len, reverse=True))
    return Entries(
        ids=tokenizer.vocab_size,
        tokens=len(ordinary),
        special=len(tokenizer.special_ids),
        holes=tokenizer.vocab_size - len(ordinary) - len(tokenizer.special_ids),
        duplicates=len(ordinary) - len(set(ordinary)),
        undecodable=len(ordinary) - len(texts),
        over_16_bytes=sum(len(spelling) > 16 for spelling in ordinary),
        longest=tuple(islice(words, 3)),
        longest_bytes=max(map(len, ordinary), default=0),
    )


def coverage(source: Tokenizer, target: Tokenizer) -> tuple[ScriptCoverage, ...]:
    """One entry per script of the target, those with most tokens first."""
    known = set(source.token_bytes)
    total: Counter[str] = Counter()
    others: dict[str, list[str]] = {}
    for spelling in dict.fromkeys(target.token_bytes):
        if not spelling:
            continue
        text = _as_text(spelling)
        script = PARTIAL if text is None else script_of(text)
        total[script] += 1
        rest = others.setdefault(script, [])
        if spelling not in known:
            rest.append(text or "")
    found = []
    for script, tokens in total.most_common():
        rest = others[script]
        same, pieces, unspelled = tokens - len(rest), None, 0
        if script != PARTIAL:
            counts = piece_counts(source, _spread(rest))
            whole = [count for count in counts if count is not None]
            unspelled = len(counts) - len(whole)
            mean = sum(whole) / len(whole) if whole else 1.0
            pieces = (same + len(rest) * mean) / tokens if whole or not rest else None
        found.append(ScriptCoverage(script, tokens, same, pieces, unspelled))
    return tuple(found)


def _spread(texts: list[str]) -> list[str]:
    """At most SAMPLE of the texts, evenly spaced."""
    return texts if len(texts) <= SAMPLE else [texts[i * len(texts) // SAMPLE] for i in range(SAMPLE)]


def piece_counts(tokenizer: Tokenizer, texts: list[str]) -> list[int | None]:
    """Tokens per text in the middle of a line; None for a text that cannot be spelled."""
    # A dummy space would join the first piece; after a line break there is none.
    carrier = "\n" if adds_space(tokenizer) else ""
    found: list[int | None] = []
    for one in encodings(tokenizer, [carrier + text for text in texts]):
        if one is None or unknowns(tokenizer, one):
            found.append(None)
        else:
            found.append(max(1, int((one.starts >= len(carrier)).sum())))
    return found


def script_of(text: str) -> str:
    """The script of the first letter; without letters digits, white space or symbols."""
    if text.isascii():  # most tokens of most vocabularies
        if any(map(str.isalpha, text)):
            return "Latin"
    else:
        for character in text:
            script = _script(character)
            if script is not None:
                return script
    if not text.strip():
        return SPACE
    return DIGITS if any(unicodedata.category(c)[0] == "N" for c in text) else SYMBOLS


@functools.cache
def _script(character: str) -> str | None:
    """The script of a letter or mark by its Unicode name; None for everything else, and for signs shared by scripts."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    words = unicodedata.name(character, "").split()
    if words and words[0] in WIDTHS:
        words = words[1:]
    if not words or words[0] in NO_SCRIPT:
        return None
    name = words[0].title()
    return NAMED.get(name, name)


def _is_word(text: str) -> bool:
    """Whether a token holds a letter and does not only repeat one or two."""
    return any(map(str.isalpha, text)) and len(set(text)) > min(2, len(text) - 1)


def _as_text(spelling: bytes) -> str | None:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return None
