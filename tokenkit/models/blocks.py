"""The blocks of a language model, found by structure: as many in a row as its configuration says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The dotted name of the list of blocks, and the list; UserError for a model that has none."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(
        f"{model.config.model_type}: no list of its {count} layers is found in the model; write start=random without "
        "layers, prune and share_layers"
    )


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "B T D"]:
    """The hidden states among the arguments of a block's call."""
    return args[0] if args else kwargs["hidden_states"]


def block_output(output: Tensor | tuple[Any, ...]) -> Float[Tensor, "B T D"]:
    """The hidden states that a block returned."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watching(hooks: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block every module calls its hook after its forward: hook(module, args, kwargs, output)."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A hook under which a block says what it was told: the model without that block."""
    states = block_input(args, kwargs)
    return (states, *output[1:]) if isinstance(output, tuple) else states
