"""Label scores whose gradients are taken beforehand, and positions that nobody reads, against the plain way."""

import pytest
import torch

import tokenkit.scores as scores
from tokenkit.objective import LossesConfig, Objective
from tokenkit.scores import NO_LABEL, UNREAD, LogitForm, token_scores, token_scores_dense


def problem(dtype=torch.float64, rows=37, width=6, vocabulary=83):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, head, torch.randint(NO_LABEL, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize(("tile", "whole"), [((4, 7), 1), ((512, 2048), 2**24)])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradients_taken_beforehand_are_those_taken_afterwards(monkeypatch, tile, whole, alike, scale):
    monkeypatch.setitem(scores.TILE, "cpu", tile)
    monkeypatch.setattr(scores, "WHOLE", whole)
    monkeypatch.setattr(scores, "FEWEST", 5)
    hidden, head, labels = problem()
    weight = -0.7 if alike else torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    fast, _ = token_scores(hidden, head, labels, form=LogitForm(scale=scale), alike=True)
    slow, _ = token_scores_dense(hidden @ head.T * scale, labels)
    torch.testing.assert_close(fast, slow)
    expected = torch.autograd.grad((slow * weight).sum(), (hidden, head))
    for _ in range(2):  # the second backward pass computes again
        found = torch.autograd.grad((fast * weight).sum(), (hidden, head), retain_graph=True)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, head, labels = problem()
    other = {"hidden": head, "head": hidden}[frozen]
    {"hidden": hidden, "head": head}[frozen].requires_grad_(False)
    token_scores(hidden, head, labels, alike=True)[0].sum().backward()
    (expected,) = torch.autograd.grad(token_scores_dense(hidden @ head.T, labels)[0].sum(), other)
    torch.testing.assert_close(other.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_close_as_without(dtype):
    hidden, head, labels = problem(rows=64, width=16, vocabulary=5000)
    exact = torch.autograd.grad(token_scores_dense(hidden @ head.T, labels)[0].sum(), (hidden, head))
    low = hidden.detach().to(dtype).requires_grad_(), head.detach().float().requires_grad_()
    for a, b in zip(torch.autograd.grad(token_scores(*low, labels, alike=True)[0].sum(), low), exact):
        assert (a - b).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * b.abs().max()


def test_unread_positions_cost_nothing_and_change_nothing():
    hidden, head, labels = problem()
    boundary = torch.arange(len(head)) % 3 == 0
    marked = labels.clone()
    marked[20:] = UNREAD
    with torch.no_grad():
        broken = hidden.clone()
        broken[20:] = torch.nan  # would show if it were read
    broken.requires_grad_()
    read = token_scores(hidden[:20], head, labels[:20], boundary)
    found = token_scores(broken, head, marked, boundary)
    for a, b in zip(found, read):
        torch.testing.assert_close(a[:20], b)
        assert (a[20:] == 0).all()
    gradients = torch.autograd.grad(sum(x.sum() for x in found), (broken, head))
    expected = torch.autograd.grad(sum(x.sum() for x in read), (hidden, head))
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a, b)
    mass = token_scores(hidden, head, labels, boundary)[1]
    assert (mass[labels == NO_LABEL] != 0).all()  # a chunk may end where nothing is learnt any more


@pytest.mark.parametrize(
    ("losses", "alike"),
    [
        ({"clm": {}}, True),
        ({"clm": {"weight": 0.3}}, True),
        ({"clm": {}, "forward_kl": {}}, True),
        ({"clm": {"token_weight": "entropy"}}, False),
        ({"alm": {}}, False),
        ({"alm": {}, "clm": {}}, False),
    ],
)
def test_which_objectives_weigh_labels_alike(losses, alike):
    assert Objective.of(LossesConfig.model_validate(losses)).scores_alike == alike
