"""Where byte-level tokenizers cut a text before merging: the published regular expressions, by the name of a family.

They are written as Oniguruma reads them, which is what the tokenizers library uses. The tiktoken package now writes
some with possessive quantifiers and `\\s++$`, which mean something else to Oniguruma; these older forms cut equally.
"""

from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.tokenizers.pieces import Definition

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _letters_and_digits(digits: str) -> str:
    """The split of cl100k, Llama 3 and Qwen2, which differ in how many digits stay together."""
    words = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    return words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES


def _cased_words(digits: str, end: str, marks: str = r"[\r\n/]*", other: str = "") -> str:
    """The split of o200k, Tekken and Kimi: words are cut where a lower-case letter meets an upper-case one."""
    before = r"[^\r\n\p{L}\p{N}]?"
    first = rf"{before}[{UPPER}{other}]*[{LOWER}{other}]+{end}"
    second = rf"{before}[{UPPER}{other}]+[{LOWER}{other}]*{end}"
    return rf"{first}|{second}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{marks}" + SPACES


DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
) + SPACES


@dataclass(frozen=True, slots=True)
class Split:
    """The regular expressions, applied one after the other; and whether the family brings text into NFC before."""

    patterns: tuple[str, ...]
    nfc: bool = False


SPLITS = {
    "gpt2": Split((GPT2_WORDS,)),
    "digits-gpt2": Split((r"\p{N}", GPT2_WORDS)),  # StarCoder, Command R, SmolLM: every digit alone
    "cl100k": Split((_letters_and_digits(r"\p{N}{1,3}"),)),  # also Llama 3
    "qwen2": Split((_letters_and_digits(r"\p{N}"),), nfc=True),
    "o200k": Split((_cased_words(r"\p{N}{1,3}", CONTRACTIONS + "?"),)),  # also Llama 4
    "tekken": Split((_cased_words(r"\p{N}", ""),)),
    "deepseek-v3": Split((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_WORDS)),
    "kimi-k2": Split((r"[\p{Han}]+|" + _cased_words(r"\p{N}{1,3}", CONTRACTIONS + "?", r"[\r\n]*", r"&&[^\p{Han}]"),)),
}


def named_or_regex(pattern: str) -> Split:
    """The split of a family's name, or the one that a regular expression describes."""
    if not pattern:
        raise UserError(f"pattern '': write a regular expression or one of {', '.join(SPLITS)}")
    return SPLITS[pattern] if pattern in SPLITS else Split((pattern,))


def byte_level_steps(split: Split) -> Definition:
    """The pre-tokenizer of a tokenizer.json that cuts a text this way and writes the pieces in the byte alphabet."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    patterns = split.patterns
    if patterns[-1] == GPT2_WORDS:  # the library has this one built in, and much faster
        last, patterns = last | {"use_regex": True}, patterns[:-1]
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*cuts, last]} if cuts else last
