"""What a step of training will take, before a weight is loaded: the step is gone through with tensors of no memory.

Every operation of the student's forward and backward pass and of the teacher's forward pass is met as torch would run
it, with its shapes and types and nothing computed: which bytes are held at the same time, how many multiplications
there are, and how many bytes move. Attention, checkpointing, adapters and losses over states count as what they are.
Only the scores of a head that needs no logits are put in by hand: what their tiles hold, and how many there are.

Where processes share a run every byte counts with the share of it that one of them holds (`Shared`).
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from tokenkit.losses.divergences import kl_of_logs, log_probabilities
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.models.view import ModelView
from tokenkit.scores import FEWEST, TILE, WHOLE

STATES = {  # leaves that the models' own code makes here; all others are scores of the head
    "hidden",
    "embeds",
    "layers",
    "attentions",
    "qkv",
    "queries",
    "keys",
    "values",
    "attention_output",
    "mlp_output",
}
ATTENTION_ON_CPU = {  # operation: products of tokens x tokens x width in it, of which there are two a pass forward
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
MASSES = {"boundary_logp", "eos_logp"}  # leaves that are scores of a set of tokens: each is a pass over the vocabulary
FORWARD_PASSES, BACKWARD_PASSES = 1, 3  # products of head x states: scores, and scores again with two gradients


@dataclass(frozen=True)
class Shared:
    """Among how many processes what a step holds is cut."""

    processes: int = 1
    """That share every parameter, its gradient and the optimizer's state."""
    model: int = 1
    """Of those, that share each matrix of a layer, and what is as wide as its outputs."""


ALONE = Shared()


@dataclass
class Spent:
    """What a microbatch takes beside weights and the optimizer's state."""

    kept_bytes: int = 0
    """Of activations when the forward pass has ended, copies of weights among them."""
    copied_bytes: int = 0
    """Of those, weights in the type of the forward pass: the backward pass needs them whole."""
    peak_bytes: int = 0
    """The most that is held at one time, gradients among it."""
    operations: list[tuple[float, float, int]] = field(default_factory=list)
    """Of each the floating-point operations, the bytes moved and the bytes of a number."""
    scored: int = 0
    """Entries of logits that are worked off in tiles, each once a pass."""

    @property
    def flops(self) -> float:
        """Floating-point operations of all."""
        return sum(flops for flops, _, _ in self.operations)


class Meter(TorchDispatchMode):
    """Which bytes a process holds while the operations inside run; those of the `known` parameters count as nothing.

    What is as wide as the model is whole in each process; what is wider is shared along `model`, and so are copies of a
    layer's weights. Gradients are added up and cut over all of them, but those of `tables`, which wait for the end.
    """

    def __init__(self, known: Iterable[Tensor], tables: Iterable[Tensor], width: int, shared: Shared):
        super().__init__()
        self.spent, self.width, self.shared = Spent(), width, shared
        self._tables = {table.untyped_storage()._cdata for table in tables}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[float, bool]] = dict.fromkeys(self._known, (0.0, False))
        self._now = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = [tensor for tensor in tree_iter(output) if isinstance(tensor, Tensor)]
        copied = func is torch.ops.aten._to_copy.default and self._key(args[0]) in self._known
        for tensor in tensors:
            self._hold(tensor, self._share(tensor, self._key(args[0]) if copied else None), copied)
        if not func.is_view:
            read = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *tensors))
            size = tensors[0].element_size() if tensors else 4
            flops, model = _flops(func, args, kwargs, output), self.shared.model
            part = self._share(tensors[0], None) if tensors and not flops else 1 / model
            self.spent.operations.append((flops / model, moved * part, size))
        return output

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _share(self, tensor: Tensor, weight: int | None) -> float:
        """Which part of a new tensor a process has; `weight` is the parameter that it is a copy of."""
        if weight is not None:
            return 1.0 if weight in self._tables else 1 / self.shared.model
        return 1 / self.shared.model if tensor.ndim > 1 and tensor.shape[-1] != self.width else 1.0

    def _hold(self, tensor: Tensor, share: float, copied: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            size = storage.nbytes() * share
            self._live[key] = (size, copied)
            self._now += size
            self.spent.peak_bytes = max(self.spent.peak_bytes, round(self._now))
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._live.pop(key, (0.0, False))[0]

    def accumulated(self, parameter: Tensor) -> None:
        """A gradient is complete: from here on it is cut over the processes."""
        if parameter.grad is None:
            return
        key = self._key(parameter.grad)
        before, copied = self._live.get(key, (0.0, False))
        table = self._key(parameter) in self._tables
        size = parameter.grad.untyped_storage().nbytes() / (1 if table else self.shared.processes)
        if key in self._live:
            self._live[key] = (size, copied)
            self._now += size - before

    def forward_ended(self, without: float) -> None:
        """Notes what the forward pass has left, beside so many bytes that were there before."""
        self.spent.kept_bytes = round(self._now - without)
        self.spent.copied_bytes = round(sum(size for size, copied in self._live.values() if copied))

    @property
    def now(self) -> float:
        """Bytes held at this moment."""
        return self._now


def _flops(func: Any, args: Any, kwargs: Any, output: Any) -> float:
    if func in ATTENTION_ON_CPU:
        places = args[:3] if ATTENTION_ON_CPU[func] == 2 else args[1:4]  # the backward pass is given a gradient first
        batch, heads, length, width = places[0].shape
        return 2.0 * ATTENTION_ON_CPU[func] * batch * heads * length * places[1].shape[2] * width
    count = flop_registry.get(func._overloadpacket)
    return float(count(*args, **kwargs, out_val=output)) if count is not None else 0.0


class _Scored(torch.autograd.Function):
    """Scores of a head that are worked off in tiles: what they hold and leave behind, and no logits."""

    @staticmethod
    def forward(ctx, hidden, head, alike, tile):
        ctx.save_for_backward(hidden, head)
        ctx.tile = tile
        part = head.to(hidden.dtype) if alike else head  # converted once for all rows
        _hold_tile(hidden, head, (max(FEWEST, WHOLE // len(head)), len(head)) if alike else tile, copies=1)
        del part
        return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)

    @staticmethod
    def backward(ctx, *gradients):
        hidden, head = ctx.saved_tensors
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        _hold_tile(hidden, head, ctx.tile, copies=2)
        return (
            None if hidden_grad is None else hidden_grad.to(hidden.dtype),
            None if head_grad is None else head_grad.to(head.dtype),
            None,
            None,
        )


def _hold_tile(hidden: Tensor, head: Tensor, tile: tuple[int, int], *, copies: int) -> None:
    """Holds for a moment what `scores` holds of a tile of logits: in float32, and in the type of the states."""
    shape = (copies, min(hidden.shape[:-1].numel(), tile[0]), min(len(head), tile[1]))
    float32 = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    half = None if hidden.dtype == torch.float32 else torch.empty_like(float32[0], dtype=hidden.dtype)
    del float32, half


@contextmanager
def without_memory(device: str) -> Iterator[None]:
    """Inside the block tensors that are made, on this device, have shapes and types, and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        yield


@dataclass(frozen=True)
class Side:
    """One model of a microbatch: what it reads, and what is asked of it."""

    view: ModelView
    rows: int
    tokens: int
    needs: AbstractSet[str]
    kind: str = "cpu"
    """Of the device that it is computed on, which decides how scores are worked off."""

    def leaves(self, spent: Spent) -> dict[str, Tensor]:
        """The tensors that a loss reads, and the work of the head that makes scores without logits."""
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.long, device=self.view.model.device)
        found = self.view.leaves({*(self.needs & STATES), "hidden"}, ids, ids)
        hidden, head = found["hidden"], self.view.head()
        if "logits" in self.needs:
            found["logits"] = (hidden @ head.to(hidden.dtype).T).float()
        elif self.needs - STATES:
            trained = torch.is_grad_enabled()
            masses = len(MASSES & self.needs)
            alike = self.view.alike and trained and not masses and self.kind == "cpu"
            entries = hidden.shape[0] * hidden.shape[1] * head.shape[0]
            passes = FORWARD_PASSES + (BACKWARD_PASSES if trained else 0)
            for number in range(max(1, masses)):
                found[f"scores_{number}"] = _Scored.apply(hidden, head, alike, TILE[self.kind])
                spent.operations.append((2.0 * entries * head.shape[1] * passes, 0, hidden.element_size()))
                spent.scored += entries * (2 if trained else 1)
        return found


def step_spent(
    student: Side,
    teacher: Side | None,
    *,
    half: torch.dtype | None,
    microbatches: int,
    width: int,
    shared: Shared = ALONE,
) -> Spent:
    """What the microbatches of a step take together; models are of `without_memory`, in the mode that they train in.

    `half` is the type of the forward pass where that is not the weights'. More than two microbatches take what two do.
    """
    models = [side.view.model for side in (student, teacher) if side is not None]
    known = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    known += [table for side in (student, teacher) if side is not None for table in side.view.tables.values()]
    tables = [table for model in models for table in tables_of(model)]
    device = student.view.model.device.type
    with Meter(known, tables, width, shared) as meter:
        trained = [parameter for parameter in student.view.model.parameters() if parameter.requires_grad]
        hooks = [one.register_post_accumulate_grad_hook(meter.accumulated) for one in trained]
        for _ in range(min(2, microbatches)):
            before = meter.now
            # as in training, without autocast's memory of what it has converted
            cast = torch.autocast(device, half or torch.bfloat16, enabled=half is not None, cache_enabled=False)
            taught: Mapping[str, Tensor] = {}
            if teacher is not None:
                with torch.no_grad(), cast:
                    taught = teacher.leaves(meter.spent)
            with cast:
                found = student.leaves(meter.spent)
                loss = _loss(found, taught)
            meter.forward_ended(before)
            loss.backward()
            del found, taught, loss
        for hook in hooks:
            hook.remove()
    scale = microbatches / min(2, microbatches)
    meter.spent.operations = [(f * scale, moved * scale, size) for f, moved, size in meter.spent.operations]
    meter.spent.scored = round(meter.spent.scored * scale)
    for parameter in trained:
        parameter.grad = None
    return meter.spent


def tables_of(model: PreTrainedModel) -> list[nn.Parameter]:
    """Embedding and head, a tied one once: what no layer holds."""
    return list({id(table): table for table in (input_matrix(model), head_matrix(model))}.values())


def _loss(found: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
    """A number that depends on all leaves; logits of both sides are compared as `forward_kl` compares them."""
    total = sum(tensor.float().sum() for name, tensor in found.items() if name != "logits")
    if "logits" in found:
        own, other = found["logits"], taught.get("logits")
        if other is None or other.shape != own.shape:
            total = total + own.log_softmax(-1).sum()
        else:
            total = total + kl_of_logs(*log_probabilities(other, own, 1.0)).sum()
    assert isinstance(total, Tensor)
    return total


def parameter_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Bytes of a model's parameters, shared ones once; of those that are trained alone."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)
