"""The checklist's network: strided convolutions over the bytes of a chunk, transposed ones back to its positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenkit.tokenizers.autoencoder.chunkers import cut, escaped, to_bytes
from tokenkit.tokenizers.autoencoder.layers import Conv1DLayer, Deconv1DLayer, SavedModule, he_normal, plain_options
from tokenkit.tokenizers.autoencoder.lengths import literal_length, stack_problem, start_length
from tokenkit.tokenizers.autoencoder.network import (
    END,
    NUM_SYMBOLS,
    ConvolutionConfig,
    NetworkConfig,
    chunks_of,
    symbols_of,
)

Activation = Literal["relu", "gelu"]
Pooling = Literal["global_avg", "flatten", "attention"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
LOW_CONFIDENCE = 0.5


class CharacterEncoder(SavedModule):
    """The bytes of a chunk → `d_latent` numbers. Positions after the last byte hold the end symbol."""

    def __init__(
        self,
        d_char: int,
        d_latent: int | None,
        conv_channels: Sequence[int],
        kernel_sizes: Sequence[int],
        strides: Sequence[int],
        max_chunk_size: int = 16,
        *,
        activation: Activation = "relu",
        pooling: Pooling = "global_avg",
        normalise: bool = False,
    ) -> None:
        """Without `d_latent` the numbers are those that pooling leaves. ValueError for lists that do not match."""
        super().__init__()
        self.options = plain_options(locals())
        _check_stack("encoder", conv_channels, kernel_sizes, strides)
        self.max_chunk_size, self.pooling = max_chunk_size, pooling
        self.table = nn.Embedding(NUM_SYMBOLS, d_char)
        widths, length = [d_char, *conv_channels], max_chunk_size
        self.layers, self.after = nn.ModuleList(), nn.ModuleList()
        for (left, right), kernel_size, stride in zip(pairwise(widths), kernel_sizes, strides):
            layer = Conv1DLayer(left, right, kernel_size, stride, kernel_size // 2)
            length = layer.output_length(length)
            self.layers.append(layer)
            self.after.append(_after(right, activation, normalise))
        pooled = widths[-1] * (length if pooling == "flatten" else 1)
        if pooling == "attention":
            self.score = nn.Linear(widths[-1], 1)
            self.place = nn.Parameter(torch.zeros(length, 1))
        self.width = pooled if d_latent is None else d_latent
        self.project = nn.Identity() if self.width == pooled else nn.Linear(pooled, self.width)
        self.initialize_weights()

    def initialize_weights(self, seed: int | None = None) -> None:
        """Byte vectors of standard deviation 0.1, layers of variance 2 / fan-in, no biases; a seed repeats them."""
        with torch.random.fork_rng([], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            nn.init.normal_(self.table.weight, std=0.1)
            self.apply(he_normal)

    def forward(self, symbols: Int[Tensor, "B T"]) -> Float[Tensor, "B H"]:
        """Numbers of chunks, given as bytes and end symbols."""
        x = self.table(symbols)
        for layer, after in zip(self.layers, self.after):
            x = after(layer(x))
        return self.project(self._pooled(x))

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pooling == "flatten":
            return x.flatten(1)
        if self.pooling == "global_avg":
            return x.mean(1)
        return ((self.score(x) + self.place).softmax(1) * x).sum(1)

    def encode(self, text: str | bytes) -> Float[Tensor, "1 H"]:
        """Numbers of one chunk. What is longer than a chunk is left out; an empty one is all zeros."""
        return self.encode_batch([text])

    @torch.no_grad()
    def encode_batch(self, texts: Sequence[str | bytes]) -> Float[Tensor, "B H"]:
        """Numbers of chunks, one row each; the same as of every chunk alone."""
        chunks = [_first_chunk(text, self.max_chunk_size) for text in texts]
        symbols = symbols_of(chunks, self.max_chunk_size).to(self.table.weight.device)
        return self(symbols) * (symbols[:, :1] != END)


@dataclass(frozen=True)
class DecoderMetrics:
    """How sure a decoder was: probabilities of the symbols that it chose."""

    average_confidence: float
    minimum_confidence: float
    low_confidence_positions: int
    """Positions under 0.5."""
    confidences: tuple[float, ...]
    """One per position."""


class VectorDecoder(SavedModule):
    """Numbers of a chunk → a distribution over 256 bytes and the end, at every one of `output_length` positions."""

    def __init__(
        self,
        d_latent: int,
        deconv_channels: Sequence[int],
        kernel_sizes: Sequence[int],
        strides: Sequence[int],
        output_length: int = 16,
        char_vocab_size: int = 256,
        *,
        activation: Activation = "relu",
        normalise: bool = False,
    ) -> None:
        """A last channel count of 256 is that of the bytes; after another one a projection follows.

        Output lengths are exact for every kernel and stride, where padding 1 would lose positions (see `lengths`).
        ValueError for lists that do not match, and for another vocabulary than the bytes.
        """
        super().__init__()
        self.options = plain_options(locals())
        _check_stack("decoder", deconv_channels, kernel_sizes, strides)
        if char_vocab_size not in (END, NUM_SYMBOLS):
            raise ValueError(f"char_vocab_size {char_vocab_size}: write 256, the number of byte values")
        self.output_length = output_length
        self.literal_length = literal_length(output_length, kernel_sizes, strides)
        """Positions that padding 1 everywhere would have given."""
        channels = list(deconv_channels)
        self.projected = channels[-1] not in (END, NUM_SYMBOLS)
        self.start = (start_length(output_length, strides), channels[0])
        self.enter = nn.Linear(d_latent, self.start[0] * channels[0])
        widths = [channels[0], *(channels if self.projected else [*channels[:-1], NUM_SYMBOLS])]
        self.layers = nn.ModuleList(
            Deconv1DLayer.exact(left, right, kernel_size, stride)
            for (left, right), kernel_size, stride in zip(pairwise(widths), kernel_sizes, strides)
        )
        hidden = widths if self.projected else widths[:-1]
        self.after = nn.ModuleList(_after(width, activation, normalise) for width in hidden)
        self.leave = nn.Linear(widths[-1], NUM_SYMBOLS) if self.projected else nn.Identity()
        self._last: DecoderMetrics | None = None
        self.initialize_weights()
        self._check_length(strides)

    def _check_length(self, strides: Sequence[int]) -> None:
        length = self.start[0]
        for stride in strides:
            length *= stride
        if length < self.output_length:
            raise ValueError(f"decoder: {length} positions, where a chunk has {self.output_length}")

    def initialize_weights(self, seed: int | None = None) -> None:
        """Layers of variance 2 / fan-in, no biases; a seed repeats them."""
        with torch.random.fork_rng([], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.apply(he_normal)

    def features(self, values: Float[Tensor, "B d"]) -> Float[Tensor, "B H"]:
        """What the first layer makes of numbers: chunks that decode alike are near each other here."""
        first = self._entered(values)
        return (self._layer(0, first) if len(self.after) > 1 else first).flatten(1)

    def forward(self, values: Float[Tensor, "B d"]) -> Float[Tensor, "B T S"]:
        """Logits of the 256 bytes and the end, at every position."""
        x = self._entered(values)
        for index in range(len(self.layers)):
            x = self._layer(index, x)
        return self.leave(x)[:, : self.output_length]

    def _entered(self, values: Tensor) -> Tensor:
        return self.after[0](self.enter(values).unflatten(-1, self.start))

    def _layer(self, index: int, x: Tensor) -> Tensor:
        layer = self.layers[index]
        x = layer(x)[:, : x.shape[1] * layer.stride]
        return self.after[index + 1](x) if index + 1 < len(self.after) else x

    def decode(self, latent: Float[Tensor, "*one d"]) -> Float[Tensor, "T S"]:
        """Probabilities of one chunk; `get_last_metrics` then says how sure they are."""
        probabilities, self._last = self.decode_with_metrics(latent)
        return probabilities

    @torch.no_grad()
    def decode_with_metrics(self, latent: Float[Tensor, "*one d"]) -> tuple[Float[Tensor, "T S"], DecoderMetrics]:
        """Probabilities of one chunk and how sure they are; nothing is kept, so threads may share the decoder."""
        if latent.ndim > 1 and latent.shape[:-1].numel() != 1:
            raise ValueError(f"{list(latent.shape)} numbers, where one chunk is decoded; use decode_batch")
        probabilities = self.decode_batch(latent.reshape(1, -1))[0]
        confidences = probabilities.amax(-1).tolist()
        low = sum(confidence < LOW_CONFIDENCE for confidence in confidences)
        average = sum(confidences) / len(confidences)
        return probabilities, DecoderMetrics(average, min(confidences), low, tuple(confidences))

    @torch.no_grad()
    def decode_batch(self, latents: Float[Tensor, "B d"]) -> Float[Tensor, "B T S"]:
        """Probabilities of chunks."""
        return self(latents).softmax(-1)

    def decode_bytes(self, latent: Float[Tensor, "*one d"]) -> bytes:
        """The likeliest bytes before the first end; none is ever left out."""
        return chunks_of(self.decode(latent).argmax(-1).unsqueeze(0))[0]

    def decode_to_text(self, latent: Float[Tensor, "*one d"], *, raw: bool = False) -> str:
        """`decode_bytes` as text to look at: U+FFFD for what is no UTF-8, and signs for control characters.

        With `raw` control characters stay, as they do in everything that a tokenizer decodes.
        """
        text = self.decode_bytes(latent).decode("utf-8", "replace")
        return text if raw else text.translate(VISIBLE)

    def get_last_metrics(self) -> DecoderMetrics | None:
        """How sure the last `decode` was, of whichever thread; None before the first."""
        return self._last


VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def convolution_pair(config: NetworkConfig) -> tuple[CharacterEncoder, VectorDecoder]:
    """The two sides of a network of convolutions: symbols → features, and grid values → logits."""
    shape = config.convolution or ConvolutionConfig()
    encoder = CharacterEncoder(
        shape.d_char,
        shape.d_latent,
        shape.channels,
        shape.kernel_sizes,
        shape.strides,
        config.max_bytes,
        activation=shape.activation,
        pooling=shape.pooling,
        normalise=shape.normalise,
    )
    decoder = VectorDecoder(
        config.groups * len(config.levels),
        shape.deconv_channels,
        shape.deconv_kernel_sizes,
        shape.deconv_strides,
        config.max_bytes,
        activation=shape.deconv_activation,
        normalise=shape.normalise,
    )
    return encoder, decoder


def _first_chunk(text: str | bytes, max_bytes: int) -> bytes:
    data = text if isinstance(text, bytes) else to_bytes(escaped(text))
    return next(iter(cut(data, max_bytes)), b"")


def _after(width: int, activation: Activation, normalise: bool) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width) if normalise else nn.Identity(), ACTIVATIONS[activation]())


def _check_stack(side: str, channels: Sequence[int], kernel_sizes: Sequence[int], strides: Sequence[int]) -> None:
    problem = stack_problem(channels, kernel_sizes, strides)
    if problem:
        raise ValueError(f"{side}: {problem}")
