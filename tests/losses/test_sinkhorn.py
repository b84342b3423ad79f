"""Sinkhorn against its iterations written out, its marginals, precisions and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenkit.losses.sinkhorn as module
from tokenkit.losses import LOSSES
from tokenkit.losses.sinkhorn import l1_cost, sinkhorn_plan

sinkhorn = LOSSES["sinkhorn"].fn


def logits(seed, *shape, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 5, 6)), generator=generator, dtype=torch.float64) * scale


ALL = torch.ones(2, 5, dtype=torch.bool)


def written_out(student, teacher, epsilon=0.1, iterations=20):
    """One row of the batch, in probabilities, with every difference at once."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    cost = (q.unsqueeze(1) - p.unsqueeze(0)).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


@pytest.mark.parametrize("tile", [1, 40, 2**22])
@pytest.mark.parametrize("iterations", [1, 20])
def test_value_and_gradient_are_those_of_the_iterations(monkeypatch, tile, iterations):
    monkeypatch.setattr(module, "TILE", tile)
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    found = sinkhorn(student, teacher, mask, iterations=iterations, sum=True)
    slow = torch.stack([written_out(s[m], t[m], iterations=iterations) for s, t, m in zip(student, teacher, mask)])
    torch.testing.assert_close(found.squeeze(1), slow)
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    expected = torch.autograd.grad((slow * weights).sum(), (student, teacher))
    for a, b in zip(torch.autograd.grad((found.squeeze(1) * weights).sum(), (student, teacher)), expected):
        torch.testing.assert_close(a, b)
    mean = sinkhorn(student, teacher, mask, iterations=iterations)
    torch.testing.assert_close(mean.squeeze(1), slow / torch.tensor([5, 3]))


@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"symmetric": True, "iterations": 3, "temperature": 2.0}])
def test_gradcheck(options):
    teacher, mask = logits(1), torch.tensor([[True] * 4 + [False], [True, False, True, False, True]])
    student = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, teacher, mask, **options), student, fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_gives_nearly_the_same(dtype, tolerance):
    student, teacher = logits(0, 2, 12, 50), logits(1, 2, 12, 50)
    mask = torch.ones(2, 12, dtype=torch.bool)
    exact = sinkhorn(student, teacher, mask)
    low = student.to(dtype).requires_grad_()
    found = sinkhorn(low, teacher.to(dtype), mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)
    (grad,) = torch.autograd.grad(found.sum(), low)
    assert torch.isfinite(grad).all()


def test_a_sharp_plan_is_finite_and_nearly_the_best_assignment():
    student, teacher = logits(0).requires_grad_(), logits(1)
    found = sinkhorn(student, teacher, ALL, epsilon=1e-3)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert torch.isfinite(found).all()
    assert torch.isfinite(grad).all()
    found = sinkhorn(student, teacher, ALL, epsilon=0.01, iterations=3000)
    scipy = pytest.importorskip("scipy.optimize")
    for row in range(2):
        cost = l1_cost(student[row].softmax(-1), teacher[row].softmax(-1)).detach()
        rows, columns = scipy.linear_sum_assignment(cost)
        assert found[row, 0].item() == pytest.approx(cost[rows, columns].mean().item(), rel=2e-2)


def test_marginals_of_a_plan_that_has_converged():
    cost = l1_cost(logits(0, 9, 20).softmax(-1), logits(1, 9, 20).softmax(-1))
    plan = sinkhorn_plan(cost, 0.05, tolerance=1e-5)
    ones = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), ones, rtol=0, atol=1e-4)
    torch.testing.assert_close(plan.sum(1), ones, rtol=0, atol=1e-4)
    torch.testing.assert_close(sinkhorn_plan(cost, 0.05, iterations=400), plan, rtol=0, atol=1e-4)
    few = cost[:4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn_plan(c, 0.3, 7), few, fast_mode=True)


def test_the_symmetric_plan_does_not_know_whose_turn_was_first():
    student, teacher = logits(0), logits(1)
    there, back = sinkhorn(student, teacher, ALL, iterations=2), sinkhorn(teacher, student, ALL, iterations=2)
    assert (there - back).abs().max() > 1e-5
    both = [sinkhorn(*x, ALL, iterations=2, symmetric=True) for x in ((student, teacher), (teacher, student))]
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=0)


def test_the_debiased_divergence_of_a_teacher_and_itself_is_nothing():
    teacher = logits(1)
    assert (sinkhorn(teacher, teacher, ALL, debiased=True).abs() < 1e-12).all()
    assert (sinkhorn(teacher, teacher, ALL) > 1e-5).all()
    assert (sinkhorn(logits(0), teacher, ALL, debiased=True) > 1e-3).all()


def test_padding_is_as_if_it_were_not_there():
    student, teacher = logits(0), logits(1)
    expected = sinkhorn(student[:, :3], teacher[:, :3], ALL[:, :3])
    mask = ALL & (torch.arange(5) < 3)
    assert torch.equal(sinkhorn(student, teacher, mask), expected)
    student[:, 3:] = torch.nan
    assert torch.equal(sinkhorn(student, teacher, mask), expected)
    nothing = sinkhorn(student.requires_grad_(), teacher, torch.zeros_like(mask))
    assert (nothing == 0).all()
    assert (torch.autograd.grad(nothing.sum(), student)[0] == 0).all()


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else [result]
        self.numel = max([self.numel, *(t.numel() for t in found if isinstance(t, torch.Tensor))])
        return result


def test_no_tensor_of_positions_times_positions_times_vocabulary(monkeypatch):
    student, teacher = logits(0, 1, 40, 300).float().requires_grad_(), logits(1, 1, 40, 300).float()
    with LargestResult() as largest:
        value = sinkhorn(student, teacher, torch.ones(1, 40, dtype=torch.bool), iterations=50)
        torch.autograd.grad(value.sum(), student)
    assert largest.numel <= max(40 * 300, 40 * 40, 2 * 50 * 41 * 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sinkhorn(student, teacher, torch.ones(1, 40, dtype=torch.bool), iterations=50)
    assert sum(kept) < 6 * 40 * 300 + 10 * 40 * 40 + 2 * 50 * 41
