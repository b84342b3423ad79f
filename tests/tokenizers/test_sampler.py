"""Drawn tokenizers are real ones: they spell every text, differ from each other, and are the same when drawn again."""

import random
from itertools import pairwise

import pytest

from tokenkit.config import UserError, build
from tokenkit.tokenizers.sampler import LEAST, ROLES, SPACES, SamplerConfig, TokenizerSampler
from tokenkit.tokenizers.train import SPLIT


def corpus() -> list[str]:
    """Thirty documents of two thousand made-up words, frequent ones and rare ones."""
    rng = random.Random(5)
    parts = ["ka", "lo", "mi", "ter", "un", "sh", "e", "gra"]
    words = ["".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(2000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=300)) + ".\n" for _ in range(30)]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return corpus()


TEXTS = [
    "the cat sat on the mat",
    "  two\n\n\tthree  🙂 naïve 東京\r\n",
    "x = [1, 22, 333]\n    return x\n",
    "\x00\x7f",
]


def sampler(documents: list[str], kind: str = "both", **changes: object) -> TokenizerSampler:
    kinds = ["bpe", "unigram"] if kind == "both" else [kind]
    config = build(SamplerConfig, {"kinds": kinds, "vocab_size": 500, "bpe_bytes": 4000, **changes})
    return TokenizerSampler(documents, config, seed=3)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_one_spells_every_text(documents, kind):
    """All 256 bytes are there, also of what the corpus has not; whatever noise was drawn."""
    made = sampler(documents, kind)
    for number in range(6):
        drawn = made.draw(number)
        assert {bytes([byte]) for byte in range(256)} <= set(drawn.token_bytes)
        assert drawn.lossless
        for text, encoding in zip(TEXTS, drawn.encode_batch(TEXTS)):
            assert b"".join(drawn.token_bytes[i] for i in encoding.ids) == text.encode()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_roles_are_ids_of_their_own(documents, kind):
    drawn = sampler(documents, kind).draw(0)
    assert len({drawn.bos_id, drawn.eos_id, drawn.pad_id}) == 3
    assert set(drawn.special_tokens) == set(ROLES.values())
    assert not drawn.special_ids & {i for e in drawn.encode_batch(list(ROLES.values())) for i in e.ids.tolist()}


def test_it_depends_on_seed_and_number_and_on_nothing_before(documents):
    first, again = (sampler(documents, vocab_spread=0.2) for _ in range(2))
    prints = [first.draw(number, documents[:3]).fingerprint for number in range(6)]
    order = random.Random(0).sample(range(6), 6)
    assert {number: again.draw(number, documents[:3]).fingerprint for number in order} == dict(enumerate(prints))
    assert len(set(prints)) == 6
    assert TokenizerSampler(documents, first.config, seed=4).draw(0).fingerprint not in prints


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sizes_are_the_one_that_was_asked_for_or_spread_around_it(documents, kind):
    exact = sampler(documents, kind, vocab_spread=0.0, vocab_size=400)
    assert {exact.draw(number).vocab_size for number in range(4)} == {400}
    spread = sampler(documents, kind, vocab_spread=0.3, vocab_size=400)
    sizes = {spread.draw(number).vocab_size for number in range(12)}
    assert len(sizes) > 6
    assert min(sizes) >= LEAST
    assert sampler(documents, kind, vocab_size=LEAST, vocab_spread=0.0).draw(0).vocab_size == LEAST


def test_both_kinds_are_drawn(documents):
    made = sampler(documents)
    kinds = [made.draw(number).definition["model"]["type"] for number in range(20)]
    assert {"BPE", "Unigram"} == set(kinds)
    assert 4 <= kinds.count("BPE") <= 16


def test_no_piece_mixes_white_space_with_what_follows_it_twice_nor_reaches_over_words(documents):
    """Runs of white space are pieces of their own, and every other piece lies inside a word."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    split = Split(Regex(SPLIT), "isolated")
    words = {word for text in documents for word, _ in split.pre_tokenize_str(text)}
    for piece in sampler(documents, "unigram").draw(1).token_bytes:
        text = piece.decode(errors="replace")
        if len(piece) < 2 or not text.strip(SPACES):
            continue
        assert sum(character in SPACES for character in text) < 2
        assert any(text in word for word in words)


def test_pieces_of_a_corpus_cover_it_with_fewer_tokens_than_bytes(documents):
    """Pieces that cover most come first, so without noise a text is cut into its words."""
    made = sampler(documents, "unigram", vocab_spread=0.0)
    drawn = [made.draw(number) for number in range(8)]
    rates = [len(document.encode()) / len(one.encode(document)) for one, document in zip(drawn, documents)]
    assert max(rates) > 2.5


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_rare_words_of_the_text_at_hand_are_pieces_where_it_is_emphasised(documents, kind):
    text, found = " ".join(["zyxwvut quaggamire"] * 3), []
    for emphasis in (0.0, 1.0):
        made = sampler([*documents, text] if kind == "unigram" else documents, kind, emphasis=emphasis, vocab_size=700)
        found.append(sum(b" quaggamire" in made.draw(number, [text]).token_bytes for number in range(12)))
    assert found[0] <= 2
    assert found[1] >= 5


def test_runs_of_white_space_are_single_tokens(documents):
    drawn = sampler(documents, "unigram").draw(0)
    for run in (" " * 7, "\n" * 3, "\t" * 4, "\n    "):
        assert run.encode() in drawn.token_bytes


def test_scores_fall_with_the_rank_and_bytes_are_dearest(documents):
    vocabulary = sampler(documents, "unigram").draw(2).definition["model"]["vocab"]
    byte_scores = {score for _, score in vocabulary[:LEAST]}
    pieces = [score for _, score in vocabulary[LEAST:] if score < 0]
    assert len(byte_scores) == 1
    assert all(before >= after for before, after in pairwise(pieces))
    assert max(byte_scores) < min(pieces)


def test_settings_that_no_vocabulary_fits_are_refused():
    with pytest.raises(UserError, match="vocab_size"):
        build(SamplerConfig, {"vocab_size": LEAST - 1})
    with pytest.raises(UserError, match="max_piece_bytes: 65"):
        build(SamplerConfig, {"max_piece_bytes": 65})
