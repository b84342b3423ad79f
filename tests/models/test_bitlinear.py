"""Ternary linear layers: the published numbers, straight-through gradients, and an int8 backward pass beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from tokenkit.models.bitlinear import TernaryLinear, int8_of, rounded_at_random, trits_of

WEIGHT = [[0.9, -0.2, 0.05, -1.4], [0.3, 0.6, -0.7, 0.1], [-0.45, 0, 2, -0.55], [0.2, 0.25, -0.9, 0.8]]
TRITS = [[1, 0, 0, -1], [1, 1, -1, 0], [-1, 0, 1, -1], [0, 0, -1, 1]]
BACKWARDS = ("float32", "saved_int8", "int8")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(inputs: int, outputs: int, *, bias: bool = True, seed: int = 0, **options: Any) -> TernaryLinear:
    weight = nn.Parameter(drawn(outputs, inputs, seed=seed) / inputs**0.5)
    return TernaryLinear(weight, nn.Parameter(drawn(outputs, seed=seed + 1)) if bias else None, **options)


def gradients(made: TernaryLinear, x: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What a layer makes of x, and the gradients of x and of everything it learns."""
    x = x.clone().requires_grad_()
    made.zero_grad()
    y = made(x)
    y.backward(upstream.to(y.dtype))
    found = {name: parameter.grad for name, parameter in made.named_parameters()} | {"x": x.grad}
    return y.detach(), {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("backward", ["float32", "saved_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_numbers(backward: Any, dtype: torch.dtype) -> None:
    made = TernaryLinear(nn.Parameter(torch.tensor(WEIGHT, dtype=dtype)), backward=backward)
    trits, gamma = made.trits()
    assert trits.tolist() == TRITS
    assert gamma.item() == pytest.approx(0.5875, abs=1e-7)
    x = torch.tensor([0.5, -1.27, 0.02, 1.0], dtype=torch.float64)
    values, rate = int8_of(x)
    assert values.tolist() == [50, -127, 2, 100]
    assert rate.item() == pytest.approx(100, abs=1e-12)
    expected = torch.tensor([-0.29375, -0.464125, -0.8695, 0.57575], dtype=torch.float64)
    torch.testing.assert_close(made(x), expected, atol=1e-7, rtol=0)


def test_ties_go_to_even_and_a_layer_of_zeros_stays_finite() -> None:
    trits, gamma = trits_of(torch.tensor([[0.5, 1.5], [-0.5, -1.5]]))  # gamma is 1
    assert (trits.tolist(), gamma.item()) == ([[0, 1], [0, -1]], 1.0)
    made = TernaryLinear(nn.Parameter(torch.zeros(2, 3)))
    assert made.trits()[1].item() == pytest.approx(1e-5)
    assert torch.equal(made(torch.zeros(1, 3)), torch.zeros(1, 2))


def test_the_scale_is_of_the_latent_weights_in_float32_or_their_median() -> None:
    weight = drawn(64, 64).to(torch.bfloat16)
    assert torch.equal(trits_of(weight)[1], weight.float().abs().mean())
    assert trits_of(drawn(5, 5), "median")[1] == drawn(5, 5).abs().median()
    assert trits_of(drawn(64, 64), "median")[0].abs().float().mean() > trits_of(drawn(64, 64))[0].abs().float().mean()


@pytest.mark.parametrize("backward", BACKWARDS)
def test_strength_0_is_the_plain_layer_to_the_bit(backward: Any) -> None:
    made, x, up = layer(24, 12, backward=backward), drawn(2, 5, 24, seed=5), drawn(2, 5, 12, seed=6)
    made.strength = 0.0
    plain = nn.Linear(24, 12)
    plain.weight, plain.bias = made.weight, made.bias
    y, found = gradients(made, x, up)
    x = x.clone().requires_grad_()
    plain.zero_grad()
    plain(x).backward(up)
    assert torch.equal(y, plain(x))
    assert all(torch.equal(found[name], p.grad) for name, p in plain.named_parameters())
    assert torch.equal(found["x"], x.grad)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_straight_through_is_the_value_of_the_quantised_and_the_gradient_of_the_identity(strength: float) -> None:
    """The layer against the formula W + strength (W_hat - W).detach(), written out."""
    made, x, up = layer(24, 12), drawn(7, 24, seed=5), drawn(7, 12, seed=6)
    made.strength = strength
    y, found = gradients(made, x, up)
    weight, bias, x = (t.detach().clone().requires_grad_() for t in (made.weight, made.bias, x))
    gamma = weight.abs().mean()
    w_hat = (weight / gamma).round().clamp(-1, 1) * gamma
    rate = 127 / x.abs().amax(-1, keepdim=True)
    x_hat = (x * rate).round().clamp(-128, 127) / rate
    obvious = linear(x + strength * (x_hat - x).detach(), weight + strength * (w_hat - weight).detach(), bias)
    obvious.backward(up)
    torch.testing.assert_close(y, obvious.detach(), atol=1e-6, rtol=1e-6)
    for name, expected in {"weight": weight.grad, "bias": bias.grad, "x": x.grad}.items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-6)


def test_the_value_at_strength_1_is_exactly_that_of_the_trits() -> None:
    made, x = layer(24, 12, bias=False), drawn(7, 24, seed=5)
    trits, gamma = made.trits()
    values, rate = int8_of(x)
    assert torch.equal(made(x), linear(values / rate, trits * gamma))


@pytest.mark.parametrize("backward", BACKWARDS[:2])
def test_finite_differences_through_the_surrogate(backward: Any) -> None:
    """Gradients are the derivatives that a plain layer would have at x_hat and W_hat."""
    made = TernaryLinear(nn.Parameter(drawn(5, 6, dtype=torch.float64)), backward=backward)
    x, up = drawn(3, 6, seed=1, dtype=torch.float64), drawn(3, 5, seed=2, dtype=torch.float64)
    _, found = gradients(made, x, up)
    trits, gamma = made.trits()
    values, rate = int8_of(x)
    x_hat, w_hat = values / rate, trits * gamma

    def surrogate(dx: Tensor, dw: Tensor) -> Tensor:
        return (linear(x_hat + dx, w_hat + dw) * up).sum()

    nothing_x, nothing_w, eps = torch.zeros_like(x), torch.zeros_like(w_hat), 1e-6
    for name, shape, call in (
        ("x", x, lambda d: surrogate(d, nothing_w)),
        ("weight", w_hat, lambda d: surrogate(nothing_x, d)),
    ):
        numeric = torch.zeros_like(shape)
        for i in range(shape.numel()):
            shift = torch.zeros(shape.numel(), dtype=torch.float64)
            shift[i] = eps
            shift = shift.view_as(shape)
            numeric.view(-1)[i] = (call(shift) - call(-shift)) / (2 * eps)
        torch.testing.assert_close(found[name], numeric, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [(6,), (2, 3), ()])
def test_saved_int8_has_the_gradients_of_straight_through(normed: bool, rows: tuple[int, ...]) -> None:
    norm = nn.RMSNorm(48) if normed else None
    plain, saved = (layer(48, 20, norm=norm, backward=backward) for backward in ("float32", "saved_int8"))
    x, up = drawn(*rows, 48, seed=5), drawn(*rows, 20, seed=6)
    (y, expected), (y8, found) = gradients(plain, x, up), gradients(saved, x, up)
    torch.testing.assert_close(y8, y, atol=1e-6, rtol=1e-6)
    assert found.keys() == expected.keys() == {"x", "weight", "bias"} | ({"norm.weight"} if normed else set())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call().sum().backward()
    return sum(sizes)


@pytest.mark.parametrize("backward", ["saved_int8", "int8"])
@pytest.mark.parametrize("rows", [16, 512])
def test_int8_keeps_less_than_half_for_the_backward_pass(backward: Any, rows: int) -> None:
    x = drawn(rows, 128).requires_grad_()
    baseline = saved_bytes(lambda: layer(128, 256)(x))
    assert baseline == 4 * (x.numel() + 128 * 256)
    share = saved_bytes(lambda: layer(128, 256, backward=backward)(x)) / baseline
    assert 0.25 < share <= 0.27  # bytes of x and W, and a scale per row


def test_random_rounding_is_unbiased() -> None:
    gradient = drawn(8, 32) * 10.0 ** -torch.arange(8).unsqueeze(1)
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack(
        [values / rate for values, rate in (rounded_at_random(gradient, generator) for _ in range(1000))]
    )
    unit = gradient.abs().amax(-1, keepdim=True) / 127
    # a draw is off by less than a unit, so the mean of 1000 by a deviation of at most 1/2 / sqrt(1000) units
    assert ((draws - gradient).abs() < 1.001 * unit).all()
    assert ((draws.mean(0) - gradient).abs() / unit).max() < 5 * 0.5 / 1000**0.5
    assert (draws.mean(0) - gradient).div(unit).mean().abs() < 5 * 0.5 / (1000 * gradient.numel()) ** 0.5
    zeros, rate = rounded_at_random(torch.zeros(2, 4), generator)
    assert not zeros.any()
    assert rate.isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_int8_gradients_point_where_the_exact_ones_do(seed: int) -> None:
    exact, rounded = (layer(96, 64, seed=seed, backward=backward) for backward in ("saved_int8", "int8"))
    x, up = drawn(40, 96, seed=seed + 5), drawn(40, 64, seed=seed + 6)
    (y, expected), (y8, found) = gradients(exact, x, up), gradients(rounded, x, up)
    assert torch.equal(y, y8)
    assert not torch.equal(found["x"], expected["x"])
    assert torch.cosine_similarity(found["x"].flatten(), expected["x"].flatten(), dim=0) > 0.99
    assert torch.equal(found["weight"], expected["weight"])  # of these the gradient is not rounded
    assert torch.equal(found["bias"], expected["bias"])


def test_int8_draws_follow_the_seed_of_the_step_and_that_of_the_layer() -> None:
    x, up = drawn(9, 32, seed=5), drawn(9, 16, seed=6)

    def rounded(step_seed: int, own_seed: int) -> Tensor:
        torch.manual_seed(step_seed)
        made = layer(32, 16, backward="int8")
        made.seed = own_seed
        return gradients(made, x, up)[1]["x"]

    assert torch.equal(rounded(1, 0), rounded(1, 0))
    assert not torch.equal(rounded(1, 0), rounded(2, 0))
    assert not torch.equal(rounded(1, 0), rounded(1, 7))


def test_looking_at_a_layer_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    with torch.no_grad():
        layer(32, 16, backward="int8")(drawn(3, 32))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_below_strength_1_the_backward_pass_is_exact() -> None:
    x, up = drawn(9, 32, seed=5), drawn(9, 16, seed=6)
    exact, rounded = layer(32, 16), layer(32, 16, backward="int8")
    exact.strength = rounded.strength = 0.5
    (y, expected), (y8, found) = gradients(exact, x, up), gradients(rounded, x, up)
    assert torch.equal(y, y8)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_bfloat16_autocast_over_float32_weights(backward: Any, strength: float) -> None:
    norm = nn.RMSNorm(48)
    made, x, up = layer(48, 20, norm=norm, backward=backward), drawn(6, 48, seed=5), drawn(6, 20, seed=6)
    made.strength = strength
    exact, expected = gradients(made, x, up)
    for given in (x, x.to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            y, found = gradients(made, given, up)
        assert y.dtype == torch.bfloat16
        assert {found[name].dtype for name in ("weight", "bias", "norm.weight")} == {torch.float32}
        assert found["x"].dtype == given.dtype
        torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.05)
        assert torch.cosine_similarity(found["weight"].flatten(), expected["weight"].flatten(), dim=0) > 0.999
        assert torch.cosine_similarity(found["x"].float().flatten(), expected["x"].flatten(), dim=0) > 0.99


def test_whole_numbers_lose_nothing_under_autocast() -> None:
    """What is summed is exact in bfloat16, so only the result is rounded."""
    made, x = layer(64, 16, bias=False, backward="saved_int8"), drawn(50, 64, seed=5)
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = made(x)
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=1e-5)


def test_half_precision_inputs_do_not_overflow() -> None:
    made = TernaryLinear(nn.Parameter(torch.ones(4, 2048)), backward="saved_int8")
    y = made(torch.ones(1, 2048, dtype=torch.float16))
    assert torch.equal(y, torch.full((1, 4), 2048, dtype=torch.float16))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradient_checkpointing_changes_nothing(backward: Any) -> None:
    first, second = layer(32, 24, backward=backward), layer(24, 16, backward=backward, seed=9)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        x = drawn(9, 32, seed=5).requires_grad_()
        y = checkpoint(lambda x: second(first(x)), x, use_reentrant=False) if recompute else second(first(x))
        found.append(torch.autograd.grad(y.square().sum(), [x, first.weight, second.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_norm_and_latent_weight_are_the_state_and_the_strength_is_not() -> None:
    made = layer(8, 4, norm=nn.RMSNorm(8))
    assert set(made.state_dict()) == {"weight", "bias", "norm.weight"}
    x = drawn(3, 8)
    made.strength = 0.0
    assert torch.equal(made(x), linear(made.norm(x), made.weight, made.bias))


def test_int8_backward_needs_int8_activations() -> None:
    with pytest.raises(ValueError, match="keeps int8 activations"):
        layer(8, 4, activation_bits=None, backward="int8")
    made, x = layer(8, 4, activation_bits=None), drawn(3, 8)
    trits, gamma = made.trits()
    assert torch.equal(made(x), linear(x, trits * gamma, made.bias))


def test_gradients_of_gradients_are_refused_rather_than_wrong() -> None:
    made, x = layer(8, 4, backward="saved_int8"), drawn(3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
