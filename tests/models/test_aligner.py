"""Norms, and norm and projector as one: masked as packed, complete before any optimizer, ordered as asked."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tokenkit.config import UserError
from tokenkit.models.aligner import MILES_EPSILON, Aligner
from tokenkit.models.alignment_norms import BatchNorm, Whitening, build_norm
from tokenkit.models.mapping import layer_pairs
from tokenkit.models.whitening import Moments

OPTIONS = {
    "layers": "last",
    "projector": "linear",
    "ensemble": ("linear", "linear", "linear"),
    "norm": "none",
    "norm_sides": "both",
    "norm_affine": False,
    "norm_first": False,
}
PROJECTORS = ["linear", "orthogonal", "mlp", "mlp_256", "miles", "ensemble"]
NORMS = ["none", "layernorm", "rmsnorm", "batchnorm", "standardize"]
MASK = torch.arange(9).expand(3, 9) < torch.tensor([[9], [4], [6]])


def aligner(pairs: int = 1, student: int = 6, teacher: int = 10, seed: int = 0, **options: object) -> Aligner:
    torch.manual_seed(seed)
    return Aligner({**OPTIONS, **options}, [(i, i) for i in range(pairs)], student, teacher)


def features(width: int, pairs: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 9, pairs, width, generator=generator) * torch.linspace(0.3, 4, width) + 1.5


# norms


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("projector", ["linear", "miles"])
def test_what_stands_outside_the_mask_changes_no_bit(norm, projector):
    x, y = features(6, 2), features(10, 2, seed=1)
    results = []
    for fill in (0.0, 1e6, float("nan"), float("inf")):
        made = aligner(2, norm=norm, projector=projector)
        a, b = (torch.where(MASK[..., None, None], v, fill) for v in (x, y))
        s, t = made(a, b, MASK)
        assert s.isfinite().all()
        assert t.isfinite().all()
        torch.where(MASK[..., None, None], (s - t).square(), 0).sum().backward()
        gradients = [p.grad for p in made.parameters() if p.requires_grad]
        results.append([s[MASK], t[MASK], *gradients, *made.buffers()])
    for other in results[1:]:
        assert all(torch.equal(u, v) for u, v in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "standardize"])
def test_rows_do_not_see_each_other(norm):
    made = aligner(norm=norm)
    x, y = features(6), features(10, seed=1)
    whole = made(x, y, MASK)
    for row in range(3):
        n = int(MASK[row].sum())
        alone = made(x[row : row + 1, :n], y[row : row + 1, :n], MASK[row : row + 1, :n])
        for a, b in zip(whole, alone, strict=True):
            assert torch.allclose(a[row, :n], b[0], atol=1e-6)


def test_norms_by_their_formulas():
    x, y = features(6), features(10, seed=1)
    everything = torch.ones_like(MASK)
    made = {norm: aligner(norm=norm) for norm in NORMS}
    plain = made["none"](x, y, everything)[0]
    for side, given in ((0, plain), (1, y)):
        layer, rms, batch, standard = (made[norm](x, y, everything)[side] for norm in NORMS[1:])
        assert torch.allclose(layer, functional.layer_norm(given, (10,)), atol=1e-6)
        assert torch.allclose(rms, given / (given.square().mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-6)
        assert torch.allclose(batch.flatten(0, 2).mean(0), torch.zeros(10), atol=1e-5)
        assert torch.allclose(batch.flatten(0, 2).var(0, correction=0), torch.ones(10), atol=1e-3)
        assert torch.allclose(standard.mean(1), torch.zeros(3, 1, 10), atol=1e-5)
        assert torch.allclose(standard.var(1, correction=0), torch.ones(3, 1, 10), atol=1e-2)


@pytest.mark.parametrize("affine", [False, True])
def test_masked_batch_norm_is_torchs_on_what_counts(affine):
    ours, theirs = BatchNorm(6, affine), nn.BatchNorm1d(6, affine=affine)
    if affine:
        for module in (ours, theirs):
            nn.init.constant_(module.weight, 1.7)
            nn.init.constant_(module.bias, -0.3)
    for seed in range(3):
        x = features(6, seed=seed)[:, :, 0]
        assert torch.allclose(ours(x, MASK)[MASK], theirs(x[MASK]), atol=1e-5)
        assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
        assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    ours.eval(), theirs.eval()
    remembered = ours.running_mean.clone()
    x = features(6, seed=9)[:, :, 0]
    assert torch.allclose(ours(x, MASK)[MASK], theirs(x[MASK]), atol=1e-5)
    assert torch.equal(ours.running_mean, remembered)


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_that_counts_gives_no_nan(norm):
    made = aligner(norm=norm, projector="miles")
    before = {name: value.clone() for name, value in made.named_buffers()}
    for mask in (torch.zeros_like(MASK), torch.arange(9).expand(3, 9) == torch.tensor([[0], [9], [9]])):
        s, t = made(features(6), features(10, seed=1), mask)
        assert s.isfinite().all()
        assert t.isfinite().all()
        torch.where(mask[..., None, None], s, 0).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)
        assert all(torch.equal(value, before[name]) for name, value in made.named_buffers())


def test_miles_scales_both_sides():
    made = aligner(projector="miles")
    x, y = features(6), features(10, seed=1)
    s, t = made(x, y, MASK)
    for found, given in ((s, made.pairs[0].projector(x)), (t, y)):
        packed = given[MASK][:, 0]
        expected = (packed - packed.mean(0)) / (packed.var(0, correction=0) + MILES_EPSILON).sqrt()
        assert torch.allclose(found[MASK][:, 0], expected, atol=1e-4)
    names = {name for name, _ in made.named_parameters()}
    assert names == {"mixing.logits", "pairs.0.projector.weight", "pairs.0.projector.bias"}
    assert {name for name, _ in made.named_buffers()} == {
        f"pairs.0.{side}_scale.running_{what}" for side in ("student", "teacher") for what in ("mean", "var")
    }


def test_sides_and_scales_are_as_asked():
    x, y = features(6), features(10, seed=1)
    one = aligner(norm="layernorm", norm_sides="teacher")
    s, t = one(x, y, torch.ones_like(MASK))
    assert torch.equal(s, one.pairs[0].projector(x))
    assert torch.allclose(t, functional.layer_norm(y, (10,)), atol=1e-6)
    for norm in ("layernorm", "rmsnorm", "batchnorm"):
        plain = {n for n, _ in aligner(norm=norm).named_parameters() if "norm" in n}
        assert not plain, "the teacher's scale is not learnt unless asked for: the target could shrink to nothing"
        found = {n for n, _ in aligner(norm=norm, norm_affine=True).named_parameters() if "norm.weight" in n}
        assert found == {"pairs.0.student_norm.weight", "pairs.0.teacher_norm.weight"}
    for norm in ("none", "standardize", "whiten_zca"):
        with pytest.raises(UserError, match=f"norm_affine: norm '{norm}' learns no scale"):
            aligner(norm=norm, norm_affine=True, norm_sides="teacher")


def test_the_order_is_as_asked():
    x, y = features(6), features(10, seed=1)
    after, before = (aligner(norm="layernorm", norm_affine=True, norm_first=first) for first in (False, True))
    assert after.pairs[0].student_norm.weight.shape == (10,)  # sized by what it gets
    assert before.pairs[0].student_norm.weight.shape == (6,)
    mask = torch.ones_like(MASK)
    assert torch.allclose(after(x, y, mask)[0], functional.layer_norm(after.pairs[0].projector(x), (10,)), atol=1e-6)
    assert torch.allclose(before(x, y, mask)[0], before.pairs[0].projector(functional.layer_norm(x, (6,))), atol=1e-6)
    assert torch.equal(after(x, y, mask)[1], before(x, y, mask)[1])


# whitening


@pytest.mark.parametrize("norm", ["whiten_zca", "whiten_pca", "whiten_cholesky"])
def test_whitening_waits_for_statistics_and_makes_the_teacher_white(norm):
    made = aligner(2, norm=norm, norm_sides="teacher", projector="orthogonal")
    assert made.needs_statistics
    assert not aligner(norm="layernorm").needs_statistics
    x, y = features(6, 2), features(10, 2, seed=1)
    with pytest.raises(UserError, match=f"{norm} needs the teacher's statistics"):
        made(x, y, MASK)
    many = torch.randn(500, 2, 10) @ torch.randn(10, 10) + 3
    made.set_statistics([Moments.of(many[:, i]) for i in range(2)])
    s, t = made(x.repeat(1, 1, 1, 1), y, MASK)
    assert torch.equal(s, made.eval()(x, y, MASK)[0])  # nothing is learnt from batches
    rows = many.unsqueeze(0)
    white = made(torch.zeros(1, 500, 2, 6), rows, torch.ones(1, 500).bool())[1][0]
    for i in range(2):
        assert (torch.cov(white[:, i].T) - torch.eye(10)).abs().max() < 1e-3
    assert not t.requires_grad
    s.square().sum().backward()
    with pytest.raises(ValueError, match="shorter"):
        made.set_statistics([Moments.of(many[:, 0])])


def test_whitening_of_a_student_that_learns_is_refused():
    with pytest.raises(UserError, match=r"norm_sides: both, but whiten_zca .* write norm_sides: teacher"):
        aligner(norm="whiten_zca")


def test_whitening_holds_under_autocast():
    module = build_norm("whiten_zca", 10, False)
    assert isinstance(module, Whitening)
    module.set_moments(Moments.of(torch.randn(100, 10)))
    y, mask = features(10)[:, :, 0], torch.ones_like(MASK)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(y, mask)
    assert torch.equal(found, module(y, mask))


# all together


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("norm", NORMS)
def test_everything_is_there_before_the_first_batch(projector, norm):
    options = {"projector": projector, "norm": norm, "norm_affine": norm in ("layernorm", "rmsnorm", "batchnorm")}
    made = aligner(2, **options)
    keys, parameters = list(made.state_dict()), [id(p) for p in made.parameters()]
    random = torch.random.get_rng_state()
    made(features(6, 2), features(10, 2, seed=1), MASK)[0].sum().backward()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert list(made.state_dict()) == keys
    assert [id(p) for p in made.parameters()] == parameters
    assert set(keys) == {n for n, _ in (*made.named_parameters(), *made.named_buffers())}
    again = aligner(2, seed=1, **options)
    again.load_state_dict(made.state_dict())
    for module in (made, again):
        module.eval()
    found = [m(features(6, 2), features(10, 2, seed=1), MASK) for m in (made, again)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_same_seed_gives_the_same_bits():
    for kind in PROJECTORS:
        first, second = aligner(2, projector=kind), aligner(2, projector=kind)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_pairs_have_projectors_of_their_own():
    made = aligner(2)
    x, y = features(6, 2), features(10, 2, seed=1)
    both = made(x, y, MASK)[0]
    other = made(x.flip(2), y, MASK)[0].flip(2)
    assert not torch.allclose(both, other, atol=1e-2)  # the same states, by the other's map
    made(x, y, MASK)[0][:, :, 0].sum().backward()
    assert made.pairs[1].projector.weight.grad is None or not made.pairs[1].projector.weight.grad.any()
    with pytest.raises(AssertionError, match="1 layers for 2 pairs"):
        made(x[:, :, :1], y[:, :, :1], MASK)


def test_half_precision_goes_in_and_float32_comes_out():
    made = aligner(norm="layernorm")
    s, t = made(features(6).bfloat16(), features(10).half(), MASK)
    assert s.dtype == t.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        s, t = aligner()(features(6).bfloat16(), features(10).bfloat16(), MASK)
    assert s.dtype == t.dtype == torch.float32


def test_full_cross_learns_which_layers_belong_together():
    pairs = layer_pairs("full_cross", 2, 3)
    torch.manual_seed(0)
    made = Aligner({**OPTIONS, "layers": "full_cross", "projector": "none"}, pairs, 6, 6)
    teacher = features(6, 3, seed=1)
    student = torch.stack([teacher[:, :, 0], teacher[:, :, 2]], 2)  # blocks 0 and 1 are the teacher's 0 and 2
    left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    assert torch.allclose(made.pair_weights(), torch.full((6,), 1 / 6))
    for _ in range(40):
        s, t = made(student[:, :, left], teacher[:, :, right], MASK)
        loss = ((s - t).square().mean(-1)[MASK].mean(0) * made.pair_weights()).sum()
        optimizer.zero_grad()
        loss.backward()
        assert made.mixing.logits.grad.abs().sum() > 0
        optimizer.step()
        assert abs(made.pair_weights().sum().item() - 1) < 1e-6
    weights = dict(zip(pairs, made.pair_weights().tolist(), strict=True))
    assert weights[0, 0] + weights[1, 2] > 0.9


def test_other_rules_weigh_all_pairs_alike():
    made = aligner(4, layers="uniform")
    assert torch.equal(made.pair_weights(), torch.full((4,), 0.25))
    assert not made.pair_weights().requires_grad
