"""Jensen-Shannon and sorted distances by their own backward passes, against autograd over the plain formulas."""

import math

import pytest
import torch

import tokenkit.losses.divergences as divergences
from tokenkit.losses.divergences import both_possible, jensen_shannon, mixture
from tokenkit.losses.uld import columns_of, sorted_distance, without


def plain_jensen_shannon(p, q, beta):
    mixed = mixture(p, q, beta)
    return sum(
        share * (x.exp() * torch.where(both_possible(x, mixed), x - mixed, 0)).sum(-1)
        for share, x in ((beta, p), (1 - beta, q))
    )


@pytest.mark.parametrize("at_once", [1, 100, 2**20])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shift", [0.0, -2.0])  # of masses that do not sum to 1, as GOLD has them
def test_jensen_shannon_equals_autograd_over_the_formula(monkeypatch, at_once, beta, shift):
    monkeypatch.setitem(divergences.AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(2, 9, 31, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    logs = [x.log_softmax(-1) + shift for x in (p, q)]
    found, expected = (fn(*logs, beta) for fn in (jensen_shannon, plain_jensen_shannon))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((v * weight).sum(), (p, q), retain_graph=True) for v in (found, expected)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_jensen_shannon_of_what_is_impossible_on_a_side():
    p = torch.tensor([[0.0, -math.inf, -math.inf]], requires_grad=True)
    q = torch.tensor([[-math.inf, 0.0, -math.inf]], requires_grad=True)
    found = jensen_shannon(p, q, 0.5)
    assert found.item() == pytest.approx(math.log(2))
    found.sum().backward()
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()


def plain_sorted_distance(p, q):
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p.sort(-1, descending=True).values - q.sort(-1, descending=True).values).abs().sum(-1)


@pytest.mark.parametrize("widths", [(40, 40), (41, 30), (30, 41)])
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_sorted_distance_equals_torch_sort(widths, rows):
    generator = torch.Generator().manual_seed(2)
    logits, other = (torch.randn(2, rows, width, generator=generator) * 3 for width in widths)
    logits.requires_grad_()
    p, q = logits.softmax(-1), other.softmax(-1)
    found, expected = sorted_distance(p, q), plain_sorted_distance(p, q)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(2, rows, generator=generator)
    gradients = [torch.autograd.grad((v * weight).sum(), logits, retain_graph=True)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_sorted_distance_of_zeros_and_equal_values_is_finite_and_stays_itself():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    assert sorted_distance(p, p.detach().flip(-1)).tolist() == [0.0, 0.0]
    sorted_distance(p, torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0]])).sum().backward()
    assert p.grad.tolist() == [[-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert torch.isnan(sorted_distance(torch.tensor([[torch.nan, 0.0]]), torch.ones(1, 2))).all()


def test_columns_by_number_and_all_others():
    values = torch.arange(12.0).view(2, 6)
    assert columns_of(values, torch.tensor([4, 1])).tolist() == [[4.0, 1.0], [10.0, 7.0]]
    assert without(values, torch.tensor([4, 1])).tolist() == [[0.0, 2.0, 3.0, 5.0], [6.0, 8.0, 9.0, 11.0]]
