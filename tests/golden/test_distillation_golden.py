"""The table of distillation objectives for two positions and four tokens, in float64, and CKA, InfoNCE and Sinkhorn."""

import math

import pytest
import torch

from tokenkit.losses import LOSSES
from tokenkit.losses.chunked import divergence_scores
from tokenkit.losses.divergences import kl_of_logs, log_mixture, mixture
from tokenkit.losses.info_nce import contrast
from tokenkit.scores import PLAIN


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


STUDENT = rows([1, 2, 3, 0], [0, 0, 0, 0])
TEACHER = rows([3, 2, 1, 0], [1, 0, -1, 2])
X = torch.tensor([[1, 0], [0, 1], [1, 1], [2, -1]], dtype=torch.float64)
Y = torch.tensor([[2, 1, 0], [0, 1, 1], [1, 0, 1], [3, 1, -1]], dtype=torch.float64)
MEANS = [
    ("forward_kl", {}, 0.7761486397),
    ("forward_kl", {"temperature": 2.0, "temperature_squared": False}, 0.2144465341),
    ("forward_kl", {"temperature": 2.0}, 0.8577861406),
    ("reverse_kl", {}, 0.8337176099),
    ("jsd", {}, 0.1764952324),
    ("jsd", {"beta": 0.1}, 0.0666962496),
    ("jsd", {"beta": 0.9}, 0.0702878317),
    ("jsd", {"beta": 0.0}, 0.7761486397),
    ("jsd", {"beta": 1.0}, 0.8337176099),
    ("total_variation", {}, 0.4753421005),
    ("soft_cross_entropy", {}, 1.7236856037),
    ("logits_mse", {}, 1.75),
    ("probability_mse", {}, 0.1061683081),
    ("probability_mse", {"sum_over_vocabulary": True}, 0.4246732323),
    ("skewed_kl", {}, 0.5789447213),
    ("skewed_reverse_kl", {}, 0.5995504843),
]


def close(found, expected):
    assert found.item() == pytest.approx(expected, rel=0, abs=1e-7)


@pytest.mark.parametrize(("name", "options", "expected"), MEANS)
def test_the_mean_over_both_positions(name, options, expected):
    close(LOSSES[name].fn(STUDENT, TEACHER, **options).mean(), expected)


def test_each_position():
    for name, values in (("forward_kl", (1.1135398820, 0.4387573970)), ("reverse_kl", (1.1135398820, 0.5538953370))):
        for found, expected in zip(LOSSES[name].fn(STUDENT, TEACHER)[0], values):
            close(found, expected)
    for found, cosine in zip(LOSSES["logits_cosine"].fn(STUDENT, TEACHER)[0], (0.7142857143, 0.0)):
        close(1 - found, cosine)
    values = LOSSES["logsum"].fn(STUDENT, TEACHER, delta=1e-12)[0]
    for found, expected in zip(values, (3.4657359028, 2.8903717579)):
        close(found, expected)
    close(values.logsumexp(0), 3.9120230054)  # one logarithm over both positions, as it was first published in code


def test_the_weighted_sum_of_both_directions():
    certain = torch.zeros(1, 2, dtype=torch.float64)
    close(LOSSES["cakld"].fn(STUDENT, TEACHER, certain).mean(), 0.8049331248)
    close(LOSSES["cakld"].fn(STUDENT, TEACHER, certain, confidence=True).mean(), 0.8337176099)


def test_cross_entropy_is_kl_and_the_teachers_entropy():
    logp = TEACHER.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    close(entropy.mean(), 0.947536964)
    difference = LOSSES["soft_cross_entropy"].fn(STUDENT, TEACHER) - LOSSES["forward_kl"].fn(STUDENT, TEACHER)
    torch.testing.assert_close(difference, entropy, rtol=0, atol=1e-12)


def test_jensen_shannon_is_not_the_one_with_its_arguments_the_other_way_round():
    p, q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
    mixed = mixture(p, q, 0.5)
    wrong = ((kl_of_logs(mixed, p) + kl_of_logs(mixed, q)) / 2).mean()
    close(wrong, 0.2259713300)
    assert abs(LOSSES["jsd"].fn(STUDENT, TEACHER).mean().item() - wrong.item()) > 0.04


def test_sinkhorn():
    scored = torch.ones(1, 2, dtype=torch.bool)
    close(LOSSES["sinkhorn"].fn(STUDENT, TEACHER, scored, sum=True), 1.9481558906)
    close(LOSSES["sinkhorn"].fn(STUDENT, TEACHER, scored), 1.9481558906 / 2)


def test_cka():
    scored, weight = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    close(1 - LOSSES["cka"].fn(X[None, :, None], Y[None, :, None], scored, weight), 0.9803133560)


@pytest.mark.parametrize(
    ("temperature", "normalize", "expected"),
    [(0.1, False, 10.2746795559), (0.1, True, 1.6921545681), (1.0, True, 1.2246225663)],
)
def test_info_nce(temperature, normalize, expected):
    counted = torch.ones(4, dtype=torch.bool)
    close(contrast(X, Y[:, :2], counted, temperature, normalize).mean(), expected)
    states = [x[None, :, None] for x in (X, Y[:, :2].contiguous())]
    weight = torch.ones(1, dtype=torch.float64)
    options = {"temperature": temperature, "normalize": normalize}
    close(LOSSES["info_nce"].fn(*states, counted[None], weight, **options).mean(), expected)


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [("kl", 0.5, 0.7761486397), ("reverse_kl", 0.5, 0.8337176099), ("jsd", 0.1, 0.0666962496)],
)
def test_the_chunked_way(kind, beta, expected):
    head = torch.eye(4, dtype=torch.float64)
    sides = (STUDENT, head, PLAIN, TEACHER, head, PLAIN)
    close(divergence_scores(*sides, kind=kind, beta=beta, chunk=1).mean(), expected)


def test_a_mixture_of_one_teacher_is_that_teacher():
    close(LOSSES["forward_kl"].fn(STUDENT, log_mixture([TEACHER], [3.0])).mean(), 0.7761486397)
    both = log_mixture([TEACHER, STUDENT], [0.9, 0.1])  # the mixture that skewed reverse KL measures against
    close(LOSSES["reverse_kl"].fn(STUDENT, both).mean(), 0.5995504843)
    assert math.isclose(both.exp().sum().item(), 2.0, rel_tol=1e-12)
