"""How a source tokenizer spells the byte strings of another one's tokens."""

from collections.abc import Sequence
from enum import IntEnum

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding, Tokenizer


class Kind(IntEnum):
    """How a target id gets its row."""

    COPIED = 0  # the source has a token of the same bytes
    SPECIAL = 1  # a special token: the source's token of the same role or the same literal, or its literal's pieces
    AVERAGED = 2  # the pieces into which the source itself splits the token's text
    FALLBACK = 3  # not text on its own (part of a character): the longest source tokens that spell the bytes
    DRAWN = 4  # the source cannot spell the bytes: a random row like the source's
    UNREACHABLE = 5  # no token has this id, or none that text becomes (`<0x41>` beside `A`): the mean source row
    OVERRIDDEN = 6  # source tokens named by hand


class Speller:
    """How the source spells byte strings with its ordinary tokens that have a row."""

    def __init__(self, source: Tokenizer, vocab: int) -> None:
        self.source, self.vocab = source, vocab
        self.by_bytes: dict[bytes, int] = {}
        doubled: dict[bytes, None] = {}
        for i, spelling in enumerate(source.token_bytes[:vocab]):
            if spelling in self.by_bytes:
                doubled[spelling] = None
            elif spelling:
                self.by_bytes[spelling] = i
        self.longest = max(map(len, self.by_bytes), default=0)
        # Of several ids with the same bytes (byte fallback `<0x41>` beside `A`) only the one in use was trained.
        for spelling, (_, pieces) in zip(doubled, self.split(list(doubled)), strict=True):
            if len(pieces) == 1:
                self.by_bytes[spelling] = pieces[0]

    def split(self, spellings: list[bytes]) -> list[tuple[Kind, list[int]]]:
        """Per byte string its kind and pieces: tokenised as text where that spells the bytes, else cut greedily."""
        texts = [_as_text(spelling) for spelling in spellings]
        pieces = self._tokenised([text for text in texts if text is not None])
        tokenised = iter(pieces)
        found = [(None if text is None else next(tokenised)) for text in texts]
        return [
            (Kind.AVERAGED, ids) if ids else self._greedy(spelling)
            for ids, spelling in zip(found, spellings, strict=True)
        ]

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        """The source's ids for each text, empty where they do not spell exactly its bytes."""
        found = [self._exact(e, text.encode(), 0) for e, text in zip(self._encodings(texts), texts)]
        # A dummy prefix joins the first piece (`foo` becomes `▁foo`). After a newline there is none.
        retry = [i for i, ids in enumerate(found) if not ids]
        for i, encoding in zip(retry, self._encodings(["\n" + texts[i] for i in retry])):
            found[i] = self._exact(encoding, texts[i].encode(), 1)
        return found

    def _encodings(self, texts: list[str]) -> Sequence[Encoding | None]:
        """One encoding per text, None for a text that the source cannot keep as it is (it normalises)."""
        try:
            return self.source.encode_batch(texts)
        except UserError:
            half = len(texts) // 2
            return [None] if half == 0 else [*self._encodings(texts[:half]), *self._encodings(texts[half:])]

    def _exact(self, encoding: Encoding | None, spelling: bytes, begin: int) -> list[int]:
        """The ids from byte `begin` on, empty unless they have rows and spell the bytes."""
        if encoding is None:
            return []
        ids = encoding.ids[encoding.starts >= begin].tolist()
        known = self.source.token_bytes
        return ids if max(ids, default=0) < self.vocab and b"".join(known[i] for i in ids) == spelling else []

    def _greedy(self, spelling: bytes) -> tuple[Kind, list[int]]:
        pieces = self.cut(spelling)
        return (Kind.DRAWN, []) if max(pieces, default=0) >= self.vocab else (Kind.FALLBACK, pieces)

    def cut(self, spelling: bytes) -> list[int]:
        """The longest source tokens from the left; `vocab + byte` where no token begins with the byte."""
        pieces, begin = [], 0
        while begin < len(spelling):
            end = min(begin + self.longest, len(spelling))
            while end > begin and spelling[begin:end] not in self.by_bytes:
                end -= 1
            pieces.append(self.vocab + spelling[begin] if end == begin else self.by_bytes[spelling[begin:end]])
            begin = max(end, begin + 1)
        return pieces


def _as_text(spelling: bytes) -> str | None:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return None
