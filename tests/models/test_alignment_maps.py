"""Maps between widths: what each is called, orthonormal through any step, the mean of several."""

import copy

import pytest
import torch
from torch.nn import functional

from tokenkit.config import UserError
from tokenkit.models.aligner import Aligner
from tokenkit.models.alignment_maps import Ensemble, Orthogonal, build_projector

PROJECTORS = ["linear", "orthogonal", "mlp", "mlp_256", "miles", "ensemble"]
MASK = torch.arange(9).expand(3, 9) < torch.tensor([[9], [4], [6]])


def aligner(pairs: int = 1, student: int = 6, teacher: int = 10, **options: object) -> Aligner:
    """An aligner without norms."""
    torch.manual_seed(0)
    own = {"layers": "last", "ensemble": ("linear", "linear", "linear"), "norm": "none", **options}
    plain = {"norm_sides": "both", "norm_affine": False, "norm_first": False}
    return Aligner({**plain, **own}, [(i, i) for i in range(pairs)], student, teacher)


def features(width: int, pairs: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 9, pairs, width, generator=generator) * torch.linspace(0.3, 4, width) + 1.5


@pytest.mark.parametrize(("student", "teacher"), [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_maps_any_width_to_any_other(kind, student, teacher):
    made = aligner(2, student, teacher, projector=kind)
    x, y = features(student, 2), features(teacher, 2, seed=1)
    a, b = made(x, y, MASK)
    assert a.shape == b.shape == (3, 9, 2, teacher)
    a.square().sum().backward()
    learnt = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert learnt
    for name, parameter in learnt.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        if kind != "miles":  # a bias before batch normalisation has a gradient of 0
            assert parameter.grad.abs().sum() > 0, name


def test_linear_and_mlp_are_what_they_are_called():
    torch.manual_seed(0)
    linear, mlp, wide = (build_projector(kind, 6, 10) for kind in ("linear", "mlp", "mlp_256"))
    x = features(6)
    assert torch.equal(linear(x), x @ linear.weight.T + linear.bias)
    for module, hidden in ((mlp, 64), (wide, 256)):
        first, _, second = module
        assert first.weight.shape == (hidden, 6)
        expected = (x @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
        assert torch.allclose(module(x), expected, atol=1e-6)


def test_no_projector_leaves_features_alone_and_refuses_other_widths():
    made = aligner(1, 8, 8, projector="none")
    x, y = features(8), features(8, seed=1)
    a, b = made(x, y, torch.ones_like(MASK))
    assert torch.equal(a, x)
    assert torch.equal(b, y)
    assert not any(p.requires_grad for p in made.parameters())
    with pytest.raises(UserError, match=r"projector: none compares 6 channels .* write projector: linear"):
        aligner(1, 6, 8, projector="none")


@pytest.mark.parametrize(("student", "teacher"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("optimizer", ["sgd", "wild", "adam"])
def test_orthogonal_stays_orthogonal_after_every_step(student, teacher, optimizer):
    torch.manual_seed(1)
    made = Orthogonal(student, teacher)
    kinds = {"sgd": (torch.optim.SGD, 0.1), "wild": (torch.optim.SGD, 300.0), "adam": (torch.optim.Adam, 0.5)}
    kind, rate = kinds[optimizer]
    steps = kind(made.parameters(), lr=rate)
    x, y = torch.randn(50, student), torch.randn(50, teacher)
    before = made.frame().detach().clone()
    for _ in range(20):
        steps.zero_grad()
        (made(x) - y).square().mean().backward()
        steps.step()
        frame = made.frame()
        error = frame.T @ frame - torch.eye(min(student, teacher))
        assert error.abs().sum(1).max() < 1e-5  # the largest sum of a row
    assert (made.frame() - before).abs().max() > 0.05


def test_orthogonal_keeps_lengths_to_a_wider_space_and_holds_under_autocast():
    torch.manual_seed(0)
    made = Orthogonal(6, 10)
    x = features(6)
    assert torch.allclose(made(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        frame = made.frame()
    assert frame.dtype == torch.float32
    assert (frame.T @ frame - torch.eye(6)).abs().max() < 1e-5


def test_the_frame_is_nearly_the_matrix_exponential():
    torch.manual_seed(0)
    made = Orthogonal(5, 8)
    skew = functional.pad(made.skew.detach().tril(-1), (0, 3))
    error = made.frame() - torch.matrix_exp(skew - skew.T)[:, :5]
    assert error.abs().max() < 0.02


@pytest.mark.parametrize(("wider", "narrower"), [(8, 5), (16, 6), (6, 6)])
def test_orthogonal_learns_any_rotation(wider, narrower):
    torch.manual_seed(0)
    made = Orthogonal(narrower, wider)
    target = torch.linalg.qr(torch.randn(wider, narrower))[0]
    if wider == narrower and torch.linalg.det(target) < 0:
        target[:, 0] *= -1  # of a square one the mirror images are out of reach, as they are for an exponential
    begin = (made.frame() - target).square().sum() / narrower
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(250):
        optimizer.zero_grad()
        (made.frame() - target).square().sum().backward()
        optimizer.step()
    assert begin > 1  # 2 is what unrelated frames have
    assert (made.frame() - target).square().sum() / narrower < 0.02


# the ensemble


def test_an_ensemble_of_one_is_its_member_and_of_many_their_mean():
    torch.manual_seed(0)
    x = features(6)
    for kind in ("linear", "orthogonal", "mlp", "mlp_256"):
        one = Ensemble(6, 10, [kind])
        assert torch.equal(one(x), one.members[0](x))
    many = Ensemble(6, 10, ["linear", "mlp", "orthogonal", "mlp_256"])
    mean = sum(member(x).double() for member in many.members) / 4
    assert (many(x) - mean).abs().max() <= 1e-7 * mean.abs().max().clamp_min(1) * 4
    double = Ensemble(6, 10, ["linear", "mlp", "orthogonal"]).double()
    exact = sum(member(x.double()) for member in double.members) / 3
    assert (double(x.double()) - exact).abs().max() < 1e-7


def test_an_ensemble_registers_moves_and_restores_its_members():
    torch.manual_seed(0)
    kinds = ["linear", "mlp", "orthogonal"]
    made = Ensemble(6, 10, kinds)
    singles = [sum(p.numel() for p in build_projector(kind, 6, 10).parameters()) for kind in kinds]
    assert sum(p.numel() for p in made.parameters()) == sum(singles)
    made(features(6)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
    assert all(p.device.type == "meta" for p in copy.deepcopy(made).to("meta").parameters())
    assert all(p.dtype == torch.float64 for p in copy.deepcopy(made).to(torch.float64).parameters())
    other = Ensemble(6, 10, kinds)
    assert not torch.equal(other(features(6)), made(features(6)))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(features(6)), made(features(6)))
    twice = Ensemble(6, 10, ["linear", "linear"])
    assert not torch.equal(twice.members[0].weight, twice.members[1].weight)  # each drawn anew


def test_an_ensemble_varies_less_over_initialisations_than_one_map():
    """Regression of a curved function from noisy data, 20 seeds: variance of the predictions, K = 1 against K = 4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    y = (x @ torch.randn(6, 4, generator=generator)).sin() + 0.1 * torch.randn(64, 4, generator=generator)
    new = torch.randn(200, 6, generator=generator)

    def predictions(members: int) -> torch.Tensor:
        found = []
        for seed in range(20):
            torch.manual_seed(seed)
            made = Ensemble(6, 4, ["mlp"] * members)
            optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
            for _ in range(12):
                optimizer.zero_grad()
                (made(x) - y).square().mean().backward()
                optimizer.step()
            found.append(made(new).detach())
        return torch.stack(found)

    single, four = (predictions(members).var(0).mean() for members in (1, 4))
    assert four < 0.7 * single, (single, four)


@pytest.mark.parametrize(("members", "message"), [((), "ensemble: empty"), (("linear", "miles"), "'miles' cannot be")])
def test_an_ensemble_is_checked(members, message):
    with pytest.raises(UserError, match=message):
        aligner(projector="ensemble", ensemble=members)
