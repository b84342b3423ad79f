import json

import numpy as np
import pytest

from tokenkit.align.bias import BIAS_FILE, PairBias, load_bias, save_bias, save_bias_npz
from tokenkit.align.counts import count_tokens, unigram_probabilities
from tokenkit.align.pair_bias import bias_blocks, suffix_pairs
from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer


def small() -> PairBias:
    ids = np.array([[0, 0, 2, 2], [1, 4, 0, 3]], np.int32)
    return PairBias(ids[0], ids[1], np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.arange(4, dtype=np.float32), (3, 5))


def test_lookup_is_that_of_a_dense_matrix():
    bias = small()
    dense = np.zeros((2, 6, 8), np.float32)
    dense[0, bias.teacher_ids, bias.student_ids] = bias.bias1
    dense[1, bias.teacher_ids, bias.student_ids] = bias.bias2
    teacher, student = (grid.ravel() for grid in np.meshgrid(np.arange(-1, 5), np.arange(-1, 7)))
    inside = (teacher >= 0) & (teacher < 3) & (student >= 0) & (student < 5)
    for found, matrix in zip(bias.at(teacher, student), dense):
        assert found.dtype == np.float32
        assert np.array_equal(found, np.where(inside, matrix[teacher, student], 0))


def test_nothing_asked_and_nothing_listed():
    none = np.zeros(0, np.int32)
    assert [len(found) for found in small().at(none, none)] == [0, 0]
    empty = PairBias(none, none, none.astype(np.float32), none.astype(np.float32), (3, 5))
    assert [found.tolist() for found in empty.at(np.array([0, 9]), np.array([1, 1]))] == [[0, 0], [0, 0]]


def test_saved_and_loaded(bpe, unigram, tmp_path):
    save_bias(tmp_path, small(), bpe, unigram)
    found = load_bias(tmp_path, bpe, unigram)
    for name in ("teacher_ids", "student_ids", "bias1", "bias2"):
        assert np.array_equal(vars(found)[name], vars(small())[name])
        assert vars(found)[name].dtype == vars(small())[name].dtype
    assert found.shape == (3, 5)
    first = (tmp_path / BIAS_FILE).read_bytes()
    save_bias(tmp_path, small(), bpe, unigram)
    assert (tmp_path / BIAS_FILE).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [BIAS_FILE]


def test_the_bias_of_another_pair_is_refused(bpe, unigram, tmp_path):
    save_bias(tmp_path, small(), bpe, unigram)
    with pytest.raises(UserError, match="another teacher"):
        load_bias(tmp_path, unigram, bpe)
    with pytest.raises(UserError, match="another student than byte"):
        load_bias(tmp_path, bpe, ByteTokenizer())
    with pytest.raises(UserError, match=r"no bias\.safetensors here"):
        load_bias(tmp_path / "elsewhere", bpe, unigram)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_bias_file(bpe, unigram, tmp_path, content):
    (tmp_path / BIAS_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"bias\.safetensors: not a bias file"):
        load_bias(tmp_path, bpe, unigram)


def test_npz_has_the_layout_of_scipy(tmp_path):
    save_bias_npz(tmp_path, small())
    for name, values in (("bias1", small().bias1), ("bias2", small().bias2)):
        with np.load(tmp_path / f"{name}_matrix.npz", allow_pickle=False) as file:
            assert file["format"].item() == b"coo"
            dense = np.zeros(file["shape"], np.float32)
            dense[file["row"], file["col"]] = file["data"]
        assert dense.shape == (3, 5)
        assert np.array_equal(dense[small().teacher_ids, small().student_ids], values)
        assert np.count_nonzero(dense) == np.count_nonzero(values)


def test_scipy_reads_the_npz(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    save_bias_npz(tmp_path, small())
    matrix = sparse.load_npz(tmp_path / "bias2_matrix.npz").toarray()
    assert np.array_equal(matrix[small().teacher_ids, small().student_ids], small().bias2)


def test_pairs_are_all_and_each_once():
    """Also where one spelling has several ids: adding up entries of equal place would count such pairs twice."""
    teacher = [b"", b"a", b"ba", b"cba", b" ", b"a", b"\n "]
    student = [b"a", b"", b"cba", b"xcba", b" ", b"a"]
    pairs = suffix_pairs(teacher, student)
    wanted = [
        (t, u)
        for t, a in enumerate(teacher)
        for u, b in enumerate(student)
        if a and b and (a.endswith(b) or b.endswith(a))
    ]
    assert list(zip(pairs.teacher_ids.tolist(), pairs.student_ids.tolist())) == wanted
    assert [wanted[row] for row in np.flatnonzero(pairs.blank)] == [(4, 4), (6, 4)]
    rows = np.concatenate(pairs.blocks)
    assert sorted(rows.tolist()) == np.flatnonzero(~pairs.blank).tolist()
    shorter = [len(teacher[t]) <= len(student[u]) for t, u in wanted]
    assert pairs.teacher_shorter.tolist() == shorter


def test_golden_biases_and_counts(shared):
    """Section D of the golden vectors: every pair, and the three with a special token, which are out of band here."""
    golden = shared / "golden"
    teacher, student = (load_tokenizer(str(golden / f"D_tokenizer_bpe1k_{side}.json")) for side in "ab")
    lines = json.loads((golden / "D_bias_counts_corpus.json").read_text("utf-8"))
    counts = count_tokens(teacher, lines), count_tokens(student, lines)
    work = bias_blocks(teacher, student, *counts)
    bias = np.ones((2, len(work.pairs.blank)))
    for block, rows in enumerate(work.pairs.blocks):
        result = work.run(block)
        bias[:, rows] = result["bias1"], result["bias2"]
    with np.load(golden / "D_bias_bpe1k_a__bpe1k_b.npz") as wanted:
        for side, found in zip(("teacher", "student"), counts):
            assert np.array_equal(found, wanted[f"{side}_counts"])
            assert np.allclose(unigram_probabilities(found), wanted[f"{side}_probs"], rtol=1e-6, atol=0)
        special = np.isin(wanted["teacher_id"], [*teacher.special_ids])
        special |= np.isin(wanted["student_id"], [*student.special_ids])
        assert special.sum() == 3
        assert not wanted["bias1"][special].any()
        assert not wanted["bias2"][special].any()
        order = np.lexsort([wanted["student_id"], wanted["teacher_id"]])
        order = order[~special[order]]
        assert np.array_equal(work.pairs.teacher_ids, wanted["teacher_id"][order])
        assert np.array_equal(work.pairs.student_ids, wanted["student_id"][order])
        assert np.array_equal(work.pairs.blank, wanted["whitespace_rule"][order] == 1)
        assert [teacher.vocab_size, student.vocab_size] == wanted["shape"].tolist()
        for found, name in zip(bias, ("bias1", "bias2")):
            assert np.allclose(found, wanted[name][order], rtol=1e-5, atol=1e-9)
            assert np.count_nonzero(found) == np.count_nonzero(wanted[name])
