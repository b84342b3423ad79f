"""Layers whose matrices are cut over several processes, by the plan that transformers has for an architecture.

A matrix is cut over its outputs (`colwise`) or, after one that was, over its inputs (`rowwise`), so that two of them
cost one sum over the processes: Shoeybi+ 2019, 1909.08053. Adapters are cut with the matrix that they change.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.lora import LoRALinear

KEY = "train.parallel.model"
INNER = "lora_A"  # reads what the matrix reads; what it writes is short, and whole
COLUMNS = {"colwise": False, "colwise_gather_output": True}  # style -> whether what comes out is put together
ROWS = {"rowwise": False, "rowwise_split_input": True}  # style -> whether what goes in is whole
HEADS = {"replicated_with_grad_allreduce"}  # a norm of each head, which reads the heads that a process has


def tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cuts the layers of a model over the processes of a mesh; UserError where they cannot be."""
    if mesh.size() == 1:
        return
    plan = plan_of(model)
    _check_sizes(model, mesh.size())
    body = model.base_model
    for name, module in list(body.named_modules()):
        style = next((style for pattern, style in plan.items() if re.fullmatch(_regex(pattern), name)), None)
        if style in HEADS:
            parallelize_module(module, mesh, SequenceParallel(sequence_dim=0, use_local_output=True))
        elif style is not None:
            _cut(module, mesh, style, name)


def plan_of(model: PreTrainedModel) -> Mapping[str, str]:
    """transformers' plan of an architecture: patterns of names of modules, and how each is cut."""
    plan = model.config.get_text_config().base_model_tp_plan
    if not plan:
        raise UserError(
            f"{KEY}: transformers has no plan to cut the layers of {model.config.model_type} over processes; write "
            f"{KEY}=1, and train.parallel.data for all of them"
        )
    unknown = sorted(set(plan.values()) - COLUMNS.keys() - ROWS.keys() - HEADS)
    if unknown:
        raise UserError(
            f"{KEY}: layers of {model.config.model_type} would be cut as {unknown[0]}, which is not done here; write "
            f"{KEY}=1"
        )
    return plan


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"\d+")


def _check_sizes(model: PreTrainedModel, size: int) -> None:
    config = model.config.get_text_config().to_dict()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config.get(name) is not None and config[name] % size:
            raise UserError(
                f"{KEY}: {size} processes cannot share {name} {config[name]} of {model.config.model_type} evenly; "
                "write a divisor of it"
            )


def _cut(module: nn.Module, mesh: DeviceMesh, style: str, name: str) -> None:
    if not (type(module) is nn.Linear or isinstance(module, LoRALinear)):
        raise UserError(f"{KEY}: {name} is a {type(module).__name__}, which is not cut over processes; write {KEY}=1")
    columns = style in COLUMNS
    reads: Placement = Replicate() if columns else Shard(-1)
    given: Placement = Replicate() if columns or ROWS[style] else Shard(-1)
    writes: Placement = Shard(-1) if columns and not COLUMNS[style] else Replicate()

    def place(part: str, owner: nn.Module, own: DeviceMesh) -> None:
        for parameter_name, parameter in list(owner.named_parameters(recurse=False)):
            placement = _placement(part, parameter, columns)
            cut = distribute_tensor(parameter, own, [placement], src_data_rank=None)
            replaced = nn.Parameter(cut, requires_grad=parameter.requires_grad)
            owner.register_parameter(parameter_name, replaced)

    def take(_: nn.Module, inputs: tuple[Tensor, ...], own: DeviceMesh) -> tuple[Tensor, ...]:
        x = (
            inputs[0]
            if isinstance(inputs[0], DTensor)
            else DTensor.from_local(inputs[0], own, [given], run_check=False)
        )
        return (x.redistribute(placements=[reads]), *inputs[1:])

    def give(_: nn.Module, output: DTensor, own: DeviceMesh) -> Tensor:
        return output.redistribute(placements=[writes]).to_local()

    distribute_module(module, mesh, place, take, give)  # pyrefly: ignore [bad-argument-type] (its hooks may return)


def _placement(part: str, parameter: nn.Parameter, columns: bool) -> Placement:
    """How a parameter of a layer is cut: along its outputs, along its inputs, or not at all."""
    if columns:
        return Replicate() if part == INNER else Shard(0)
    matrix = parameter.ndim > 1 and part in ("", INNER)
    return Shard(1) if matrix else Replicate()
