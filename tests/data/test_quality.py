"""Every rule has a document that it alone rejects; the signals are those that one would count by hand."""

import math
import random

import pytest

from tokenkit.config import UserError, build
from tokenkit.data.quality import NAMES, RULES, QualityConfig, QualityFilter, repeated_grams, signals, top_gram

STOPS = ["which", "their", "there", "other", "about", "these"]  # English, five letters as all other words here
LITTLE = "of to in is it on as at by or we so i he up do an if my"


def invented(count: int, length: int = 5) -> list[str]:
    """Words that nobody says, all different."""
    draw = random.Random(count * 10 + length)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice("bcdfghjklmnprstvz" if i % 2 == 0 else "aeiou") for i in range(length))] = None
    return list(found)


def text(count: int = 160, distinct: int = 90, seed: int = 0, stops: int = 12) -> list[str]:
    """A hundred and sixty words that every rule lets pass."""
    draw = random.Random(seed)
    words = invented(distinct)
    found = words[: min(distinct, count - stops)]
    found += [draw.choice(words) for _ in range(count - stops - len(found))]
    found += [STOPS[i % 6] for i in range(stops)]
    draw.shuffle(found)
    return found


def with_grams(n: int, times: int, grams: int, share: float) -> str:
    """A text in which so many n-grams stand `times` times, those after the first being `share` of the characters."""
    count = round(grams * n * (times - 1) / share)
    fixed = [invented(400, 5)[200 + n * g : 200 + n * g + n] for g in range(grams)]
    filler = text(count - grams * n * times, 60, stops=count // 8)
    copies = [gram for gram in fixed for _ in range(times)]
    gap = len(filler) // len(copies)
    assert gap >= 1
    for place, gram in enumerate(copies):
        filler[place * (gap + n) : place * (gap + n)] = gram
    return " ".join(filler)


def lines(words: list[str], begin: str = "", end: str = "", every: int = 1) -> str:
    rows = [words[i : i + 8] for i in range(0, len(words), 8)]
    return "\n".join(begin + " ".join(row) + (end if number % every == 0 else "") for number, row in enumerate(rows))


def some(words: list[str], share: float, change) -> str:
    count = round(len(words) * share)
    return " ".join(change(word) if i < count else word for i, word in enumerate(words))


GERMAN_TEXT = "der die das und ist nicht ein eine zu den dem mit von auf für im sich des dass auch"
GERMAN = GERMAN_TEXT.split()
# what HA HA breaks
SHORT = {"words", "mean_word_length", "unigram_entropy", "stop_words", "capital_words", "language"}
DOCUMENTS = {
    "words": {"few": " ".join(text(44, 30, stops=6)), "many": " ".join(invented(1100) + text(8950, 60, stops=900))},
    "mean_word_length": {
        "short": " ".join(text(40, 30, stops=0)[:15] + random.Random(0).choices(LITTLE.split(), k=90)),
        "long": " ".join(invented(60, 14) + invented(60, 14)[::-2] + STOPS[:6] * 2),
    },
    "unique_words": {
        "all": " ".join(invented(55) + STOPS),
        "few": " ".join(random.Random(0).choices([*invented(22), *STOPS[:3]], k=400)),
    },
    "unigram_entropy": {
        "poor": " ".join(random.Random(3).choices([*invented(11), *STOPS[:2]], k=70)),
        "rich": " ".join(text(2000, 900, stops=160)),
    },
    "stop_words": {"none": " ".join(text(stops=3))},
    "capital_words": {"loud": some(text(), 0.15, str.upper)},
    "words_without_letters": {"numbers": some(text(stops=24), 0.45, lambda word: str(1000 + sum(map(ord, word)) % 90))},
    "symbols_per_word": {"tags": some(text(), 0.6, lambda word: f"#{word}")},
    "ellipsis_lines": {"dots": lines(text(), end=" etc...", every=4), "sign": lines(text(), end="…", every=4)},
    "bullet_lines": {"list": lines(text(), begin="• "), "dashes": lines(text(), begin="- ")},
    "curly_brackets": {"code": some(text(), 0.4, lambda word: f"{{{word}}}")},
    "lorem_ipsum": {"filler": " ".join([*text(), "Lorem", "ipsum,"])},
    **{f"top_{n}_gram": {"one": with_grams(n, 9, 1, (0.21, 0.19, 0.17)[n - 2] * 8 / 9 + 0.003)} for n in (2, 3, 4)},
    **{f"repeated_{n}_grams": {"twice": with_grams(n, 2, 6, 0.205 - 0.01 * n)} for n in range(5, 11)},
    "language": {"german": " ".join([*text(200, 100, stops=16), *GERMAN, *GERMAN])},
}


def test_a_plain_text_is_kept():
    kept = QualityFilter()
    for document in (" ".join(text()), lines(text(300, 150, stops=30))):
        assert kept(document) == []
    assert (kept.documents, kept.kept) == (2, 2)
    assert set(kept.counts()["rejected"].values()) == {0}


def test_every_rule_is_tried():
    assert {*DOCUMENTS, "duplicate"} == set(NAMES)
    assert len(NAMES) == len(RULES)


@pytest.mark.parametrize(
    ("rule", "kind"), [(rule, kind) for rule, documents in DOCUMENTS.items() for kind in documents]
)
def test_a_document_that_only_this_rule_rejects(rule, kind):
    document = DOCUMENTS[rule][kind]
    judge = QualityFilter()
    assert judge(document) == [rule]
    assert judge.counts()["rejected"] == judge.counts()["rejected_by_this_rule_alone"]
    assert judge.rejected == {rule: 1}
    lax = QualityFilter(build(QualityConfig, {"without": [rule]}))
    assert lax(document) == []


def test_a_document_that_came_before_is_a_duplicate():
    judge = QualityFilter()
    document = " ".join(text())
    assert judge(document) == []
    assert judge(document.upper().lower() + " ") == ["duplicate"]
    assert judge.rejected_alone == {"duplicate": 1}
    assert judge(" ".join(text(seed=1))) == []


def test_what_breaks_two_rules_counts_for_both_and_for_neither_alone():
    judge = QualityFilter()
    assert judge("HA HA") == [name for name in NAMES if name in SHORT]
    assert judge.rejected_alone == {}
    assert judge("") != []  # nothing is divided by nothing
    assert judge.rejected["words"] == 2


def test_signals_counted_by_hand():
    found = signals("The cat, the CAT…\n- The 7 dogs {ran}\n")
    assert found["words"] == 8  # the cat the cat the 7 dogs ran: a dash is no word
    assert found["mean_word_length"] == pytest.approx((3 * 5 + 1 + 4 + 3) / 8)
    assert found["unique_words"] == 5 / 8
    shares = [3 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8]
    assert found["unigram_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert found["stop_words"] == 3 / 8
    assert found["capital_words"] == 1 / 9
    assert found["words_without_letters"] == 2 / 9
    assert found["symbols_per_word"] == 1 / 9
    assert found["ellipsis_lines"] == 1 / 2
    assert found["bullet_lines"] == 1 / 2
    assert found["curly_brackets"] == 2 / len("The cat, the CAT…\n- The 7 dogs {ran}\n")
    assert top_gram(["a", "b", "c", "a", "b", "d"], 2) == 4 / 6
    assert top_gram(["a", "b", "c", "d"], 2) == 0
    assert repeated_grams(["a", "b", "c", "x", "a", "b", "c", "y"], 3) == 3 / 8
    assert repeated_grams(["a", "a", "a", "a"], 2) == 3 / 4  # each word once


def test_other_bounds_and_names():
    short = " ".join(text(44, 30, stops=6))
    assert QualityFilter(build(QualityConfig, {"bounds": {"words": {"min": 20}}}))(short) == []
    assert QualityFilter(build(QualityConfig, {"bounds": {"words": {"min": 20, "max": 30}}}))(short) == ["words"]
    german = " ".join([*text(200, 100, stops=0), *GERMAN, *GERMAN])
    assert QualityFilter(build(QualityConfig, {"language": "de"}))(german) == []
    for values, message in (
        ({"without": ["word"]}, "without: 'word' is no rule; did you mean 'words'"),
        ({"bounds": {"elipsis_lines": {}}}, "did you mean 'ellipsis_lines'"),
        ({"bounds": {"words": {}}, "without": ["words"]}, "write one of the two"),
    ):
        with pytest.raises(UserError, match=message):
            build(QualityConfig, values)
