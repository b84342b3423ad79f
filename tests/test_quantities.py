"""Every fast quantity against the slow, obvious way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenkit.quantities as quantities
from tokenkit.quantities import Quantities, inputs_of, leaves_of, token_scores, token_scores_dense


def problem(seed, rows=23, width=8, vocabulary=41, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=generator, dtype=dtype) * scale).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(-1, vocabulary, (rows,), generator=generator)
    boundary = torch.rand(vocabulary, generator=generator) < 0.3
    boundary[0] = True
    return hidden, head, labels, boundary


@pytest.mark.parametrize("tile", [(4, 7), (256, 4096), (1, 1), (23, 41)])
@pytest.mark.parametrize("with_boundary", [False, True])
def test_token_scores_equal_the_dense_way(monkeypatch, tile, with_boundary):
    monkeypatch.setitem(quantities.TILE, "cpu", tile)
    hidden, head, labels, boundary = problem(0)
    wanted = boundary if with_boundary else None
    fast = token_scores(hidden, head, labels, wanted)
    slow = token_scores_dense(hidden @ head.T, labels, wanted)
    weights = torch.randn(2, len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, fast)), (hidden, head))
    expected = torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, slow)), (hidden, head))
    for a, b in [*zip(fast, slow), *zip(found, expected)]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_faint_boundary_mass_neither_underflows_nor_poisons_the_gradient():
    logits = torch.tensor([[0.0, -150.0, -151.0], [0.0, -1.0, -90.0]], requires_grad=True)
    boundary = torch.tensor([False, True, True])
    labels = torch.tensor([0, 1])
    _, mass = token_scores(logits, torch.eye(3), labels, boundary)
    expected = logits.detach().double().log_softmax(-1).masked_fill(~boundary, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-6, atol=1e-5)
    mass.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == pytest.approx(1 / (1 + torch.e**-1), rel=1e-5)


def test_gradients_by_differences():
    hidden, head, labels, boundary = problem(3, rows=5, width=3, vocabulary=7, scale=1.0)
    torch.autograd.gradcheck(lambda h, w: token_scores(h, w, labels, boundary), (hidden, head))


def test_label_below_zero_scores_nothing():
    hidden, head, _, _ = problem(4)
    logp, _ = token_scores(hidden, head, torch.full((len(hidden),), -1))
    assert (logp == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(logp.sum(), (hidden, head)))


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=12), st.integers(0, 1000))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_chunk_sums_equal_a_double_loop(chunk, seed):
    label_logp = -torch.rand(1, len(chunk), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensors = Quantities(
        {
            "student_label_logp": label_logp,
            "student_boundary_logp": label_logp * 2,
            "student_chunk": torch.tensor([chunk]),
            "student_chunk_end": torch.tensor([[len(chunk) - 1 if c == 2 else -1 for c in range(6)]]),
        }
    )
    for c in range(6):
        inside = [label_logp[0, t].item() for t, owner in enumerate(chunk) if owner == c]
        assert tensors["student_chunk_logp"][0, c].item() == pytest.approx(sum(inside))
        assert tensors["student_chunk_tokens"][0, c].item() == len(inside)
    assert tensors["student_chunk_boundary_logp"][0, 2] == 2 * label_logp[0, -1]


def test_names_lead_to_leaves():
    assert inputs_of("student_chunk_logp") == ["student_label_logp", "student_chunk", "student_chunk_end"]
    assert leaves_of({"chunk_mask"}) == {f"{s}_{n}" for s in ("student", "teacher") for n in ("chunk", "chunk_end")}
    with pytest.raises(KeyError, match="no quantity is called 'student_chunk_lgop'"):
        inputs_of("student_chunk_lgop")
    with pytest.raises(KeyError, match="did not yield 'teacher_logits'"):
        Quantities({})["teacher_logits"]
