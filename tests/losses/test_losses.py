"""Laws that every registered loss keeps, and the formulas of those that no golden vector covers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.losses import LOSSES
from tokenkit.losses.alm import DIVERGENCES, alm, log1mexp
from tokenkit.plugins.checks import CHECKS, example, one_vocabulary
from tokenkit.quantities import Quantities


def defaults(entry):
    return {name: parameter.default for name, parameter in entry.options.items()}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("check", CHECKS)
def test_what_check_loss_holds_a_loss_to(name, check):
    CHECKS[check](LOSSES[name])


# `clm` has no teacher, nor has an auto-encoder; `dskd` learns its maps along; `mined` has the text itself for a target
# wherever tokens differ
WITHOUT_TEACHER = ("clm", "reconstruction", "saturation", "crowded_levels")
# entropy of the plan, entropy of the teacher, the logarithm of `delta`, other positions, tokens at equal scores
NEVER_ZERO = ("chunked_divergence", "sinkhorn", "soft_cross_entropy", "logsum", "info_nce", "ranking")


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in (*WITHOUT_TEACHER, *NEVER_ZERO, "dskd", "mined")])
def test_a_student_equal_to_its_teacher_has_no_divergence(name):
    entry = LOSSES[name]
    drawn = example(entry, 1)
    side = {n: n.rpartition(".")[2].partition("_")[0] for n in drawn}  # of pairs of layers: `cka.teacher_states`
    teacher = {n: t for n, t in drawn.items() if side[n] == "teacher"}
    tables = {n: t for n, t in drawn.items() if side[n] not in ("teacher", "student")} | one_vocabulary()
    student = {
        n.replace("teacher_", "student_"): t.clone().requires_grad_(t.is_floating_point()) for n, t in teacher.items()
    }
    tensors = Quantities(tables, teacher, student)
    values = entry.values(tensors, defaults(entry)) * entry.mask(tensors, defaults(entry))
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-12, rtol=0)
    leaves = [t for t in student.values() if t.requires_grad]
    if (
        name == "top_k_kl"
    ):  # of log-probabilities that must sum to 1; tests/losses/test_formulas.py goes on to the logits
        return
    for gradient in torch.autograd.grad(values.sum(), leaves, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_the_module_says_what_a_loss_is_and_whose(name):
    assert len(LOSSES[name].paper) > 20


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "ce"] + ["renyi"])
@pytest.mark.parametrize("changes", [{}, {"merge": False, "chunk_sizes": (2, 1)}, {"debias": False, "boundary": "eos"}])
def test_equal_sides_have_no_divergence_of_any_kind(divergence, changes):
    teacher = {n: t for n, t in example(LOSSES["alm"], 3).items() if n.startswith("teacher_")}
    student = {n.replace("teacher_", "student_"): t.clone() for n, t in teacher.items()}
    student["student_label_logp"].requires_grad_()
    options = defaults(LOSSES["alm"]) | {"divergence": divergence} | changes
    tensors = Quantities(teacher, student)
    values = torch.where(LOSSES["alm"].mask(tensors, options), LOSSES["alm"].values(tensors, options), 0.0)
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(values.sum(), student["student_label_logp"])
    assert gradient.abs().max() < 1e-7


def test_one_vocabulary_is_read_from_the_signature():
    found = {name for name, entry in LOSSES.items() if entry.one_vocabulary}
    of_logits = "forward_kl reverse_kl soft_cross_entropy total_variation jsd cakld skewed_kl skewed_reverse_kl"
    matched = "top_k_kl chunked_divergence logits_mse probability_mse logits_cosine logsum ranking sinkhorn"
    of_layers = "cka info_nce layer_states attention_maps attention_relations"
    assert found == {*of_logits.split(), *matched.split(), *of_layers.split()}


def test_total_variation_and_kl_by_the_book():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    arguments = (q.log().view(1, 1, 3), p.log().view(1, 1, 3))
    assert LOSSES["total_variation"].fn(*arguments).item() == pytest.approx(0.4)
    assert LOSSES["forward_kl"].fn(*arguments).item() == pytest.approx(sum((p * (p / q).log()).tolist()))


TABLE = [  # temperature, teacher, student: ce, reverse_kl, kl_limit, abs, tvd, renyi, k2, k3
    (100, -1, -2, [0.05883, 0.00382418, 0.306853, 1, 0.00985115, 0.0765764, 5e-5, 5.01671e-5]),
    (100, -0.1, -5, [0.0529731, 0.142948, 4.50879, 4.9, 0.047771, 1.90629, 0.0012005, 0.00122035]),
    (100, -2, -1, [0.101093, 0.003053, 0.386294, 1, 0.00985115, 0.0765764, 5e-5, 4.98337e-5]),
    (100, -5, -0.1, [0.33783, 0.0450624, 14.6601, 4.9, 0.047771, 1.90629, 0.0012005, 0.00118113]),
    (100, -1, -1, [0.055777, 0, 0, 0, 0, 0, 0, 0]),
    (1, -2, -1, [0.531935, 0.16986, 0.386294, 1, 0.232544, 0.0765764, 0.5, 0.367879]),
    (1, -1, -2, [0.827677, 0.135531, 0.306853, 1, 0.232544, 0.0765764, 0.5, 0.718282]),
    (1, -5, -0.1, [2.33698, 4.2105, 14.6601, 4.9, 0.898099, 1.90629, 12.005, 3.90745]),
]


@pytest.mark.parametrize(("temperature", "teacher", "student", "expected"), TABLE)
def test_divergences_by_the_table(temperature, teacher, student, expected):
    names = ("ce", "reverse_kl", "kl_limit", "abs", "tvd", "renyi", "k2", "k3")
    one = torch.ones(1, 1, dtype=torch.long)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for name, value in zip(names, expected):
        found = alm(
            torch.full_like(zero, student),
            torch.full_like(zero, teacher),
            zero,
            zero,
            one,
            one,
            temperature=float(temperature),
            divergence=name,
            debias=False,
            merge=False,
        )
        assert found.item() == pytest.approx(value, rel=2e-5, abs=1e-12), name


@given(st.floats(-60, -1e-6))
@settings(deadline=None, derandomize=True)
def test_log1mexp_is_accurate_at_both_ends(x):
    expected = math.log(-math.expm1(x)) if x > -1e-3 else math.log1p(-math.exp(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_limit_is_reached():
    teacher, student = torch.tensor([[-1.3]], dtype=torch.float64), torch.tensor([[-2.9]], dtype=torch.float64)
    far = 1e4 * DIVERGENCES["kl"](teacher, student, 1e4)
    assert far.item() == pytest.approx(DIVERGENCES["kl_limit"](teacher, student, 1.0).item(), rel=2e-2)


def slow_units(teacher, student, boundary, n_teacher, n_student, threshold):
    """The merged units of one row, with a plain loop: sums over chunks up to a likely boundary."""
    units, current = [], [0.0, 0.0, None]
    for t, s, b, nt, ns in zip(teacher, student, boundary, n_teacher, n_student):
        if not (nt and ns):
            continue
        current = [current[0] + t, current[1] + s, b]
        if math.exp(b) > threshold:
            units.append(current)
            current = [0.0, 0.0, None]
    return units + ([current] if current[2] is not None else [])


@given(st.integers(0, 10_000))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_merging_equals_a_plain_loop_and_the_denominator_counts_groups(seed):
    generator = torch.Generator().manual_seed(seed)
    teacher, student, boundary = (-3 * torch.rand(1, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    counts = torch.randint(0, 3, (2, 1, 7), generator=generator)
    expected = slow_units(*(x[0].tolist() for x in (teacher, student, boundary, counts[0], counts[1])), 0.3)
    options = defaults(LOSSES["alm"]) | {"threshold": 0.3}
    tensors = {
        "student_chunk_logp": student,
        "teacher_chunk_logp": teacher,
        "student_chunk_boundary_logp": torch.zeros_like(boundary),
        "teacher_chunk_boundary_logp": boundary,
        "student_chunk_tokens": counts[1],
        "teacher_chunk_tokens": counts[0],
    }
    mask = LOSSES["alm"].mask(tensors, options)
    assert mask.sum() == len(expected)
    total = torch.where(mask, LOSSES["alm"].values(tensors, options), 0.0).sum()
    slow = 0.0
    for t, s, b in expected:
        pair = (torch.tensor([[x]], dtype=torch.float64) for x in (t + b, s))
        slow += DIVERGENCES["kl"](*pair, 5.0).item()
    assert total.item() == pytest.approx(slow, rel=1e-12, abs=1e-12)
