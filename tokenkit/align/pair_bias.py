"""Both biases of every pair of tokens that end alike, in blocks that can be computed anywhere and in any order."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from numpy import ndarray

from tokenkit.align.counts import SMOOTHING
from tokenkit.align.covers import Cover, Covers, covers
from tokenkit.tokenizers.base import Tokenizer

PAIRS_PER_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of tokens of which one spells a suffix of the other, sorted by (teacher id, student id)."""

    teacher_ids: Int32[ndarray, "P"]
    student_ids: Int32[ndarray, "P"]
    teacher_shorter: Bool[ndarray, "P"]  # or equally long
    blank: Bool[ndarray, "P"]  # one of the two is white space only: the bias is 1 by convention
    blocks: list[Int64[ndarray, "_"]]  # rows of the other pairs; rows of one block share suffixes


def suffix_pairs(teacher_bytes: list[bytes], student_bytes: list[bytes]) -> Pairs:
    """All pairs of two vocabularies; a token without bytes (special, hole) is in none."""
    ids: tuple[defaultdict[bytes, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for table, spelled_tokens in zip(ids, (teacher_bytes, student_bytes)):
        for index, spelled in enumerate(spelled_tokens):
            table[spelled].append(index)
    rows: list[tuple[int, int, bool, bool, bytes]] = []
    for (longer, shorter), teacher_shorter in (((ids[1], ids[0]), True), ((ids[0], ids[1]), False)):
        for spelled, long_ids in longer.items():
            blank = _is_blank(spelled)
            for start in range(0 if teacher_shorter else 1, len(spelled)):
                suffix = spelled[start:]
                if suffix not in shorter:
                    continue
                either_blank = blank or _is_blank(suffix)
                for a in shorter[suffix]:
                    pairs = ((a, b) if teacher_shorter else (b, a) for b in long_ids)
                    rows += [(*pair, teacher_shorter, either_blank, spelled[::-1]) for pair in pairs]
    rows.sort()
    blank_rows = np.array([row[3] for row in rows], np.bool_)
    order = np.array(sorted(np.flatnonzero(~blank_rows).tolist(), key=lambda i: rows[i][4]), np.int64)
    return Pairs(
        np.array([row[0] for row in rows], np.int32),
        np.array([row[1] for row in rows], np.int32),
        np.array([row[2] for row in rows], np.bool_),
        blank_rows,
        [order[start : start + PAIRS_PER_BLOCK] for start in range(0, len(order), PAIRS_PER_BLOCK)],
    )


def _is_blank(spelled: bytes) -> bool:
    return spelled.decode(errors="replace").isspace()


@dataclass
class Side:
    """One tokenizer of a pair: its covers, and how much every token of it weighs."""

    covers: Covers
    counts: Int64[ndarray, "V"]
    smoothing: float = SMOOTHING

    def mass(self, counts: Float64[ndarray, "N"], tokens: Float64[ndarray, "N"]) -> Float64[ndarray, "N"]:
        """Probability of sets of tokens that number `tokens` and occur `counts` times together."""
        total = float(self.counts.sum())
        return (counts + self.smoothing * total * tokens) / (total + self.smoothing * total * len(self.counts))


@dataclass
class BiasBlocks:
    """The work: `run` gives both biases of the rows of a block, by its number. Can be pickled, for other processes."""

    pairs: Pairs
    teacher: Side
    student: Side
    num_overhangs: int

    def run(self, task: int) -> dict[str, Float64[ndarray, "B"]]:
        """`bias1` and `bias2` of the pairs in a block, in the block's order."""
        rows, pairs = self.pairs.blocks[task], self.pairs
        bias = np.zeros((2, len(rows)), np.float64)
        found: tuple[dict[int, Cover], dict[int, Cover]] = ({}, {})
        mark = np.zeros(self.num_overhangs, np.int32)
        for teacher_shorter, (short, long) in ((True, (0, 1)), (False, (1, 0))):
            ids = (pairs.teacher_ids[rows], pairs.student_ids[rows])
            chosen = np.flatnonzero(pairs.teacher_shorter[rows] == teacher_shorter)
            chosen = chosen[np.argsort(ids[short][chosen], kind="stable")]
            borders = np.flatnonzero(np.diff(ids[short][chosen])) + 1
            for group in np.split(chosen, borders) if len(chosen) else []:
                first = self._cover(short, int(ids[short][group[0]]), found)
                others = [self._cover(long, int(index), found) for index in ids[long][group]]
                bias[short, group], bias[long, group] = self._differences(short, first, others, mark)
        return {"bias1": bias[0], "bias2": bias[1]}

    def _cover(self, side: int, token: int, found: tuple[dict[int, Cover], dict[int, Cover]]) -> Cover:
        if token not in found[side]:
            found[side][token] = (self.teacher, self.student)[side].covers.of(token)
        return found[side][token]

    def _differences(
        self, short: int, first: Cover, others: list[Cover], mark: Int32[ndarray, "D"]
    ) -> tuple[Float64[ndarray, "N"], Float64[ndarray, "N"]]:
        """What one cover has and each of the others has not, as probability, and the other way round.

        Occurrences are summed as whole numbers, so equal covers give exactly 0 and no order of summing matters.
        """
        side, other_side = (self.teacher, self.student)[:: 1 if short == 0 else -1]
        lengths = [len(other.overhangs) for other in others]
        owner = np.repeat(np.arange(len(others)), lengths)
        tokens = np.concatenate([other.tokens for other in others])
        mark[first.overhangs] = np.arange(1, len(first.overhangs) + 1, dtype=np.int32)
        partner = mark[np.concatenate([other.overhangs for other in others])]
        mark[first.overhangs] = 0
        shared = partner > 0
        size = len(others)
        common = _sums(owner[shared], np.ones(int(shared.sum()), np.int64), size)
        lost = _sums(owner[shared], side.counts[first.tokens[partner[shared] - 1]], size)
        alone = _sums(owner[~shared], np.ones(int((~shared).sum()), np.int64), size)
        gained = _sums(owner[~shared], other_side.counts[tokens[~shared]], size)
        of_first = side.mass(side.counts[first.tokens].sum() - lost, len(first.tokens) - common)
        return of_first, other_side.mass(gained, alone)


def _sums(owner: Int64[ndarray, "N"], values: Int64[ndarray, "N"], size: int) -> Float64[ndarray, "S"]:
    """The sum of the values of every owner; exact, for they are whole numbers far below 2^53."""
    return np.bincount(owner, values, size).astype(np.float64)


def bias_blocks(
    teacher: Tokenizer,
    student: Tokenizer,
    teacher_counts: Int64[ndarray, "V"],
    student_counts: Int64[ndarray, "U"],
    smoothing: float = SMOOTHING,
) -> BiasBlocks:
    """The work of a pair, ready to run."""
    numbers: dict[bytes, int] = {}

    def number(overhang: bytes) -> int:
        return numbers.setdefault(overhang, len(numbers))

    first = Side(covers(teacher, number), teacher_counts, smoothing)
    second = Side(covers(student, number), student_counts, smoothing)
    return BiasBlocks(suffix_pairs(teacher.token_bytes, student.token_bytes), first, second, len(numbers))
