"""Each loss's gradient by itself, looked at now and then: length, angles to the others, noise of their sum."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenkit.train.gradients import Gradients, LossGradients, products
from tokenkit.train.parallel import full, total
from tokenkit.train.passes import Forward, counted, look_first

LOOKS, OPPOSED, TRACE, SQUARE = "looks", "opposed", "trace", "square"


class Diagnosis:
    """Norms and cosines of the losses' gradients over what several losses train, and the gradient noise scale.

    A look costs a backward pass for each loss, and a second forward pass where a step has several microbatches.
    """

    def __init__(
        self, parameters: list[nn.Parameter], names: Sequence[str], *, batch_rows: int = 1, noise_scale: bool = False
    ):
        """`batch_rows` are those of a whole step: what the noise scale is measured in."""
        self.parameters, self.names = parameters, list(names)
        self.batch_rows, self.noise_scale = batch_rows, noise_scale
        self._sums: dict[str, float] = {}
        self._values: dict[str, float] = {}

    def look(
        self, forwards: Sequence[Forward], weights: Mapping[str, float], scale: Tensor | None = None
    ) -> Sequence[Forward]:
        """Looks at the gradients of a step before they are balanced; the microbatches, for the balance.

        `scale` is what half precision has multiplied the gradients with.
        """
        gradients, noise = LossGradients(self.parameters), _Microbatches(self.parameters, weights)

        def add(shares: dict[str, Tensor]) -> None:
            own = LossGradients(self.parameters)
            own.add(counted(shares, weights))
            if scale is not None:
                own.divide(scale)
            gradients.merge(own)
            if self.noise_scale:
                noise.add(own.found)

        forwards = look_first(forwards, add)
        gradients.gather(self.names)
        self._values = self._lengths_and_angles(gradients)
        if self.noise_scale:
            self._values |= self._scale(noise, gradients.found, weights)
        return forwards

    def values(self) -> dict[str, float]:
        """What the last look saw."""
        return self._values

    def _lengths_and_angles(self, gradients: LossGradients) -> dict[str, float]:
        names = [name for name in self.names if name in gradients.found]
        owners = gradients.owners(self.names)
        shared = [number for number in range(len(self.parameters)) if number not in owners]
        if not shared or len(names) == 1:
            shared = [*range(len(self.parameters))]
        gram = products(gradients.found, names, shared)
        lengths = {name: math.sqrt(max(gram[i, i], 0.0)) for i, name in enumerate(names)}
        values = {f"gradient_norm/{name}": length for name, length in lengths.items()}
        for (i, one), (j, other) in combinations(enumerate(names), 2):
            pair = f"{one}/{other}"
            size = lengths[one] * lengths[other]
            cosine = float(gram[i, j]) / size if size > 0 else 0.0
            self._count(f"{LOOKS}/{pair}", 1.0)
            self._count(f"{OPPOSED}/{pair}", float(cosine < 0))
            values[f"gradient_cosine/{pair}"] = cosine
            values[f"gradient_opposed/{pair}"] = self._sums[f"{OPPOSED}/{pair}"] / self._sums[f"{LOOKS}/{pair}"]
        return values

    def _scale(self, noise: "_Microbatches", found: Gradients, weights: Mapping[str, float]) -> dict[str, float]:
        """The simple noise scale, from the squares of the gradients of microbatches and of the step."""
        big = sum(_square(g) for g in _weighted(found, weights, len(self.parameters)).values())
        seen = torch.tensor([noise.count, noise.squares], dtype=torch.float64)
        spread = any(isinstance(parameter, DTensor) for parameter in self.parameters)  # then all have seen the same
        count, squares = (seen if spread else total(seen)).tolist()
        if count < 2:
            return {}
        small = count * squares  # mean over the microbatches of |count x what it adds to the step|^2
        rows = self.batch_rows
        square = (rows * big - rows / count * small) / (rows - rows / count)
        trace = (small - big) / (count / rows - 1 / rows)
        self._count(SQUARE, square)
        self._count(TRACE, trace)
        values = {"gradient_noise/trace": trace, "gradient_noise/square": square}
        if self._sums[SQUARE] > 0:  # both estimates are noisy: their means are divided, not they
            values["gradient_noise/scale"] = self._sums[TRACE] / self._sums[SQUARE]
        return values

    def _count(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def state(self) -> dict[str, Tensor]:
        """Sums over the looks so far."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self._sums.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self._sums = {name: tensor.item() for name, tensor in tensors.items()}


class _Microbatches:
    """How many microbatches there are, and the sum of the squared norms of what each adds to the step's gradient."""

    def __init__(self, parameters: list[nn.Parameter], weights: Mapping[str, float]):
        self.parameters, self.weights = parameters, weights
        self.count, self.squares = 0, 0.0

    def add(self, found: Gradients) -> None:
        self.count += 1
        own = _weighted(found, self.weights, len(self.parameters))
        self.squares += sum(_square(gradient) for gradient in own.values())


def _square(gradient: Tensor) -> float:
    return float(full((gradient.double() ** 2).sum()))


def _weighted(found: Gradients, weights: Mapping[str, float], count: int) -> dict[int, Tensor]:
    """The gradient of the weighted sum, by parameter."""
    gradients: dict[int, Tensor] = {}
    for number in range(count):
        parts = [weights[name] * own[number] for name, own in found.items() if number in own]
        if parts:
            gradients[number] = torch.stack(parts).sum(0)
    return gradients
