"""A context and its continuation as the ids of one text, cut where the continuation begins.

Both are encoded together: a text has one spelling, and the model was trained on it. The cut is found by the bytes that
the tokens cover, so a token that begins in the context and ends in the continuation belongs to the continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Encoding, Tokenizer
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.chat import Piece, encode_pieces
from tokenkit.tokenizers.hf import HFTokenizer

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Pairs:
    """How texts become ids before a model that reads at most `positions` of them."""

    tokenizer: Tokenizer
    positions: int
    begin: bool = True
    """The start token stands before every text."""
    special: bool = False
    """Literals of special tokens in a context are these tokens, as a rendered conversation needs it."""

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """Ids of each context and of its continuation. Without a context, the start token is given.

        White space at the end of a context goes to the continuation, whose first token it mostly is a part of.
        """
        if self.special:
            return [self._begun(*self._rendered(context, continuation)) for context, continuation in pairs]
        texts = list(dict.fromkeys(context + continuation for context, continuation in pairs))
        encoded = dict(zip(texts, self.tokenizer.encode_batch(texts)))
        found = []
        for context, continuation in pairs:
            encoding = encoded[context + continuation]
            ids, cut = encoding.ids.tolist(), tokens_before(encoding, len(context.rstrip().encode()))
            found.append(self._begun(ids[:cut], ids[cut:]))
        return found

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that a model goes on with."""
        if self.special:
            found = [encode_pieces(self.tokenizer, [Piece(text, 0)]).encoding.ids.tolist() for text in texts]
        else:
            found = [encoding.ids.tolist() for encoding in self.tokenizer.encode_batch([*texts])]
        return [self._begun(ids, [])[0] for ids in found]

    def windows(self, text: str) -> list[Pair]:
        """Pieces that score every token of a text once: each as wide as the model reads, what was scored before it as
        context; the first has the start token alone."""
        ids = self.tokenizer.encode(text).ids.tolist()
        size, found = self.positions, []
        for first in range(0, len(ids), size):
            last = min(first + size, len(ids))
            before = ids[max(0, last - size - 1) : first] if first else [self.tokenizer.start_id()]
            found.append((before, ids[first:last]))
        return found

    def cut(self, pair: Pair, what: str) -> tuple[list[int], list[int]]:
        """What the model reads and the labels at its end: without the last id, the beginning left out where it is long.

        UserError where the continuation alone is longer than what the model reads.
        """
        context, continuation = pair
        if len(continuation) > self.positions:
            raise UserError(
                f"{what}: a continuation of {len(continuation)} tokens, but the model reads {self.positions}; leave "
                "the task out, or take a model with more positions"
            )
        return (context + continuation)[-(self.positions + 1) :][:-1], continuation

    def _rendered(self, context: str, continuation: str) -> Pair:
        kept = context.rstrip()
        pieces = [Piece(kept, 0), Piece(context[len(kept) :] + continuation, 1, template=False)]
        found = encode_pieces(self.tokenizer, [piece for piece in pieces if piece.text]).encoding
        cut = int(found.special.sum())
        return found.ids[:cut].tolist(), found.ids[cut:].tolist()

    def _begun(self, context: list[int], continuation: list[int]) -> Pair:
        start = self.tokenizer.start_id() if self.begin or not context else None
        return (context if start is None or context[:1] == [start] else [start, *context]), continuation


def tokens_before(encoding: Encoding, border: int) -> int:
    """How many of the first tokens end before a byte; a token of no width belongs to what follows it."""
    inside = (encoding.ends <= border) & (encoding.ends > encoding.starts)
    return int(inside.nonzero()[0][-1]) + 1 if inside.any() else 0


def begins_texts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own files put a start token before a text: what other programs then do."""
    told = tokenizer.config.get("add_bos_token")
    if told is not None:
        return bool(told)
    if not isinstance(tokenizer, HFTokenizer) or isinstance(tokenizer, ByteTokenizer):
        return True  # our own kinds are saved so
    return tokenizer.bos_id is not None and _first_of(tokenizer.definition.get("post_processor")) is not None


def _first_of(processor: dict | None) -> str | None:
    """The special token that a post-processor of tokenizer.json puts first."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return next((found for one in processor["processors"] if (found := _first_of(one)) is not None), None)
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return processor["cls"][0]
    if processor["type"] != "TemplateProcessing":
        return None
    first = processor["single"][0]
    return first["SpecialToken"]["id"] if "SpecialToken" in first else None
