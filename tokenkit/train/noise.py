"""Noise while training: on what the teacher says, on the student's inputs, on gradients and on weights.

Every draw is a function of (seed, step, microbatch, name) from a generator of its own, so that a resumed run draws the
same and dropout draws what it would have drawn without. Nothing here acts on a measurement.
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.data.batch import Batch
from tokenkit.data.packing import pack
from tokenkit.train.models import LanguageModels
from tokenkit.train.parallel import like
from tokenkit.train.schema import NoiseConfig
from tokenkit.train.tasks import Task

FEATURES = frozenset({"hidden", "embeds", "layers", "qkv", "queries", "keys", "values"})
FEATURES |= {"attention_output", "mlp_output"}
GRADIENT_DECAY = 0.55


def generator(device: torch.device, seed: int, name: str) -> torch.Generator:
    """A stream of its own for each name under a seed."""
    mixed = (seed * 1_000_003 + zlib.crc32(name.encode())) % (1 << 63)
    return torch.Generator(device).manual_seed(mixed)


def spread_noise(values: Float[Tensor, "..."], share: float, draws: torch.Generator) -> Float[Tensor, "..."]:
    """The values with normal noise whose deviation is a share of their own over the last axis.

    What is not finite, such as the logit of a masked id, stays as it is and has no say in the deviation.
    """
    finite = values.isfinite()
    known = torch.where(finite, values, 0)
    count = finite.sum(-1, keepdim=True).clamp_min(1)
    mean = known.sum(-1, keepdim=True) / count
    deviation = (torch.where(finite, values - mean, 0).square().sum(-1, keepdim=True) / count).sqrt()
    drawn = torch.randn(values.shape, generator=draws, device=values.device, dtype=torch.float32).to(values.dtype)
    return torch.where(finite, known + share * deviation * drawn, values)


def embedding_noise(
    shape: torch.Size, lengths: Float[Tensor, "B 1 1"], alpha: float, draws: torch.Generator
) -> Float[Tensor, "B T D"]:
    """Uniform noise within alpha / sqrt(length x channels), by each row's own length: padding dampens nothing."""
    drawn = torch.rand(shape, generator=draws, device=lengths.device) * 2 - 1
    return drawn * (alpha / (lengths * shape[-1]).sqrt())


@contextmanager
def neftune(embedding: nn.Module, alpha: float, mask: Bool[Tensor, "B T"], draws: torch.Generator) -> Iterator[None]:
    """Inside the block an input embedding adds noise to what it returns while it is in training mode."""
    lengths = mask.sum(1).clamp_min(1).to(torch.float32)[:, None, None]

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.training:  # a teacher on the same body reads in evaluation mode
            return output
        return output + embedding_noise(output.shape, lengths, alpha, draws).to(output.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def add_gradient_noise(parameters: Mapping[str, nn.Parameter], eta: float, step: int, seed: int) -> None:
    """Adds normal noise of variance eta / (1 + step)^0.55 to every gradient there is."""
    deviation = (eta / (1 + step) ** GRADIENT_DECAY) ** 0.5
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.add_(_drawn(parameter, seed, name), alpha=deviation)


def _drawn(parameter: nn.Parameter, seed: int, name: str) -> Tensor:
    """Normal numbers for all of a parameter, spread as it is."""
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return like(drawn.normal_(generator=generator(parameter.device, seed, name)), parameter)


@contextmanager
def noisy_weights(parameters: Mapping[str, nn.Parameter], share: float, seed: int) -> Iterator[None]:
    """Inside the block every parameter has normal noise of a share of its root mean square on it; then its old bits."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                drawn = _drawn(parameter, seed, f"w {name}")
                parameter.add_(drawn * parameter.square().mean().sqrt(), alpha=share)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


class Noise:
    """The noise of a run, where a step asks for it."""

    def __init__(self, config: NoiseConfig, task: Task):
        """UserError where nothing of this run would feel it."""
        self.config = config
        self._embedding: nn.Module | None = None
        models = task if isinstance(task, LanguageModels) else None
        needs = task.objective.needs("teacher") if models is not None and models.teacher is not None else set()
        for key, wanted, what in (
            ("teacher_logits", {"logits"}, "the logits"),
            ("features", FEATURES, "states"),
        ):
            if config.__dict__[key] and not needs & wanted:
                raise UserError(
                    f"train.noise.{key}: no loss of this run reads {what} of a live teacher; write 0, or add such a "
                    "loss"
                )
        if config.neftune:
            if models is None:
                raise UserError("train.noise.neftune: what is trained here has no input embedding of tokens; write 0")
            self._embedding = models.student.model.get_input_embeddings()

    def teacher(self, tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """What a teacher said of a microbatch, with noise."""
        changed = {}
        for name, values in tensors.items():
            leaf = name.removeprefix("teacher_")
            share = self.config.teacher_logits if leaf == "logits" else self.config.features * (leaf in FEATURES)
            if share:
                changed[name] = spread_noise(values, share, generator(values.device, seed, name))
        return {**tensors, **changed}

    def student(self, batch: Batch, seed: int) -> AbstractContextManager[None]:
        """Around a forward pass of the student over a microbatch."""
        if self._embedding is None:
            return nullcontext()
        mask = batch.tensors["student_token_mask"]
        if "student_slot" in batch.tensors:  # of rows that are packed, as the model reads them
            mask = pack(mask, batch.tensors["student_slot"], batch.tensors["student_positions"], 0)
        return neftune(self._embedding, self.config.neftune, mask, generator(mask.device, seed, "neftune"))

    def weights(self, parameters: Mapping[str, nn.Parameter], seed: int) -> AbstractContextManager[None]:
        """Around all forward and backward passes of a step."""
        return noisy_weights(parameters, self.config.weights, seed) if self.config.weights else nullcontext()

    def gradients(self, parameters: Mapping[str, nn.Parameter], step: int, seed: int) -> None:
        """On the clipped gradients of a step."""
        if self.config.gradient:
            add_gradient_noise(parameters, self.config.gradient, step, seed)
