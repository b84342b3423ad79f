"""What a chain does to the gradients of several losses: by published vectors, by a double loop, by its laws."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.train.gradients import combined, gradclip, norm, pcgrad


def vectors(*rows):
    names = [f"task{number}" for number in range(len(rows))]
    gradients = {name: {0: torch.tensor(row, dtype=torch.float64)} for name, row in zip(names, rows, strict=True)}
    return gradients, dict.fromkeys(names, 1.0)


@pytest.mark.parametrize(
    "chain, rows, expected",
    [
        ([("pcgrad", 0.0)], [(1, 0, 2), (-2, 1, 0)], (-1.4, 1.4, 2.8)),
        ([("gradmag", 1e-8)], [(1, 0, 2), (-2, 1, 0)], (-0.44721360, 0.44721360, 0.89442719)),
        ([("gradclip", 1.0)], [(1, 0, 2), (-2, 1, 0)], (-0.44721360, 0.44721360, 0.89442719)),
        ([("pcgrad", 0.0)], [(1, 0), (-1, 1), (-1, -1)], (0, 0)),
    ],
)
def test_links_by_published_vectors(chain, rows, expected):
    total = combined(*vectors(*rows), chain)[0]
    torch.testing.assert_close(total, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


gradient_rows = st.lists(
    st.lists(st.floats(-3, 3, width=16), min_size=4, max_size=4), min_size=2, max_size=4
)  # width 16: no denormals whose squares vanish


@given(gradient_rows)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_pcgrad_equals_a_double_loop(rows):
    originals = np.array(rows, dtype=np.float64)
    expected = originals.copy()
    for i, j in itertools.permutations(range(len(rows)), 2):
        product = sum(originals[i][k] * originals[j][k] for k in range(4))
        length = sum(originals[j][k] ** 2 for k in range(4))
        if product < 0:
            for k in range(4):
                expected[i][k] -= product / length * originals[j][k]
    found = combined(*vectors(*rows), [("pcgrad", 0.0)])[0]
    np.testing.assert_allclose(found.numpy(), expected.sum(0), rtol=1e-9, atol=1e-9)


@given(gradient_rows)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_two_gradients_do_not_oppose_each_other_after_surgery(rows):
    gradients, weights = vectors(*rows[:2])
    changed = pcgrad(gradients, weights, 0.0)
    own, other = changed["task0"][0], changed["task1"][0]
    assert (own * other).sum() >= -1e-9
    assert (own * gradients["task1"][0]).sum() >= -1e-9


@given(gradient_rows, st.floats(0.01, 5))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_clipping_bounds_every_norm_and_keeps_the_direction(rows, limit):
    gradients, weights = vectors(*rows)
    for name, own in gradclip(gradients, weights, limit).items():
        before = norm(gradients[name].values())
        assert norm(own.values()) == pytest.approx(min(limit, before))
        torch.testing.assert_close(own[0] * before, gradients[name][0] * min(limit, before))


def test_links_are_taken_in_order_and_weights_count():
    gradients, weights = vectors((3, 4), (0, 2))
    clipped = combined(gradients, weights, [("gradmag", 1e-30), ("gradclip", 0.5)])[0]
    torch.testing.assert_close(clipped, torch.tensor([0.3, 0.9], dtype=torch.float64))
    other = combined(gradients, weights, [("gradclip", 0.5), ("gradmag", 1e-30)])[0]
    torch.testing.assert_close(other, torch.tensor([0.6, 1.8], dtype=torch.float64))
    weighted = combined(gradients, {"task0": 10.0, "task1": 1.0}, [("gradmag", 1e-30)])[0]
    torch.testing.assert_close(weighted, torch.tensor([6.0, 9.0], dtype=torch.float64))
