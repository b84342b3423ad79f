"""Models spread over the processes of a run, changed from outside and put back at its end.

Each layer's parameters are cut over the processes along `data`, gathered while the layer computes, and their gradients
added up and cut again: FSDP2, Zhao+ 2023, 2304.11277. What no layer holds (embedding, head, last norm) is cut over all
processes. Along `model` the matrices themselves are cut (`tensor_parallel`).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tokenkit.models.blocks import block_list
from tokenkit.models.mixture import views_of
from tokenkit.models.quantize import is_quantised
from tokenkit.models.view import ModelView
from tokenkit.train.parallel import ALL, DATA, MODEL, Ranks, full, leads
from tokenkit.train.tensor_parallel import tensor_parallel

Result = TypeVar("Result")
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


class Whole(nn.Module):
    """Around a model that is spread over processes: work that is done inside finds what no layer holds in one piece."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self._inside = False

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()

    def run(self, work: Callable[[], Result]) -> Result:
        """What the work returns; all processes have to do the same."""
        if self._inside:
            return work()
        self._inside = True
        try:
            with warnings.catch_warnings():  # losses are functions: none of them changes what it gets
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
                return self(work)
        finally:
            self._inside = False


@contextmanager
def sharded(student: ModelView, teacher: ModelView | None, ranks: Ranks) -> Iterator[None]:
    """Inside the block both sides are spread over the processes of a run; a quantised teacher is whole in each.

    After it the first process has each as one model again; in the others they are empty.
    """
    if ranks.mesh is None:
        yield
        return
    others = [view for view in views_of(teacher) if view.model is not student.model]
    for view in others:
        if is_quantised(view.model):
            nn.Module.to(view.model, ranks.mesh.device_type)
    views = [student, *(view for view in others if not is_quantised(view.model))]
    befores = [_Before(view.model) for view in views]
    for number, view in enumerate(views):
        spread(view, ranks, cut=number == 0 or has_plan(view.model))
    own = [view for view in views_of(teacher) if view.model is student.model]
    home = {view: view.tables for view in own}
    for view in own:
        view.whole = student.whole
        view.tables = {name: table.to(student.model.device) for name, table in view.tables.items()}
    if teacher is not None and teacher not in (*views, *own):  # a mixture: one inside the other
        teacher.whole = _nested([view.whole for view in views_of(teacher)])
    try:
        yield
    except BaseException:
        for before in befores:
            before.put_back(gather=False)
        raise
    for before in befores:
        before.put_back(gather=True)
    for view in (*views, *own, *([] if teacher is None else [teacher])):
        view.whole = ModelView.at_once
        view.tables = home.get(view, view.tables)


def has_plan(model: PreTrainedModel) -> bool:
    """Whether transformers knows how to cut a model's layers."""
    return bool(model.config.get_text_config().base_model_tp_plan)


def spread(view: ModelView, ranks: Ranks, *, cut: bool) -> None:
    """Spreads one model: `cut` its matrices along `model` where that is more than one."""
    model, mesh = view.model, ranks.mesh
    assert mesh is not None
    learns = any(parameter.requires_grad for parameter in model.parameters())
    everywhere = mesh[DATA] if ranks.model == 1 else _flat(mesh)
    layers = mesh[DATA] if cut else everywhere
    if cut:
        tensor_parallel(model, mesh[MODEL])
    for block in block_list(model)[1]:
        fully_shard(block, mesh=layers)
    root = Whole(model)
    fully_shard(root, mesh=everywhere, reshard_after_forward=learns)
    for module in root.modules():
        if isinstance(module, FSDPModule):  # the step has divided by the counts of all rows: gradients are added up
            module.set_force_sum_reduction_for_comms(True)
            alike = ranks.model if module is root else 1  # processes along `model` have the same gradient of these
            module.set_gradient_divide_factor(float(alike))
    view.whole = root.run


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    return mesh[DATA, MODEL]._flatten(ALL)


def _nested(around: Sequence[Callable[[Callable[[], Any]], Any]]) -> Callable[[Callable[[], Any]], Any]:
    def run(work: Callable[[], Any]) -> Any:
        for one in around:
            work = _inside(one, work)
        return work()

    return run


def _inside(around: Callable[[Callable[[], Any]], Any], work: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: around(work)


class _Before:
    """A model's classes and hooks before it was spread, to make it what it was."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.device = model, model.device
        self.modules = {
            module: (type(module), {name: dict(module.__dict__[name]) for name in HOOKS}, set(module.__dict__))
            for module in model.modules()
        }

    @torch.no_grad()
    def put_back(self, *, gather: bool) -> None:
        """Takes the spreading off; with `gather` the first process then has all of every parameter."""
        held: dict[nn.Parameter, nn.Parameter] = {}
        for module, (kind, hooks, names) in self.modules.items():
            if isinstance(module, FSDPModule):
                module.reshard()
            module.__class__ = kind
            for name in [name for name in module.__dict__ if name not in names]:
                del module.__dict__[name]
            for name, before in hooks.items():
                now = module.__dict__[name]
                for key in [key for key in now if key not in before]:
                    del now[key]
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, DTensor):
                    if parameter not in held:
                        held[parameter] = self._one(parameter, gather)
                    module._parameters[name] = held[parameter]
        if gather and leads():
            nn.Module.to(self.model, self.device)  # what is no parameter, too

    def _one(self, parameter: nn.Parameter, gather: bool) -> nn.Parameter:
        whole = full(parameter.detach()) if gather else None
        if whole is None or not leads():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        return nn.Parameter(whole.to(self.device) if whole.device.type != "meta" else whole, parameter.requires_grad)
