"""What a hypernetwork is made of: pre-norm layers over the few pieces of a token, without dropout."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from tokenkit.config import Config


class HypernetConfig(Config):
    """The shape of a hypernetwork. Minixhofer+ 2024, 2405.07883."""

    architecture: Literal["transformer", "mlp", "linear", "identity"] = "transformer"
    """transformer: layers over the pieces; mlp: the same without attention; linear: a matrix per place; identity:
    nothing is learnt."""
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    hidden_expansion_factor: int = Field(2, ge=1)
    """Width of the layers' inside, in widths."""
    residual: bool = True
    """Predict what is added to the pieces' own row, so that an untrained network changes nothing."""
    residual_alpha: float = Field(8.0, gt=0)
    """What is added is as large as alpha / sqrt(width), in deviations of the rows."""
    residual_pooling: Literal["first", "mean"] = "mean"
    """Which row it is added to: that of the first piece, or the mean over the pieces."""
    use_attention: bool = True
    use_attention_mask: bool = True
    """Attention sees the pieces alone; false: the empty places up to `max_seq_length` too."""
    pooling: Literal["first", "mean"] = "mean"
    """Of which place the last states are read."""
    shared: bool = True
    """One network reads and writes the rows of input and head; false: a network for each."""
    multiply_hidden_dim_by_num_embeddings: bool = True
    """A shared network is as wide as input and head rows together; false: as one of them."""
    max_seq_length: int = Field(8, ge=1)
    """Pieces of a token that are read; what is beyond is not seen."""
    initializer_range: float = Field(0.02, gt=0)
    """Deviation of the first weights."""

    @property
    def attends(self) -> bool:
        """Whether the layers look from one piece at the others."""
        return self.architecture == "transformer" and self.use_attention


class Layer(nn.Module):
    """Attention between the pieces, where there is some, then an MLP; each added to what came in."""

    def __init__(self, width: int, num_heads: int, expansion: int, attends: bool):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width) if attends else None
        self.qkv = nn.Linear(width, 3 * width) if attends else None
        self.attention_out = nn.Linear(width, width) if attends else None
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, states: Float[Tensor, "N L H"], seen: Bool[Tensor, "N L"] | None) -> Float[Tensor, "N L H"]:
        """The states after the layer; `seen` are the places that may be looked at, None: all."""
        if self.attention_norm is not None and self.qkv is not None and self.attention_out is not None:
            qkv = self.qkv(self.attention_norm(states)).unflatten(-1, (3, self.num_heads, -1))
            queries, keys, values = qkv.movedim(2, 0).transpose(2, 3)
            mask = None if seen is None else seen[:, None, None, :]
            found = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            states = states + self.attention_out(found.transpose(1, 2).flatten(2))
        return states + self.down(functional.gelu(self.up(self.norm(states))))


class Network(nn.Module):
    """From the pieces of a token, in deviations of the rows, to what is added to its row; zero at first."""

    def __init__(self, config: HypernetConfig, channels: int, hidden: int):
        """`channels` of a piece: those of one matrix, or of input and head side by side; layers are `hidden` wide."""
        super().__init__()
        self.config = config
        layered = config.architecture in ("transformer", "mlp")
        self.into = nn.Linear(channels, hidden) if layered and hidden != channels else None
        self.places = nn.Parameter(torch.zeros(config.max_seq_length, hidden)) if layered else None
        layer = hidden, config.num_heads, config.hidden_expansion_factor, config.attends
        self.layers = nn.ModuleList(Layer(*layer) for _ in range(config.num_layers if layered else 0))
        self.norm = nn.LayerNorm(hidden) if layered else None
        self.out = nn.Linear(hidden if layered else config.max_seq_length * channels, channels)
        self._draw()

    def forward(self, pieces: Float[Tensor, "N L W"], lengths: Int[Tensor, "N"]) -> Float[Tensor, "N W"]:
        """What is added, per token; places from `lengths` on are empty."""
        inside = torch.arange(pieces.shape[1], device=pieces.device) < lengths[:, None]
        pieces = torch.where(inside[:, :, None], pieces, 0.0)
        if self.norm is None or self.places is None:
            missing = self.config.max_seq_length - pieces.shape[1]
            return self.out(functional.pad(pieces, (0, 0, 0, missing)).flatten(1))
        if not self.config.use_attention_mask:
            missing = self.config.max_seq_length - pieces.shape[1]
            pieces, inside = functional.pad(pieces, (0, 0, 0, missing)), functional.pad(inside, (0, missing))
        states = pieces if self.into is None else self.into(pieces)
        states = states + self.places[: states.shape[1]]
        ragged = self.config.use_attention_mask and not bool(inside.all())
        for layer in self.layers:
            states = layer(states, inside if ragged else None)
        return self.out(pooled(self.norm(states), inside, self.config.pooling))

    @torch.no_grad()
    def _draw(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=self.config.initializer_range)
                module.bias.zero_()
        if self.places is not None:
            self.places.normal_(std=self.config.initializer_range)
        self.out.weight.zero_()


def pooled(
    states: Float[Tensor, "N L H"], inside: Bool[Tensor, "N L"], pooling: Literal["first", "mean"]
) -> Float[Tensor, "N H"]:
    """The first place, or the mean of those inside; a single one is exactly itself."""
    if pooling == "first":
        return states[:, 0]
    return torch.where(inside[:, :, None], states, 0.0).sum(1) / inside.sum(1).clamp_min(1)[:, None]
