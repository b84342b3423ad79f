"""Vectors learnt from text, and the initialisers that go by them, each against something slow and obvious."""

import numpy as np
import pytest
import torch

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS, focus, token_vectors
from tokenkit.transfer.evidence import Texts
from tokenkit.transfer.mixture import Mixture, Origin
from tokenkit.transfer.plan import TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.tokalign import frequent_anchors
from tokenkit.transfer.token_vectors import (
    Learning,
    Spelled,
    Stream,
    cooccurrence,
    nearest,
    sums_of,
    vectors_by_bytes,
    vectors_of_tokens,
)
from tokenkit.transfer.wechsel import turned

HOW = Learning(dimensions=20, window_tokens=3, min_count=1)
BY_TEXT = pytest.mark.parametrize(
    "name, options", [("focus", {}), ("wechsel", {}), ("wechsel", {"space": "words"}), ("tokalign", {})]
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tokenizers: dict[str, Tokenizer]) -> tuple[Tokenizer, Tokenizer, TransferPlan]:
    source, target = tokenizers["small"], tokenizers["large"]
    return source, target, plan_transfer(source, target, source_rows=source.vocab_size)


def made(name: str, pair: tuple, old: torch.Tensor, documents: list[str], **options: object) -> Mixture:
    source, target, plan = pair
    fn, given = INITIALIZERS[name].fn, (target,) if name == "focus" else (source, target)
    return fn(TensorRows(old), plan, Texts(documents), *given, side="input", **options)


# counting


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_pairs_are_counted_within_documents_only(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(token_vectors, "BLOCK_TOKENS", block)
    generator = np.random.default_rng(0)
    lengths = [9, 1, 0, 14, 2]
    rows = [generator.integers(0, 5, length).astype(np.int32) for length in lengths]
    wanted = np.zeros((5, 5))
    for row in rows:
        for i in range(len(row)):
            for j in range(len(row)):
                if 0 < abs(i - j) <= 3:
                    wanted[row[i], row[j]] += 1 / abs(i - j)
    documents = np.repeat(np.arange(5, dtype=np.int32), lengths)
    keys, sums = cooccurrence(Stream(np.concatenate(rows), documents, [b"x"] * 5), 3)
    found = np.zeros(25)
    found[keys] = sums
    np.testing.assert_allclose(found.reshape(5, 5), wanted)
    assert (np.diff(keys) > 0).all()


def test_tokens_that_are_used_alike_have_like_vectors(tokenizers: dict[str, Tokenizer]) -> None:
    """One word for another at random: of all tokens, the other's vector is the nearest."""
    generator = np.random.default_rng(0)
    sentences = ["the {} sat on the mat\n", "and the other {} sat there too\n", "the mat and the {} there\n"]
    words = [sentences[i % 3].format(["cat", "value"][generator.integers(2)]) for i in range(400)]
    target = tokenizers["large"]
    cat, value = (target.encode(f"the {word} sat").ids for word in ("cat", "value"))
    assert len(cat) == len(value) == 3
    vectors = vectors_of_tokens(Texts(["".join(words)]), target, HOW)
    norms = vectors.vectors.norm(dim=1)[vectors.known]
    torch.testing.assert_close(norms, torch.ones_like(norms))
    similar = vectors.vectors @ vectors.vectors[cat[1]]
    similar[cat[1]] = -1
    assert similar.argmax() == value[1]
    assert vectors.known.sum() == (vectors.counts > 0).sum() < target.vocab_size


def test_rare_tokens_have_no_vector_where_more_is_asked(tokenizers: dict[str, Tokenizer], corpus: list[str]) -> None:
    vectors = vectors_of_tokens(Texts(corpus), tokenizers["large"], Learning(20, 3, 4))
    assert np.array_equal(vectors.known, vectors.counts >= 4)
    assert 0 < vectors.known.sum() < (vectors.counts > 0).sum()


@pytest.mark.parametrize("documents", [[], [""], ["a"], ["the the"]])
def test_hardly_any_text_is_no_error(tokenizers: dict[str, Tokenizer], documents: list[str]) -> None:
    one = tokenizers["large"]
    assert vectors_of_tokens(Texts(documents), one, HOW).vectors.isfinite().all()
    assert all(v.isfinite().all() for v in vectors_by_bytes(Texts(documents), [one], HOW))


# spelling


def spelled() -> Spelled:
    strings = [b" cat", b" cats", b" mat", b" mats", b"rat", b"the", b"there", b"zq"]
    return Spelled(strings, drawn(8, 4), np.array([900, 3, 500, 1, 40, 2000, 7, 2]))


def test_n_grams_are_numbered_in_the_order_of_the_strings() -> None:
    """Not in that of a set of bytes, which changes from process to process."""
    one = spelled()
    seen: dict[bytes, int] = {}
    for string in one.spellings:
        parts = {string[i:j] for i in range(len(string)) for j in range(i + 2, min(i + 6, len(string)) + 1)}
        for part in parts:
            seen[part] = seen.get(part, 0) + 1
    assert set(one.ngrams) == {part for part, strings in seen.items() if strings > 1}
    first = [min((string.find(n) < 0, k) for k, string in enumerate(one.spellings))[1] for n in one.ngrams]
    assert first == sorted(first)


def test_n_gram_vectors_are_the_ridge_regression() -> None:
    one = spelled()
    means = torch.zeros(8, len(one.ngrams))
    for i, string in enumerate(one.spellings):
        parts = [
            one.ngrams[string[a:b]]
            for a in range(9)
            for b in range(a + 2, a + 7)
            if b <= len(string) and string[a:b] in one.ngrams
        ]
        for part in parts:
            means[i, part] += 1 / len(parts)
    weights = torch.from_numpy(one.counts).float().sqrt()
    left = means.T @ (weights[:, None] * means) + token_vectors.RIDGE * torch.eye(len(one.ngrams))
    wanted = torch.linalg.solve(left, means.T @ (weights[:, None] * one.vectors))
    torch.testing.assert_close(one.parts, wanted, rtol=1e-3, atol=1e-4)


def test_frequent_strings_keep_their_vectors_and_rare_ones_lean_on_their_bytes() -> None:
    one = spelled()
    blended = one.of(one.spellings)
    own = (blended - one.vectors).norm(dim=1) / one.vectors.norm(dim=1)
    assert own[5] < 0.02 < 0.2 < own[3]
    predicted = one.of([b" mat!", b"there?", b"qqq"])
    assert predicted[:2].any(1).all()
    assert not predicted[2].any()


def test_the_same_bytes_have_the_same_vector(tokenizers: dict[str, Tokenizer], corpus: list[str], pair: tuple) -> None:
    source, target, plan = pair
    old, new = vectors_by_bytes(Texts(corpus), [source, target], HOW)
    assert len(plan.anchors[0]) > 100
    assert torch.equal(new[plan.anchors[0]], old[plan.anchors[1]])


# weights


def test_sparsemax_is_the_nearest_distribution() -> None:
    """By bisection of what all numbers are lowered by, until they sum to one."""
    for spread in (0.01, 0.3, 5.0):
        rows = (spread * drawn(20, 30)).double().sort(descending=True).values
        found = focus.sparsemax(rows)
        low, high = rows.min(1).values - 1, rows.max(1).values
        for _ in range(100):
            middle = (low + high) / 2
            above = (rows - middle[:, None]).clamp_min(0).sum(1) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        torch.testing.assert_close(found, (rows - low[:, None]).clamp_min(0))


@pytest.mark.parametrize("looked_at", [1, 2, 7])
def test_focus_looks_at_all_anchors_where_it_must(
    monkeypatch: pytest.MonkeyPatch, pair: tuple, corpus: list[str], looked_at: int
) -> None:
    old = drawn(pair[0].vocab_size, 6)
    whole = made("focus", pair, old, corpus)
    assert np.diff(whole.offsets).max() > 7
    monkeypatch.setattr(focus, "LOOKED_AT", looked_at)
    some = made("focus", pair, old, corpus)
    for i in pair[2].free.tolist():
        wanted, found = dict(whole.sources(i)), dict(some.sources(i))
        assert {k: v for k, v in found.items() if v > 1e-5} == pytest.approx(
            {k: v for k, v in wanted.items() if v > 1e-5}, abs=1e-5
        )


def test_blocks_find_what_one_product_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, among = drawn(50, 8), drawn(37, 8, seed=1)
    values, ids = (wanted @ among.T).sort(dim=1, descending=True)
    monkeypatch.setattr(token_vectors, "BLOCK_BYTES", 4 * 37 * 7)
    parts = list(nearest(wanted, among, 5))
    assert [part.stop - part.start for part, _, _ in parts] == [7] * 7 + [1]
    torch.testing.assert_close(torch.cat([one for _, one, _ in parts]), values[:, :5])
    assert np.array_equal(np.concatenate([one for _, _, one in parts]), ids[:, :5])
    assert list(nearest(wanted, among[:0], 5)) == []


def test_sums_are_put_in_the_order_of_their_rows() -> None:
    first = (np.array([9, 4]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), np.array([[1, 2], [3, 4]]))
    second = (np.array([6]), torch.tensor([[0.2, 0.3, 0.5]]), np.array([[7, 8, 9]]))
    rows, lengths, ids, weights = sums_of([first, second])
    assert (rows.tolist(), lengths.tolist(), ids.tolist()) == ([4, 6, 9], [1, 3, 2], [3, 7, 8, 9, 1, 2])
    np.testing.assert_allclose(weights, [1, 0.2, 0.3, 0.5, 0.5, 0.5])


def test_a_rotated_space_is_turned_back() -> None:
    rotation = torch.linalg.qr(drawn(6, 6, seed=3)).Q
    old = drawn(40, 6)
    anchors = np.arange(10, 30), np.arange(20)  # target ids, source ids
    new = torch.zeros(50, 6)
    new[10:50] = old @ rotation
    torch.testing.assert_close(turned(old, new, anchors), old @ rotation)


def test_pivots_are_the_anchors_frequent_in_both(pair: tuple, corpus: list[str]) -> None:
    source, target, plan = pair
    old, new = (vectors_of_tokens(Texts(corpus), one, HOW) for one in (source, target))
    ids, sources = frequent_anchors(old, new, plan, 15)
    assert [target.token_bytes[i] for i in ids] == [source.token_bytes[i] for i in sources]
    least = np.minimum(new.counts[ids], old.counts[sources])
    every = np.minimum(new.counts[plan.anchors[0]], old.counts[plan.anchors[1]])
    assert sorted(least) == sorted(every[every > 0])[-15:]


# the initialisers


@BY_TEXT
def test_rows_of_tokens_that_the_texts_lack_stay_with_the_chain(
    pair: tuple, corpus: list[str], name: str, options: dict[str, str]
) -> None:
    old, plan = drawn(pair[0].vocab_size, 6), pair[2]
    chain = INITIALIZERS["fvt"].fn(TensorRows(old), plan, side="input")
    for documents, share in (([], 0.0), (corpus[:1], 0.5), (corpus, 1.0)):
        one = made(name, pair, old, documents, **options)
        learnt = one.origin == Origin.INITIALIZER
        assert not learnt[np.setdiff1d(np.arange(len(plan)), plan.free)].any()
        assert (learnt.sum() / len(plan.free) > 0.3) == (share == 1.0)
        assert learnt.any() == (share > 0)
        kept = np.flatnonzero(~learnt)
        assert torch.equal(one(kept), chain(kept))
        for i in np.flatnonzero(learnt).tolist():
            assert sum(weight for _, weight in one.sources(i)) == pytest.approx(1, abs=1e-4)


@BY_TEXT
def test_the_texts_and_the_seed_decide(pair: tuple, corpus: list[str], name: str, options: dict[str, str]) -> None:
    """Not the process, nor what was drawn before."""
    old = drawn(pair[0].vocab_size, 6)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = made(name, pair, old, corpus, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = made(name, pair, old, corpus, seed=3, **options)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.weights, second.weights)


def test_tokalign_copies_one_row(pair: tuple, corpus: list[str]) -> None:
    old = drawn(pair[0].vocab_size, 6)
    one = made("tokalign", pair, old, corpus, neighbours=1)
    several = made("tokalign", pair, old, corpus, neighbours=3)
    for i in np.flatnonzero(one.origin == Origin.INITIALIZER).tolist():
        [(source, weight)] = one.sources(i)
        assert weight == 1
        assert pair[0].token_bytes[source]
        assert torch.equal(one(np.array([i]))[0], old[source])
        assert max(several.sources(i), key=lambda pair: pair[1])[0] == source


def test_wechsel_weights_are_the_softmax_over_the_nearest(pair: tuple, corpus: list[str]) -> None:
    source, target, _ = pair
    old = drawn(source.vocab_size, 6)
    options = {"space": "words", "dimensions": 20, "window_tokens": 3}
    one = made("wechsel", pair, old, corpus, neighbours=4, temperature=0.2, **options)
    vectors, new = vectors_by_bytes(Texts(corpus), [source, target], HOW)
    has = np.array([bool(s) for s in source.token_bytes]) & vectors.any(1).numpy()
    for i in np.flatnonzero(one.origin == Origin.INITIALIZER).tolist():
        cosines = (vectors @ new[i]).masked_fill(~torch.from_numpy(has), -2)
        wanted = (cosines.sort(descending=True).values[:4] / 0.2).softmax(0)
        np.testing.assert_allclose(sorted(w for _, w in one.sources(i)), sorted(wanted.tolist()), rtol=1e-3)


@pytest.mark.parametrize(
    "name, options, where",
    [
        ("focus", {"temperature": 0.0}, "transfer.focus.temperature: 0.0"),
        ("wechsel", {"neighbours": 0}, "transfer.wechsel.neighbours: 0"),
        ("tokalign", {"pivots": -1}, "transfer.tokalign.pivots: -1"),
        ("focus", {"dimensions": 0}, "transfer.focus.dimensions: 0"),
    ],
)
def test_options_out_of_range_are_one_line(pair: tuple, name: str, options: dict, where: str) -> None:
    with pytest.raises(UserError, match=f"{where}, where .* is needed") as error:
        made(name, pair, drawn(pair[0].vocab_size, 6), ["the cat"], **options)
    assert "\n" not in str(error.value)
