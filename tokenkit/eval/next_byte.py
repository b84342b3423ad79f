"""The next byte under a model of tokens: exact, or among the likeliest ways to spell what came before.

Many token sequences spell a text, and a prefix may end inside a token. A cover of a prefix is a token sequence that
spells it, with a last token that may go on past its end; the probability of the prefix is the sum over its covers
(Vieira+ 2024, 2412.03719). Two prefixes, one byte apart, give the next byte. Kept are the covers that end
with the prefix ("closed", each with its mass and what the model says next) and, for each earlier closed cover, the
tokens that begin with the bytes since: a narrowing range of the vocabulary in byte order.

Only ids that spell bytes or end a text have mass; other special tokens, holes and padded rows have none, and the rest
is scaled to 1. Symbol 256 is the end of the text, which is the sum over every id that ends one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.eval.byte_order import ByteOrder, Node
from tokenkit.eval.ends import end_ids
from tokenkit.models.load import head_matrix
from tokenkit.models.tree_reader import TreeReader
from tokenkit.tokenizers.base import Tokenizer, require_lossless

END = 256  # the symbol after the last byte of a text
SYMBOLS = 257
KEEP = 256  # tree nodes that are read at least between two clearings
Cover = tuple[float, int, int]  # mass, tree node before its last token, last token


class CoverConfig(Config):
    """Which spellings of a text are followed."""

    beam: int | None = Field(8, ge=1)
    """Closed covers that are kept at every byte, the likeliest ones; null keeps all: exact, and exponentially many."""
    threshold: float = Field(1e-4, ge=0, lt=1)
    """A closed cover of less than this share of the mass is dropped (the likeliest one never is)."""
    canonical: bool = False
    """Only spellings that the tokenizer itself gives what was written so far; checked wherever a character ends."""


@dataclass
class _Group:
    """Closed covers that end at one place, and the tokens that begin with the bytes since then."""

    node: Node
    mass: Float64[ndarray, "B"]
    tokens: Float64[ndarray, "B N"]  # of the node's longer tokens: probability after the cover
    ends: Float64[ndarray, "B"]  # of the end of the text, which only a cover that ends here can have next
    nodes: list[int]  # of the tree


class BytePrefix:
    """One text as one model sees it: take a byte, read what was asked for, look at what may come next.

    The mass of all covers that are kept is scaled to 1 after every byte.
    """

    def __init__(self, reading: "ByteModel", given: list[int]) -> None:
        """`given`: ids that stand before the text."""
        self.reading, self.given, self.text = reading, given, b""
        self.groups: list[_Group] = []
        self.dropped = 0.0
        """Share of the mass that was dropped at the last byte."""
        self.dropped_nats = 0.0
        """Minus the sum over all bytes of log(1 - dropped): by how much exact probabilities may be smaller at most."""
        self._mass: Float64[ndarray, "B"] = np.ones(1)

    def next_logp(self) -> Float64[ndarray, "257"]:
        """Natural log-probabilities of the 256 bytes and the end."""
        weights = np.zeros(SYMBOLS)
        for group in self.groups:
            weights[group.node.bytes] += group.mass @ group.node.sums(group.tokens)
            weights[END] += group.mass @ group.ends
        with np.errstate(divide="ignore"):
            return np.log(weights) - math.log(weights.sum())

    def advance(self, byte: int) -> list[Cover]:
        """Takes a byte; the closed covers that are to be read: `feed` gets what the model says after them."""
        closed: list[Cover] = []
        groups = []
        for group in self.groups:
            found = group.node.range(byte)
            if found is not None:
                child, tokens = group.node.child(byte), group.tokens[:, found[0] : found[1]]
                if child.depth == 1:  # a view would keep all of the vocabulary's rows in memory
                    tokens = tokens.copy()
                closed += _closed(child, tokens, group)
                if child.longer:
                    rest = tokens[:, child.whole :]
                    groups.append(_Group(child, group.mass, rest, np.zeros(len(rest)), group.nodes))
        self.groups = groups
        opened = float(sum((group.mass @ group.tokens).sum() for group in groups))
        total = opened + sum(cover[0] for cover in closed)
        if not total > 0:
            raise UserError(self.no_way(byte))
        self.text += bytes([byte])
        kept = self._kept(closed, opened)
        left = opened + sum(cover[0] for cover in kept)
        self.dropped = 1 - left / total if len(kept) < len(closed) else 0.0
        self.dropped_nats += math.log(total / left) if len(kept) < len(closed) else 0.0
        for group in groups:
            group.mass = group.mass / left
        self._mass = np.array([cover[0] for cover in kept]) / left
        return kept

    def _kept(self, closed: list[Cover], opened: float) -> list[Cover]:
        """The covers that are followed: those of the tokenizer, of these the likeliest, at least one."""
        config = self.reading.config
        if config.canonical and closed:
            written = self.reading.written(self.given, self.text)
            if written is not None:  # inside a character nothing can be said
                skip, path = len(self.given), self.reading.tree.path
                own = [cover for cover in closed if [*path(cover[1])[skip:], cover[2]] == written]
                closed = own if own or opened > 0 else closed
        least = config.threshold * (opened + sum(cover[0] for cover in closed))
        closed = sorted(closed, reverse=True)[: config.beam]
        return [cover for place, cover in enumerate(closed) if place == 0 or cover[0] >= least]

    def feed(self, nodes: list[int], tokens: Float64[ndarray, "B N"], ends: Float64[ndarray, "B"]) -> None:
        """What the model says after the covers that were to be read, in their order."""
        if nodes:
            self.groups.append(_Group(self.reading.order.root, self._mass, tokens, ends, nodes))

    def nodes(self) -> list[int]:
        """The tree nodes that covers in use end with."""
        return [node for group in self.groups for node in group.nodes]

    def close(self) -> None:
        """Nothing more is asked of this text: what was read for it may be freed."""
        self.groups = []

    def no_way(self, byte: int) -> str:
        """What is said of a byte that has no probability here."""
        hint = "write canonical=false" if self.reading.config.canonical else "take one that spells every byte"
        shown = self.text[-12:] + bytes([byte])
        return f"{self.reading.name}: none of its tokens goes on to the last byte of {shown!r}; {hint}"


def _closed(child: Node, tokens: ndarray, group: _Group) -> Iterator[Cover]:
    """The covers that the tokens of exactly these bytes make of the group's."""
    for place in range(child.whole):
        token = int(child.order.ids[child.low + place])
        masses = (group.mass * tokens[:, place]).tolist()
        yield from ((mass, node, token) for mass, node in zip(masses, group.nodes, strict=True) if mass > 0)


class ByteModel:
    """A causal model and its tokenizer as a distribution over bytes, of several texts at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, config: CoverConfig, name: str = "") -> None:
        require_lossless(tokenizer, "read byte by byte")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.name = name or tokenizer.name
        self.ends = end_ids(model, tokenizer)
        spelled = [b"" if i in self.ends else s for i, s in enumerate([*tokenizer.token_bytes])]
        self.order = ByteOrder(spelled, len(head_matrix(model)))
        self._puts = [self._put_before(continued) for continued in (False, True)]
        self.tree = TreeReader(model)
        self._shared = self.tree.shared
        self._texts: list[BytePrefix] = []
        self._clear_at = KEEP
        self._scored = torch.tensor([*self.order.ids.tolist(), *self.ends], device=model.device)

    def open(self, given: Sequence[list[int]]) -> list[BytePrefix]:
        """One empty text per list of ids that stand before it; what was open before is forgotten.

        After a start token alone the text begins where a document does: the space that some tokenizers put before a
        document is taken as given, so probabilities are of the text itself.
        """
        self.tree, self._clear_at = TreeReader(self.model, shared=self._shared), KEEP
        self._texts = found = [BytePrefix(self, ids) for ids in given]
        for prefix in found:
            logits = self.tree.read_path(prefix.given)
            prefix.feed([len(self.tree) - 1], *self._probabilities(logits[None]))
        for byte_at in zip_longest(*(self.before(ids) for ids in given)):
            self.advance([(p, byte) for p, byte in zip(found, byte_at, strict=True) if byte is not None])
        for prefix in found:
            prefix.dropped_nats = 0.0
        return found

    def advance(self, steps: Sequence[tuple[BytePrefix, int]]) -> None:
        """Every text takes its byte; all that has to be read for it is read together."""
        asked = [prefix.advance(byte) for prefix, byte in steps]
        covers = [cover for some in asked for cover in some]
        if not covers:
            return
        if len(self.tree) >= self._clear_at:
            self.tree.keep([*{node for prefix in self._texts for node in prefix.nodes()} | {c[1] for c in covers}])
            self._clear_at = len(self.tree) + max(KEEP, self.tree.held)
        first = len(self.tree)
        tokens, ends = self._probabilities(self.tree.read([c[1] for c in covers], [c[2] for c in covers]))
        at = 0
        for (prefix, _), some in zip(steps, asked, strict=True):
            here = slice(at, at + len(some))
            prefix.feed([*range(first + here.start, first + here.stop)], tokens[here], ends[here])
            at = here.stop

    def written(self, given: list[int], text: bytes) -> list[int] | None:
        """The tokenizer's ids of a text; None inside a character, or where its tokens do not spell the text's bytes."""
        try:
            words = text[len(self.before(given)) :].decode()
        except UnicodeDecodeError:
            return None
        continued = len(given) > 1
        ids = self.tokenizer.encode_batch([words], continued=continued)[0].ids.tolist()
        return ids if b"".join(self.tokenizer.token_bytes[i] for i in ids) == text else None

    def before(self, given: list[int]) -> bytes:
        """What the tokenizer puts between these ids and a text: a space or nothing."""
        return self._puts[len(given) > 1] if given[-1] in self.tokenizer.special_ids else b""

    def _put_before(self, continued: bool) -> bytes:
        ids = self.tokenizer.encode_batch(["a"], continued=continued)[0].ids.tolist()
        return b"".join(self.tokenizer.token_bytes[i] for i in ids).removesuffix(b"a")

    def _probabilities(self, logits: Float[Tensor, "B V"]) -> tuple[Float64[ndarray, "B N"], Float64[ndarray, "B"]]:
        """Of the tokens in byte order, and of the end of the text."""
        found = logits[:, self._scored].double().softmax(-1).cpu().numpy()
        count = len(self.order.ids)
        return found[:, :count], found[:, count:].sum(1)
