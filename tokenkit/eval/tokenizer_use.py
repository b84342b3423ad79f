"""How a tokenizer cuts a text: what a token holds, and how much of the vocabulary is used."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tokenkit.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class TokenizerUse:
    """Counts over texts, special tokens left out."""

    tokens: int
    words: int
    partial: int
    """Tokens that hold a part of a character only: bytes that the vocabulary falls back to."""
    ids_seen: int
    vocabulary: int
    """Ids that spell something."""

    @property
    def tokens_per_word(self) -> float:
        """Fertility: tokens over words between white space."""
        return self.tokens / max(1, self.words)

    @property
    def partial_share(self) -> float:
        """Of all tokens, in [0, 1]."""
        return self.partial / max(1, self.tokens)

    @property
    def vocabulary_used(self) -> float:
        """Share of the ids that spell something which stand in the texts."""
        return self.ids_seen / max(1, self.vocabulary)

    def figures(self) -> dict[str, float | int]:
        """As a result shows them."""
        return {
            "tokens_per_word": self.tokens_per_word,
            "byte_fallback": self.partial_share,
            "ids_used": self.ids_seen,
            "vocabulary_used": self.vocabulary_used,
        }


def tokenizer_use(tokenizer: Tokenizer, documents: Sequence[str]) -> TokenizerUse:
    """What the tokens of some texts hold."""
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch([*documents]):
        counts.update(encoding.ids.tolist())
    spelled = tokenizer.token_bytes
    return TokenizerUse(
        tokens=sum(counts.values()),
        words=sum(len(document.split()) for document in documents),
        partial=sum(count for index, count in counts.items() if not _is_text(spelled[index])),
        ids_seen=len(counts),
        vocabulary=_spelling(tokenizer),
    )


def _spelling(tokenizer: Tokenizer) -> int:
    """Ids that are not special; of open codes too many to be looked at one by one, so all are counted."""
    spelled = tokenizer.token_bytes
    return sum(map(bool, spelled)) if isinstance(spelled, list) else tokenizer.vocab_size - len(tokenizer.special_ids)


def _is_text(spelling: bytes) -> bool:
    try:
        spelling.decode()
    except UnicodeDecodeError:
        return False
    return True
