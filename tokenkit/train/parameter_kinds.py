"""What a parameter is: told by the module that holds it, never by its name."""

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor
from transformers import PreTrainedModel

ParameterKind = Literal["matrix", "embedding", "head", "norm", "vector"]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
DECAYED: frozenset[ParameterKind] = frozenset({"matrix", "embedding", "head"})


def parameter_kinds(parameters: Mapping[str, nn.Parameter], modules: Iterable[nn.Module]) -> dict[str, ParameterKind]:
    """The kind of each parameter, by its name.

    norm: held by a normalisation, whatever its shape; vector: a bias, or of fewer than two dimensions; embedding: a
    table of ids, tied or not; head: the matrix that makes logits, where it is another; matrix: all others. A parameter
    that none of the modules holds is told by its shape.
    """
    found: dict[int, ParameterKind] = {}
    for module in modules:
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                kind = _kind(part, name, parameter, part is head)
                if found.get(id(parameter)) != "embedding":  # of a tied one the table counts
                    found[id(parameter)] = kind
    return {name: found.get(id(p), shape_kind(p)) for name, p in parameters.items()}


def shape_kind(parameter: Tensor) -> ParameterKind:
    """What can be told without a module."""
    return "matrix" if parameter.ndim > 1 else "vector"


def mesh_of(parameter: Tensor) -> DeviceMesh | None:
    """The processes that a sharded parameter lies on; one kernel cannot work on two such sets at a time."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def _kind(module: nn.Module, name: str, parameter: nn.Parameter, is_head: bool) -> ParameterKind:
    if is_norm(module):
        return "norm"
    if parameter.ndim < 2 or name == "bias":
        return "vector"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "head" if is_head else "matrix"


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own, or a model's own class, which shares no base with others."""
    own = not isinstance(module, (nn.Embedding, nn.Linear)) and "norm" in type(module).__name__.lower()
    return own or isinstance(module, NORMS)
