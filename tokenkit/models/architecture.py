"""Shapes of a decoder that have a given number of weights: depth against width, heads, groups and the inner width."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import Field, model_validator
from transformers import PreTrainedConfig

from tokenkit.config import Config, UserError
from tokenkit.models.count import config_parameters
from tokenkit.models.shape import GROUPS, HEADS, LAYERS, WIDTH, changed_config, known_keys, own_names

KEY = "shapes"
INNER = ("intermediate_size", "n_inner")


class ShapesConfig(Config):
    """The values that shapes are made of, and how many weights they have."""

    parameters: int = Field(ge=1)
    """Weights of every shape, a tied table counted once."""
    tolerance: float = Field(0.02, gt=0, lt=1)
    """Share of it by which a shape may be larger or smaller."""
    layers: list[int] = Field(min_length=1)
    hidden_size: list[int] = Field(min_length=1)
    heads: list[int] = Field(min_length=1)
    kv_heads: list[int] | None = Field(None, min_length=1)
    """Groups of keys and values; null: as many as heads."""
    ffn: list[int] | None = Field(None, min_length=1)
    """Inner widths; null: for each shape the one that comes nearest to `parameters`."""
    ffn_multiple: int = Field(8, ge=1)
    """An inner width that is found is a multiple of this."""

    @model_validator(mode="after")
    def _positive(self) -> "ShapesConfig":
        for key in ("layers", "hidden_size", "heads", "kv_heads", "ffn"):
            for value in self.__dict__[key] or ():
                if value < 1:
                    raise UserError(f"shapes.{key}: {value} is no size; write whole numbers from 1")
        return self

    def fits(self, weights: int | float) -> bool:
        """Whether a shape has the wanted number of weights."""
        return abs(weights - self.parameters) <= self.tolerance * self.parameters


@dataclass(frozen=True)
class Shape:
    """One shape: the keys of a configuration that make it, and its weights."""

    keys: dict[str, Any]
    parameters: int

    @property
    def name(self) -> str:
        """Layers x width, heads/groups, inner width."""
        layers, width, heads, *rest = self.keys.values()
        groups, inner = rest if len(rest) == 2 else [heads, *rest]
        return f"{layers}x{width}, {heads}/{groups} heads, ffn {inner}"


def shapes_of(template: PreTrainedConfig, config: ShapesConfig) -> list[Shape]:
    """Every shape that can be built and has the wanted number of weights, in the order of the lists; each once.

    A width is a multiple of its heads, the width of a head is even (rotary positions turn pairs), and heads are a
    multiple of their groups. Weights are counted on the meta device.
    """
    kind = type(template)
    inner = next((name for name in INNER if name in known_keys(kind)), None)
    if inner is None:
        raise UserError(f"{KEY}: {kind.model_type} has no inner width to choose; take a family such as llama or qwen2")
    if config.kv_heads is not None and GROUPS not in known_keys(kind):
        raise UserError(f"{KEY}.kv_heads: {kind.model_type} has no groups of keys and values; leave them out")
    found: dict[str, Shape] = {}
    for body in _bodies(config, grouped=GROUPS in known_keys(kind)):
        law = _law(template, body, inner, config.ffn_multiple)
        for layers in config.layers:
            for size in config.ffn or law.nearest(config.parameters, layers, config.ffn_multiple):
                keys = {LAYERS: layers, **body, inner: size}
                if config.fits(law.weights(layers, size)) and config.fits(count := _count(template, keys)):
                    found.setdefault(str(keys), Shape(keys, count))
    if not found:
        raise UserError(
            f"{KEY}: no shape within {config.tolerance:.0%} of {config.parameters:,} weights; allow more values, or a "
            "larger tolerance"
        )
    return list(found.values())


@dataclass(frozen=True)
class _Law:
    """Weights = outside + layers x (per layer + per inner channel x inner width)."""

    outside: float
    per_layer: float
    per_inner: float

    def weights(self, layers: int, inner: int) -> float:
        return self.outside + layers * (self.per_layer + self.per_inner * inner)

    def nearest(self, weights: int, layers: int, multiple: int) -> list[int]:
        """The inner width, if there is one, that comes nearest to so many weights."""
        size = multiple * round(((weights - self.outside) / layers - self.per_layer) / self.per_inner / multiple)
        return [size] if size > 0 else []


def _law(template: PreTrainedConfig, body: dict[str, Any], inner: str, size: int) -> _Law:
    """The law of a width, its heads and groups, from three models: it spares counting what is far from the budget."""
    sizes = ((1, size), (2, size), (1, 2 * size))
    one, two, wider = (float(_count(template, {LAYERS: n, **body, inner: many})) for n, many in sizes)
    per_inner = (wider - one) / size
    return _Law(2 * one - two, two - one - per_inner * size, per_inner)


def _bodies(config: ShapesConfig, *, grouped: bool) -> Iterator[dict[str, Any]]:
    for width, heads in product(config.hidden_size, config.heads):
        if width % heads or width // heads % 2:
            continue
        keys = {WIDTH: width, HEADS: heads}
        for groups in config.kv_heads or [heads]:
            if heads % groups == 0:
                yield {**keys, GROUPS: groups} if grouped else keys


def _count(template: PreTrainedConfig, keys: dict[str, Any]) -> int:
    changes = own_names(type(template), keys, KEY)
    return config_parameters(changed_config(template, changes, None, KEY))
