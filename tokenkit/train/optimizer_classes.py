"""What moves the weights: torch's AdamW and Muon, and those of other packages, over groups that are made elsewhere."""

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tokenkit.config import UserError
from tokenkit.train.optimizer_schema import OptimizerConfig
from tokenkit.train.parameter_kinds import mesh_of

log = logging.getLogger(__name__)
Group = dict[str, Any]
MUON_MOMENTUM = 0.95
BLOCKWISE = {  # name → class in bitsandbytes, which keeps state in 8 bits, in pages that may leave the GPU, or both
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_8bit": "PagedLion8bit",
}
WHOLE = {"soap", *BLOCKWISE}  # state that does not follow the shards of a parameter


def make_optimizer(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that a run file names; UserError where its package is missing or it cannot move what is trained."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if config.name in WHOLE and any(mesh_of(parameter) is not None for parameter in parameters):
        raise UserError(
            f"train.optimizer.name: {config.name}, works on whole parameters and these are shared among processes; "
            "write adamw, lion or muon, or train in one process"
        )
    rate, betas = config.learning_rate, config.betas
    match config.name:
        case "adamw":
            return _adamw(groups, config)
        case "muon":
            return _muon(groups, config)
        case "lion":  # Chen+ 2023, 2302.06675
            return _imported("pytorch_optimizer", "Lion", config.name)(groups, lr=rate, betas=betas)
        case "soap":  # Vyas+ 2024, 2409.11321
            return _imported("pytorch_optimizer", "SOAP", config.name)(groups, lr=rate, betas=betas, eps=config.eps)
        case _:
            return _blockwise(groups, config, parameters)


def honours_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can be called off by a flag on the device, without the host having to look at it."""
    return type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)


class Combined(torch.optim.Optimizer):
    """Several optimizers, each over parameters of its own, as one: one list of groups, one state, one step."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups, part.state = [next(groups) for _ in part.param_groups], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore [bad-override] (torch overloads it)
        """A step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _adamw(groups: list[Group], config: OptimizerConfig) -> torch.optim.AdamW:
    options: dict[str, Any] = {"fused": True} if config.fused else {}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, **options)


def _muon(groups: list[Group], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the matrices inside a model, AdamW for the rest. Jordan+ 2024; Liu+ 2025, 2502.16982.

    Muon's updates are scaled to the root mean square of AdamW's, so that one learning rate serves both.
    """
    hidden = [group for group in groups if group["hidden"]]
    rest = [group for group in groups if not group["hidden"]]
    if not hidden:
        raise UserError("train.optimizer.name: muon, moves matrices inside a model and none is trained; write adamw")
    options: dict[str, Any] = {"momentum": MUON_MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(hidden, lr=config.learning_rate, **options)
    return Combined([muon, _adamw(rest, config)] if rest else [muon])


def _blockwise(
    groups: list[Group], config: OptimizerConfig, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Dettmers+ 2021, 2110.02861. On a CPU there is nothing to page to: the same numbers, without pages."""
    name = BLOCKWISE[config.name]
    if name.startswith("Paged") and all(parameter.device.type == "cpu" for parameter in parameters):
        log.warning("train.optimizer.name: %s keeps no pages on a CPU; the numbers are the same", config.name)
        name = name.removeprefix("Paged")
    options = {} if "Lion" in name else {"eps": config.eps}
    made = _imported("bitsandbytes.optim", name, config.name)
    return made(groups, lr=config.learning_rate, betas=config.betas, **options)


def _imported(module: str, name: str, wanted: str) -> Callable[..., torch.optim.Optimizer]:
    package = module.partition(".")[0]
    try:
        return vars(importlib.import_module(module))[name]
    except ImportError:
        raise UserError(
            f"train.optimizer.name: {wanted}, needs {package}, which is not installed; "
            f"pip install {package} (the extra optim), or write adamw or muon"
        ) from None
