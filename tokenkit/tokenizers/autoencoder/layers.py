"""Convolutions along a sequence as the checklist has them, and modules that one file holds."""

import json
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.lengths import convolution_length, deconvolution_length, exact_padding
from tokenkit.tokenizers.whole_file import write_whole

Saved = TypeVar("Saved", bound="SavedModule")


class SavedModule(nn.Module):
    """A module that one safetensors file holds: its weights, and in the header what it was made of."""

    options: dict[str, Any]

    def save(self, path: Path | str) -> None:
        """Writes weights and options."""
        header = {"kind": type(self).__name__, "options": json.dumps(self.options)}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_whole(path, to_safetensors(tensors, header))

    @classmethod
    def load(cls: type[Saved], path: Path | str) -> Saved:
        """The module that `save` wrote; UserError for another file."""
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("kind") != cls.__name__:
                    raise UserError(f"{path}: holds {header.get('kind', 'other weights')}, not a {cls.__name__}")
                module = cls(**json.loads(header["options"]))
                module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: not a saved {cls.__name__} ({str(error).splitlines()[0]})") from None
        return module.eval()


class Conv1DLayer(SavedModule):
    """A convolution along the positions of a sequence: (n, channels) or a batch of them, in and out."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.options = plain_options(locals())
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.inner = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding)
        he_normal(self.inner)

    def output_length(self, length: int) -> int:
        """Positions made of `length`."""
        return convolution_length(length, self.kernel_size, self.stride, self.padding)

    def forward(self, x: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b m o"]:
        """`output_length(n)` positions."""
        return self.inner(x.transpose(-1, -2)).transpose(-1, -2)


class Deconv1DLayer(SavedModule):
    """A transposed convolution along the positions of a sequence: (n, channels) or a batch of them, in and out."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 1,
        output_padding: int = 0,
    ) -> None:
        super().__init__()
        self.options = plain_options(locals())
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.output_padding = padding, output_padding
        self.inner = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride, padding, output_padding)
        he_normal(self.inner)

    @classmethod
    def exact(cls, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> "Deconv1DLayer":
        """A layer of which the first n * stride positions of the output are wanted: padding for any kernel."""
        return cls(in_channels, out_channels, kernel_size, stride, *exact_padding(kernel_size, stride))

    def output_length(self, length: int) -> int:
        """Positions made of `length`."""
        return deconvolution_length(length, self.kernel_size, self.stride, self.padding, self.output_padding)

    def forward(self, x: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b m o"]:
        """`output_length(n)` positions."""
        return self.inner(x.transpose(-1, -2)).transpose(-1, -2)


def he_normal(module: nn.Module) -> None:
    """Weights of variance 2 / fan-in, biases of zero; of a layer only, not of what holds layers."""
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        fan_in = module.in_channels * module.kernel_size[0]
    elif isinstance(module, nn.Linear):
        fan_in = module.in_features
    else:
        return
    nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def plain_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor, as `locals()` has them, in the form that JSON keeps."""
    kept = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
    lists = {name: list(value) for name, value in kept.items() if isinstance(value, list | tuple)}
    return kept | lists
