"""Modules that are trained whole beside adapters, on a body that still has to compute what it was.

Such a module keeps its class, its place and the names of its parameters. It also keeps copies of what they were, which
it computes with while it is switched off.
"""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class Whole(nn.Module):
    """What a module that is trained whole can do beside what its own class does."""

    _enabled: bool
    _kept: dict[str, str]  # name of a parameter -> name of the buffer with its original

    @property
    def enabled(self) -> bool:
        """Whether it computes with what was trained."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value

    def originals(self) -> dict[str, Tensor]:
        """What the parameters were, by their names inside the module."""
        return {name: self.get_buffer(buffer) for name, buffer in self._kept.items()}

    def forward(self, *args: Any, **options: Any) -> Any:
        """What its own class computes, with the trained parameters or with the originals."""
        if self._enabled:
            return super().forward(*args, **options)
        self._enabled = True  # the call below comes by here again
        try:
            return functional_call(self, self.originals(), args, options)
        finally:
            self._enabled = False


def train_whole(module: nn.Module, *, originals: bool) -> None:
    """Lets every parameter of a module be trained; with `originals` it can be switched back to what it was."""
    module.requires_grad_(True)
    if not originals:
        return
    kept = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        kept[name] = f"_original_{number}"
        module.register_buffer(kept[name], parameter.detach().clone(), persistent=False)
    kind = type(module)
    module.__class__ = type(f"Whole{kind.__name__}", (Whole, kind), {})
    assert isinstance(module, Whole)
    module._kept, module.enabled = kept, True


def forget_originals(module: nn.Module) -> None:
    """Makes a module that was trained whole an ordinary one of its class."""
    assert isinstance(module, Whole)
    for buffer in module._kept.values():
        del module._buffers[buffer]
    del module._kept, module._enabled
    module.__class__ = type(module).__bases__[1]


def whole(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are trained whole and remember what they were."""
    return [module for module in model.modules() if isinstance(module, Whole)]
