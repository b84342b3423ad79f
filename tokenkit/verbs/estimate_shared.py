"""What several processes add to an estimate: layers that are gathered while they compute, traffic, memory of the hosts.

As `train/sharding` and `train/tensor_parallel` spread a model: every parameter is cut over all processes and travels in
float32; a layer is gathered before its forward and its backward pass, embedding and head for the whole of both.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tokenkit.models.blocks import block_list
from tokenkit.models.devices import LINKS, DataSheet
from tokenkit.models.memory import parameter_bytes, tables_of
from tokenkit.train.tensor_parallel import COLUMNS, ROWS, plan_of

GATHERED_LAYERS = 3  # the one at work, the next one on its way, and the pieces that it is put together from


@dataclass(frozen=True)
class Layout:
    """Processes of a run, and what they hold and do between them."""

    data: int
    model: int
    accumulation: int
    """Microbatches of a step in each process."""
    shared_body: bool
    """Whether the teacher is the student's own body."""
    checkpointing: bool

    @property
    def processes(self) -> int:
        """All of them."""
        return self.data * self.model


def table_bytes(model: PreTrainedModel, *, trained: bool = False) -> int:
    """Bytes of what no layer holds; of that which is trained alone."""
    return sum(t.numel() * t.element_size() for t in tables_of(model) if t.requires_grad or not trained)


def layer_bytes(model: PreTrainedModel, *, trained: bool = False) -> int:
    """Bytes of all layers; of what is trained in them alone."""
    return parameter_bytes(model, trained=trained) - table_bytes(model, trained=trained)


def gathered_bytes(student: PreTrainedModel, layout: Layout) -> tuple[int, int]:
    """Bytes that are whole in a process while a pass goes on, and at its end, when tables' gradients are added up."""
    if layout.processes == 1:
        return 0, 0
    tables = table_bytes(student)
    layer = layer_bytes(student) // (max(1, len(block_list(student)[1])) * layout.model)
    return tables + GATHERED_LAYERS * layer, tables + layer + 2 * table_bytes(student, trained=True)


def teacher_bytes(teacher: PreTrainedModel, held: int, layout: Layout, *, quantised: bool) -> int:
    """What a process holds of a teacher that takes so many bytes: a share of it and its tables whole, or all of it."""
    if layout.processes == 1 or layout.shared_body or quantised:
        return held
    return held // layout.processes + table_bytes(teacher)


def host_bytes(student: PreTrainedModel, teachers: list[PreTrainedModel], held: int, layout: Layout) -> int:
    """What a process has in the memory of its host before anything is spread: both sides, whole."""
    others = [held] if layout.shared_body else [parameter_bytes(teacher) for teacher in teachers]
    return parameter_bytes(student) + sum(others)


@dataclass(frozen=True)
class Traffic:
    """What a process receives in a step, in bytes, by the processes that it comes from."""

    layers: float = 0.0
    """Parameters and gradients of layers, along `data`."""
    tables: float = 0.0
    """The same of embedding and head, of all processes."""
    states: float = 0.0
    """Sums of what the matrices of a layer put out, along `model`."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.layers + self.tables + self.states

    def seconds(self, sheet: DataSheet, layout: Layout) -> float:
        """How long it travels, nothing else being done."""
        neighbours = max(1, sheet.per_host // layout.model)  # of a group along `data`, each with a port of its own
        several = layout.processes > sheet.per_host
        data = min(sheet.link, sheet.network * neighbours) if several else sheet.link
        whole = min(sheet.link, sheet.network * sheet.per_host) if several else sheet.link
        model = sheet.link if layout.model <= sheet.per_host else sheet.network
        return (self.layers / data + self.tables / whole + self.states / model) / LINKS


def traffic(
    student: PreTrainedModel, teachers: list[PreTrainedModel], layout: Layout, state_bytes: float, taught_bytes: float
) -> Traffic:
    """What a step sends; `state_bytes` are those of a microbatch's hidden states in the student, and in the teacher."""
    if layout.processes == 1:
        return Traffic()
    data, everywhere = 1 - 1 / layout.data, 1 - 1 / layout.processes
    layers = 2 * layer_bytes(student) + layer_bytes(student, trained=True)
    tables = 2 * table_bytes(student) + table_bytes(student, trained=True)
    if layout.shared_body:  # the same weights once more, for its own forward pass
        layers, tables = layers + layer_bytes(student), tables + table_bytes(student)
    else:
        layers += sum(layer_bytes(teacher) for teacher in teachers)
    return Traffic(
        layout.accumulation * layers / layout.model * data,
        layout.accumulation * tables * everywhere,
        layout.accumulation * _summed_states(student, teachers, layout, state_bytes, taught_bytes),
    )


def _summed_states(
    student: PreTrainedModel, teachers: list[PreTrainedModel], layout: Layout, state_bytes: float, taught_bytes: float
) -> float:
    if layout.model == 1:
        return 0.0
    styles = [*plan_of(student).values()]
    forward = sum(style in ROWS for style in styles)
    backward = sum(style in COLUMNS for style in styles)
    own = (forward * (2 if layout.checkpointing else 1) + backward) * len(block_list(student)[1])
    sides = [student] if layout.shared_body else teachers
    taught = sum(forward * len(block_list(teacher)[1]) for teacher in sides)
    return 2 * (1 - 1 / layout.model) * (own * state_bytes + taught * taught_bytes)


def width_bytes(model: PreTrainedModel, half: torch.dtype | None) -> int:
    """Bytes of one token's hidden states in the type of the forward pass."""
    return tables_of(model)[0].shape[1] * (4 if half is None else half.itemsize)
