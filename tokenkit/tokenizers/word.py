"""The word tokenizer that the learned one replaces: lower-cased words and single signs, whose ids are in a table."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count, repeat
from pathlib import Path

from tokenkit.config import UserError, resolved
from tokenkit.tokenizers.autoencoder.ids import FixedRoles
from tokenkit.tokenizers.json_config import read_config, write_json
from tokenkit.tokenizers.whole_file import write_whole
from tokenkit.tokenizers.word_config import WordConfig

PAD, UNK, BOS, EOS, USER, ASSISTANT, FIRST_WORD = range(7)
SIGNS = re.escape(string.punctuation)
WORDS = re.compile(rf"[^\s{SIGNS}]+|[{SIGNS}]")
VOCABULARY, CONFIG = "vocab.txt", "word_tokenizer_config.json"
HEADER = ("vocab_size", "next_id", "total_tokens")


class WordTokenizer(FixedRoles):
    """Words between white space and ASCII punctuation, which is kept sign by sign; what is not in the table is unk."""

    lossless = False

    def __init__(self, config: WordConfig | None = None, words: Sequence[str] = (), total_tokens: int = 0) -> None:
        """`words` have the ids from 6 on; `total_tokens` is how many words the corpus had. UserError for a repeat."""
        self.config = config or WordConfig()
        self.words, self.total_tokens = [*words], total_tokens
        self._ids = {word: FIRST_WORD + index for index, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            word = next(word for index, word in enumerate(self.words) if self._ids[word] != FIRST_WORD + index)
            raise UserError(f"vocabulary: the word {word!r} stands twice; keep one")
        literals = self.config.special_tokens.literals
        self._all = {index: _spaced(word) for index, word in enumerate([*literals, *self.words])}
        self._words = self._all | dict.fromkeys(range(FIRST_WORD), "")
        self._normalised = _normaliser(self.config)

    @classmethod
    def train(cls, texts: Iterable[str], config: WordConfig | None = None) -> "WordTokenizer":
        """The most frequent words of texts; of words as frequent, the first in the order of code points."""
        config = config or WordConfig()
        normalised, counts = _normaliser(config), Counter[str]()
        for text in texts:
            counts.update(WORDS.findall(normalised(text)))
        kept = [word for word, times in counts.items() if times >= config.min_frequency]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls(config, kept[: config.vocab_size - FIRST_WORD], counts.total())

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return FIRST_WORD + len(self.words)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of the words and signs of a text, by default between bos and eos."""
        ids = list(map(self._ids.get, WORDS.findall(self._normalised(text)), repeat(UNK)))
        return [BOS, *ids, EOS] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Words with a space before each that does not begin with a sign. UserError for an id that there is not."""
        table = self._words if skip_special_tokens else self._all
        try:
            return "".join(map(table.__getitem__, ids)).removeprefix(" ")
        except KeyError as error:
            raise UserError(f"id {error}: this tokenizer has ids 0 .. {self.vocab_size - 1}") from None

    def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of every text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode_batch(self, batch: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of every row of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def is_special(self, index: int) -> bool:
        """Whether an id stands for no word."""
        return 0 <= index < FIRST_WORD

    def save(self, folder: Path | str) -> None:
        """Writes the vocabulary and the configuration."""
        write_vocabulary(Path(folder) / VOCABULARY, self)
        write_json(Path(folder) / CONFIG, resolved(self.config))

    @classmethod
    def load(cls, path: Path | str) -> "WordTokenizer":
        """The tokenizer of a folder that `save` wrote, or of a vocabulary file alone, which then keeps the defaults."""
        path = Path(path)
        config = read_config(WordConfig, path / CONFIG) if (path / CONFIG).is_file() else WordConfig()
        return cls.read(path / VOCABULARY if path.is_dir() else path, config)

    @classmethod
    def read(cls, path: Path | str, config: WordConfig | None = None) -> "WordTokenizer":
        """The words of a vocabulary file. Its special tokens, where it lists them, go before those of `config`."""
        literals, words, total_tokens = read_vocabulary(Path(path))
        config = config or WordConfig()
        if literals:
            names = zip(("pad", "unk", "bos", "eos", "user", "assistant"), literals)
            specials = type(config.special_tokens).model_validate(resolved(config.special_tokens) | dict(names))
            config = config.model_copy(update={"special_tokens": specials})
        return cls(config, words, total_tokens)


def write_vocabulary(path: Path, tokenizer: WordTokenizer) -> None:
    """Writes a vocabulary in the old format: comments, three numbers, a line of dashes, then `id<TAB>word`."""
    entries = [*tokenizer.config.special_tokens.literals, *tokenizer.words]
    numbers = zip(HEADER, (len(entries), len(entries), tokenizer.total_tokens))
    lines = [
        "# words of a tokenizer, one a line after its id",
        *(f"{name}={number}" for name, number in numbers),
        "---",
    ]
    lines += (f"{index}\t{word}" for index, word in enumerate(entries))
    write_whole(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))


def read_vocabulary(path: Path) -> tuple[list[str], list[str], int]:
    """Special tokens ([] where the file has words only), words by id, and the number of words that the corpus had.

    UserError, with the line, for a file that is none or was cut short.
    """
    try:
        lines = path.read_bytes().decode("utf-8", "surrogatepass").split("\n")
    except OSError as error:
        raise UserError(f"{path}: no vocabulary ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so not a vocabulary of words") from None
    lines = [line.removesuffix("\r") for line in lines]
    if "---" not in lines:
        raise UserError(f"{path}: no line of three dashes, so not a vocabulary of words")
    begin = lines.index("---")
    header = dict(_header_line(path, number, line) for number, line in enumerate(lines[:begin], 1) if _says(line))
    entries = _entries(path, lines[begin + 1 :], begin + 2)
    first = 0 if 0 in entries else FIRST_WORD
    missing = next(index for index in count(first) if index not in entries)
    end = first + len(entries)
    if missing < max(end, FIRST_WORD):
        raise UserError(f"{path}: no word for the id {missing}; ids run from 0 or {FIRST_WORD} without a gap")
    if header.get("next_id", end) != end:
        raise UserError(f"{path}: ids end at {end - 1}, but next_id is {header['next_id']}; the file was cut short")
    found = [entries[index] for index in range(first, end)]
    return found[: FIRST_WORD - first], found[FIRST_WORD - first :], header.get("total_tokens", 0)


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def _header_line(path: Path, number: int, line: str) -> tuple[str, int]:
    name, _, value = line.partition("=")
    if name not in HEADER or not value.isdecimal():
        raise UserError(f"{path}, line {number}: {line!r}; write {', '.join(f'{name}=NUMBER' for name in HEADER)}")
    return name, int(value)


def _entries(path: Path, lines: list[str], first_line: int) -> dict[int, str]:
    entries: dict[int, str] = {}
    for number, line in enumerate(lines, first_line):
        if not line:
            continue
        index, tab, word = line.partition("\t")
        if not index.isdecimal() or not tab or not word:
            raise UserError(f"{path}, line {number}: {line!r}; write id, tab, word")
        if int(index) in entries:
            raise UserError(f"{path}, line {number}: the id {index} stands twice; keep one")
        entries[int(index)] = word
    return entries


def _spaced(word: str) -> str:
    return word if word[0] in string.punctuation else f" {word}"


def _normaliser(config: WordConfig) -> Callable[[str], str]:
    if config.normalization.remove_accents:
        return _lower_without_accents if config.normalization.lowercase else _without_accents
    return str.lower if config.normalization.lowercase else str


def _lower_without_accents(text: str) -> str:
    return _without_accents(text.lower())


def _without_accents(text: str) -> str:
    if text.isascii():
        return text
    letters = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(letter for letter in letters if not unicodedata.combining(letter)))
