"""What of a trained model a smaller one keeps: whole blocks, channels, neurons, heads. Minitron, 2407.14679.

Blocks are kept by what they do to the hidden states (or to the predictions), widths by mean absolute activations on
calibration texts, all scored once on the whole model. Equal scores are kept in the order of their places, so the same
model and texts give the same sets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import Config, UserError
from tokenkit.models.blocks import block_input, block_list, block_output, skip, watching
from tokenkit.models.shape import GROUPS, HEADS, LAYERS, WIDTH

NORMS = ("input_layernorm", "post_attention_layernorm")
WIDTHS = (WIDTH, "intermediate_size", HEADS, GROUPS)
AXES: dict[str, tuple[str | None, ...]] = {  # last two parts of a tensor's name: what its axes run over
    "embed_tokens.weight": (None, "hidden"),
    "lm_head.weight": (None, "hidden"),
    "norm.weight": ("hidden",),
    **{f"{name}.weight": ("hidden",) for name in NORMS},
    "q_proj.weight": ("query", "hidden"),
    "k_proj.weight": ("key", "hidden"),
    "v_proj.weight": ("key", "hidden"),
    "o_proj.weight": ("hidden", "query"),
    "q_proj.bias": ("query",),
    "k_proj.bias": ("key",),
    "v_proj.bias": ("key",),
    "o_proj.bias": ("hidden",),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "gate_proj.weight": ("neuron", "hidden"),
    "up_proj.weight": ("neuron", "hidden"),
    "down_proj.weight": ("hidden", "neuron"),
    "gate_proj.bias": ("neuron",),
    "up_proj.bias": ("neuron",),
    "down_proj.bias": ("hidden",),
}
WIDE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # families whose every tensor AXES tells of


class PruneConfig(Config):
    """Sizes after pruning; what is not given stays."""

    layers: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads. Alone, it takes whole groups of query heads with their key-value head where that comes out even, and
    else as many query heads from every group."""
    num_key_value_heads: int | None = Field(None, ge=1)
    layer_score: Literal["cosine", "kl"] = "cosine"
    """A block's weight: 1 - cosine between its input and output, or how far the model's predictions go without it."""

    @model_validator(mode="after")
    def _something(self) -> "PruneConfig":
        if self.layers is None and not self.wide:
            raise UserError(f"student.prune: no size is given; write one of layers, {', '.join(WIDTHS)}")
        return self

    @property
    def wide(self) -> bool:
        """Whether any width is pruned."""
        return any(size is not None for size in self.model_dump(include={*WIDTHS}).values())


@dataclass(frozen=True)
class Kept:
    """What is kept, in order: layers of the model, and in each of these what its tensors' axes keep."""

    layers: list[int]
    axes: list[dict[str, list[int]]] = field(default_factory=list)
    """Per kept layer: indices along "hidden", "neuron", "query", "key", of those axes that are cut."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The configuration's keys that change."""
    heads: list[list[int]] = field(default_factory=list)
    """Per kept layer the query heads."""

    def cut(self, name: str, tensor: Tensor, layer: int) -> Tensor:
        """The kept part of a tensor, by its name and the number of its layer among those kept (0 outside of them)."""
        if not self.axes:
            return tensor
        for axis, what in enumerate(AXES[".".join(name.split(".")[-2:])]):
            if what in self.axes[layer]:
                index = torch.tensor(self.axes[layer][what], device=tensor.device)
                tensor = tensor.index_select(axis, index)
        return tensor


@dataclass(frozen=True)
class WidthScores:
    """Mean absolute activations: of every channel, and per layer of every neuron and of every query head."""

    hidden: Float[Tensor, "D"]
    neurons: Float[Tensor, "L F"]
    heads: Float[Tensor, "L H"]


def keep_sets(model: PreTrainedModel, config: PruneConfig, calibration: Sequence[Int[Tensor, "1 _"]]) -> Kept:
    """What of the model is kept, scored on calibration texts."""
    if not calibration:
        raise UserError("student.prune: scores need texts to be measured on; give calibration texts")
    if config.wide and model.config.model_type not in WIDE:
        raise UserError(
            f"student.prune: the widths of {model.config.model_type!r} cannot be pruned here, only its layers; those "
            f"of {', '.join(WIDE)} can"
        )
    before = _sizes(model)
    after = _sizes_after(before, config)
    layers = list(range(before[LAYERS]))
    if after[LAYERS] < before[LAYERS]:
        layers = best(block_scores(model, calibration, config.layer_score), after[LAYERS])
    if not config.wide:
        return Kept(layers)
    axes, heads = _axes(width_scores(model, calibration), before, after)
    sizes = {name: after[name] for name in WIDTHS}
    if after[HEADS] * before["head_dim"] != after[WIDTH]:  # else it follows from the others, as the architecture says
        sizes["head_dim"] = before["head_dim"]
    return Kept(layers, [axes[layer] for layer in layers], sizes, [heads[layer] for layer in layers])


def best(scores: Float[Tensor, "N"], count: int) -> list[int]:
    """The places of the highest scores, in order of place; of equal scores the first places."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


@torch.no_grad()
def block_scores(
    model: PreTrainedModel, calibration: Sequence[Int[Tensor, "1 _"]], score: Literal["cosine", "kl"] = "cosine"
) -> Float[Tensor, "L"]:
    """How much each block matters; 0 for one that changes nothing. ShortGPT's block influence, 2403.03853, or a KL.

    `kl`: mean nats per token from the model's predictions to those without the block.
    """
    _, blocks = block_list(model)
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    positions = sum(ids.shape[1] for ids in calibration)

    def influence(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cosine = nn.functional.cosine_similarity(block_input(args, kwargs), block_output(output), dim=-1)
        sums[number] += (1 - cosine.double()).sum().cpu()

    with _evaluating(model):
        for ids in calibration:
            ids = ids.to(model.device)
            if score == "cosine":
                with watching([(block, partial(influence, number)) for number, block in enumerate(blocks)]):
                    _logp(model, ids)
                continue
            whole = _logp(model, ids)
            for number, block in enumerate(blocks):
                with watching([(block, skip)]):
                    sums[number] += (whole.exp() * (whole - _logp(model, ids))).sum().double().cpu()
    return sums / positions


@torch.no_grad()
def width_scores(model: PreTrainedModel, calibration: Sequence[Int[Tensor, "1 _"]]) -> WidthScores:
    """Channels are scored at the outputs of all norms, neurons at the input of `down_proj`, heads (by their L2 norm) at
    that of `o_proj`.
    """
    _, blocks = block_list(model)
    sizes = _sizes(model)
    hidden = torch.zeros(sizes[WIDTH], dtype=torch.float64)
    neurons = torch.zeros(len(blocks), sizes["intermediate_size"], dtype=torch.float64)
    heads = torch.zeros(len(blocks), sizes[HEADS], dtype=torch.float64)

    def channel(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        hidden.add_(output.abs().double().sum((0, 1)).cpu())

    def neuron(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        neurons[number] += args[0].abs().double().sum((0, 1)).cpu()

    def head(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        heads[number] += args[0].unflatten(-1, (sizes[HEADS], -1)).double().norm(dim=-1).sum((0, 1)).cpu()

    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [(model.base_model.get_submodule("norm"), channel)]
    for number, block in enumerate(blocks):
        hooks += [(block.get_submodule(name), channel) for name in NORMS]
        hooks.append((block.get_submodule("mlp.down_proj"), partial(neuron, number)))
        hooks.append((block.get_submodule("self_attn.o_proj"), partial(head, number)))
    with _evaluating(model), watching(hooks):
        for ids in calibration:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    positions = sum(ids.shape[1] for ids in calibration)
    return WidthScores(hidden / (positions * (1 + len(NORMS) * len(blocks))), neurons / positions, heads / positions)


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    values = model.config.to_dict()
    kind = type(model.config)
    found = {name: values.get(kind.attribute_map.get(name, name)) for name in (LAYERS, *WIDTHS, "head_dim")}
    if found["head_dim"] is None and found[HEADS]:
        found["head_dim"] = found[WIDTH] // found[HEADS]
    return found


def _sizes_after(before: Mapping[str, Any], config: PruneConfig) -> dict[str, int]:
    """The sizes that are kept; UserError for one that grows, and for heads that do not go into groups."""
    given = {**config.model_dump(include={*WIDTHS}), LAYERS: config.layers}
    for name, size in given.items():
        if size is not None and before[name] is not None and size > before[name]:
            raise UserError(f"student.prune: {name} {size} of {before[name]}; pruning can only take away")
    after = {name: before[name] if size is None else size for name, size in given.items()}
    if before[GROUPS] and given[HEADS] is not None and given[GROUPS] is None:
        each = before[HEADS] // before[GROUPS]
        after[GROUPS] = given[HEADS] // each if given[HEADS] % each == 0 else before[GROUPS]
    if before[GROUPS] and given[HEADS] is None and given[GROUPS] is not None:
        after[HEADS] = before[HEADS] // before[GROUPS] * given[GROUPS]
    if before[GROUPS]:
        each, most = after[HEADS] / after[GROUPS], before[HEADS] // before[GROUPS]
        if each != int(each) or each > most:
            raise UserError(
                f"student.prune: {after[HEADS]} query heads for {after[GROUPS]} key-value heads, where each has up to "
                f"{most}; write num_attention_heads as a multiple of num_key_value_heads"
            )
    return after


def _axes(
    scores: WidthScores, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
    """Per layer what is kept along each axis that is cut, and the query heads."""
    shared: dict[str, list[int]] = {}
    if after[WIDTH] < before[WIDTH]:
        shared["hidden"] = best(scores.hidden, after[WIDTH])
    axes, queries = [], []
    for neurons, heads in zip(scores.neurons, scores.heads, strict=True):
        own = dict(shared)
        if after["intermediate_size"] < before["intermediate_size"]:
            own["neuron"] = best(neurons, after["intermediate_size"])
        query, key = _heads(heads.view(before[GROUPS], -1), after[GROUPS], after[HEADS] // after[GROUPS])
        if after[HEADS] < before[HEADS]:
            own |= {"query": _rows(query, before["head_dim"]), "key": _rows(key, before["head_dim"])}
        axes.append(own)
        queries.append(query)
    return axes, queries


def _heads(scores: Float[Tensor, "G H"], groups: int, each: int) -> tuple[list[int], list[int]]:
    """Query heads and key-value heads: the best few of every group, of the groups whose best few are best together."""
    kept = [best(group, each) for group in scores]
    keys = best(torch.stack([group[chosen].sum() for group, chosen in zip(scores, kept, strict=True)]), groups)
    return [group * scores.shape[1] + head for group in keys for head in kept[group]], keys


def _rows(heads: Sequence[int], head_dim: int) -> list[int]:
    return [head * head_dim + row for head in heads for row in range(head_dim)]


def _logp(model: PreTrainedModel, ids: Int[Tensor, "1 T"]) -> Float[Tensor, "1 T V"]:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block dropout is off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
