"""Which documents read like text: the signals and thresholds of RedPajama-V2, as pure functions of the text.

Together Computer 2023; after Gopher (Rae+ 2021, 2112.11446), C4 (Raffel+ 2020, 1910.10683) and CCNet. A document is
kept if every signal lies within its rule. Words are runs without white space; the normalised text is in small letters,
without punctuation.
"""

import difflib
import hashlib
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import field_validator, model_validator

from tokenkit.config import Config, UserError

Language = Literal["de", "en", "es", "fr", "it"]
STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "de": "der die das und ist nicht ein eine zu den dem mit von auf für im sich des dass auch als an wie "
        "bei oder aus nach wird sind noch war ich sie er es wir ihr aber wenn nur so um am zum zur einen "
        "einem einer hat haben werden",
        "en": "the be to of and that have with a in is it for on as are was this at by not or from but what "
        "all were we when your can said there use an each which she do how their if will up other about "
        "out many then them these so i you he they his her had has",
        "es": "el la de que y a en un ser se no haber por con su para como estar tener le lo todo pero más "
        "hacer o poder este ya los las una del al es son fue era muy sin sobre también me hasta hay "
        "donde desde cuando",
        "fr": "le la les de des du et à un une est que qui dans pour pas plus par sur au aux ne se ce il elle "
        "sont avec son sa ses ou mais nous vous ils cette comme être a été leur était aussi même fait",
        "it": "il lo la i gli le di da a in con su per tra e che un una è non si del della dei delle al alla "
        "nel nella sono come più ma anche ha o se questo questa era dal dalla ci mi loro essere stato",
    }.items()
}
ELLIPSES = ("...", "…")
SYMBOLS = ("#", *ELLIPSES)
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
PUNCTUATION = str.maketrans("", "", string.punctuation + "„“”‚‘’«»–—…¿¡")


@dataclass(frozen=True)
class Rule:
    """Bounds of one signal: at least, at most, and below."""

    name: str
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a document with this value is kept."""
        return self.least <= value <= self.most and value < self.below

    def bounds(self) -> dict[str, float]:
        """Those bounds that it has."""
        found = {"at_least": self.least, "at_most": self.most, "below": self.below}
        return {key: value for key, value in found.items() if math.isfinite(value)}


RULES: tuple[Rule, ...] = (
    Rule("words", least=50.0, most=10_000.0),
    Rule("mean_word_length", least=3.0, most=10.0),
    Rule("unique_words", least=0.1, most=0.9),
    Rule("unigram_entropy", least=3.0, most=6.0),
    Rule("stop_words", least=0.06),
    Rule("capital_words", below=0.1),
    Rule("words_without_letters", below=0.4),
    Rule("symbols_per_word", below=0.5),
    Rule("ellipsis_lines", below=0.2),
    Rule("bullet_lines", most=0.9),
    Rule("curly_brackets", below=0.05),
    Rule("lorem_ipsum", below=3e-6),
    *(Rule(f"top_{n}_gram", most=most) for n, most in ((2, 0.20), (3, 0.18), (4, 0.16))),
    *(Rule(f"repeated_{n}_grams", most=round(0.20 - 0.01 * n, 2)) for n in range(5, 11)),
    Rule("language", least=1.0),
    Rule("duplicate", most=0.0),
)
NAMES = tuple(rule.name for rule in RULES)


class Bounds(Config):
    """Bounds of a rule in place of its own."""

    min: float | None = None
    max: float | None = None


class QualityConfig(Config):
    """What is asked of a document."""

    language: Language = "en"
    """Whose stop words are counted, and what the document must be written in."""
    bounds: dict[str, Bounds] = {}
    """Other bounds of a rule, by name: `{words: {min: 20}}`; what is not given is not asked."""
    without: list[str] = []
    """Rules that are left out."""

    @field_validator("without")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            _check_name(name, "without")
        return names

    @model_validator(mode="after")
    def _apart(self) -> "QualityConfig":
        for name in self.bounds:
            _check_name(name, "bounds")
            if name in self.without:
                raise UserError(f"bounds.{name}: also under without; write one of the two")
        return self

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this configuration, in the order of the table."""
        return tuple(self._rule(rule) for rule in RULES if rule.name not in self.without)

    def _rule(self, rule: Rule) -> Rule:
        if rule.name not in self.bounds:
            return rule
        own = self.bounds[rule.name]
        least, most = (-math.inf if own.min is None else own.min), (math.inf if own.max is None else own.max)
        return Rule(rule.name, least=least, most=most)


def _check_name(name: str, place: str) -> None:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {', '.join(NAMES)}"
        raise UserError(f"{place}: {name!r} is no rule; {hint}")


def signals(text: str, language: Language = "en") -> dict[str, float]:
    """The value of every signal but `duplicate`, which is not of one document alone; 0 where there is nothing to count.

    Counts are of words, `mean_word_length` is in characters, the entropy in nats, all others are shares: of words, of
    lines, of characters.
    """
    raw_words, words = text.split(), normalised(text).split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = {
        "words": float(len(words)),
        "mean_word_length": _share(sum(map(len, words)), len(words)),
        "unique_words": _share(len(set(words)), len(words)),
        "unigram_entropy": entropy(words),
        "stop_words": stop_word_share(words, language),
        "capital_words": _share(sum(word.isupper() for word in raw_words), len(raw_words)),
        "words_without_letters": _share(sum(not any(c.isalpha() for c in word) for word in raw_words), len(raw_words)),
        "symbols_per_word": _share(sum(text.count(symbol) for symbol in SYMBOLS), len(raw_words)),
        "ellipsis_lines": _share(sum(line.endswith(ELLIPSES) for line in lines), len(lines)),
        "bullet_lines": _share(sum(line.startswith(BULLETS) for line in lines), len(lines)),
        "curly_brackets": _share(text.count("{") + text.count("}"), len(text)),
        "lorem_ipsum": _share(len(re.findall(r"\blorem ipsum\b", normalised(text))), len(text)),
        "language": float(language_of(words) == language),
    }
    found |= {f"top_{n}_gram": top_gram(words, n) for n in (2, 3, 4)}
    return found | {f"repeated_{n}_grams": repeated_grams(words, n) for n in range(5, 11)}


def normalised(text: str) -> str:
    """The text in small letters, composed, without punctuation, one space between words."""
    return " ".join(unicodedata.normalize("NFC", text).lower().translate(PUNCTUATION).split())


def entropy(words: Sequence[str]) -> float:
    """Of the distribution of single words, in nats."""
    counts = Counter(words).values()
    return math.fsum(-count / len(words) * math.log(count / len(words)) for count in counts)


def stop_word_share(words: Sequence[str], language: Language) -> float:
    """How many of the words are among the commonest little words of a language."""
    return _share(sum(word in STOP_WORDS[language] for word in words), len(words))


def language_of(words: Sequence[str]) -> Language | None:
    """The language with the largest share of stop words; None where none of five has any."""
    languages: tuple[Language, ...] = ("en", "de", "es", "fr", "it")
    best = max(languages, key=lambda language: stop_word_share(words, language))
    return best if stop_word_share(words, best) > 0 else None


def top_gram(words: Sequence[str], n: int) -> float:
    """Characters of the commonest n-gram that stands more than once, all times together, as a share of all."""
    counts = Counter(zip(*(words[start:] for start in range(n))))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return min(1.0, _share(most * longest, sum(map(len, words))))


def repeated_grams(words: Sequence[str], n: int) -> float:
    """Characters of words inside an n-gram that stood before, as a share of all; each word counts once."""
    seen: set[tuple[str, ...]] = set()
    inside = [False] * len(words)
    for start, gram in enumerate(zip(*(words[first:] for first in range(n)))):
        if gram in seen:
            inside[start : start + n] = [True] * n
        seen.add(gram)
    return _share(sum(len(word) for word, marked in zip(words, inside) if marked), sum(map(len, words)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@dataclass
class QualityFilter:
    """Says of one document after another which rules it breaks, and counts."""

    config: QualityConfig = field(default_factory=QualityConfig)
    documents: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Documents that break a rule, by rule."""
    rejected_alone: Counter[str] = field(default_factory=Counter)
    """Documents that break this rule and no other."""
    _seen: set[bytes] = field(default_factory=set)

    def __call__(self, text: str) -> list[str]:
        """The rules that a document breaks; none: it is kept. What came before, kept or not, makes it a duplicate."""
        seal = hashlib.sha256(normalised(text).encode()).digest()
        values = signals(text, self.config.language) | {"duplicate": float(seal in self._seen)}
        self._seen.add(seal)
        broken = [rule.name for rule in self.config.rules() if not rule.holds(values[rule.name])]
        self.documents += 1
        self.kept += not broken
        self.rejected.update(broken)
        if len(broken) == 1:
            self.rejected_alone.update(broken)
        return broken

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents per rule, every rule in the order of the table, those that broke nothing with 0."""
        names = [rule.name for rule in self.config.rules()]
        return {
            "rejected": {name: self.rejected[name] for name in names},
            "rejected_by_this_rule_alone": {name: self.rejected_alone[name] for name in names},
        }
