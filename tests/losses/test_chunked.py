"""Divergences under two heads in chunks of positions against the losses over whole logits, and what they hold."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tokenkit.losses import LOSSES
from tokenkit.losses.chunked import divergence_scores
from tokenkit.scores import PLAIN, LogitForm

ROWS, VOCABULARY = 23, 41
KINDS = [("kl", "forward_kl", {}), ("reverse_kl", "reverse_kl", {}), ("jsd", "jsd", {"beta": 0.3})]


def problem(dtype=torch.float32, rows=ROWS, vocabulary=VOCABULARY, widths=(8, 5)):
    """Hidden states and heads of a student and of a teacher of another width."""
    generator = torch.Generator().manual_seed(0)
    own, other = widths
    shapes = ((1, rows, own), (vocabulary, own), (1, rows, other), (vocabulary, other))
    found = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    return [found[0].requires_grad_(), found[1].requires_grad_(), *found[2:]]


def forms(plain, dtype=torch.float32):
    if plain:
        return PLAIN, PLAIN
    generator = torch.Generator().manual_seed(4)
    bias, other = (torch.randn(VOCABULARY, generator=generator).to(dtype) for _ in range(2))
    return LogitForm(bias.requires_grad_(), 0.7, 3.0), LogitForm(other, 1.3)


@pytest.mark.parametrize(("kind", "name", "options"), KINDS)
@pytest.mark.parametrize("chunk", [1, 7, ROWS, ROWS + 9, None])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("plain", [True, False])
def test_values_and_gradients_are_those_of_whole_logits(kind, name, options, chunk, masked, plain):
    hidden, head, teacher_hidden, teacher_head = problem()
    form, teacher_form = forms(plain)
    counted = torch.ones(1, ROWS, dtype=torch.bool)
    if masked:
        counted[0, ::3] = False
    inputs = [hidden, head] if plain else [hidden, head, form.bias]
    teacher = teacher_form(teacher_hidden @ teacher_head.T)
    slow = LOSSES[name].fn(form(hidden @ head.T), teacher, temperature=1.5, temperature_squared=False, **options)
    slow = torch.where(counted, slow, 0)
    given = {"kind": kind, "temperature": 1.5, "chunk": chunk, "counted": counted if masked else None, **options}
    weights = torch.randn(1, ROWS, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((slow * weights).sum(), inputs)
    for sides in ((teacher_hidden, teacher_head, teacher_form), (teacher, None)):
        fast = divergence_scores(hidden, head, form, *sides, **given)
        found = torch.autograd.grad((fast * weights).sum(), inputs)
        for a, b in zip((fast, *found), (slow, *expected)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_the_gradient_is_that_of_the_value(kind):
    hidden, head, teacher_hidden, teacher_head = problem(torch.float64, 4, 6, (3, 2))
    sides = (PLAIN, teacher_hidden, teacher_head)

    def total(hidden, head):
        return divergence_scores(hidden, head, *sides, kind=kind, chunk=3)

    assert torch.autograd.gradcheck(total, (hidden, head), fast_mode=True)
    frozen = divergence_scores(hidden, head.detach(), *sides, kind=kind)
    assert torch.isfinite(torch.autograd.grad(frozen.sum(), hidden)[0]).all()


def test_half_precision_and_nothing_at_all():
    hidden, head, teacher_hidden, teacher_head = problem(torch.bfloat16)
    exact = divergence_scores(hidden.float(), head.float(), PLAIN, teacher_hidden.float(), teacher_head.float())
    found = divergence_scores(hidden, head, PLAIN, teacher_hidden, teacher_head, chunk=5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05)
    for grad in torch.autograd.grad(found.sum(), (hidden, head)):
        assert grad.dtype == torch.bfloat16
        assert torch.isfinite(grad).all()
    nothing = torch.zeros(1, ROWS, dtype=torch.bool)
    empty = divergence_scores(hidden, head, PLAIN, teacher_hidden, teacher_head, counted=nothing)
    assert (empty == 0).all()
    for grad in torch.autograd.grad(empty.sum(), (hidden, head)):
        assert (grad == 0).all()


def test_what_does_not_count_is_not_looked_at():
    hidden, head, teacher_hidden, teacher_head = problem()
    counted = torch.arange(ROWS).unsqueeze(0) < 9
    bad = torch.where(counted.unsqueeze(-1), hidden.detach(), torch.nan).requires_grad_()
    found = divergence_scores(bad, head, PLAIN, teacher_hidden, teacher_head, counted=counted, chunk=4)
    expected = divergence_scores(hidden[:, :9], head, PLAIN, teacher_hidden[:, :9], teacher_head, chunk=4)
    assert torch.equal(found[:, :9], expected)
    assert (found[:, 9:] == 0).all()
    pairs = [torch.autograd.grad(values.sum(), (states, head)) for values, states in ((found, bad), (expected, hidden))]
    assert torch.equal(pairs[0][0][:, :9], pairs[1][0][:, :9])
    assert (pairs[0][0][:, 9:] == 0).all()
    assert torch.equal(pairs[0][1], pairs[1][1])


def peak_bytes(run):
    """The most bytes that a call held at one time beside what was there, by the allocations that the profiler saw."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert all(torch.isfinite(t).all() for t in kept)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "options"), KINDS)
def test_a_large_vocabulary_is_held_in_a_third_of_the_memory(kind, name, options):
    hidden, head, teacher_hidden, teacher_head = problem(rows=512, vocabulary=50_000, widths=(16, 16))

    def whole():
        values = LOSSES[name].fn(hidden @ head.T, teacher_hidden @ teacher_head.T, **options)
        return torch.autograd.grad(values.sum(), (hidden, head))

    def chunked():
        values = divergence_scores(hidden, head, PLAIN, teacher_hidden, teacher_head, kind=kind, **options)
        return torch.autograd.grad(values.sum(), (hidden, head))

    assert peak_bytes(chunked) < 0.35 * peak_bytes(whole)


def test_no_more_than_a_chunk_of_logits_is_kept_for_the_backward_pass():
    hidden, head, teacher_hidden, teacher_head = problem(rows=64, vocabulary=3000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        divergence_scores(hidden, head, PLAIN, teacher_hidden, teacher_head, chunk=4)
    assert sum(kept) == hidden.numel() + head.numel()
    few = peak_bytes(lambda: [divergence_scores(hidden, head, PLAIN, teacher_hidden, teacher_head, chunk=4).detach()])
    assert few < 64 * 3000 * 4  # less than the logits of one side
