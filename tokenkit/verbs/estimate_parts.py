"""The parts of an estimate, what an optimizer remembers, and an estimate in words."""

from dataclasses import dataclass, field

import torch
from torch import nn

from tokenkit.models.devices import LINKS, MEMORY, PRODUCTS, DataSheet
from tokenkit.train.optimizer_schema import OptimizerConfig
from tokenkit.train.schema import TrainConfig
from tokenkit.verbs.estimate_shared import Traffic
from tokenkit.verbs.estimate_sides import Lengths

HALVES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED_FROM = 4096  # numbers of a tensor from which bitsandbytes keeps its state in 8 bits
BLOCKS = 1 + 4 / 256  # bytes of such a number, with its block's scale
LARGEST_ROTATED = 10_000  # rows or columns of a matrix that soap still rotates


@dataclass(frozen=True)
class Place:
    """Where a run would go on: this machine's device, or one of a data sheet, at a price."""

    device: str
    name: str = ""
    sheet: DataSheet | None = None
    price: float | None = None
    """Of an hour of one device."""

    @property
    def kind(self) -> str:
        """What kernels it is computed with."""
        return "cuda" if self.sheet is not None else torch.device(self.device).type


@dataclass
class Estimate:
    """Bytes of one process, and seconds of a step."""

    data: int
    model: int
    place: Place
    precision: str
    rows: int
    """Of text in a microbatch."""
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    """Kept for the backward pass."""
    copies: int
    """Of weights in 16 bits, kept with them."""
    gathered: int
    """Layers and tables of other processes that are whole for a while."""
    peak: int
    """The most at one time, beside what the program itself takes."""
    host: int
    """In the memory of the host, before anything is spread."""
    tokens: Lengths = field(default_factory=lambda: Lengths(0.0, 0))
    teacher_tokens: Lengths | None = None
    other_kept: int = 0
    """Activations and copies with gradient_checkpointing the other way."""
    flops: float = 0.0
    """Of a step, teacher included."""
    seconds: float = 0.0
    """Of computing a step."""
    traffic: Traffic = field(default_factory=Traffic)
    waiting: float = 0.0
    """Seconds that the traffic of a step takes by itself; 0 where the links are not known."""
    step_tokens: float = 0.0
    """Of the student's, that a process reads in a step."""
    rate: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def processes(self) -> int:
        """That share the run."""
        return self.data * self.model

    @property
    def tokens_per_second(self) -> float:
        """Of the student's, of all processes together, where no traffic hides behind computing."""
        return self.data * self.step_tokens / (self.seconds + self.waiting) if self.seconds else 0.0


def told(found: Estimate, train: TrainConfig) -> list[str]:
    """The estimate in words."""
    place = found.place
    here = f"{found.data} x {found.model} processes" if found.processes > 1 else "one process"
    other = "without" if train.gradient_checkpointing else "with"
    teacher = "" if found.teacher_tokens is None else f", teacher {found.teacher_tokens.longest:,}"
    guess = f" (a guess: {found.tokens.guessed})" if found.tokens.guessed else ""
    parts = {
        "student weights": found.weights,
        "gradients": found.gradients,
        f"optimizer ({train.optimizer.name})": found.optimizer,
        "teacher": found.teacher,
        "activations": found.activations,
        **({f"weights in {found.precision}": found.copies} if found.copies else {}),
        **({"gathered for a while": found.gathered} if found.gathered else {}),
    }
    host = [f"  {'on the host, at first:':<26}{_size(found.host):>10}  for each process"] if _on_a_gpu(found) else []
    room = "" if place.sheet is None else f", of {_size(place.sheet.memory)}"
    return [
        f"memory per process, estimated for {here} on {place.name or place.device}, {found.precision}, {train.mode}:",
        *(f"  {name + ':':<26}{_size(value):>10}" for name, value in parts.items()),
        f"  {'peak:':<26}{_size(found.peak):>10}  beside what the program itself takes{room}",
        *host,
        f"  activations {other} gradient_checkpointing: {_size(found.other_kept)}",
        f"  a microbatch: {found.rows} rows of up to {found.tokens.longest:,} tokens{teacher}{guess}",
        *_time_told(found, train),
        *found.notes,
    ]


def _on_a_gpu(found: Estimate) -> bool:
    return found.place.kind == "cuda" or found.processes > 1


def _time_told(found: Estimate, train: TrainConfig) -> list[str]:
    place, alone = found.place, found.step_tokens / found.seconds if found.seconds else 0.0
    of = "an assumed" if place.sheet is not None else "a measured"
    lines = [
        f"time per step, estimated: {found.seconds:.3g} s, {alone:,.0f} tokens/s a process; {found.flops / 1e9:,.1f} "
        f"GFLOP at {of} {found.rate / 1e9:,.0f} GFLOP/s for products"
    ]
    if found.processes > 1:
        sent = f"between processes, a step: {_size(found.traffic.total)} received by each"
        if place.sheet is not None:
            most = found.seconds + found.waiting
            sent += (
                f", {found.waiting:.3g} s: {100 * found.waiting / most:.0f} % of a step of {most:.3g} s where nothing "
                f"hides it; {found.tokens_per_second:,.0f} tokens/s in all"
            )
        lines.append(sent)
    if place.sheet is None:
        return lines
    lines.append(
        f"assumed of {place.name}: {100 * PRODUCTS:.0f} % of its peak for products, {100 * MEMORY:.0f} % of its "
        f"memory's and {100 * LINKS:.0f} % of its links' speed; nothing of it was measured"
    )
    hours = found.processes * (found.seconds + found.waiting) * train.steps / 3600
    cost = "" if place.price is None else f", {hours * place.price:,.0f} at {place.price:g} an hour"
    return [*lines, f"{train.steps:,} steps: {hours:,.1f} device hours{cost}"]


def _size(count: int | float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def optimizer_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """What the optimizer remembers of all that is trained."""
    return round(sum(_state_bytes(parameter, config) for parameter in model.parameters() if parameter.requires_grad))


def _state_bytes(parameter: nn.Parameter, config: OptimizerConfig) -> int | float:
    count, moments = parameter.numel(), 1 if "lion" in config.name else 2
    if "8bit" in config.name:
        return moments * count * (BLOCKS if count >= QUANTISED_FROM else 4)
    if config.name == "muon":
        table = parameter.ndim == 2 and max(parameter.shape) > 8 * min(parameter.shape)  # tables are AdamW's there
        return 4 * count * (1 if parameter.ndim == 2 and not table else 2)
    rotated = [side for side in parameter.shape if side <= LARGEST_ROTATED] if parameter.ndim == 2 else []
    turned = 2 * sum(side * side for side in rotated) if config.name == "soap" else 0
    return 4 * (moments * count + turned)
