"""How one tokenizer treats numbers, white space, the beginning of a text and odd characters, found by asking it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.tokenizers.changes import LACKS_BYTES, LACKS_CHARACTERS

LONGEST_NUMBER = 16
NUMBERS_PER_LENGTH = 12
ROUND_NUMBERS = ("2024", "10000", "100000", "1000000", "1000000000", "0000000000000000")
RUNS = range(1, 129)
INDENTATION = 8


@dataclass(frozen=True, slots=True)
class Digits:
    """How numbers are cut: digit by digit, in groups of `longest` counted from the left or the right, or freely."""

    kind: Literal["single", "left", "right", "free"]
    longest: int  # digits in the longest group seen
    numerals: int  # how many of the numbers 0 to 999 stay whole
    joins_space: bool  # the space before a number is in the token of its first digits

    @property
    def scheme(self) -> str:
        """The scheme in words."""
        if self.kind == "free":
            return f"in learnt runs of up to {self.longest} digits"
        if self.kind == "single":
            return "digit by digit"
        return f"in groups of {self.longest} from the {self.kind}"


@dataclass(frozen=True, slots=True)
class WhiteSpace:
    """What happens to spaces, tabs and line breaks. Runs are the longest that one token covers, asked up to 128."""

    word_space: Literal["before", "after", "alone", "dropped"]  # where the space between two words goes
    spaces: int
    tabs: int
    newlines: int
    keeps_indentation: bool
    indentation_tokens: int  # tokens for an indentation of eight spaces, one that is joined to the word counted
    space_joins_word: bool  # the last space of an indentation is in the token of the word
    tab_joins_word: bool
    newline_joins_indentation: bool
    newline_joins_punctuation: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """What was found of one tokenizer."""

    digits: Digits
    white_space: WhiteSpace
    dummy_space: bool  # a text is begun by a space that it does not hold
    changes: tuple[str, ...]  # in words, what it does not keep of a text
    lossless: bool  # ordinary text can be had back from the tokens
    lacks_characters: bool


def profile(tokenizer: Tokenizer) -> Profile:
    """What is found by encoding some thousand short texts."""
    lacks = {LACKS_BYTES, LACKS_CHARACTERS}
    changes = tuple(change for change in tokenizer.changes if change not in lacks)
    return Profile(
        digits=_digits(tokenizer),
        white_space=_white_space(tokenizer),
        dummy_space=adds_space(tokenizer),
        changes=changes,
        lossless=tokenizer.lossless,
        lacks_characters=len(changes) < len(tokenizer.changes),
    )


def encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding | None]:
    """One encoding per text, None for a text that the tokenizer refuses."""
    try:
        return [*tokenizer.encode_batch(list(texts))]
    except UserError:
        half = len(texts) // 2
        return [None] if half == 0 else encodings(tokenizer, texts[:half]) + encodings(tokenizer, texts[half:])


def unknowns(tokenizer: Tokenizer, encoding: Encoding) -> int:
    """How many tokens stand for characters that the vocabulary cannot spell."""
    return sum(i in tokenizer.special_ids for i in encoding.ids[~encoding.special].tolist())


def spelled(tokenizer: Tokenizer, encoding: Encoding) -> bytes:
    """The bytes of the tokens, dummy space included."""
    return b"".join(tokenizer.token_bytes[i] for i in encoding.ids.tolist())


def adds_space(tokenizer: Tokenizer) -> bool:
    """Whether a text is begun by a space that it does not hold."""
    (found,) = encodings(tokenizer, ["a"])
    return found is not None and spelled(tokenizer, found).startswith(b" ")


def _cuts(encoding: Encoding | None) -> set[int]:
    """Byte positions where a token ends."""
    return set() if encoding is None else set(encoding.ends.tolist())


def _digits(tokenizer: Tokenizer) -> Digits:
    draw = random.Random(0)
    numbers = [str(n) for n in range(1000)]
    for length in range(4, LONGEST_NUMBER + 1):
        numbers += [str(draw.randrange(10 ** (length - 1), 10**length)) for _ in range(NUMBERS_PER_LENGTH)]
    numbers += ROUND_NUMBERS
    found = [_cuts(one) for one in encodings(tokenizer, [f"= {number};" for number in numbers])]
    groups = [_groups(cuts, len(number)) for number, cuts in zip(numbers, found)]
    longest = max(max(group) for group in groups)
    kind: Literal["single", "left", "right", "free"] = "free"
    if longest == 1:
        kind = "single"
    elif all(group == _full(sum(group), longest) for group in groups):
        kind = "left"
    elif all(group[::-1] == _full(sum(group), longest) for group in groups):
        kind = "right"
    return Digits(kind, longest, sum(len(group) == 1 for group in groups[:1000]), any(2 not in cuts for cuts in found))


def _groups(cuts: set[int], length: int) -> list[int]:
    """Digits per token of a number that begins at byte 2."""
    places = [0, *(p for p in range(1, length) if p + 2 in cuts), length]
    return [after - before for before, after in pairwise(places)]


def _full(length: int, size: int) -> list[int]:
    rest = length % size
    return [size] * (length // size) + ([rest] if rest else [])


def _white_space(tokenizer: Tokenizer) -> WhiteSpace:
    probes = ["the cat", "x:\n" + " " * INDENTATION + "return", "x:\n\treturn"]
    words, indented, tabbed = encodings(tokenizer, probes)
    between, places, tab = _cuts(words), _cuts(indented), _cuts(tabbed)
    end = 3 + INDENTATION
    if words is None or b" " not in spelled(tokenizer, words)[1:]:
        word_space = "dropped"
    elif 3 in between:
        word_space = "alone" if 4 in between else "before"
    else:
        word_space = "after"
    return WhiteSpace(
        word_space=word_space,
        spaces=_longest_run(tokenizer, " "),
        tabs=_longest_run(tokenizer, "\t"),
        newlines=_longest_run(tokenizer, "\n"),
        keeps_indentation=indented is not None and b"\n" + b" " * INDENTATION in spelled(tokenizer, indented),
        indentation_tokens=1 + sum(3 < place < end for place in places),
        space_joins_word=end not in places,
        tab_joins_word=4 not in tab,
        newline_joins_indentation=3 not in places,
        newline_joins_punctuation=2 not in places,
    )


def _longest_run(tokenizer: Tokenizer, character: str) -> int:
    """The longest token of nothing but the character, met in runs of it between letters."""
    spelling = character.encode()
    found = encodings(tokenizer, ["x" + character * run + "x" for run in RUNS])
    tokens = {tokenizer.token_bytes[i] for one in found if one is not None for i in one.ids.tolist()}
    return max((len(token) for token in tokens if not token.strip(spelling)), default=0)
