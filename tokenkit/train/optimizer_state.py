"""An optimizer's state as named tensors and back: whatever it keeps for each parameter, numbers and lists too.

A tensor is called `parameter.key`. Behind the key stand the place in a list, as [0], and after a colon what is not a
tensor by itself: int, float, none (an empty list), or T for a matrix that lies in memory by columns and shall do so
again, since sums over columns and over rows round differently.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

PART = re.compile(r"(.+)\.(\w+)(\[\d+\])?(?::(int|float|none|T))?")
GROUP_STEP = "group_step"  # steps that an optimizer counts for a whole group, kept beside each of its parameters


@runtime_checkable
class MakesState(Protocol):
    """An optimizer that makes a parameter's state where it wants it to lie, such as in pages that may leave a GPU."""

    def init_state(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Makes it."""
        ...


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter that has one, by the parameter's name."""
    steps = {p: group["step"] for group in optimizer.param_groups if "step" in group for p in group["params"]}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in parameters.items():
        state = optimizer.state[parameter] if parameter in optimizer.state else {}
        if state and parameter in steps:
            state = {**state, GROUP_STEP: steps[parameter]}
        for key, value in state.items():
            for full, tensor in _parts(f"{name}.{key}", value).items():
                place = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()
                tensors[full] = tensor.clone() if place in seen else tensor  # one table for all parameters
                seen.add(place)
    return tensors


def put_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Gives an optimizer of the same kind the state that `optimizer_tensors` gave, one parameter after another."""
    keys = _by_parameter(tensors)
    found = {parameter: keys[name] for name, parameter in parameters.items() if name in keys}
    for number, group in enumerate(optimizer.param_groups):
        on_device = bool(group.get("fused") or group.get("capturable"))
        for place, parameter in enumerate(group["params"]):
            if parameter not in found:
                continue
            (state,) = _states({key: tensors[key] for key in found[parameter]}).values()
            if GROUP_STEP in state:
                group["step"] = state.pop(GROUP_STEP)
            if isinstance(optimizer, MakesState):
                optimizer.init_state(group, parameter, number, place)
                _fill(optimizer.state[parameter], state)
            else:
                optimizer.state[parameter] = {
                    key: value if key == "step" and not on_device else _moved(value, parameter)
                    for key, value in state.items()
                }


def plain(tensor: Tensor) -> Tensor:
    """A tensor's values on the host; one that is spread over processes stays as it is."""
    tensor = tensor.detach()
    return tensor if isinstance(tensor, DTensor) else tensor.cpu().contiguous()


def _parts(name: str, value: Any) -> dict[str, Tensor]:
    match value:
        case None:
            return {}
        case Tensor():
            turned = (
                not isinstance(value, DTensor)
                and value.ndim == 2
                and not value.is_contiguous()
                and value.T.is_contiguous()
            )
            return {f"{name}:T": plain(value.T)} if turned else {name: plain(value)}
        case int():
            return {f"{name}:int": torch.tensor(value)}
        case float():
            return {f"{name}:float": torch.tensor(value, dtype=torch.float64)}
        case []:
            return {f"{name}:none": torch.empty(0)}
        case list():
            found: dict[str, Tensor] = {}
            for number, entry in enumerate(value):
                found |= _parts(f"{name}[{number}]", entry)
            return found
    raise TypeError(f"{name}: a {type(value).__name__} has no place in a checkpoint")


def _by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of tensors that `_parts` made, by the parameter's name."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = PART.fullmatch(name)
        if match is None:
            raise ValueError(f"with an optimizer state called {name}, which is none of an optimizer's")
        found.setdefault(match[1], []).append(name)
    return found


def _states(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What `_parts` took apart, by the parameter's name."""
    states: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        match = PART.fullmatch(full)
        assert match is not None
        name, key, place, kind = match.groups()
        state, value = states.setdefault(name, {}), _value(tensor, kind)
        if place is None:
            state[key] = value
        else:
            state.setdefault(key, {})[int(place[1:-1])] = value
    for state in states.values():
        for key, value in state.items():
            if isinstance(value, dict):
                state[key] = [value[number] for number in sorted(value)]
    return states


def _value(tensor: Tensor, kind: str | None) -> Any:
    match kind:
        case "int" | "float":
            return tensor.item()
        case "none":
            return []
        case "T":
            return tensor.T
    return tensor


def _moved(value: Any, parameter: nn.Parameter) -> Any:
    """A saved value where the parameter lies, and shared out as it is."""
    if isinstance(value, list):
        return [_moved(entry, parameter) for entry in value]
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        own = value.to(parameter.device)
        return distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)


def _fill(state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(value, Tensor):
            state[key].copy_(value)
        else:
            state[key] = value
