"""Linear layers whose weights are -1, 0 or 1 times one scale (BitNet b1.58), learnt in full precision underneath.

Ma+ 2024, 2402.17764. Values are those of the quantised layer, gradients those of a plain one (straight-through). What
a backward pass needs is kept as int8 with `backward="saved_int8"`; with `"int8"` the gradient it sends on is rounded to
int8 as well. That saves memory; no speed-up is promised, least of all on a CPU.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from tokenkit.quantities import at_least_float32

Scale = Literal["mean", "median"]
Backward = Literal["float32", "saved_int8", "int8"]
SMALLEST = 1e-5  # of a scale that is divided by; the one that readers of the packed format use too
SMALLEST_GRADIENT = 1e-30  # gradients are small numbers; this only keeps rows of zeros finite


def trits_of(weight: Float[Tensor, "O I"], scale: Scale = "mean") -> tuple[Int8[Tensor, "O I"], Float[Tensor, ""]]:
    """-1, 0 or 1 for every weight, ties to even, and what they are multiplied with: the mean or median of |weight|.

    The scale has at least float32, whatever the weight has: from rounded weights borderline trits would flip.
    """
    weight = at_least_float32(weight.detach())
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    sizes = weight.abs()
    gamma = (sizes.mean() if scale == "mean" else sizes.median()).clamp_min(SMALLEST)
    return (weight / gamma).round_().clamp_(-1, 1).to(torch.int8), gamma


def int8_of(x: Float[Tensor, "*N I"]) -> tuple[Int8[Tensor, "*N I"], Float[Tensor, "*N 1"]]:
    """Whole numbers in -128..127, ties to even, and what each row of x was multiplied with: 127 / its largest size."""
    x = at_least_float32(x.detach())
    rate = 127 / x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * rate).round_().clamp_(-128, 127).to(torch.int8), rate


def rounded_at_random(
    gradient: Float[Tensor, "*N O"], generator: torch.Generator
) -> tuple[Int8[Tensor, "*N O"], Float[Tensor, "*N 1"]]:
    """Like `int8_of`, but rounded up with the probability of the fraction, so that the mean over draws is exact."""
    gradient = at_least_float32(gradient)
    rate = 127 / gradient.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_GRADIENT)
    chance = torch.rand(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
    return (gradient * rate).add_(chance).floor_().clamp_(-128, 127).to(torch.int8), rate


class _Straight(torch.autograd.Function):
    """The value of one tensor, the gradient of another."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _Product(torch.autograd.Function):
    """Quantised x times ternary weights. Sums of whole numbers are scaled once; int8 is all that is kept for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, scale: Scale, seed: int | None) -> Tensor:
        trits, gamma = trits_of(weight, scale)
        values, rate = int8_of(x)
        # these numbers are exact in bfloat16, but their sums are more than float16 can hold
        summed = torch.float32 if dtype == torch.float16 else dtype
        with torch.autocast(x.device.type, enabled=False):
            sums = linear(values.to(summed), trits.to(summed))
        ctx.save_for_backward(values, rate, trits, gamma)
        ctx.dtypes, ctx.seed = (x.dtype, weight.dtype), seed
        return (sums * (gamma / rate)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore [bad-override] (a decorator hides the signature)
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        gradient: Tensor = grad_outputs[0]
        values, rate, trits, gamma = ctx.saved_tensors
        dtype, to_x, to_weight = gradient.dtype, None, None
        if ctx.needs_input_grad[0]:
            steps, scale = gradient, gamma
            if ctx.seed is not None:
                steps, step_rate = rounded_at_random(gradient, torch.Generator(gradient.device).manual_seed(ctx.seed))
                scale = gamma / step_rate
            to_x = ((steps.to(dtype) @ trits.to(dtype)) * scale).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            rows = (gradient / rate).to(dtype).reshape(-1, gradient.shape[-1])
            to_weight = (rows.T @ values.to(dtype).reshape(-1, values.shape[-1])).to(ctx.dtypes[1])
        return to_x, to_weight, None, None, None


class TernaryLinear(nn.Module):
    """x -> W_hat x_hat + b: ternary weights, int8 activations, after a norm of its own (SubLN) where it has one.

    `weight` is the latent matrix that is trained. `strength` goes from 0, a plain linear layer, to 1, a ternary one:
    W + strength (W_hat - W), and the same for x. It is a setting, not a part of the state.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        norm: nn.RMSNorm | None = None,
        scale: Scale = "mean",
        activation_bits: Literal[8] | None = 8,
        backward: Backward = "float32",
        seed: int = 0,
    ):
        super().__init__()
        if activation_bits is None and backward != "float32":
            raise ValueError(f"backward={backward!r} keeps int8 activations, so there have to be some")
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.norm = weight, bias, norm
        self.scale, self.activation_bits, self.backward, self.seed = scale, activation_bits, backward, seed
        self.strength = 1.0

    def trits(self) -> tuple[Int8[Tensor, "O I"], Float[Tensor, ""]]:
        """The weights as -1, 0 and 1, and their scale gamma."""
        return trits_of(self.weight, self.scale)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        dtype = x.dtype
        if self.norm is not None:
            x = self.norm(at_least_float32(x))  # what is quantised has not been rounded before
        if self.strength == 1 and self.backward != "float32":
            computed = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else dtype
            y = _Product.apply(x, self.weight, computed, self.scale, self._draw())
            return y if self.bias is None else y + self.bias.to(y.dtype)
        weight = self.weight
        if self.strength > 0:
            trits, gamma = self.trits()
            weight = self._towards(weight, trits * gamma)
            if self.activation_bits is not None:
                values, rate = int8_of(x)
                x = self._towards(x, (values / rate).to(x.dtype))
        return linear(x.to(dtype), weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def _towards(self, latent: Tensor, quantised: Tensor) -> Tensor:
        value = torch.lerp(latent.detach(), quantised.to(latent.dtype), self.strength)  # exact at 0 and at 1
        return _Straight.apply(latent, value)

    @torch.compiler.disable  # a number of the generator is no part of a compiled graph
    def _draw(self) -> int | None:
        """Where the rounding of this call's gradients begins: like dropout, a draw of the generator of the step."""
        if self.backward != "int8" or not torch.is_grad_enabled():
            return None
        return self.seed ^ int(torch.randint(1 << 62, ()))

    def extra_repr(self) -> str:
        """What a print of the model says of this layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, backward={self.backward}"


def latent_of(layer: nn.Linear | Conv1D) -> nn.Parameter:
    """The weight of a linear layer, out x in, in at least float32: the same object where it is that already."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    kept = isinstance(layer, nn.Linear) and weight.dtype == torch.promote_types(weight.dtype, torch.float32)
    if kept:
        return weight
    matrix = weight.detach() if isinstance(layer, nn.Linear) else weight.detach().T
    copied = torch.empty(matrix.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    return nn.Parameter(copied.copy_(matrix), requires_grad=weight.requires_grad)


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """The ternary layers of a model by dotted name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
