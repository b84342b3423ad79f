"""The auto-encoder of short byte strings: order-preserving residual MLPs around groups of quantised codes.

Nothing that a tokenizer does relies on the network being right: what it says is checked before it is used.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tokenkit.config import Config, UserError
from tokenkit.tokenizers.autoencoder.lengths import stack_problem
from tokenkit.tokenizers.autoencoder.quantizer import KAPPA, DigitOrder, FSQLayer, Mode

END = 256  # the symbol after the last byte of a chunk that is shorter than the longest
NUM_SYMBOLS = 257
LEVELS = (8, 8, 8, 8, 8, 5, 5, 5)  # 4,096,000 codes


class ConvolutionConfig(Config):
    """Shape of the convolutions; by default those of the checklist with what its stack lacks to learn."""

    d_char: int = Field(64, ge=1)
    d_latent: int | None = Field(None, ge=1)
    """Numbers that the encoder gives; by default those that pooling leaves, without a projection."""
    channels: tuple[int, ...] = (128, 256, 256)
    kernel_sizes: tuple[int, ...] = (3, 3, 3)
    strides: tuple[int, ...] = (1, 2, 2)
    activation: Literal["relu", "gelu"] = "gelu"
    pooling: Literal["global_avg", "flatten", "attention"] = "flatten"
    normalise: bool = True
    """LayerNorm after every layer; without it the stack collapses to a few codes."""
    deconv_channels: tuple[int, ...] = (256, 256, 128, 256)
    deconv_kernel_sizes: tuple[int, ...] = (4, 4, 3, 3)
    deconv_strides: tuple[int, ...] = (2, 2, 1, 1)
    deconv_activation: Literal["relu", "gelu"] = "gelu"

    @model_validator(mode="after")
    def _fits(self) -> "ConvolutionConfig":
        stacks = {
            "encoder": (self.channels, self.kernel_sizes, self.strides),
            "decoder": (self.deconv_channels, self.deconv_kernel_sizes, self.deconv_strides),
        }
        for name, stack in stacks.items():
            problem = stack_problem(*stack)
            if problem:
                raise UserError(f"network.convolution, {name}: {problem}")
        return self


class NetworkConfig(Config):
    """Shape of the network and of its quantiser."""

    kind: Literal["residual", "convolution"] = "residual"
    """Residual MLPs over all positions at once, or the strided convolutions of the checklist."""
    max_bytes: int = Field(8, ge=1, le=64)
    """Longest chunk that is coded."""
    levels: tuple[int, ...] = LEVELS
    groups: int = Field(3, ge=1, le=8)
    """Codes that the longest spelling of a chunk has."""
    min_groups: int = Field(2, ge=1)
    """Codes that the shortest has; training draws a length in between for every chunk."""
    mode: Mode = "M"
    digit_order: DigitOrder = "msf"
    kappa: float = Field(KAPPA, gt=0)
    """Slope of the activation of mode M: KAPPA over the checklist's temperature."""
    hidden: int = Field(384, ge=8)
    encoder_blocks: int = Field(1, ge=0)
    decoder_blocks: int = Field(2, ge=0)
    byte_width: int = Field(32, ge=4)
    """Width of the table of byte vectors."""
    convolution: ConvolutionConfig | None = None
    """Shape of the convolutions, where `kind` says so."""

    @model_validator(mode="after")
    def _fits(self) -> "NetworkConfig":
        if self.min_groups > self.groups:
            raise UserError(f"network.min_groups: {self.min_groups} of {self.groups} groups; write fewer")
        if self.convolution and self.kind != "convolution":
            raise UserError(f"network.convolution: the network is {self.kind}; write kind convolution, or leave it out")
        self.quantizer()
        return self

    def quantizer(self) -> FSQLayer:
        """The quantiser of one group; UserError for levels that make none."""
        try:
            return FSQLayer(self.levels, self.mode, digit_order=self.digit_order, kappa=self.kappa)
        except ValueError as error:
            raise UserError(f"network: {error}") from None


PRESETS: dict[str, NetworkConfig] = {
    "nano": NetworkConfig(hidden=192, encoder_blocks=1, decoder_blocks=1, byte_width=24, groups=2),
    "small": NetworkConfig(),
    "base": NetworkConfig(max_bytes=12, hidden=512, encoder_blocks=2, decoder_blocks=3, byte_width=48),
    "gpu": NetworkConfig(max_bytes=16, hidden=1024, encoder_blocks=4, decoder_blocks=6, byte_width=64, groups=4),
    "compat": NetworkConfig(  # the checklist's literal layers; a decoder of 16 positions, not 13, and an end symbol
        kind="convolution",
        max_bytes=16,
        groups=1,
        min_groups=1,
        mode="P",
        convolution=ConvolutionConfig(
            activation="relu",
            pooling="global_avg",
            normalise=False,
            deconv_kernel_sizes=(3, 3, 3, 3),
            deconv_activation="relu",
        ),
    ),
}


class ResidualBlock(nn.Module):
    """x + W₂ GELU(W₁ LayerNorm(x)); nothing at first, since W₂ begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Float[Tensor, "*b h"]) -> Float[Tensor, "*b h"]:
        """The sum of the input and what the block makes of it."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualEncoder(nn.Module):
    """Symbols → features, with every position in a place of its own."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_SYMBOLS, config.byte_width)
        self.width = config.hidden
        self.mix = nn.Linear(config.max_bytes * config.byte_width, config.hidden)
        self.blocks = nn.Sequential(*(ResidualBlock(config.hidden) for _ in range(config.encoder_blocks)))
        nn.init.normal_(self.table.weight, std=0.5)

    def forward(self, symbols: Int[Tensor, "B T"]) -> Float[Tensor, "B H"]:
        """Features that are not normalised yet."""
        return self.blocks(self.mix(self.table(symbols).flatten(1)))


class ResidualDecoder(nn.Module):
    """Grid values → logits of every position, against a table of byte vectors."""

    def __init__(self, config: NetworkConfig, table: nn.Embedding) -> None:
        super().__init__()
        self.shape = (config.max_bytes, config.byte_width)
        self.enter = nn.Linear(config.groups * len(config.levels), config.hidden)
        self.blocks = nn.Sequential(*(ResidualBlock(config.hidden) for _ in range(config.decoder_blocks)))
        self.leave = nn.Linear(config.hidden, config.max_bytes * config.byte_width)
        self.norm = nn.LayerNorm(config.byte_width)
        self.bias = nn.Parameter(torch.zeros(NUM_SYMBOLS))
        self._table = [table]  # the encoder's; a list, so that it is not a second owner

    def features(self, values: Float[Tensor, "B Gd"]) -> Float[Tensor, "B H"]:
        """What the first block makes of grid values: strings that decode alike are near each other here."""
        x = self.enter(values)
        return self.blocks[0](x) if len(self.blocks) else x

    def forward(self, values: Float[Tensor, "B Gd"]) -> Float[Tensor, "B T S"]:
        """Logits of the 256 bytes and the end, at every position."""
        x = self.leave(self.blocks(self.enter(values))).unflatten(-1, self.shape)
        return F.linear(self.norm(x), self._table[0].weight, self.bias)


class AutoEncoder(nn.Module):
    """Symbols of a chunk ⇄ groups of codes."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.max_bytes, self.groups = config.max_bytes, config.groups
        self.quantizer = config.quantizer()
        d = self.quantizer.num_dimensions
        if config.kind == "convolution":
            from tokenkit.tokenizers.autoencoder.convolution import convolution_pair

            self.encoder, self.decoder = convolution_pair(config)
        else:
            self.encoder = ResidualEncoder(config)
            self.decoder = ResidualDecoder(config, self.encoder.table)
        self.norm = nn.LayerNorm(self.encoder.width)
        self.latent = nn.Linear(self.encoder.width, config.groups * d)
        self.missing = nn.Parameter(torch.zeros(config.groups, d))
        """What stands for a group that was not sent."""

    def latents(self, symbols: Int[Tensor, "B T"]) -> Float[Tensor, "B G d"]:
        """What is quantised: about unit-normal coordinates."""
        z = self.latent(self.norm(self.encoder(symbols)))
        return z.unflatten(-1, (self.groups, self.quantizer.num_dimensions))

    def digits(self, symbols: Int[Tensor, "B T"]) -> Int[Tensor, "B G d"]:
        """The digits of every group."""
        return self.quantizer.digits(self.latents(symbols))

    def logits(self, values: Float[Tensor, "B G d"], kept: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T S"]:
        """Logits of grid values of which the first `kept` groups were sent, by default all."""
        return self.decoder(self.masked(values, kept).flatten(1))

    def masked(self, values: Float[Tensor, "B G d"], kept: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B G d"]:
        """Grid values with the learnt vector in place of groups that were not sent."""
        if kept is None:
            return values
        sent = torch.arange(self.groups, device=values.device) < kept.unsqueeze(1)
        return torch.where(sent.unsqueeze(-1), values, self.missing.to(values.dtype))

    def forward(
        self, symbols: Int[Tensor, "B T"], kept: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T S"], Float[Tensor, "B G d"], Int[Tensor, "B G d"]]:
        """Logits of the reconstruction, latents and digits; gradients pass the rounding straight through."""
        latents = self.latents(symbols)
        values, digits = self.quantizer(latents)
        return self.logits(values.to(latents.dtype), kept), latents, digits

    @torch.no_grad()
    def scale_latents(self, symbols: Int[Tensor, "B T"]) -> None:
        """Gives every latent coordinate zero mean and unit variance over these chunks.

        Without it, and without the normalisation before it, the chunks begin on a handful of codes and may stay there.
        """
        z = self.latent(self.norm(self.encoder(symbols)))
        scale = 1 / z.std(0).clamp_min(1e-6)
        self.latent.weight.mul_(scale.unsqueeze(1))
        self.latent.bias.copy_((self.latent.bias - z.mean(0)) * scale)


def symbols_of(chunks: Sequence[bytes], max_bytes: int) -> Int[Tensor, "B T"]:
    """Chunks of at most `max_bytes` bytes as symbols, the rest filled with END."""
    joined = b"".join(chunk.ljust(max_bytes, b"\0") for chunk in chunks)
    symbols = torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    lengths = torch.tensor([len(chunk) for chunk in chunks])
    if len(chunks) and int(lengths.max()) > max_bytes:
        raise ValueError(f"a chunk of {int(lengths.max())} bytes, where {max_bytes} is the most")
    symbols = symbols.view(len(chunks), max_bytes).long()
    return symbols.masked_fill(torch.arange(max_bytes) >= lengths.unsqueeze(1), END)


def chunks_of(symbols: Int[Tensor, "B T"]) -> list[bytes]:
    """The bytes before the first END of every row."""
    return [bytes(row[: row.index(END)] if END in row else row) for row in symbols.tolist()]


def scored_positions(symbols: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The bytes of each chunk and, where there is room, the END after them."""
    inside = symbols != END
    return inside | (F.pad(inside, (1, 0), value=True)[:, :-1] & ~inside)


def decoded_right(logits: Float[Tensor, "B T S"], symbols: Int[Tensor, "B T"], margin: float) -> Bool[Tensor, "B"]:
    """Whether every scored position of a chunk says what it should, ahead of all else by `margin`."""
    wrong = logits.scatter(-1, symbols.unsqueeze(-1), -torch.inf).amax(-1)
    right = logits.gather(-1, symbols.unsqueeze(-1)).squeeze(-1)
    return ((right - wrong >= margin) & (right > wrong) | ~scored_positions(symbols)).all(-1)
