"""Tables over two vocabularies against their definitions, on tokenizers made here."""

import numpy as np
import pytest

from tokenkit.config import UserError
from tokenkit.data.pair import PROJECTION_WIDTH, Pair
from tokenkit.tokenizers.bytelevel import ByteTokenizer


@pytest.fixture(scope="module")
def pair(bpe, unigram):
    return Pair(unigram, bpe, unigram.vocab_size + 3, bpe.vocab_size)


def test_exact_pairs_spell_the_same_and_are_one_to_one(pair):
    pairs = pair.exact_pairs()
    assert len(pairs) > 20
    own, other = pair.student, pair.teacher
    specials = (
        {i: literal for literal, i in own.special_tokens.items()},
        {i: literal for literal, i in other.special_tokens.items()},
    )
    for i, j in pairs.tolist():
        same = own.token_bytes[i] == other.token_bytes[j] != b"" or specials[0].get(i) == specials[1].get(j)
        assert same or (i, j) == (own.eos_id, other.eos_id)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    shared = {b for b in own.token_bytes if b} & {b for b in other.token_bytes if b}
    assert {own.token_bytes[i] for i in pairs[:, 0]} - {b""} == shared


def test_ends_of_text_are_matched_whatever_they_are_called(bpe):
    other = ByteTokenizer()
    pairs = Pair(other, bpe, other.vocab_size, bpe.vocab_size).exact_pairs()
    assert [other.eos_id, bpe.eos_id] in pairs.tolist()


def test_a_projection_spells_the_student_token_and_its_rows_sum_to_one(bpe):
    teacher = ByteTokenizer()
    pair = Pair(bpe, teacher, bpe.vocab_size + 3, teacher.vocab_size)
    ids, weights = pair.projection_ids(), pair.projection_weights()
    assert ids.shape == weights.shape == (pair.student_rows, PROJECTION_WIDTH)
    assert (ids[-3:] == -1).all()  # rows of the head that stand for no token
    assert (weights[-3:] == 0).all()
    several = 0
    for i, spelling in enumerate(pair.student.token_bytes):
        if not spelling:
            continue
        pieces = [pair.teacher.token_bytes[j] for j in ids[i] if j >= 0]
        spelled = b"".join(pieces)
        assert spelling == spelled or (spelling.startswith(spelled) and len(pieces) == PROJECTION_WIDTH)
        several += len(pieces) > 1
        expected = np.array([0.1**k for k in range(len(pieces))])
        np.testing.assert_allclose(weights[i, : len(pieces)], expected / expected.sum(), rtol=1e-6)
        assert (weights[i, len(pieces) :] == 0).all()
    assert several > 20


def test_one_tokenizer_is_projected_onto_itself(bpe):
    pair = Pair(bpe, bpe, bpe.vocab_size, bpe.vocab_size)
    known = [i for i, spelling in enumerate(bpe.token_bytes) if spelling]
    assert (pair.projection_ids()[known, 0] == known).all()
    assert (pair.projection_weights()[known, 0] == 1).all()
    assert (pair.mined_ids()[known] == known).all()
    assert {tuple(p) for p in pair.exact_pairs()} >= {(i, i) for i in known}


def test_ids_beyond_the_rows_of_a_head_are_left_out(bpe, unigram):
    pair = Pair(unigram, bpe, unigram.vocab_size, 100)
    assert pair.exact_pairs()[:, 1].max() < 100
    assert pair.mined_ids().max() < 100
    assert pair.projection_ids().max() < 100


def test_mined_pairs_are_the_map(pair):
    ids, pairs = pair.mined_ids(), pair.mined_pairs()
    assert len(ids) == pair.student_rows
    assert (ids[pairs[:, 0]] == pairs[:, 1]).all()
    assert len(pairs) == (ids >= 0).sum()


def test_an_empty_table_and_a_missing_folder_are_one_line(bpe, unigram):
    pair = Pair(unigram, bpe, 0, bpe.vocab_size)
    with pytest.raises(UserError, match=r"exact pairs: .* have none; use a loss that needs none"):
        pair.tensors({"exact_pairs"})
    with pytest.raises(UserError, match="'unbiased' needs the bias of this pair; make it with"):
        Pair(unigram, bpe, unigram.vocab_size, bpe.vocab_size).tensors({"unbiased_pairs"})
