"""Byte-pair encoding as a law about neighbours: which token may follow which, without tokenising anything.

A sequence of tokens is what the merges make of its text if and only if this holds for every two neighbours in it: the
merges inside two tokens do not see each other, and of the merges across a border only the two tokens decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray

from tokenkit.tokenizers.surgery.bpe import merged

NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class MergeTree:
    """The merge that completes every token when its own text is tokenised alone.

    `left` and `right` are -1 where a token is not merged. `rank` is the place of that merge in the list, `time` the
    largest rank of all merges that the token takes: merges of another text with smaller ranks happen before it is
    complete, those with larger ranks after it. Both are -1 for a token that stands for itself. `reachable`: tokenising
    the text of the token gives the token.
    """

    left: Int32[ndarray, "V"]
    right: Int32[ndarray, "V"]
    rank: Int32[ndarray, "V"]
    time: Int32[ndarray, "V"]
    reachable: Bool[ndarray, "V"]


def merge_tree(vocabulary: dict[str, int], merges: list[tuple[str, str]], size: int) -> MergeTree:
    """The tree of a merge list, from tokenising every entry of the vocabulary; entries of one character are whole."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}  # of two equal merges the library keeps the later
    none = np.full(size, -1, np.int32)
    tree = MergeTree(none, none.copy(), none.copy(), none.copy(), np.zeros(size, np.bool_))
    for piece, index in vocabulary.items():
        if not all(character in vocabulary for character in piece):
            continue
        symbols, done = merged(piece, ranks)
        if symbols == [piece]:
            tree.reachable[index] = True
            if done:
                left, right = merges[done[-1]]
                tree.left[index], tree.right[index] = vocabulary[left], vocabulary[right]
                tree.rank[index], tree.time[index] = done[-1], max(done)
    return tree


class Followers:
    """For a token, the tokens that may not follow it, as sorted places in a list of tokens.

    A merge across the border joins a token of the right edge of the first with one of the left edge of the second. It
    happens if both are there at one time, and if from then on none of the two is consumed by merges that all rank
    before it. Where every token is listed after its parts this is a comparison of ranks. Where not, the part that is
    complete later begins the wait: it waits for what its own token still merges, the other part for its whole token.

    Tokens with one left edge are neighbours in a preorder of the tree of left parts, so a merge rules out an interval,
    or a few.
    """

    def __init__(self, tree: MergeTree, place: Int32[ndarray, "V"]) -> None:
        """`place` says where in the list asked about a token stands; -1 where it does not."""
        self._tree = tree
        merged = np.flatnonzero(tree.left >= 0)
        left_time, right_time = tree.time[tree.left[merged]], tree.time[tree.right[merged]]
        self._left_later = np.zeros(len(place), np.bool_)
        self._left_later[merged] = left_time > right_time  # of two merges of equal rank the left one is first
        # The largest rank that is merged from the completion of the left (right) part on, up to the whole token.
        self._left_wait, self._right_wait = tree.rank.copy(), tree.rank.copy()
        self._left_wait[merged] = np.where(left_time > right_time, tree.rank[merged], tree.time[merged])
        self._right_wait[merged] = np.where(left_time > right_time, tree.time[merged], tree.rank[merged])
        children = merged[np.lexsort([-tree.time[merged], tree.left[merged]])]
        every = np.arange(len(place))
        self._first_child = np.searchsorted(tree.left[children], every)
        self._end_child = np.searchsorted(tree.left[children], every, side="right")
        preorder, start, end = self._preorder(children)
        self._place = place[preorder]
        bounds = ((child, self._intervals(child, children, start, end)) for child in children.tolist())
        rules = [(child, low, high) for child, intervals in bounds for low, high in intervals]
        table = np.array(rules, np.int64).reshape(-1, 3)
        self._rule, self._interval = table[:, 0], table[:, 1:]
        parents = tree.left[self._rule]
        self._first_rule = np.searchsorted(parents, every)
        self._end_rule = np.searchsorted(parents, every, side="right")

    def _preorder(
        self, children: Int64[ndarray, "C"]
    ) -> tuple[Int64[ndarray, "N"], Int64[ndarray, "V"], Int64[ndarray, "V"]]:
        """Reachable tokens, each followed by those it begins; where each stands, and where its subtree ends."""
        order: list[int] = []
        start, end = np.zeros((2, len(self._tree.left)), np.int64)
        roots = np.flatnonzero(self._tree.reachable & (self._tree.left < 0))
        stack = [(root, False) for root in roots[::-1].tolist()]
        while stack:
            token, left_behind = stack.pop()
            if left_behind:
                end[token] = len(order)
                continue
            start[token] = len(order)
            order.append(token)
            stack.append((token, True))
            below = children[self._first_child[token] : self._end_child[token]]
            stack.extend((child, False) for child in below[::-1].tolist())
        return np.array(order, np.int64), start, end

    def _intervals(
        self, merge: int, children: Int64[ndarray, "C"], start: Int64[ndarray, "V"], end: Int64[ndarray, "V"]
    ) -> list[tuple[int, int]]:
        """What the merge that makes this token rules out: its right part, and what consumes that later."""
        tree, part = self._tree, int(self._tree.right[merge])
        below = children[self._first_child[part] : self._end_child[part]]
        if self._left_later[merge]:
            out = tree.time[merge] <= tree.time[below]
        else:
            out = tree.rank[merge] <= self._left_wait[below]
        count = int(out.sum())
        if out[:count].all():  # always so where tokens are listed after their parts
            return [(int(start[part]), int(end[below[count - 1]]) if count else int(start[part]) + 1)]
        return [(int(start[part]), int(start[part]) + 1), *((int(start[q]), int(end[q])) for q in below[out].tolist())]

    def ruled_out(self, token: int) -> Int32[ndarray, "R"]:
        """Sorted places of the tokens that never follow this one in a tokenisation."""
        intervals = np.concatenate([self._interval[rows] for rows in self._crossing(token)])
        widths = intervals[:, 1] - intervals[:, 0]
        ends = np.cumsum(widths)
        steps = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - widths, widths)
        places = self._place[np.repeat(intervals[:, 0], widths) + steps]
        return np.unique(places[places >= 0])

    def _crossing(self, token: int) -> Iterator[Int64[ndarray, "R"]]:
        """Rules of the merges that the tokens of the right edge begin, where they come before what consumes these."""
        tree, time, wait = self._tree, NEVER, NEVER
        while token >= 0:
            rows = np.arange(self._first_rule[token], self._end_rule[token])
            merges = self._rule[rows]
            yield rows[np.where(self._left_later[merges], tree.rank[merges] < wait, tree.time[merges] < time)]
            time, wait = int(tree.time[token]), int(self._right_wait[token])
            token = int(tree.right[token])
