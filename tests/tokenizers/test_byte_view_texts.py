"""Thousands of odd texts for every kind: ids of the library, spans that tile, tokens that spell their spans."""

import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.hf import HFTokenizer


def test_random_texts(tokenizer, checker):
    if not isinstance(tokenizer, HFTokenizer):
        for text in checker.random_texts(1000, 1):
            assert tokenizer.encode(text).ids.tolist() == [*text.encode()]
        return
    check = checker.Checker(tokenizer)
    check.check([*checker.EDGES, *checker.random_texts(500, 1)])
    found = check.found
    assert found.wrong == 0, found.failures
    assert found.strings > 400
    assert found.ids == found.tiled == found.strings


@pytest.mark.parametrize("kind", ["sp-first", pytest.param("bpe", marks=pytest.mark.slow)])
def test_every_assigned_code_point(make_tokenizer, checker, kind):
    check = checker.Checker(make_tokenizer(kind))
    points = [*checker.code_points()]
    assert len(points) > 40_000
    check.check(["\n".join(points[begin : begin + 50]) for begin in range(0, len(points), 50)])
    found = check.found
    assert found.wrong == 0, found.failures
    assert not found.refused
    assert found.ids == found.tiled == found.strings > 800
    assert found.by_offsets <= 1  # the space mark, where there is one


@pytest.mark.slow
def test_every_assigned_code_point_of_a_lossy_tokenizer(lossy, checker):
    check = checker.Checker(lossy)
    check.check([*checker.code_points()])
    found = check.found
    assert found.wrong == 0, found.failures
    assert found.ids == found.tiled == found.strings - found.refused.total()


def test_half_a_surrogate_pair_is_one_line(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(
            UserError, match=r"half a surrogate pair, '\\ud83d', at character 2 of a text; read"
        ) as caught:
            encode("ab\ud83dc")
        assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_in_a_lossy_tokenizer(lossy):
    with pytest.raises(UserError, match="half a surrogate pair"):
        lossy.encode("\udc00")


def test_one_long_document_equals_its_words(make_tokenizer):
    tokenizer = make_tokenizer("bpe")
    words = [f" the cat {number}\n" for number in range(20_000)]
    whole = tokenizer.encode("".join(words))
    assert whole.ends[-1] == sum(map(len, words))
    assert b"".join(tokenizer.token_bytes[index] for index in whole.ids) == "".join(words).encode()
