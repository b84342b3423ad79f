import numpy as np
import pytest

from tokenkit.align import counts
from tokenkit.align.counts import count_tokens, unigram_probabilities


def test_counts_are_those_of_every_text_alone(bpe, unigram, documents, monkeypatch):
    monkeypatch.setattr(counts, "BATCH_TEXTS", 10)
    texts = [*documents, "", " ", "naïve café\n"]
    for tokenizer in (bpe, unigram):
        wanted = np.zeros(tokenizer.vocab_size, np.int64)
        for text in texts:
            for index in tokenizer.encode(text).ids:
                wanted[index] += 1
        assert np.array_equal(count_tokens(tokenizer, texts), wanted)


def test_no_special_token_is_counted(bpe, documents):
    found = count_tokens(bpe, [*documents, "<|endoftext|> is text"])
    assert not found[list(bpe.special_ids)].any()
    assert found.sum() > 0


def test_probabilities():
    probabilities = unigram_probabilities(np.array([3, 0, 1]), 0.01)
    assert probabilities == pytest.approx(np.array([3.04, 0.04, 1.04]) / 4.12)
    assert probabilities.sum() == pytest.approx(1)
    assert unigram_probabilities(np.array([5, 0]))[1] == pytest.approx(1e-9)


def test_an_unseen_token_is_not_impossible():
    """Counts kept as text under string keys once read as nothing, and everything became equally likely."""
    probabilities = unigram_probabilities(np.array([1_000_000, 10, 0]))
    assert 0 < probabilities[2] < probabilities[1] < probabilities[0]
