"""The processes of a run: data x model of them as `torchrun` started them, and what they tell each other.

Processes that differ in their place along `data` read different rows of a step; those along `model` read the same rows
and hold different parts of the layers. With one process nothing here does anything.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tokenkit.config import UserError
from tokenkit.train.schema import ParallelConfig
from tokenkit.train.torchrun import rank, started

Result = TypeVar("Result")
DATA, MODEL, ALL = "data", "model", "all"
HOW = "torchrun --nproc-per-node {} --no-python tokenkit ..."
LOST = "another process of this run is gone; the newest whole checkpoint stands: continue with --resume"
PATIENCE = 10  # seconds that a process which is refused something waits for the others


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the run."""

    data: int = 1
    model: int = 1
    data_rank: int = 0
    mesh: DeviceMesh | None = None
    """data x model; None where the run has no mesh."""

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The processes that read different rows; None: all."""
        return None if self.mesh is None else self.mesh[DATA].get_group()


ALONE = Ranks()
_current: list[Ranks] = []


def ranks() -> Ranks:
    """This process among those of the run that is going on."""
    if _current:
        return _current[-1]
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_world_size(), 1, dist.get_rank())
    return ALONE


def leads() -> bool:
    """Whether this process is the one that writes files and talks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return rank() == 0


def layout(config: ParallelConfig) -> tuple[int, int]:
    """Processes along data and model; UserError where they are not those that were started."""
    count = max(1, started())
    data = config.data if config.data is not None else max(1, count // config.model)
    if data * config.model != count:
        raise UserError(
            f"train.parallel: {data} (data) x {config.model} (model) processes, and this run has {count}; start it "
            f"with {HOW.format(data * config.model)}"
        )
    return data, config.model


@contextmanager
def processes(config: ParallelConfig, device: str) -> Iterator[Ranks]:
    """Inside the block the processes of a run know each other; all but the first are quiet.

    UserError where one of them is gone. What all are refused is said once, by the first.
    """
    data, model = layout(config)
    if not started():
        yield ALONE
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # values that decide what happens next go over CPUs, so that no GPU has to be waited for
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    mesh = init_device_mesh(device.partition(":")[0], (data, model), mesh_dim_names=(DATA, MODEL))
    _current.append(Ranks(data, model, mesh[DATA].get_local_rank(), mesh))
    leading, talk, level = leads(), sys.stdout, logging.getLogger().level
    mute = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed below, as long as the block)
    try:
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support", UserWarning)
        warnings.filterwarnings("ignore", "While redistributing from .* sequential all_reduce", UserWarning)
        if not leading:
            logging.getLogger().setLevel(logging.CRITICAL)
            sys.stdout = mute
        yield _current[-1]
        dist.barrier()  # gloo aborts a process that leaves while another still talks to it
    except UserError:
        if _all_here() and not leading:
            sys.exit(2)
        raise
    except Exception as error:  # whatever it is, the others have to hear of it
        if isinstance(error, RuntimeError) and _is_loss(error):
            raise UserError(LOST) from None
        _all_here()  # a run that was asked to stop ends in all of them
        raise
    finally:
        sys.stdout = talk
        mute.close()
        logging.getLogger().setLevel(level)
        _current.pop()
        dist.destroy_process_group()


def _all_here() -> bool:
    """Whether all processes come by here within some seconds."""
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError):
        return False
    return True


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another process can no longer be reached."""
    lost = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    return lost or any(words in str(error) for words in ("gloo/transport", "Connection closed by peer", "[Gloo]"))


def several() -> bool:
    """Whether a step is shared with processes that read other rows of it."""
    return ranks().data > 1


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes that read different rows, the same in each."""
    if several():
        values = values.clone()
        dist.all_reduce(values, group=ranks().data_group)
    return values


def leaders(value: Result) -> Result:
    """The first process's value, in all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def first(work: Callable[[], Result]) -> Result:
    """What the first process finds, in all of them, while the others wait; a UserError of its is everybody's."""
    found, refused = None, None
    if leads():
        try:
            found = work()
        except UserError as error:
            refused = str(error)
    refused, found = leaders((refused, found))
    if refused is not None:
        raise UserError(refused)
    return found  # pyrefly: ignore [bad-return] (None only where the first process's work gives None)


def everyone(value: Result) -> list[Result]:
    """The values of all processes, in all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def together(refused: str | None) -> None:
    """UserError in all processes where one of them was refused something; its words."""
    for words in everyone(refused):
        if words is not None:
            raise UserError(words)


def largest(value: int) -> int:
    """The largest of the processes' numbers, in all of them; over CPUs."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    held = torch.tensor(value)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every process gets the gradients of the whole step; one that had nothing to say to a parameter counts as 0.

    Those of sharded parameters are added up in the backward pass itself.
    """
    if several():
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                parameter.grad = total(
                    parameter.grad if parameter.grad is not None else parameter.new_zeros(parameter.shape)
                )


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, whole; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that every process has whole, spread as another one is."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups that one kernel can take: those on one mesh, and those on none."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return [*groups.values()]


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of tensors taken as one vector, whole or spread over processes."""
    norms = [full(nn.utils.get_total_norm(group)) for group in by_mesh(tensors)]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a norm over all of them together; the norm they had."""
    had = norm([p.grad for p in parameters if p.grad is not None])
    for group in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(group, max_norm, had)
    return had
