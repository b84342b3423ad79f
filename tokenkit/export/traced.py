"""A causal language model as one graph of tensors, traced by `torch.export`: the body of an ONNX or .pt2 file.

    input_ids, position_ids        int64 [batch, sequence]
    attention_mask                 int64 [batch, past + sequence]
    past_key_values.N.key, .value        [batch, heads, past, width]
 -> logits                               [batch, sequence, vocabulary]
    present.N.key, .value                [batch, heads, past + sequence, width]

The mask is 0 on padding, which stands on the left, and 1 elsewhere. `past` is 0 at the first call.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tokenkit.config import UserError
from tokenkit.export.quieted import quieted
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.expand import expansion_of
from tokenkit.models.factorised_view import factorised_of
from tokenkit.models.load import input_matrix, quiet
from tokenkit.models.lora import adapters, merge_lora

INSTEAD = "write format=huggingface"
FULL, SLIDING = "full_attention", "sliding_attention"
DATA_DEPENDENT_ROTATION = ("dynamic", "longrope")  # frequencies that change with the length of the text

Past = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Signature:
    """What goes into the graph and comes out of it."""

    layers: tuple[tuple[int, int, int], ...]
    """Of each layer's cache: heads, width of a key, width of a value. Empty: there is no cache."""
    dtype: torch.dtype
    length: int | None
    """Where everything has a fixed shape: tokens of the one row."""

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's inputs, in their order."""
        return ["input_ids", "attention_mask", "position_ids", *self._cache("past_key_values")]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs, in their order."""
        return ["logits", *self._cache("present")]

    def _cache(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(len(self.layers)) for part in ("key", "value")]

    def empty(self, batch: int, length: int = 0) -> Past:
        """A cache of zeros."""
        return [
            (
                torch.zeros(batch, heads, length, key, dtype=self.dtype),
                torch.zeros(batch, heads, length, value, dtype=self.dtype),
            )
            for heads, key, value in self.layers
        ]


class Traced(nn.Module):
    """What is traced: the model behind inputs that are tensors only, its masks made of comparisons."""

    def __init__(self, model: PreTrainedModel, signature: Signature) -> None:
        super().__init__()
        self.model, self.cached = model, bool(signature.layers)
        config = model.config.get_text_config().to_dict()
        self.window: int | None = config.get("sliding_window")
        self.kinds: set[str] = set(config.get("layer_types") or ())

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        attention_mask: Int64[Tensor, "B S"],
        position_ids: Int64[Tensor, "B T"],
        past: Past,
    ) -> tuple[Float[Tensor, "B T V"], Past]:
        cache = DynamicCache() if self.cached else None
        for key, value in past:
            assert cache is not None
            layer = DynamicLayer()  # of sliding layers too: the mask says how far they see
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        said = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=self.cached,
        )
        return said.logits, [] if cache is None else _kept(cache)

    def _masks(self, attention_mask: Int64[Tensor, "B S"], length: int | torch.SymInt) -> Tensor | dict[str, Tensor]:
        """One mask, or one for each kind of layer where the model has two."""
        key = torch.arange(attention_mask.shape[1]).unsqueeze(0)
        query = key[:, key.shape[1] - length :].mT  # the last ones are read now
        full = (key <= query) & (attention_mask[:, None] > 0)
        near = full if self.window is None else full & (key > query - self.window)
        if SLIDING in self.kinds:
            return {FULL: self._added(full), SLIDING: self._added(near)}
        return self._added(full if self.kinds else near)

    def _added(self, allowed: Bool[Tensor, "B T S"]) -> Float[Tensor, "B 1 T S"]:
        """What is added to scores. Half of the lowest number: a sum with it is finite in float16 too."""
        dtype = self.model.dtype
        zero = torch.zeros((), dtype=dtype)
        return zero.masked_fill(~allowed.unsqueeze(1), torch.finfo(dtype).min / 2)


def trace(model: PreTrainedModel, signature: Signature) -> ExportedProgram:
    """The model as a graph, any batch, past and sequence unless the signature has a length.

    UserError where the model decides something by the numbers it computes, or by sizes.
    """
    batch, sequence, past = (1, signature.length, 0) if signature.length else (2, 3, 5)
    ids = torch.ones(batch, sequence, dtype=torch.long)
    mask = torch.ones(batch, past + sequence if signature.layers else sequence, dtype=torch.long)
    positions = torch.arange(sequence).repeat(batch, 1)
    arguments = (ids, mask, positions, signature.empty(batch, past))
    rows, states = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    shapes = None if signature.length else (rows, rows, rows, [(states, states) for _ in signature.layers])
    with quieted(), _plain_operations(model), torch.no_grad():
        try:
            program = torch.export.export(Traced(model, signature), arguments, dynamic_shapes=shapes)
        except Exception as error:  # what tracing raises has no common base
            raise unsupported(model, error) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def unsupported(model: PreTrainedModel, why: object) -> UserError:
    """The line for an architecture that is no graph."""
    reason = str(why).strip().partition("\n")[0] or type(why).__name__
    return UserError(f"export: a {model.config.model_type} model cannot be written as a graph ({reason}); {INSTEAD}")


@contextmanager
def _plain_operations(model: PreTrainedModel) -> Iterator[None]:
    """Inside, attention is products and a softmax, and experts are products too, which every consumer has."""
    attention, training = model.config._attn_implementation or "eager", model.training
    experts = model.get_experts_implementation() if model._can_set_experts_implementation() else None
    with quiet():
        model.eval().set_attn_implementation("eager")
        if experts is not None:
            model.set_experts_implementation("batched_mm")
        try:
            yield
        finally:
            model.set_attn_implementation(attention)
            if experts is not None:
                model.set_experts_implementation(experts)
            model.train(training)


def _kept(cache: DynamicCache) -> Past:
    """Keys and values of the layers that hold nothing else."""
    kept: Past = []
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            assert layer.keys is not None
            assert layer.values is not None
            kept.append((layer.keys, layer.values))
    return kept


def graph_model(model: PreTrainedModel, vocab_size: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model that is traced: in a number format, without adapters; UserError where we added to it.

    The model itself where nothing has to be changed, else a copy.
    """
    rows = len(input_matrix(model))
    if rows < vocab_size:
        raise UserError(f"export: {rows} embedding rows for {vocab_size} token ids; transfer the model first")
    if ternary_layers(model):
        raise UserError(
            "export: the model is ternary; write format=gguf or ternary (and of a packed folder an ordinary one with "
            "format=unpacked, which can be exported)"
        )
    if expansion_of(model) is not None or factorised_of(model) is not None:
        raise UserError(f"export: what is added to the model's inputs cannot be written as a graph; {INSTEAD}")
    if dtype == torch.bfloat16:
        raise UserError("export: dtype=bfloat16 is not for graphs; write float32 or float16")
    if adapters(model) or dtype != model.dtype:
        model = copy.deepcopy(model)
        merge_lora(model)
        model.to(dtype)  # pyrefly: ignore [bad-argument-type] (a decorator hides the signature)
        model.config.dtype = dtype
    return model


def signature_of(model: PreTrainedModel, *, cached: bool = True, length: int | None = None) -> Signature:
    """What the model's graph takes and gives, found by asking it for one token; UserError for caches of other kinds."""
    config = model.config.get_text_config().to_dict()
    other = set(config.get("layer_types") or ()) - {FULL, SLIDING}
    if other:
        raise unsupported(model, f"layers of kind {', '.join(sorted(other))}")
    rotations = config.get("rope_parameters") or {}
    for rotation in (rotations, *(value for value in rotations.values() if isinstance(value, dict))):
        if rotation.get("rope_type") in DATA_DEPENDENT_ROTATION:
            raise unsupported(model, f"rope_type {rotation['rope_type']} depends on the length of the text")
    if not cached:
        return Signature((), model.dtype, length)
    with torch.no_grad():
        cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).get("past_key_values")
    kept = _kept(cache) if isinstance(cache, DynamicCache) else []
    if not kept or len(kept) < len(cache.layers):
        raise unsupported(model, "it keeps other things than keys and values of each layer")
    layers = [(key.shape[1], key.shape[-1], value.shape[-1]) for key, value in kept]
    return Signature(tuple(layers), model.dtype, None)
