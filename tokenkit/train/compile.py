"""The student's body, and the teacher's, compiled in place while a run trains; and Liger's kernels in the student.

Nothing is wrapped: parameters keep their names, so checkpoints are those of a run without.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.fused import installed
from tokenkit.models.blocks import block_list
from tokenkit.train.models import LanguageModels
from tokenkit.train.schema import CompileConfig
from tokenkit.train.tasks import Task

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Compiled:
    """Modules that run compiled, and what the compiler did."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self._before = _counted() if modules else (0, 0)

    def values(self) -> dict[str, int]:
        """Graphs that were compiled, and places at which one had to end early and another begin."""
        if not self.modules:
            return {}
        graphs, breaks = (now - then for now, then in zip(_counted(), self._before, strict=True))
        return {"compile/graphs": graphs, "compile/graph_breaks": breaks}

    def undo(self) -> None:
        """Runs the modules as they are written, from here on."""
        for module in self.modules:
            module._compiled_call_impl = None
        self.modules = []

    def attempt(self, work: Callable[[], Result]) -> Result:
        """What some work returns; where the compiler fails in it, it is done again without, after a warning."""
        try:
            return work()
        except RuntimeError as error:
            if not self.modules or not _is_compilers(error):
                raise
            said = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
            log.warning("train.compile: does not work here (%s); the run goes on without it", said)
        self.undo()
        return work()


@contextmanager
def compiled(task: Task, config: CompileConfig | None) -> Iterator[Compiled]:
    """Inside the block the models of a task run compiled; afterwards they are as they were."""
    if config is None:
        yield Compiled([])
        return
    import torch._dynamo
    import torch._inductor.config

    known = torch._dynamo.list_backends(exclude_tags=())
    if config.backend not in known:
        raise UserError(f"train.compile.backend: {config.backend!r} is not known here; write one of {', '.join(known)}")
    modules = _modules(task, config)
    options = {"backend": config.backend, "mode": config.mode, "dynamic": config.dynamic}
    # losses hang hooks into layers for single forward passes: a graph that was compiled without them is not theirs
    hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    dropout = torch._inductor.config.patch(fallback_random=True)  # draws what it would have drawn
    with hooks, dropout, warnings.catch_warnings():
        # the compiler itself looks at gradients of what one layer hands to the next
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        for module in modules:
            module.compile(**options)
        run = Compiled(modules)
        try:
            yield run
        finally:
            run.undo()


def _is_compilers(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(error, TorchDynamoException | CppCompileError | InvalidCxxCompiler)


def _modules(task: Task, config: CompileConfig) -> list[nn.Module]:
    if not isinstance(task, LanguageModels):
        raise UserError("train.compile: is for language models; leave it out here")
    models = [task.student.model]
    if config.teacher and task.teacher is not None and task.teacher.model is not task.student.model:
        models.append(task.teacher.model)
    return [module for model in models for module in _regions(model, config.regional)]


def _regions(model: PreTrainedModel, regional: bool) -> list[nn.Module]:
    return [*block_list(model)[1]] if regional else [model.base_model]


def _counted() -> tuple[int, int]:
    """Graphs compiled and graph breaks of this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), int(sum(counters["graph_break"].values()))


def apply_liger(task: Task) -> None:
    """Puts Liger's kernels into the student's layers, from outside; UserError where that cannot be."""
    if not isinstance(task, LanguageModels):
        raise UserError("train.liger: is for language models; write false here")
    model = task.student.model
    if "liger_kernel" not in installed():
        raise UserError("train.liger: liger-kernel is not installed; take the extra `gpu`, or write train.liger=false")
    if model.device.type != "cuda":
        raise UserError(f"train.liger: its kernels run on CUDA, not on {model.device.type}; write train.liger=false")
    kernels = import_module("liger_kernel.transformers.monkey_patch")
    kind = model.config.model_type
    if kind not in kernels.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"train.liger: liger-kernel has no kernels for {kind}; write train.liger=false")
    # the losses here read hidden states: what Liger puts in the place of the model's own loss is never called
    kernels._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
