"""How often every token of a vocabulary occurs in a corpus, and the smoothed probabilities that follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from tokenkit.tokenizers.base import Tokenizer

SMOOTHING = 1e-9  # share of all counts that every token is given on top of its own
BATCH_TEXTS = 1024


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Int64[ndarray, "V"]:
    """Occurrences of every id in the texts, each tokenised on its own and without special tokens."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(texts), BATCH_TEXTS):
        for encoding in tokenizer.encode_batch(list(texts[start : start + BATCH_TEXTS])):
            counts += np.bincount(encoding.ids, minlength=len(counts))
    return counts


@dataclass(frozen=True)
class CountBatches:
    """The work of counting with two tokenizers: `run` counts a batch of texts. Can be pickled, for other processes."""

    teacher: Tokenizer
    student: Tokenizer

    def run(self, task: list[str]) -> dict[str, ndarray]:
        """`teacher` and `student`: occurrences of every id."""
        return {"teacher": count_tokens(self.teacher, task), "student": count_tokens(self.student, task)}


def unigram_probabilities(counts: Int64[ndarray, "V"], smoothing: float = SMOOTHING) -> Float64[ndarray, "V"]:
    """Probabilities in proportion to count + smoothing × sum of counts; they sum to 1."""
    smoothed = counts + smoothing * counts.sum()
    return smoothed / smoothed.sum()
