"""Objectives over states, attention maps and relations against loops, and what each of them cannot see."""

import math

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.losses import LOSSES
from tokenkit.losses.info_nce import contrast, information_bound
from tokenkit.losses.relations import relation_heads
from tokenkit.plugins.checks import defaults, example
from tokenkit.quantities import Quantities

SCORED = torch.tensor([[True] * 6 + [False] * 2, [True] * 5 + [False] * 3])
WEIGHTS = torch.tensor([0.25, 0.75], dtype=torch.float64)


def states(seed, width, length=8, pairs=2, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, pairs, width, generator=generator, dtype=torch.float64) * scale


def turn(width, seed=9):
    """A random rotation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("widths", [(3, 4), (40, 30)])  # sums over channels, and over pairs of positions
def test_cka_by_its_formula(widths):
    student, teacher = states(0, widths[0]), states(1, widths[1])
    found = LOSSES["cka"].fn(student, teacher, SCORED, WEIGHTS)
    for row in range(2):
        expected = 0.0
        for pair in range(2):
            x, y = (s[row, SCORED[row], pair] for s in (student, teacher))
            x, y = x - x.mean(0), y - y.mean(0)
            norm = torch.linalg.matrix_norm
            expected += WEIGHTS[pair] * (1 - norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)))
        torch.testing.assert_close(found[row, 0], expected)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("widths", [(3, 3), (30, 30)])
def test_cka_sees_neither_rotation_nor_scale_nor_shift(widths):
    student, teacher = states(0, widths[0]), states(1, widths[1])
    expected = LOSSES["cka"].fn(student, teacher, SCORED, WEIGHTS)
    for factor in (1.0, 1e-10, 1e10):
        moved = (student @ turn(widths[0]) + 7) * factor
        torch.testing.assert_close(LOSSES["cka"].fn(moved, teacher, SCORED, WEIGHTS), expected)
    assert (LOSSES["cka"].fn(teacher @ turn(widths[1]), teacher, SCORED, WEIGHTS).abs() < 1e-12).all()
    single = LOSSES["cka"].fn((1e8 * student).float(), (1e-8 * teacher).float(), SCORED, WEIGHTS)
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


def test_info_nce_by_a_double_loop():
    student, teacher = states(0, 5), states(1, 5)
    entry = LOSSES["info_nce"]
    for symmetric in (False, True):
        found = entry.fn(student, teacher, SCORED, WEIGHTS, temperature=0.3, symmetric=symmetric)
        for row, t in SCORED.nonzero().tolist():
            expected = 0.0
            for pair, weight in enumerate(WEIGHTS.tolist()):
                a, b = ([v / v.norm() for v in s[row, SCORED[row], pair]] for s in (student, teacher))
                directions = [(a[t], b), (b[t], a)] if symmetric else [(a[t], b)]
                for own, others in directions:
                    scores = [float(own @ other) / 0.3 for other in others]
                    log_sum = math.log(sum(math.exp(s) for s in scores))
                    expected += weight * (log_sum - scores[t]) / len(directions)
            assert found[row, t].item() == pytest.approx(expected)


def test_info_nce_counts_rows_with_something_to_tell_apart():
    mask = torch.tensor([[True, False, False], [True, True, False], [False] * 3])
    assert LOSSES["info_nce"].units(mask).tolist() == [[False] * 3, [True, True, False], [False] * 3]


def test_info_nce_knows_partners_from_strangers():
    a = states(0, 16)[:, :, 0]
    counted = torch.ones(2, 8, dtype=torch.bool)
    before = math.log(8)
    for temperature in (10.0, 1.0, 0.3, 0.1):
        equal = contrast(a, a, counted, temperature).mean().item()
        assert equal < before
        before = equal
        assert contrast(a, a.roll(1, 1), counted, temperature).mean().item() > equal
    bound = information_bound(contrast(a, a, counted), counted)
    assert bound.shape == (2, 1)
    assert ((bound > 0) & (bound <= math.log(8))).all()
    torch.testing.assert_close(bound[0, 0], math.log(8) - contrast(a, a, counted)[0].mean())
    half = counted & (torch.arange(8) < 4)
    assert (information_bound(contrast(a, a, half), half) <= math.log(4)).all()


def test_info_nce_takes_any_number_of_axes_and_no_notice_of_lengths():
    a, b = states(0, 6), states(1, 6)
    counted = torch.ones(2, 8, 2, dtype=torch.bool)
    whole = contrast(a, b, counted)  # 4-D: the second axis is a batch here
    for i in range(2):
        torch.testing.assert_close(contrast(a[i], b[i], counted[i]), whole[i])
        torch.testing.assert_close(contrast(a[i, 0], b[i, 0], counted[i, 0]), whole[i, 0])
    torch.testing.assert_close(contrast(1e4 * a, 1e-4 * b, counted), whole)
    low = contrast(a.bfloat16(), b.bfloat16(), counted)
    assert low.dtype == torch.float32
    assert torch.isfinite(low).all()
    assert torch.isfinite(contrast(torch.zeros_like(a), b, counted)).all()


@pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1", "logsum"])
def test_layer_states_by_a_loop(distance):
    student, teacher = states(0, 5, scale=2.0), states(1, 5)
    found = LOSSES["layer_states"].fn(student, teacher, WEIGHTS, distance=distance, alpha=3.0, delta=0.01)
    for row in range(2):
        for t in range(8):
            expected = 0.0
            for pair, weight in enumerate(WEIGHTS.tolist()):
                a, b = student[row, t, pair].tolist(), teacher[row, t, pair].tolist()
                d = [x - y for x, y in zip(a, b)]
                expected += (
                    weight
                    * {
                        "mse": sum(x * x for x in d) / 5,
                        "cosine": 1 - sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b),
                        "smooth_l1": sum(x * x / 2 if abs(x) < 1 else abs(x) - 0.5 for x in d) / 5,
                        "logsum": math.log(0.01 + sum(abs(x) ** 3 for x in d)),
                    }[distance]
                )
            assert found[row, t].item() == pytest.approx(expected)


def maps(seed, heads):
    """Causal attention maps of two pairs of layers."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 2, heads, 8, 8, generator=generator, dtype=torch.float64)
    return scores.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("distance", ["mse", "kl", "cosine"])
@pytest.mark.parametrize(("heads", "numbers"), [("match", (3, 3)), ("mean", (2, 3))])
def test_attention_maps_by_a_loop(distance, heads, numbers):
    student, teacher = maps(0, numbers[0]), maps(1, numbers[1])
    found = LOSSES["attention_maps"].fn(student, teacher, SCORED, WEIGHTS, distance=distance, heads=heads)
    for row, t in SCORED.nonzero().tolist():
        expected = 0.0
        for pair, weight in enumerate(WEIGHTS.tolist()):
            looks = [x[row, pair, :, t, SCORED[row]] for x in (student, teacher)]
            looks = [x.mean(0, keepdim=True) for x in looks] if heads == "mean" else looks
            for q, p in zip(*(x.tolist() for x in looks)):
                one = {
                    "mse": sum((x - y) ** 2 for x, y in zip(q, p)) / len(q),
                    "kl": sum(y * math.log(y / x) for x, y in zip(q, p) if y > 0),
                    "cosine": 1 - sum(x * y for x, y in zip(q, p)) / math.hypot(*q) / math.hypot(*p),
                }[distance]
                expected += weight * one / len(looks[0])
        assert found[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_attention_maps_with_other_numbers_of_heads_are_refused_by_head():
    with pytest.raises(UserError, match="have 2 heads, the teacher's 3; write heads=mean"):
        LOSSES["attention_maps"].fn(maps(0, 2), maps(1, 3), SCORED, WEIGHTS)


def sides(of_student, of_teacher):
    """Queries, keys and values of both sides; keys and values may be narrower (grouped-query attention)."""
    return [states(10 + i, width) for i, width in enumerate((*of_student, *of_teacher))]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"normalize": True}, {"of": ("values",)}, {"heads": 4}])
def test_attention_relations_by_a_loop(options):
    inputs = sides((16, 8, 8), (24, 24, 24))
    found = LOSSES["attention_relations"].fn(*inputs, SCORED, WEIGHTS, **options)
    kinds = [2] if "of" in options else [0, 1, 2]
    for row, t in ((0, 0), (0, 5), (1, 3)):
        keys = [s for s in SCORED[row].nonzero().squeeze(1).tolist() if s <= t or "causal" not in options]
        expected = 0.0
        for pair, weight in enumerate(WEIGHTS.tolist()):
            for kind in kinds:
                own, other = (inputs[kind + 3 * side][row, :, pair] for side in (0, 1))
                heads = options.get("heads") or relation_heads(own.shape[1], other.shape[1])
                for head in range(heads):
                    logs = []
                    for x in (own, other):
                        width = x.shape[1] // heads
                        a = x[:, head * width : (head + 1) * width]
                        if "normalize" in options:
                            a = a / a.norm(dim=1, keepdim=True)
                        scale = 1 if "normalize" in options else math.sqrt(width)
                        scores = torch.stack([a[t] @ a[s] for s in keys]) / scale
                        logs.append(scores.log_softmax(0))
                    expected += weight * float((logs[1].exp() * (logs[1] - logs[0])).sum()) / heads
        assert found[row, t].item() == pytest.approx(expected)


def test_relations_of_one_model_are_those_of_its_rotated_heads():
    inputs = sides((16, 8, 8), (16, 8, 8))[:3]
    rotated = [(x.unflatten(-1, (-1, 8)) @ turn(8)).flatten(-2) for x in inputs]
    found = LOSSES["attention_relations"].fn(*rotated, *inputs, SCORED, WEIGHTS)
    assert found[SCORED].abs().max() < 1e-12
    repeated = [inputs[0], *(x.repeat(1, 1, 1, 2) for x in inputs[1:])]  # grouped keys and values written out
    found = LOSSES["attention_relations"].fn(*inputs, *repeated, SCORED, WEIGHTS, normalize=True, heads=1)
    assert found[SCORED].abs().max() < 1e-12


def test_the_number_of_relation_heads():
    table = {(1024, 1024): 32, (768, 768): 32, (64, 96): 8, (16, 24): 2, (8, 24): 1, (15, 7): 1, (64, 65): 1, (4, 4): 1}
    for (own, other), heads in table.items():
        assert relation_heads(own, other) == heads
    with pytest.raises(UserError, match="heads=3: does not divide 16, the width of a model's queries"):
        LOSSES["attention_relations"].fn(*sides((16, 8, 8), (24, 24, 24)), SCORED, WEIGHTS, heads=3)


CHECKED = [
    ("info_nce", {"symmetric": True, "normalize": False, "temperature": 2.0}),
    ("layer_states", {"distance": "cosine"}),
    ("layer_states", {"distance": "logsum", "alpha": 2.5, "delta": 0.1}),
    ("layer_states", {"distance": "smooth_l1"}),
    ("attention_relations", {"of": ("keys",), "heads": 3}),
    ("attention_relations", {"of": ("values", "queries"), "normalize": True, "causal": True}),
]


@pytest.mark.parametrize(("name", "changes"), CHECKED)
def test_gradients_of_options_that_are_not_the_default(name, changes):
    entry = LOSSES[name]
    options = defaults(entry) | changes
    leaves = example(entry, 1)
    units = entry.units_of(Quantities(leaves), options).weight
    names = entry.named(entry.tensors, options)
    if name == "attention_relations":  # wide enough to be cut into heads
        for tensor in names:
            if tensor.endswith(("queries", "keys", "values")):
                leaves[tensor] = leaves[tensor].repeat(1, 1, 1, 6)[..., :6].contiguous()
    inputs = [n for n in dict.fromkeys(names) if ".student" in n and leaves[n].is_floating_point()]

    def total(*values):
        tensors = {**leaves, **dict(zip(inputs, values))}
        return torch.where(units > 0, entry.values(tensors, options), 0.0).sum()

    assert torch.autograd.gradcheck(total, [leaves[n].clone().requires_grad_() for n in inputs], fast_mode=True)


def test_equal_sides_have_finite_gradients_whatever_the_distance():
    teacher = states(0, 4)
    for distance in ("mse", "cosine", "smooth_l1", "logsum"):
        student = teacher.clone().requires_grad_()
        LOSSES["layer_states"].fn(student, teacher, WEIGHTS, distance=distance).sum().backward()
        assert student.grad.abs().max() < 1e-6
