"""Laws of the objectives over one vocabulary's logits: bounds, limits, impossible tokens, what padding may say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError, build
from tokenkit.losses import LOSSES
from tokenkit.losses.divergences import jensen_shannon, log_mixture, mixture
from tokenkit.objective import LossesConfig, Objective
from tokenkit.plugins.checks import defaults, example
from tokenkit.quantities import Quantities
from tokenkit.scores import scores_at, top_k_scores

PER_POSITION = [
    ("forward_kl", {}),
    ("reverse_kl", {"temperature": 2.0}),
    ("soft_cross_entropy", {}),
    ("total_variation", {}),
    ("jsd", {"beta": 0.3}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
    ("skewed_kl", {}),
    ("skewed_reverse_kl", {"skew": 0.0}),
    ("logits_mse", {}),
    ("probability_mse", {"sum_over_vocabulary": True}),
    ("logits_cosine", {}),
    ("logsum", {}),
    ("ranking", {"best": 3}),
    ("ranking", {"kind": "hinge", "best": 5, "margin": 0.7}),
]


def logits(seed, *shape, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 3, 7)), generator=generator, dtype=torch.float64).mul(scale).to(dtype)


@pytest.mark.parametrize(("name", "options"), PER_POSITION)
def test_a_token_that_is_impossible_for_both_might_as_well_not_be_there(name, options):
    student, teacher = logits(0), logits(1)
    expected_input = student.clone().requires_grad_()
    expected = LOSSES[name].fn(expected_input, teacher, **options)
    wall = torch.full((2, 3, 2), -torch.inf, dtype=torch.float64)
    wide = torch.cat([student, wall], -1).requires_grad_()
    found = LOSSES[name].fn(wide, torch.cat([teacher, wall], -1), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = logits(2, 2, 3)
    (grad,) = torch.autograd.grad((found * weights).sum(), wide)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), expected_input)
    torch.testing.assert_close(grad[..., :-2], expected_grad, rtol=1e-10, atol=1e-12)
    assert (grad[..., -2:] == 0).all()


@pytest.mark.parametrize(("name", "options"), [*PER_POSITION, ("cakld", {})])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_one_side_excludes_makes_nothing_nan(name, options, side, dtype):
    student, teacher = logits(0, dtype=dtype), logits(1, dtype=dtype)
    (student if side == "student" else teacher)[..., ::3] = -torch.inf
    more = (torch.zeros(2, 3),) if name == "cakld" else ()
    student.requires_grad_()
    values = LOSSES[name].fn(student, teacher, *more, **options)
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()
    (grad,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(grad).all()


def test_what_the_teacher_excludes_adds_nothing_to_the_kl():
    student, teacher = logits(0), logits(1)
    teacher[..., 2] = -torch.inf
    p, q = teacher.softmax(-1), student.log_softmax(-1)
    slow = sum(p[..., v] * (p[..., v].log() - q[..., v]) for v in range(7) if v != 2)
    torch.testing.assert_close(LOSSES["forward_kl"].fn(student, teacher), slow)


@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.floats(0.1, 40))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_the_jensen_shannon_divergence_is_bounded(seed, beta, scale):
    p, q = (logits(seed + side, 4, 9, scale=scale).log_softmax(-1) for side in (0, 1))
    bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert bound <= math.log(2) + 1e-15
    values = jensen_shannon(p, q, beta)
    assert (values >= -1e-12).all()
    assert (values <= bound + 1e-12).all()
    torch.testing.assert_close(values, jensen_shannon(q, p, 1 - beta), rtol=1e-9, atol=1e-12)


def test_the_ends_of_the_jensen_shannon_divergence_are_what_its_slopes_are():
    student, teacher = logits(0), logits(1)
    kl, reverse = (LOSSES[name].fn(student, teacher) for name in ("forward_kl", "reverse_kl"))
    assert torch.equal(LOSSES["jsd"].fn(student, teacher, beta=0.0), kl)
    assert torch.equal(LOSSES["jsd"].fn(student, teacher, beta=1.0), reverse)
    torch.testing.assert_close(LOSSES["jsd"].fn(student, teacher, beta=1e-7) / 1e-7, kl, rtol=1e-4, atol=0)
    torch.testing.assert_close(LOSSES["jsd"].fn(student, teacher, beta=1 - 1e-7) / 1e-7, reverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("name", "plain"), [("skewed_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")])
def test_skewed_divergences_go_to_the_plain_ones_and_are_bounded(name, plain):
    student, teacher = logits(0), logits(1)
    expected = LOSSES[plain].fn(student, teacher)
    torch.testing.assert_close(LOSSES[name].fn(student, teacher, skew=0.0), expected)
    torch.testing.assert_close(LOSSES[name].fn(student, teacher, skew=1e-12), expected, rtol=1e-7, atol=1e-9)
    student, teacher = 20 * student, 20 * teacher
    assert (LOSSES[name].fn(student, teacher, skew=0.1) <= -math.log(0.1)).all()
    assert (LOSSES[name].fn(student, teacher, skew=1.0).abs() < 1e-12).all()


def test_the_temperature_is_that_of_both_sides_and_may_be_squared():
    student, teacher = logits(0), logits(1)
    for name in ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "soft_cross_entropy"):
        plain = LOSSES[name].fn(student / 3, teacher / 3)
        found = LOSSES[name].fn(student, teacher, temperature=3.0, temperature_squared=False)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(LOSSES[name].fn(student, teacher, temperature=3.0), 9 * plain, rtol=1e-12, atol=0)


def test_cakld_takes_the_reverse_where_the_teacher_is_sure():
    student, teacher = logits(0), logits(1)
    label_logp = teacher.log_softmax(-1)[..., 0]
    kl, reverse = (LOSSES[name].fn(student, teacher) for name in ("forward_kl", "reverse_kl"))
    sure = label_logp.exp()
    own = label_logp.clone().requires_grad_()
    found = LOSSES["cakld"].fn(student, teacher, own, confidence=True)
    torch.testing.assert_close(found, sure * reverse + (1 - sure) * kl)
    assert not found.requires_grad
    torch.testing.assert_close(LOSSES["cakld"].fn(student, teacher, own, beta=0.2), 0.2 * reverse + 0.8 * kl)


def test_ranking_by_a_double_loop():
    student, teacher = logits(0, 1, 4, 9), logits(1, 1, 4, 9)
    teacher[..., 3] = teacher[..., 4] = 9.0  # a tie says nothing
    for kind, penalty in (
        ("pairwise", lambda lead: math.log1p(math.exp(-lead / 0.5))),
        ("hinge", lambda lead: max(0.0, 0.8 - lead)),
    ):
        found = LOSSES["ranking"].fn(student, teacher, kind=kind, best=6, margin=0.8, temperature=0.5)
        for t in range(4):
            s, z = student[0, t].tolist(), teacher[0, t].tolist()
            best = sorted(range(9), key=lambda v: -z[v])[:6]
            pairs = [penalty(s[i] - s[j]) for i in best for j in best if z[i] > z[j]]
            assert found[0, t].item() == pytest.approx(sum(pairs) / len(pairs))
    in_order = LOSSES["ranking"].fn(100 * teacher, teacher, kind="hinge")
    assert (in_order < LOSSES["ranking"].fn(-teacher, teacher, kind="hinge")).all()


def test_what_a_tail_is_worth():
    generator = torch.Generator().manual_seed(3)
    student, teacher, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 7), (2, 5, 7), (30, 7))
    )
    p, q = ((x @ head.T).softmax(-1) for x in (teacher, student))
    whole = (p * (p / q).log()).sum(-1)
    found = {}
    for k in (2, 10, 30):
        top, ids, tail = top_k_scores(teacher, head, k)
        logp, rest = scores_at(student, head, ids)
        for kind in ("keep", "renormalize", "zero"):
            found[kind, k] = LOSSES["top_k_kl"].fn(logp, rest, top, tail, top_k=k, tail=kind)
        p_best, q_best = p.gather(-1, ids), q.gather(-1, ids)
        torch.testing.assert_close(found["zero", k], (p_best * (p_best / q_best).log()).sum(-1))
        p_best, q_best = p_best / p_best.sum(-1, keepdim=True), q_best / q_best.sum(-1, keepdim=True)
        torch.testing.assert_close(found["renormalize", k], (p_best * (p_best / q_best).log()).sum(-1))
        assert (found["keep", k] <= whole + 1e-12).all()
    assert (found["keep", 2] <= found["keep", 10] + 1e-12).all()
    for kind in ("keep", "renormalize", "zero"):
        torch.testing.assert_close(found[kind, 30], whole)

    top, _, tail = top_k_scores(teacher, head, 2)
    sure = (top.softmax(-1) * (1 + top.exp().sum(-1, keepdim=True)) / 2).log()  # half of the tail's mass is on them
    rest = (1 - sure.exp().sum(-1)).log()
    values = {kind: LOSSES["top_k_kl"].fn(sure, rest, top, tail, top_k=2, tail=kind) for kind in ("keep", "zero")}
    assert (values["zero"] < 0).all()  # biased: better than equality
    assert (values["keep"] > 0).all()
    alone = LOSSES["top_k_kl"].fn(top - 3, (1 - (top - 3).exp().sum(-1)).log(), top, tail, top_k=2, tail="renormalize")
    assert alone.abs().max() < 1e-12  # biased: mass elsewhere goes unseen


def test_a_mixture_is_one_of_probabilities():
    first, second = logits(0), logits(1)
    second[..., 0] = -torch.inf
    found = log_mixture([first, second], [1.0, 3.0])
    torch.testing.assert_close(found.exp(), first.softmax(-1) / 4 + 3 * second.softmax(-1) / 4)
    assert (found - (first + 3 * second).div(4).log_softmax(-1)).abs().max() > 0.1
    torch.testing.assert_close(log_mixture([first], [0.3]), first.log_softmax(-1), rtol=0, atol=0)
    torch.testing.assert_close(log_mixture([first, second], [0.0, 2.0]), second.log_softmax(-1), rtol=0, atol=0)
    student = logits(2)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        alone = LOSSES[name].fn(student, log_mixture([first], [1.0]), temperature=2.0)
        torch.testing.assert_close(alone, LOSSES[name].fn(student, first, temperature=2.0), rtol=1e-12, atol=1e-13)
    same = mixture(first.log_softmax(-1), student.log_softmax(-1), 0.25)
    torch.testing.assert_close(log_mixture([first, student], [1.0, 3.0]), same)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(UserError, match="weights of a mixture"):
            log_mixture([first, second], weights)


WITH_PLACES = [
    *[(name, {}) for name in ("forward_kl", "reverse_kl", "jsd", "cakld", "skewed_kl", "soft_cross_entropy")],
    *[(name, {}) for name in ("logits_mse", "probability_mse", "logits_cosine", "logsum", "ranking")],
    ("sinkhorn", {}),
    ("sinkhorn", {"debiased": True, "symmetric": True}),
    ("cka", {}),
    ("info_nce", {"symmetric": True}),
    ("layer_states", {"distance": "cosine"}),
    ("attention_maps", {"distance": "kl", "positions": "all"}),
    ("attention_relations", {"causal": True, "normalize": True}),
    ("attention_relations", {"positions": "all", "of": ("values",), "heads": 2}),
]


@pytest.mark.parametrize(("name", "changes"), WITH_PLACES)
def test_what_stands_at_padding_changes_no_bit(name, changes):
    entry = LOSSES[name]
    options = defaults(entry) | changes
    leaves, other = example(entry, 2), example(entry, 3)
    present = leaves["student_token_mask"] if "student_token_mask" in entry.tensors else leaves["student_label_mask"]
    found = []
    for instead in (leaves, other):
        tensors = {}
        for tensor in entry.named(entry.tensors, options):
            value = leaves[tensor]
            if value.is_floating_point() and value.shape[:2] == present.shape:
                here = present.view(*present.shape, *[1] * (value.ndim - 2))
                value = torch.where(here, value, 3 * instead[tensor] + 1)
            if tensor.endswith("maps"):  # padded keys and padded queries
                both = (present.unsqueeze(2) & present.unsqueeze(1)).view(len(value), 1, 1, *value.shape[3:])
                value = torch.where(both, value, instead[tensor] / 2)
            tensors[tensor] = value.clone()
        inputs = [t.requires_grad_() for n, t in tensors.items() if "student_" in n and t.is_floating_point()]
        weight = entry.units_of(Quantities(leaves, tensors), options).weight
        assert weight.sum() > 1
        total = torch.where(weight > 0, entry.values(tensors, options), 0.0).sum()
        found.append([total, *torch.autograd.grad(total, inputs, allow_unused=True)])
    for a, b in zip(*found):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_hard_label_share_of_one_is_language_modelling_bit_by_bit():
    leaves = example(LOSSES["forward_kl"], 0)
    del leaves["student_label_logp"]
    found = []
    for own in ({"clm": {}}, {"clm": {"weight": 1}, "forward_kl": {"weight": 0, "temperature": 2}}):
        objective = Objective.of(build(LossesConfig, own))
        student = leaves["student_logits"].clone().requires_grad_()
        logp = student.log_softmax(-1).gather(-1, leaves["student_labels"].clamp_min(0).unsqueeze(-1)).squeeze(-1)
        tensors = Quantities(leaves | {"student_logits": student, "student_label_logp": logp})
        units = objective.units(tensors)
        sums = objective.sums(tensors, units)
        total = sum(w * (sums[n] / units[n].counts()).sum() for n, w in objective.weights().items())
        found.append((total, *torch.autograd.grad(total, student)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"jsd": {"beta": 1.5}}, "beta"),
        ({"forward_kl": {"temperature": 0}}, "temperature"),
        ({"top_k_kl": {"tail": "renormalise"}}, "tail"),
        ({"attention_relations": {"of": []}}, "of"),
        ({"sinkhorn": {"epsilon": -1}}, "epsilon"),
        ({"layer_states": {"distance": "mae"}}, "distance"),
    ],
)
def test_options_out_of_range_are_refused_by_name(section, key):
    with pytest.raises(UserError, match=key):
        build(LossesConfig, section)
