"""Mixtures: shares are exact, nobody ends first, languages keep to themselves, and a step alone says what it reads."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError, build, resolved
from tokenkit.data.batch import Batches
from tokenkit.data.corpus import DataConfig, read_texts, read_training_rows
from tokenkit.data.example import Window
from tokenkit.data.mixture import BLOCK, Mixing, Shares, WeightedSource, names_of
from tokenkit.data.order import MixedRows, ordered

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(0, 2**31), st.integers(0, 700))
def test_every_beginning_has_its_shares(weights, seed, number):
    shares = Shares(weights, [seed])
    drawn = [shares.at(i) for i in range(number)]
    found = Counter(choice for choice, _ in drawn)
    assert [found[i] for i in range(len(weights))] == shares.before(number)
    for i in range(len(weights)):
        assert [k for choice, k in drawn if choice == i] == list(range(found[i]))  # none twice, none left out
    whole = number // BLOCK * BLOCK
    quotas = [whole * weight / sum(weights) for weight in weights]
    assert all(abs(got - quota) < len(weights) for got, quota in zip(shares.before(whole), quotas, strict=True))


def test_shares_of_a_long_run_are_exact_and_far_places_cost_nothing():
    shares, total = Shares([0.7, 0.2, 0.1], [3]), 10**12
    assert shares.before(total) == pytest.approx([0.7 * total, 0.2 * total, 0.1 * total], abs=2)
    choice, times = shares.at(total)
    assert times == shares.before(total)[choice]


def test_choices_within_a_block_are_drawn_by_the_seed():
    first = [Shares([1.0, 1.0], [0]).at(i)[0] for i in range(BLOCK)]
    assert first == [Shares([1.0, 1.0], [0]).at(i)[0] for i in range(BLOCK)]
    assert first != [Shares([1.0, 1.0], [1]).at(i)[0] for i in range(BLOCK)]
    assert first[: BLOCK // 2] != first[BLOCK // 2 :]  # no pattern that goes along with an evaluation every n steps


def windows(name: str, count: int) -> list[Window]:
    return [Window(i, 0, f"{name} {i}", True) for i in range(count)]


def weighted(*entries: tuple[float, str | None]) -> list[WeightedSource]:
    return [WeightedSource(path=f"{i}.txt", weight=weight, language=name) for i, (weight, name) in enumerate(entries)]


def test_each_source_runs_through_its_own_epochs():
    rows = MixedRows([windows("a", 5), windows("b", 70)], weighted((3, None), (1, None)), True)
    read, order = ordered(rows, batch_size=8, seed=1)
    texts = [read[n].text for step in range(3 * BLOCK) for n in order.numbers(step)]  # 24 blocks
    small, large = ([t for t in texts if t[0] == name] for name in "ab")
    assert (len(small), len(large)) == (18 * BLOCK, 6 * BLOCK)
    assert order.rows_read(3 * BLOCK) == {"0.txt": 18 * BLOCK, "1.txt": 6 * BLOCK}
    for some, length in ((small, 5), (large, 70)):
        epochs = [some[i : i + length] for i in range(0, len(some) - length, length)]
        assert all(len(set(epoch)) == length for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    again = ordered(rows, batch_size=8, seed=1)[1]
    assert again.numbers(57) == order.numbers(57)
    assert ordered(rows, batch_size=8, seed=2)[1].numbers(57) != order.numbers(57)


def test_one_source_in_a_mixture_has_every_row_once_an_epoch():
    rows = MixedRows([windows("a", 12)], weighted((0.5, "en")), True)
    order = ordered(rows, batch_size=4, seed=0)[1]
    assert sorted(n for step in range(3) for n in order.numbers(step)) == list(range(12))


def test_languages_keep_to_themselves_and_have_their_shares_of_the_steps():
    sources = weighted((2, "en"), (1, "de"), (1, "en"))
    rows = MixedRows([windows("en1", 9), windows("de", 9), windows("en2", 9)], sources, mix_languages=False)
    read, order = ordered(rows, batch_size=6, seed=0)
    steps = [[read[n].text[:2] for n in order.numbers(step)] for step in range(4 * BLOCK)]
    assert all(len(set(step)) == 1 for step in steps)
    assert Counter(step[0] for step in steps) == {"en": 3 * BLOCK, "de": BLOCK}
    assert sum(order.rows_read(50).values()) == 300
    drawn = Counter(order.name(n) for step in range(50) for n in order.numbers(step))
    assert drawn == order.rows_read(50)
    assert set(order.rows_read(1)) == {"0.txt", "de", "2.txt"}


def test_steps_do_not_depend_on_those_before():
    mixing = Mixing(weighted((2, "en"), (1, "de")), mix_languages=False, batch_size=5, seed=4)
    forward = [mixing.at(step) for step in range(300)]
    other = Mixing(weighted((2, "en"), (1, "de")), mix_languages=False, batch_size=5, seed=4)
    assert [other.at(step) for step in reversed(range(300))] == forward[::-1]


def test_names_are_short_and_no_two_alike():
    sources = [
        WeightedSource(path="/a/x.txt", language="en"),
        WeightedSource(path="/b/x.txt", language="en"),
        WeightedSource(path="/b/y.txt", language="de"),
        WeightedSource(hub="owner/set", hub_name="fr"),
    ]
    assert names_of(sources) == ["x.txt", "x.txt-2", "de", "set (fr)"]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    made = {}
    for name, count in (("en", 30), ("de", 6)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} text {i} " * 4}) + "\n" for i in range(count)), "utf-8")
        made[name] = str(path)
    return made


def mixture(files, **options) -> DataConfig:
    entries = [{"path": path, "weight": 1, "language": name} for name, path in files.items()]
    return build(DataConfig, {"mixture": entries, "window_bytes": 64, **options})


def test_batches_of_a_mixture_resume_in_the_middle_and_name_their_sources(bpe, files):
    data = mixture(files)
    batches = Batches(read_training_rows(data), bpe, None, batch_size=6, seed=2)
    expected = [batches.at(step) for step in range(9)]
    again = Batches(read_training_rows(data), bpe, None, batch_size=6, seed=2)
    for step in (8, 3, 5):
        one, other = again.at(step)[0], expected[step][0]
        assert one.rows == other.rows
        assert all(one.tensors[name].equal(tensor) for name, tensor in other.tensors.items())
    assert re.search(r"\((en|de) document \d+ byte \d+", batches.place(0))
    languages = [batches.texts(step)[i].text[:2] for step in range(4) for i in range(6)]
    assert batches.rows_read(4) == Counter(languages)
    ranks = [again.at(5, 2, rank, 3) for rank in range(3)]
    assert [row for i in range(2) for parts in ranks for row in parts[i].rows] == expected[5][0].rows


def test_texts_of_a_mixture_are_spread_evenly(files):
    texts = read_texts(mixture(files))
    assert len(texts) == 36
    assert Counter(text[:2] for text in texts[:18]) == {"en": 15, "de": 3}


def test_a_mixture_is_described_and_saved_whole(files):
    data = mixture(files)
    assert data.describe() == "50 % en, 50 % de"
    assert build(DataConfig, resolved(data)) == data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data: give either source="),
        ({"source": {"path": "a"}, "mixture": [{"path": "b"}]}, "data: give either source="),
        ({"mixture": [{"path": "b"}], "mix_languages": False}, r"data.mixture.0.language: missing"),
        ({"source": {"path": "a"}, "mix_languages": False}, "data.mix_languages: false, but there is one source"),
        ({"mixture": [{"path": "b", "weight": 0}]}, "mixture.0.weight: input should be greater than 0"),
        ({"mixture": [{"path": "b", "wieght": 1}]}, "did you mean 'weight'"),
        ({"source": {"path": "a", "hub_name": "en"}}, "source.hub_name: 'en' beside no hub"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(values, message):
    with pytest.raises(UserError, match=message):
        build(DataConfig, values)
