"""The logits-free kernels against log-softmax of dense logits, sorted, summed and differentiated the plain way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenkit.scores as scores
from tokenkit.scores import LogitForm, scores_at, token_scores, token_scores_dense, token_scores_of_logits, top_k_scores

FORMS = ["plain", "bias", "scale", "softcap", "all"]


def with_bias(form, vocabulary, dtype):
    """A bias to differentiate, and the form of that name."""
    generator = torch.Generator().manual_seed(9)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype).requires_grad_()
    bias = bias if form in ("bias", "all") else None
    scale = 0.4 if form in ("scale", "all") else 1.0
    return bias, LogitForm(bias, scale, 3.0 if form in ("softcap", "all") else None)


def written_out(hidden, head, form):
    logits = hidden @ head.T
    if form.bias is not None:
        logits = logits + form.bias
    logits = logits * form.scale
    return logits if form.softcap is None else torch.tanh(logits / form.softcap) * form.softcap


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else [result]
        self.numel = max([self.numel, *(t.numel() for t in found if isinstance(t, torch.Tensor))])
        return result


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
@pytest.mark.parametrize("form", FORMS)
def test_token_scores_equal_the_dense_way(monkeypatch, tile, with_boundary, form):
    monkeypatch.setitem(scores.TILE, "cpu", tile)
    hidden, head, labels, boundary = problem(0)
    bias, form = with_bias(form, len(head), torch.float64)
    wanted = boundary if with_boundary else None
    inputs = [hidden, head] if bias is None else [hidden, head, bias]
    fast = token_scores(hidden, head, labels, wanted, form)
    slow = token_scores_dense(written_out(hidden, head, form), labels, wanted)
    weights = torch.randn(2, len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, fast)), inputs)
    expected = torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, slow)), inputs)
    for a, b in [*zip(fast, slow), *zip(found, expected)]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_stays_close_to_double(form):
    hidden, head, labels, boundary = problem(5, rows=70, width=16, vocabulary=5000)
    bias, form = with_bias(form, len(head), torch.float64)
    exact = [*token_scores_dense(written_out(hidden, head, form), labels, boundary)]
    exact += torch.autograd.grad(exact[0].sum() + exact[1].sum(), (hidden, head))
    low = [t.detach().float().requires_grad_() for t in (hidden, head)]
    low_form = LogitForm(None if bias is None else bias.detach().float(), form.scale, form.softcap)
    found = [*token_scores(*low, labels, boundary, low_form)]
    found += torch.autograd.grad(found[0].sum() + found[1].sum(), low)
    for a, b in zip(found, exact):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()


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


@pytest.mark.parametrize("depth", [1.0, 30.0, 59.0, 61.0, 200.0])
def test_gradients_of_masses_on_both_sides_of_faint(depth):
    exact = torch.tensor([[0.0, -depth, -depth - 1, 1.0], [2.0, 0.0, -3.0, 1.0]], dtype=torch.float64)
    labels, boundary = torch.tensor([3, 1]), torch.tensor([False, True, True, False])
    for fast, slow in (
        (lambda x: token_scores(x, torch.eye(4), labels, boundary), lambda x: token_scores_dense(x, labels, boundary)),
        (lambda x: scores_at(x, torch.eye(4), torch.tensor([[0, 3], [0, 3]])), _dense_rest),
    ):
        low, high = exact.float().requires_grad_(), exact.clone().requires_grad_()
        sum(score.sum() for score in fast(low)).backward()
        sum(score.sum() for score in slow(high)).backward()
        torch.testing.assert_close(low.grad.double(), high.grad, rtol=1e-5, atol=1e-6)


def _dense_rest(logits):
    logp = logits.log_softmax(-1)
    return logp[:, [0, 3]], logp[:, 1:3].logsumexp(-1)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_differences(form):
    hidden, head, labels, boundary = problem(3, rows=5, width=3, vocabulary=7, scale=1.0)
    bias, form = with_bias(form, 7, torch.float64)

    def own(h, w, *b):
        return token_scores(h, w, labels, boundary, LogitForm(*(b or [None]), form.scale, form.softcap))

    torch.autograd.gradcheck(own, (hidden, head) if bias is None else (hidden, head, bias))


@pytest.mark.parametrize("tile", [(4, 7), (256, 4096)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_k_best_and_their_tail_equal_a_sort_of_the_dense_logits(monkeypatch, tile, form, k):
    monkeypatch.setitem(scores.TILE, "cpu", tile)
    hidden, head, _, _ = problem(6)
    bias, form = with_bias(form, len(head), torch.float64)
    inputs = [hidden, head] if bias is None else [hidden, head, bias]
    values, ids, tail = top_k_scores(hidden, head, k, form)
    logp = written_out(hidden, head, form).log_softmax(-1)
    best = logp.sort(-1, descending=True)
    assert torch.equal(ids, best.indices[:, :k])
    slow = best.values[:, :k], best.values[:, k:].logsumexp(-1)
    weights = torch.randn(len(hidden), k + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((weights * torch.cat([values, tail[:, None]], 1)).sum(), inputs)
    expected = torch.autograd.grad((weights * torch.cat([slow[0], slow[1][:, None]], 1)).sum(), inputs)
    for a, b in [(values, slow[0]), (tail, slow[1]), *zip(found, expected)]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values.exp().sum(1) + tail.exp(), torch.ones_like(tail))


def test_scores_at_given_ids_by_differences():
    hidden, head, _, _ = problem(7, rows=4, width=3, vocabulary=9, scale=1.0)
    ids = torch.tensor([[1, 8, 3], [0, 2, -1], [4, 5, 6], [7, 1, 0]])
    form = LogitForm(None, 1.3, 5.0)
    torch.autograd.gradcheck(lambda h, w: scores_at(h, w, ids, form), (hidden, head))
    values, tail = scores_at(hidden, head, ids, form)
    assert values[1, 2] == 0
    probability = written_out(hidden, head, form).softmax(-1)
    outside = [[v for v in range(9) if v not in row] for row in ids.tolist()]
    expected = torch.stack([p[v].sum().log() for p, v in zip(probability, outside)])
    torch.testing.assert_close(tail, expected)


def test_a_tail_too_faint_to_add_beside_the_peak():
    logits = torch.tensor([[0.0, -150.0, -151.0], [0.0, -1.0, -90.0]], requires_grad=True)
    _, ids, tail = top_k_scores(logits, torch.eye(3), 1)
    expected = logits.detach().double()[:, 1:].logsumexp(-1) - logits.detach().double().logsumexp(-1)
    assert ids.tolist() == [[0], [0]]
    torch.testing.assert_close(tail.double(), expected, rtol=1e-6, atol=1e-5)
    tail.sum().backward()
    assert logits.grad[0, 1] == pytest.approx(1 / (1 + torch.e**-1), rel=1e-5)
    assert torch.isfinite(logits.grad).all()


def test_nothing_of_the_size_of_tokens_times_vocabulary_exists(monkeypatch):
    monkeypatch.setitem(scores.TILE, "cpu", (16, 64))
    hidden, head, labels, boundary = problem(8, rows=128, width=4, vocabulary=2048, dtype=torch.float32)
    largest = LargestResult()
    with torch.no_grad():
        head[boundary] -= 400 * hidden.mean(0)  # masses too faint to be added beside the peak, in many rows
    with largest:
        label, mass = token_scores(hidden, head, labels, boundary)
        assert (mass < -60).sum() > 20
        _, _, tail = top_k_scores(hidden, head, 8)
        (label.sum() + mass.sum() + tail.sum()).backward()
    assert largest.numel <= 4 * 2048  # the gradient of the head, not 128 x 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_finite_and_close(dtype, form):
    hidden, head, labels, boundary = problem(10, rows=40, width=16, vocabulary=3000)
    _, form = with_bias(form, len(head), torch.float64)
    half = [t.detach().to(dtype).requires_grad_() for t in (hidden, head)]
    half_form = LogitForm(None if form.bias is None else form.bias.detach().to(dtype), form.scale, form.softcap)
    found = [*token_scores(*half, labels, boundary, half_form), *top_k_scores(*half, 4, half_form)[::2]]
    exact = token_scores_dense(written_out(hidden, head, form), labels, boundary)
    for a, b in zip(found, exact):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()
    gradients = torch.autograd.grad(sum(score.sum() for score in found), half)
    assert all(torch.isfinite(t).all() for t in (*found, *gradients))
    assert [g.dtype for g in gradients] == [dtype, dtype]


def test_label_below_zero_scores_nothing():
    hidden, head, _, _ = problem(4)
    logp, _ = token_scores(hidden, head, torch.full((len(hidden),), -1))
    assert (logp == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(logp.sum(), (hidden, head)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scored", [True, False])
def test_scores_of_logits_that_exist_are_the_same_with_their_gradients(dtype, scored):
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(3, 4, 17, generator=generator, dtype=dtype) * 9).requires_grad_()
    labels = torch.randint(-1, 17, (3, 4), generator=generator)
    boundary = torch.arange(17) % 3 == 0 if scored else None
    found, expected = (fn(logits, labels, boundary) for fn in (token_scores_of_logits, token_scores_dense))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(sum(score.sum() for score in scores), logits)[0] for scores in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
