"""An encoder whose matrix products are of 8-bit integers: faster, and another tokenizer, since its codes are others."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenkit.tokenizers.autoencoder.network import AutoEncoder

EXACT_WIDTH = (1 << 24) // 127**2  # products of so many pairs still add up exactly in float32


class Int8Linear(nn.Module):
    """A linear layer with one scale per output channel and one per row of its input; sums are exact."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Float[Tensor, "B k"]) -> Float[Tensor, "B n"]:
        """What the layer of floats gives, up to the rounding of both sides to 8 bits."""
        steps = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        rounded = (x / steps).round()
        if x.device.type == "cpu" and x.shape[1] > 1:
            sums = torch._int_mm(rounded.to(torch.int8), self.weight.t()).to(x.dtype)
        else:
            sums = rounded @ self.weight.t().to(x.dtype)
        return sums * steps * self.scale + self.bias


def with_int8_encoder(network: AutoEncoder) -> AutoEncoder:
    """A copy whose encoder and latent layer compute with 8 bits; the decoder, which checks, stays as it is.

    ValueError for a layer so wide that sums could be inexact.
    """
    changed = copy.deepcopy(network)
    for parent in [changed, *changed.encoder.modules()]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                if child.in_features > EXACT_WIDTH:
                    raise ValueError(f"{name}: {child.in_features} inputs, where {EXACT_WIDTH} is the most")
                setattr(parent, name, Int8Linear(child))
    return changed
