"""The checklist's JSON configuration of a learned tokenizer, key by key, and what our network makes of it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from tokenkit.config import Config, UserError, build, resolved
from tokenkit.tokenizers.autoencoder.chunkers import DEFAULT, make_chunker
from tokenkit.tokenizers.autoencoder.ids import FIRST_REGULAR_ID, SPECIALS
from tokenkit.tokenizers.autoencoder.lengths import stack_problem
from tokenkit.tokenizers.json_config import Values, move, read_config, write_json

if TYPE_CHECKING:  # the network needs torch, which a tokenizer of pins and bytes does without
    from tokenkit.tokenizers.autoencoder.network import NetworkConfig

Preset = Literal["nano", "small", "base", "gpu", "compat"]
Activation = Literal["relu", "gelu"]
COMPAT = "compat"
CONVOLUTIONS = ("architecture", "encoder", "decoder")


class ArchitectureSection(Config):
    """Sizes that encoder and decoder share."""

    d_char: int = Field(64, ge=1)
    """Width of the table of byte vectors, in a network of convolutions."""
    d_latent: int = Field(8, ge=1)
    """Numbers that the convolutions give; a projection to the digits follows."""
    max_chunk_size: int = Field(16, ge=1, le=64)
    """Bytes of the longest chunk that convolutions read. Other presets have a size of their own."""
    char_vocab_size: Literal[256] = 256


class EncoderSection(Config):
    """The convolutions that read a chunk."""

    conv_channels: tuple[int, ...] = (128, 256, 256)
    kernel_sizes: tuple[int, ...] = (3, 3, 3)
    strides: tuple[int, ...] = (1, 2, 2)
    activation: Activation = "relu"
    pooling: Literal["global_avg", "flatten", "attention"] = "global_avg"

    @model_validator(mode="after")
    def _fits(self) -> "EncoderSection":
        problem = stack_problem(self.conv_channels, self.kernel_sizes, self.strides)
        if problem:
            raise UserError(f"encoder: {problem}")
        return self


class QuantizerSection(Config):
    """The quantiser. What follows from `levels` may be left out; where it stands it must agree."""

    levels: tuple[int, ...] = (8, 8, 8, 8, 8, 5, 5, 5)
    num_dimensions: int = 8
    total_vocab_size: int = 4_096_000
    vocab_size: int = 32_768
    """Pinned strings: what the checklist calls pruning to the most frequent codes."""
    temperature: float = Field(1.0, gt=0)
    """Divides the slope of the activation; rounding itself knows no temperature."""

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, values: Any) -> Any:
        levels = values.get("levels") if isinstance(values, dict) else None
        if not isinstance(levels, list | tuple) or not all(isinstance(level, int) for level in levels):
            return values
        total = math.prod(levels)
        derived = {"num_dimensions": len(levels), "total_vocab_size": total, "vocab_size": min(32_768, total)}
        return derived | values

    @model_validator(mode="after")
    def _agrees(self) -> "QuantizerSection":
        if not self.levels or min(self.levels) < 2:
            raise UserError(f"fsq.levels: {[*self.levels]}; write one or more integers of at least 2")
        found = {"num_dimensions": len(self.levels), "total_vocab_size": math.prod(self.levels)}
        given = {"num_dimensions": self.num_dimensions, "total_vocab_size": self.total_vocab_size}
        for name, value in found.items():
            if given[name] != value:
                raise UserError(
                    f"fsq.{name}: {given[name]}, but fsq.levels {[*self.levels]} make {value}; leave it out"
                )
        if not 0 <= self.vocab_size <= self.total_vocab_size:
            raise UserError(f"fsq.vocab_size: {self.vocab_size} of {self.total_vocab_size} codes; write fewer")
        return self


class DecoderSection(Config):
    """The transposed convolutions that spell a chunk."""

    deconv_channels: tuple[int, ...] = (256, 256, 128, 256)
    kernel_sizes: tuple[int, ...] = (3, 3, 3, 3)
    strides: tuple[int, ...] = (2, 2, 1, 1)
    activation: Activation = "relu"
    output_activation: Literal["softmax"] = "softmax"
    output_length: int = Field(16, ge=1)
    """At least `architecture.max_chunk_size`; positions beyond the longest chunk are not made."""
    output_vocab_size: Literal[256] = 256
    """Byte values; the symbol that ends a chunk comes on top."""
    d_latent: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "DecoderSection":
        problem = stack_problem(self.deconv_channels, self.kernel_sizes, self.strides)
        if problem:
            raise UserError(f"decoder: {problem}")
        return self


class SpecialTokensSection(Config):
    """Ids of the special tokens; those below `first_regular_id` that have no name are reserved."""

    pad_id: Literal[0] = 0
    unk_id: Literal[1] = 1
    bos_id: Literal[2] = 2
    eos_id: Literal[3] = 3
    first_regular_id: int = Field(FIRST_REGULAR_ID, ge=4)
    """64 by default, and 4 as in the checklist for its own network; user, assistant and system are 4, 5 and 6."""

    @model_validator(mode="after")
    def _whole(self) -> "SpecialTokensSection":
        if 4 < self.first_regular_id < len(SPECIALS):
            raise UserError(
                f"special_tokens.first_regular_id: {self.first_regular_id} leaves out some of the three roles; "
                f"write 4, or {len(SPECIALS)} or more"
            )
        return self


class TrainingSection(Config):
    """AdamW with a warm-up; steps are those of the optimiser."""

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(32, ge=1)
    max_epochs: int = Field(100, ge=1)
    max_steps: int = Field(100_000, ge=1)
    warmup_steps: int = Field(1000, ge=0)
    eval_interval: int = Field(1000, ge=1)
    checkpoint_interval: int = Field(1000, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    validation_split: float = Field(0.1, ge=0, lt=1)
    early_stopping_patience: int = Field(5, ge=0)
    """Evaluations without a better one, after which training stops; 0 for never."""
    target_char_accuracy: float | None = Field(0.95, gt=0, le=1)
    """Accuracy of network and quantiser alone at which training stops; null for never."""


class LoggingSection(Config):
    """What is written while training."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    enable_profiling: bool = True
    log_directory: str = "logs/tokenizer"
    save_metrics: bool = True
    metrics_file: str = "logs/tokenizer/metrics.json"


class PerformanceSection(Config):
    """How the tokenizer runs."""

    use_simd: bool = True
    """Accepted and without effect: arithmetic on tensors is vectorised as it is."""
    num_threads: int = Field(4, ge=1)
    cache_encodings: bool = True
    batch_processing: bool = True


class PathsSection(Config):
    """Where files are."""

    model_save_dir: str = "models/autoencoder_tokenizer"
    checkpoint_dir: str = "checkpoints/tokenizer"
    training_data: str = "data/training_corpus.txt"
    validation_data: str = "data/validation_corpus.txt"


class TokenizerConfig(Config):
    """A learned tokenizer. Without a preset it is `small`, or `compat` where convolutions are described."""

    tokenizer_type: Literal["autoencoder"] = "autoencoder"
    version: str = "1.0.0"
    preset: Preset = "small"
    chunker: str = DEFAULT
    network_overrides: Values = Field(default_factory=dict, alias="network")
    """Fields of the network that differ from the preset's. In a file: `network`."""
    architecture: ArchitectureSection = ArchitectureSection()
    encoder: EncoderSection | None = None
    decoder: DecoderSection | None = None
    fsq: QuantizerSection = QuantizerSection()
    special_tokens: SpecialTokensSection = SpecialTokensSection()
    training: TrainingSection = TrainingSection()
    logging: LoggingSection = LoggingSection()
    performance: PerformanceSection = PerformanceSection()
    paths: PathsSection = PathsSection()

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        move(values, "type", "tokenizer_type")
        move(values, "network_overrides", "network")
        for name in ("d_char", "d_latent", "max_chunk_size", "char_vocab_size"):
            move(values, f"encoder.{name}", f"architecture.{name}")
        move(values, "decoder.char_vocab_size", "decoder.output_vocab_size")
        described = any(values.get(name) is not None for name in CONVOLUTIONS)
        values.setdefault("preset", COMPAT if described else "small")
        if values["preset"] == COMPAT:
            _fill_compat(values)
        return values

    @model_validator(mode="after")
    def _agrees(self) -> "TokenizerConfig":
        if not self.chunker.startswith("entropy:"):  # that one is made of text
            make_chunker(self.chunker)
        if self.preset != COMPAT:
            self._no_convolutions()
            return self
        assert self.encoder is not None
        assert self.decoder is not None
        length, latent = self.architecture.max_chunk_size, self.architecture.d_latent
        if self.decoder.output_length < length:
            raise UserError(
                f"decoder.output_length: {self.decoder.output_length} positions, but architecture.max_chunk_size is "
                f"{length}; write {length}, or shorter chunks"
            )
        if self.decoder.d_latent != latent:
            raise UserError(f"decoder.d_latent: {self.decoder.d_latent}, but architecture.d_latent is {latent}")
        return self

    def _no_convolutions(self) -> None:
        for name, section in (("encoder", self.encoder), ("decoder", self.decoder)):
            if section is not None:
                raise UserError(
                    f"{name}: preset {self.preset} has no convolutions; write preset compat, or leave it out"
                )
        for name in ("d_char", "d_latent"):
            value, usual = vars(self.architecture)[name], ArchitectureSection.model_fields[name].default
            if value != usual:
                raise UserError(
                    f"architecture.{name}: {value} does nothing in preset {self.preset}; write preset compat"
                )

    def network(self) -> "NetworkConfig":
        """The network that is meant: the preset, then the sections of the checklist, then `network`."""
        from tokenkit.tokenizers.autoencoder.network import PRESETS, NetworkConfig
        from tokenkit.tokenizers.autoencoder.quantizer import KAPPA

        values = resolved(PRESETS[self.preset]) | {"levels": [*self.fsq.levels], "kappa": KAPPA / self.fsq.temperature}
        if self.encoder and self.decoder:
            values["max_bytes"] = self.architecture.max_chunk_size
            values["convolution"] |= self._convolutions(values["groups"] * len(self.fsq.levels))
        try:
            return build(NetworkConfig, _merged(values, self.network_overrides))
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith("network") else f"network.{text}") from None

    def _convolutions(self, digits: int) -> Values:
        encoder, decoder = self.encoder, self.decoder
        assert encoder is not None
        assert decoder is not None
        latent = self.architecture.d_latent
        return {
            "d_char": self.architecture.d_char,
            "d_latent": None if latent == digits else latent,  # the projection to the digits is that to the latents
            "channels": [*encoder.conv_channels],
            "kernel_sizes": [*encoder.kernel_sizes],
            "strides": [*encoder.strides],
            "activation": encoder.activation,
            "pooling": encoder.pooling,
            "deconv_channels": [*decoder.deconv_channels],
            "deconv_kernel_sizes": [*decoder.kernel_sizes],
            "deconv_strides": [*decoder.strides],
            "deconv_activation": decoder.activation,
        }

    def save(self, path: Path | str) -> None:
        """Writes the configuration with every value spelled out; `load_config` gives an equal one."""
        values = self.model_dump(mode="json", by_alias=True)
        if self.preset != COMPAT:
            del values["encoder"], values["decoder"]
        write_json(path, values)


def load_config(path: Path | str) -> TokenizerConfig:
    """The configuration that a JSON file holds, the network in it checked; UserError for any mistake."""
    config = read_config(TokenizerConfig, path)
    if config.network_overrides:  # of presets alone there is nothing to check, and torch need not be imported
        try:
            config.network()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return config


def _fill_compat(values: Values) -> None:
    """Sections that the checklist's network has even where a file leaves them out, each agreeing with the others."""
    for name in CONVOLUTIONS:
        if values.get(name) is None:
            values[name] = {}
    architecture, decoder = values["architecture"], values["decoder"]
    if isinstance(architecture, dict) and isinstance(decoder, dict):
        latent = architecture.setdefault("d_latent", decoder.get("d_latent", 8))
        decoder.setdefault("d_latent", latent)
        length = architecture.get("max_chunk_size", 16)
        decoder.setdefault("output_length", length)
        values.setdefault("chunker", f"fixed:{length}")
    special = values.setdefault("special_tokens", {})
    if isinstance(special, dict):
        special.setdefault("first_regular_id", 4)


def _merged(values: Values, changes: Values) -> Values:
    nested = {
        key: _merged(values[key] or {}, change)
        for key, change in changes.items()
        if isinstance(change, dict) and key in values
    }
    return values | changes | nested
