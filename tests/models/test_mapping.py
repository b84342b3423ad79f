"""Rules of layer mapping for every pair of depths, and what explicit pairs are held to."""

from typing import get_args

import pytest

from tokenkit.config import UserError
from tokenkit.losses.aligned import Layers
from tokenkit.models.mapping import RULES, layer_pairs

DEPTHS = range(1, 13)
SIZES = [(s, t) for s in DEPTHS for t in DEPTHS]
LEAST = {"last_2": 2, "last_3": 3, "last_4": 4}  # blocks that both sides need


def test_every_word_of_the_option_is_a_rule():
    assert set(get_args(get_args(Layers)[0])) == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_pairs_are_in_range_sorted_and_each_once(rule):
    for students, teachers in SIZES:
        needs = LEAST.get(rule, 1)
        if min(students, teachers) < needs or (rule == "all" and students != teachers):
            with pytest.raises(UserError, match=f"layers: {rule} needs .*; write layers: (last|uniform)$"):
                layer_pairs(rule, students, teachers)
            continue
        pairs = layer_pairs(rule, students, teachers)
        assert pairs
        assert all(0 <= s < students and 0 <= t < teachers for s, t in pairs)
        assert pairs == sorted(set(pairs))


def test_uniform_leads_from_last_to_last_and_never_backwards():
    for students, teachers in SIZES:
        pairs = layer_pairs("uniform", students, teachers)
        assert [s for s, _ in pairs] == list(range(students))
        assert pairs[-1] == (students - 1, teachers - 1)
        steps = [t for _, t in pairs]
        assert steps == sorted(steps)
        if students <= teachers:
            assert len(set(steps)) == students  # no two student blocks learn from one teacher block


def test_uniform_is_the_rounded_formula():
    assert layer_pairs("uniform", 6, 12) == [(i, 2 * i + 1) for i in range(6)]
    assert layer_pairs("uniform", 4, 6) == [(0, 1), (1, 2), (2, 4), (3, 5)]  # 1.5, 3, 4.5, 6: halves upwards
    assert layer_pairs("uniform", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert layer_pairs("uniform", 5, 1) == [(i, 0) for i in range(5)]  # 0.2 rounds to 0: before the first block


def test_uniform_cons_leaves_no_block_out():
    for students, teachers in SIZES:
        pairs = layer_pairs("uniform_cons", students, teachers)
        assert {s for s, _ in pairs} == set(range(students))
        assert {t for _, t in pairs} == set(range(teachers))
        assert len(pairs) == max(students, teachers)  # of the deeper side, each block once
    assert layer_pairs("uniform_cons", 3, 6) == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert layer_pairs("uniform_cons", 4, 6) == [(0, 0), (1, 1), (1, 2), (2, 3), (3, 4), (3, 5)]


def test_uniform_and_last_asks_the_last_of_every_block():
    for students, teachers in SIZES:
        pairs = layer_pairs("uniform_and_last", students, teachers)
        assert {(i, teachers - 1) for i in range(students)} <= set(pairs)
        assert {(i, i * teachers // students) for i in range(students)} <= set(pairs)
    assert layer_pairs("uniform_and_last", 2, 4) == [(0, 0), (0, 3), (1, 2), (1, 3)]


def test_skip_takes_every_kth_and_leaves_the_last_to_the_logits():
    assert layer_pairs("skip", 6, 12) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]  # 2, 4, ... 10 in the paper
    assert layer_pairs("skip", 12, 6) == [(1, 0), (3, 1), (5, 2), (7, 3), (9, 4)]
    assert layer_pairs("skip", 3, 3) == [(0, 0), (1, 1)]
    assert layer_pairs("skip", 1, 8) == [(0, 7)]
    for students, teachers in SIZES:
        fewer = min(students, teachers)
        assert len(layer_pairs("skip", students, teachers)) == max(1, fewer - 1)


def test_the_other_rules_by_example():
    assert layer_pairs("all", 3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs("last", 2, 5) == [(1, 4)]
    assert layer_pairs("last_3", 4, 9) == [(1, 6), (2, 7), (3, 8)]
    assert layer_pairs("all_to_one", 3, 7) == [(0, 6), (1, 6), (2, 6)]
    assert layer_pairs("full_cross", 2, 3) == [(i, j) for i in range(2) for j in range(3)]


def test_explicit_pairs_stay_in_order_and_count_from_the_end():
    assert layer_pairs([(1, 5), (0, -1), (-1, -2)], 3, 8) == [(1, 5), (0, 7), (2, 6)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "layers: no pairs; write a rule"),
        ([(0, 8)], r"layers: \[0, 8\] asks for block 8 of the teacher, which has 8; write a number from -8 to 7"),
        ([(-4, 0)], r"layers: \[-4, 0\] asks for block -4 of the student, which has 3"),
        ([(0, 7), (0, -1)], r"layers: the pair \[0, -1\] stands twice"),
    ],
)
def test_explicit_pairs_are_checked(pairs, message):
    with pytest.raises(UserError, match=message):
        layer_pairs(pairs, 3, 8)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="each needs one"):
        layer_pairs("last", 0, 4)
