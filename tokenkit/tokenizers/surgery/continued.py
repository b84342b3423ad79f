"""Merge learning resumed where the merges of a tokenizer end: pair counts kept up to date, the commonest pair next.

Sennrich+ 2016, 1508.07909; continued: Purason+ 2025, 2512.03989.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise

from tokenkit.tokenizers.pieces import Definition, model_vocabulary
from tokenkit.tokenizers.surgery.bpe import Pair
from tokenkit.tokenizers.surgery.library import Joins, Word, ordinary_pieces

Ids = tuple[int, int]


class Pieces:
    """The pieces of a vocabulary by id, and what two of them may become."""

    def __init__(self, definition: Definition, begin: int, joins: Joins, longest: int) -> None:
        """New pieces get ids from `begin` on; none is longer than `longest` characters."""
        self.ids = dict(model_vocabulary(definition))
        self.spelling = {i: piece for piece, i in self.ids.items()}
        self._ordinary = set(ordinary_pieces(definition))
        self._next, self._joins, self._longest = begin, joins, longest

    def may_join(self, pair: Ids) -> bool:
        """Whether the two may be one token: short enough, joined as others are, and not the name of another kind."""
        left, right = self.spelling[pair[0]], self.spelling[pair[1]]
        free = left + right not in self.ids or left + right in self._ordinary
        return len(left) + len(right) <= self._longest and free and self._joins(left, right)

    def join(self, pair: Ids) -> int:
        """The id of the two together: that of the piece where there is one already, else the next."""
        piece = self.spelling[pair[0]] + self.spelling[pair[1]]
        if piece not in self.ids:
            self.ids[piece], self.spelling[self._next] = self._next, piece
            self._ordinary.add(piece)
            self._next += 1
        return self.ids[piece]


@dataclass
class Learnt:
    """Merges in the order in which they were learnt."""

    pairs: list[Pair] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    """The new pieces, ids ascending."""
    revived: list[int] = field(default_factory=list)
    """Ids of pieces that were there and that no merge made of text."""


class PairCounts:
    """How often two ids stand side by side in counted words, while pairs of them are merged."""

    def __init__(self, words: Mapping[Word, int]) -> None:
        self._words = [list(word) for word in words]
        self._counts = [*words.values()]
        self.count: Counter[Ids] = Counter()
        self._where: defaultdict[Ids, set[int]] = defaultdict(set)
        for place, word in enumerate(self._words):
            for pair in pairwise(word):
                self.count[pair] += self._counts[place]
                self._where[pair].add(place)

    def merge(self, pair: Ids, made: int) -> set[Ids]:
        """Puts one id in the place of two, wherever they stand, from the left; the pairs that this brings about."""
        born: set[Ids] = set()
        for place in self._where.pop(pair, ()):
            word, times = self._words[place], self._counts[place]
            for old in pairwise(word):
                self.count[old] -= times
            word = self._words[place] = _replaced(word, pair, made)
            for new in pairwise(word):
                self.count[new] += times
                self._where[new].add(place)
                if made in new:
                    born.add(new)
        del self.count[pair]
        return born


def _replaced(word: list[int], pair: Ids, made: int) -> list[int]:
    found, place = [], 0
    while place < len(word):
        if word[place] == pair[0] and word[place + 1 : place + 2] == [pair[1]]:
            found.append(made)
            place += 2
        else:
            found.append(word[place])
            place += 1
    return found


def learn_merges(words: Mapping[Word, int], pieces: Pieces, tokens: int, min_count: int) -> Learnt:
    """So many new pieces, the commonest pair first and of equals the one with smaller ids; fewer where none is left
    that occurs `min_count` times."""
    found, counts = Learnt(), PairCounts(words)
    heap = [(-count, pair) for pair, count in counts.count.items() if count >= min_count]
    heapify(heap)
    while heap and len(found.pieces) < tokens:
        negative, pair = heappop(heap)
        count = counts.count[pair]
        if count < min_count or not pieces.may_join(pair):
            continue
        if count != -negative:  # it has become rarer since it was put here
            heappush(heap, (-count, pair))
            continue
        known = len(pieces.ids)
        made = pieces.join(pair)
        if len(pieces.ids) > known:
            found.pieces.append(pieces.spelling[made])
        else:
            found.revived.append(made)
        found.pairs.append((pieces.spelling[pair[0]], pieces.spelling[pair[1]]))
        for born in counts.merge(pair, made):
            if counts.count[born] >= min_count:
                heappush(heap, (-counts.count[born], born))
    return found
