"""The quantiser: published vectors, thresholds and digit masses; digits, values and ids are one another's inverse."""

import itertools
import json
import math
import time

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.quantizer import FSQLayer

LEVELS = [8, 8, 8, 8, 8, 5, 5, 5]
INPUT = [0.1, -0.5, 0.3, -0.2, 0.0, 0.7, -0.9, 0.4]
SMALL = [5, 4, 3, 2]  # of all parities; mode P takes no 2
MODES = ["P", "S", "M", "C"]
ORDERS = ["msf", "lsf"]

# mode, kappa, digits, id with the first digit least significant, id with the last one least significant
VECTORS = {
    "P": ("P", 1.6, [4, 2, 5, 3, 4, 3, 1, 3], 2_738_004, 2_219_583),
    "S": ("S", 1.6, [4, 2, 5, 3, 4, 3, 1, 3], 2_738_004, 2_219_583),
    "M-1.6": ("M", 1.6, [4, 2, 4, 3, 4, 3, 0, 3], 2_574_100, 2_211_578),
    "M-2": ("M", 2.0, [4, 2, 5, 3, 4, 4, 0, 3], 2_606_932, 2_219_603),
    "C": ("C", 1.6, [3, 1, 4, 2, 3, 3, 1, 3], 2_733_323, 1_634_458),
}
VALUES = {
    "P": [0, -0.5, 0.25, -0.25, 0, 0.5, -0.5, 0.5],
    "S": [1 / 7, -3 / 7, 3 / 7, -1 / 7, 1 / 7, 0.5, -0.5, 0.5],
    "M-1.6": [0.125, -0.375, 0.125, -0.125, 0.125, 0.4, -0.8, 0.4],
    "M-2": [0.125, -0.375, 0.375, -0.125, 0.125, 0.8, -0.8, 0.4],
    "C": [0, -2, 1, -1, 0, 1, -1, 1],
}
MASSES = {
    ("C", 1.6): ([0.186, 0.138, 0.119, 0.114, 0.119, 0.139, 0.185, 0.0], [0.166, 0.233, 0.200, 0.235, 0.165]),
    ("P", 1.6): ([0.077, 0.137, 0.116, 0.112, 0.116, 0.133, 0.180, 0.128], [0.167, 0.233, 0.200, 0.235, 0.166]),
    ("S", 1.6): ([0.100, 0.158, 0.126, 0.116, 0.114, 0.127, 0.159, 0.100], [0.166, 0.233, 0.200, 0.235, 0.166]),
    ("M", 2.0): ([0.166, 0.125, 0.108, 0.101, 0.099, 0.108, 0.127, 0.165], [0.244, 0.175, 0.160, 0.176, 0.245]),
    ("M", 1.6): ([0.112, 0.134, 0.128, 0.125, 0.124, 0.129, 0.135, 0.112], [0.194, 0.206, 0.199, 0.208, 0.193]),
}
ENTROPIES = {
    ("C", 1.6): (2.780, 2.305),
    ("P", 1.6): (2.966, 2.305),
    ("S", 1.6): (2.979, 2.305),
    ("M", 2.0): (2.971, 2.298),
    ("M", 1.6): (2.997, 2.321),
}
THRESHOLDS = {
    8: [-1.4230, -0.7925, -0.4373, -0.1437, 0.1499, 0.5051, 1.1356],
    5: [-0.9712, -0.2551, 0.2551, 0.9712],
    4: [-1.1497, -0.3462, 0.4573],
    3: [-0.5486, 0.5486],
}


def grid(mode):
    """All codes of a small grid, and its layer."""
    levels = SMALL[:3] if mode == "P" else SMALL
    return FSQLayer(levels, mode), torch.tensor(list(itertools.product(*(range(level) for level in levels))))


def unbounded(layer, values):
    """Inputs whose bounded value is a grid value: the inverse of `bounded`, written from its definition."""
    levels = torch.tensor(layer.levels, dtype=torch.float64)
    values = values.double()
    if layer.mode == "P":
        half, offset = (levels - 1) * (1 + layer.epsilon) / 2, (levels % 2 == 0) * 0.5
        return torch.atanh((values * (levels // 2) + offset) / half) - torch.atanh(offset / half)
    if layer.mode == "C":
        return torch.atanh((values / ((levels - 1) / 2)).clamp(max=1))
    return torch.atanh(values) if layer.mode == "S" else torch.logit((values + 1) / 2) / layer.kappa


@pytest.mark.parametrize("row", VECTORS)
def test_published_vectors(row):
    mode, kappa, digits, lsf, msf = VECTORS[row]
    for order, wanted in (("lsf", lsf), ("msf", msf)):
        layer = FSQLayer(LEVELS, mode, kappa=kappa, digit_order=order)
        assert layer.quantize(INPUT) == digits
        assert layer.dequantize(digits) == pytest.approx(VALUES[row])
        assert layer.code_to_token_id(digits) == wanted
        assert layer.token_id_to_code(wanted) == digits
        values, found = layer(torch.tensor(INPUT))
        assert found.tolist() == digits
        assert values.tolist() == pytest.approx(VALUES[row])


def test_bounded_values_of_the_paper():
    bounded = FSQLayer(LEVELS, "P").bounded(torch.tensor(INPUT)) * (torch.tensor(LEVELS) // 2)
    wanted = [0.337, -1.698, 0.960, -0.697, 0, 1.210, -1.434, 0.761]
    assert bounded.tolist() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_constant_vectors(mode):
    layer = FSQLayer(LEVELS, mode)
    for extreme in (50.0, math.inf):
        assert layer.quantize([extreme] * 8) == [7] * 5 + [4] * 3
        assert layer.quantize([-extreme] * 8) == [0] * 8
    assert layer.code_to_token_id([7] * 5 + [4] * 3) == 4_095_999
    assert layer.quantize([3.0] * 8) == ([6] * 5 + [4] * 3 if mode == "C" else [7] * 5 + [4] * 3)
    if mode == "P":
        assert layer.quantize([0.0] * 8) == [4] * 5 + [2] * 3
        assert FSQLayer(LEVELS, "P", digit_order="lsf").code_to_token_id([4] * 5 + [2] * 3) == 2_050_340


@pytest.mark.parametrize("level", THRESHOLDS)
def test_thresholds_of_the_paper(level):
    layer = FSQLayer([level], "P")
    for digit, threshold in enumerate(THRESHOLDS[level]):
        assert layer.quantize([threshold - 1e-4]) == [digit]
        assert layer.quantize([threshold + 1e-4]) == [digit + 1]


@pytest.mark.parametrize(("mode", "kappa"), MASSES)
def test_digit_masses_of_a_unit_normal(mode, kappa):
    z = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for level, masses, entropy in zip((8, 5), MASSES[mode, kappa], ENTROPIES[mode, kappa]):
        digits = FSQLayer([level], mode, kappa=kappa).digits(z.unsqueeze(1)).squeeze(1)
        found = torch.bincount(digits, minlength=level) / len(z)
        assert found.tolist() == pytest.approx(masses, abs=0.005)
        assert -torch.special.xlogy(found, found).sum().item() / math.log(2) == pytest.approx(entropy, abs=0.005)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_ids_and_digits_are_a_bijection_on_a_small_grid(mode, order):
    codes = grid(mode)[1]
    layer = FSQLayer([int(level) + 1 for level in codes.amax(0)], mode, digit_order=order)
    ids = layer.code_to_token_id(codes)
    assert ids.dtype == torch.int64
    assert sorted(ids.tolist()) == list(range(layer.total_vocab_size))
    assert torch.equal(layer.token_id_to_code(ids), codes)
    least = 0 if order == "lsf" else -1
    step = layer.code_to_token_id([int(i == least % len(layer.levels)) for i in range(len(layer.levels))])
    assert step == 1


@pytest.mark.parametrize("order", ORDERS)
def test_ids_and_digits_are_a_bijection_on_the_large_grid(order):
    layer = FSQLayer(LEVELS, digit_order=order)
    ids = torch.randint(layer.total_vocab_size, (100_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.code_to_token_id(layer.token_id_to_code(ids)), ids)
    assert layer.token_id_to_code(layer.total_vocab_size - 1) == [level - 1 for level in LEVELS]


def test_ids_above_32_bits_are_exact():
    layer = FSQLayer([1000] * 6)
    digits = [999, 0, 1, 2, 998, 997]
    assert layer.code_to_token_id(digits) == 999_000_001_002_998_997
    assert layer.token_id_to_code(999_000_001_002_998_997) == digits


@pytest.mark.parametrize("mode", MODES)
def test_every_code_is_reached_from_its_value(mode):
    layer, small = grid(mode)
    large = FSQLayer(LEVELS, mode)
    random = torch.randint(large.total_vocab_size, (130_000,), generator=torch.Generator().manual_seed(1))
    for fsq, codes in ((layer, small), (large, large.token_id_to_code(random))):
        values = fsq.dequantize(codes)
        assert torch.equal(fsq.quantize(unbounded(fsq, values)), codes)


@pytest.mark.parametrize("mode", MODES)
def test_rounding_moves_at_most_half_a_cell(mode):
    layer = FSQLayer(LEVELS, mode)
    z = 2 * torch.randn(20_000, 8, generator=torch.Generator().manual_seed(2))
    values, digits = layer(z)
    assert torch.equal(digits, layer.quantize(z))
    assert torch.allclose(values, layer.dequantize(digits), atol=1e-6)
    width = torch.tensor(layer.dequantize([1] * 8)) - torch.tensor(layer.dequantize([0] * 8))
    assert ((values - layer.bounded(z)).abs() <= width / 2 + 1e-5).all()


@pytest.mark.parametrize("mode", MODES)
def test_reachable_levels(mode):
    layer = FSQLayer(LEVELS, mode)
    digits = layer.digits(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(3)))
    used = [len(digits[:, i].unique()) for i in range(8)]
    assert used == [level - (mode == "C" and level % 2 == 0) for level in LEVELS]
    assert layer.num_usable == math.prod(used)
    assert FSQLayer(LEVELS, "C").num_usable == 2_100_875


def test_gradients_pass_the_rounding_as_through_the_bound():
    z = 1.5 * torch.randn(40, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    z.requires_grad_()
    for mode in MODES:
        layer = FSQLayer(LEVELS, mode)
        assert torch.autograd.gradcheck(layer.bounded, z)
        (through,) = torch.autograd.grad(layer(z)[0].sum(), z)
        (wanted,) = torch.autograd.grad(layer.bounded(z).sum(), z)
        assert torch.equal(through, wanted)
        assert (through > 0).all()
        far = torch.tensor([50.0, -50.0] * 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(far)[0].sum(), far)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("mode", "level", "slope"),
    [("P", 8, 0.858), ("P", 5, 1.001), ("S", 8, 1.0), ("S", 5, 1.0), ("M", 8, 0.8), ("M", 5, 0.8)],
)
def test_slope_at_zero(mode, level, slope):
    z = torch.zeros(1, requires_grad=True)
    FSQLayer([level], mode)(z)[0].sum().backward()
    assert z.grad.item() == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_margin_against_a_search_over_all_boundaries(mode):
    layer = FSQLayer([8, 5, 3], mode)
    z = 1.5 * torch.randn(300, 3, generator=torch.Generator().manual_seed(5))
    margins, others = layer.margin(z)
    bounded, digits = layer.bounded(z), layer.digits(z)
    for i, level in enumerate(layer.levels):
        values = [layer.dequantize([digit if j == i else 0 for j in range(3)])[i] for digit in range(level)]
        for row in range(len(z)):
            distances = [abs(bounded[row, i].item() - (a + b) / 2) for a, b in itertools.pairwise(values)]
            below = min(range(level - 1), key=distances.__getitem__)
            assert margins[row, i].item() == pytest.approx(distances[below] / (values[1] - values[0]), abs=1e-4)
            assert others[row, i].item() in (below, below + 1)
    assert (others != digits).all()
    assert ((others - digits).abs() == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_around_it_changes_nothing(mode):
    layer = FSQLayer(LEVELS, mode)
    z = torch.randn(5_000, 8, generator=torch.Generator().manual_seed(6))
    values, digits = layer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_digits = layer(z)
        assert torch.equal(layer.quantize(z), digits)
        assert layer(z.bfloat16())[0].dtype == torch.float32
    assert torch.equal(found_digits, digits)
    assert found.dtype == torch.float32
    assert torch.equal(found, values)
    assert torch.equal(FSQLayer(LEVELS, mode).bfloat16().quantize(z), digits)


def test_lists_and_tensors_say_the_same():
    layer = FSQLayer(LEVELS, "M")
    z = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(7))
    digits = layer.quantize(z)
    ids = layer.code_to_token_id(digits)
    assert (digits.shape, digits.dtype, ids.shape, ids.dtype) == (z.shape, torch.int64, z.shape[:-1], torch.int64)
    assert layer.quantize(z.tolist()) == digits.tolist()
    assert layer.dequantize(digits.tolist()) == layer.dequantize(digits).tolist()
    assert layer.code_to_token_id(digits.tolist()) == ids.tolist()
    assert layer.token_id_to_code(ids.tolist()) == digits.tolist()
    assert layer.num_dimensions == 8
    assert layer.total_vocab_size == 4_096_000


@pytest.mark.parametrize(
    ("levels", "options"),
    [
        ([], {}),
        ([8, 1], {}),
        ([8, 0], {}),
        ([8, 2], {"mode": "P"}),
        ([8], {"kappa": 0.0}),
        ([1 << 31] * 2, {}),
    ],
)
def test_layers_that_cannot_be(levels, options):
    with pytest.raises(ValueError):
        FSQLayer(levels, **options)


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("quantize", [0.0] * 7),
        ("quantize", [0.0] * 7 + [math.nan]),
        ("quantize", 0.0),
        ("dequantize", [0] * 7),
        ("dequantize", [0] * 7 + [5]),
        ("dequantize", [-1] + [0] * 7),
        ("dequantize", [0.5] * 8),
        ("code_to_token_id", [0] * 9),
        ("code_to_token_id", [8] + [0] * 7),
        ("token_id_to_code", -1),
        ("token_id_to_code", 4_096_000),
        ("token_id_to_code", 1 << 70),
        ("token_id_to_code", [0, 4_096_000]),
        ("token_id_to_code", 1.0),
    ],
)
def test_misuse_is_a_value_error(method, value):
    with pytest.raises(ValueError):
        vars(FSQLayer)[method](FSQLayer(LEVELS), value)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_loaded(tmp_path, mode):
    layer = FSQLayer(LEVELS, mode, digit_order="lsf", kappa=1.5)
    layer.save(tmp_path / "fsq.json")
    again = FSQLayer.load(tmp_path / "fsq.json")
    assert again.state() == layer.state()
    assert again.quantize(INPUT) == layer.quantize(INPUT)
    assert [path.name for path in tmp_path.iterdir()] == ["fsq.json"]


@pytest.mark.parametrize("text", ["", "[8, 5]", "{", json.dumps({"levels": [8, 1]}), json.dumps({"size": 3}), "\xff"])
def test_another_file_is_one_line(tmp_path, text):
    path = tmp_path / "fsq.json"
    path.write_text(text, "latin-1")
    with pytest.raises(UserError, match="not a saved FSQLayer"):
        FSQLayer.load(path)
    with pytest.raises(UserError, match="not a saved FSQLayer"):
        FSQLayer.load(tmp_path / "none.json")


def test_five_million_vectors_a_second():
    layer, z = FSQLayer(LEVELS), torch.randn(100_000, 8)
    limit, best, begin = len(z) / 5e6, math.inf, time.monotonic()
    while best > limit and time.monotonic() - begin < 10:  # on a busy machine the first tries are slow
        start = time.process_time()
        layer.quantize(z)
        best = min(best, time.process_time() - start)
    assert best <= limit, f"{len(z) / best / 1e6:.1f} million vectors a second"
