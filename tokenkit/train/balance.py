"""How several losses share a step: what each one's gradient is multiplied with, and what has to be known for that.

Everything is decided by the whole step, never by a microbatch, so that cutting a step in another way changes nothing.
Where a factor depends on the step itself and there are several microbatches, the student reads them twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.train.gradients import LossGradients, combined
from tokenkit.train.schema import BalanceConfig, parse_chain

Forward = Callable[[], dict[str, Tensor]]  # a microbatch's share of each loss's mean over the step; no units, no entry
ZERO = 1e-8  # a norm or a loss below this is rounding noise: it gets weight 0, not 1/noise
SMALLEST_WEIGHT = 1e-3  # GradNorm shall neither silence a loss for good nor turn it round
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Shared:
    """Mean of each loss that had units, and what its gradient was multiplied with."""

    means: dict[str, float]
    weights: dict[str, float]


class Balance:
    """The plain sum of weighted losses. `state` is what has to survive a stop: numbers by loss."""

    def __init__(self) -> None:
        self.state: dict[str, dict[str, float]] = {}

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        """Adds the gradients of a step to the parameters; `weights` are the run file's, at this step."""
        return Shared(_sum(forwards, weights), dict(weights))


class Magnitude(Balance):
    """L / |L| with a constant denominator: every loss weighs its weight, whatever its size."""

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        forwards, means = _values_first(forwards)
        factors = {name: weight * _inverse(abs(means.get(name, 0.0))) for name, weight in weights.items()}
        return Shared(_sum(forwards, factors), factors)


class RunningDeviation(Balance):
    """(L - mean) / deviation, with running statistics of the steps before this one.

    Before its first step a loss is taken to deviate by as much as it is large, so the first factor is 1 / |L|.
    """

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        if weights.keys() - self.state.keys():
            forwards, first = _values_first(forwards)
            for name, value in first.items():
                self.state.setdefault(name, {"mean": value, "variance": value * value})
        spread = {name: math.sqrt(entry["variance"]) for name, entry in self.state.items()}
        factors = {name: weight * _inverse(spread.get(name, 0.0)) for name, weight in weights.items()}
        means = _sum(forwards, factors)
        for name, value in means.items():
            entry, away = self.state[name], value - self.state[name]["mean"]
            entry["variance"] = self.alpha * entry["variance"] + (1 - self.alpha) * away * away
            entry["mean"] += (1 - self.alpha) * away
        return Shared(means, factors)


class Uncertainty(Balance):
    """w L exp(-s) + s / 2 with a learnt s for each loss. Kendall+ 2018, 1705.07115."""

    def __init__(self, names: Sequence[str], s_init: float, learning_rate: float):
        super().__init__()
        self.learning_rate = learning_rate
        self.state = {name: _learnt(s_init) for name in names}

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        factors = {name: weight * math.exp(-self.state[name]["value"]) for name, weight in weights.items()}
        means = _sum(forwards, factors)
        for name, value in means.items():
            if weights[name]:  # alone, s / 2 would pull s down for ever
                _descend(self.state[name], 0.5 - factors[name] * value, self.learning_rate)
        return Shared(means, factors)


class GradientMagnitude(Balance):
    """Weights over gradient norms in the last layer, and with `preserve` scaled so that the factors add up to 1.

    The multi-task scheme of ALM: Minixhofer, Vulić & Ponti 2025, 2503.20083.
    """

    def __init__(self, parameters: list[nn.Parameter], *, preserve: bool):
        super().__init__()
        self.parameters, self.preserve = parameters, preserve

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        gradients = LossGradients(self.parameters)
        forwards = _look_first(forwards, lambda shares: gradients.add(_counted(shares, weights)))
        norms = gradients.norms()
        factors = {name: weight * _inverse(norms.get(name, 0.0)) for name, weight in weights.items()}
        total = sum(factors.values())
        if self.preserve and total:
            factors = {name: factor / total for name, factor in factors.items()}
        return Shared(_sum(forwards, factors), factors)


class GradNorm(Balance):
    """Learnt factors that let losses train at similar rates. Chen+ 2018, 1711.02257.

    The factors of a step come from the steps before, so one pass is enough; they move after it.
    """

    def __init__(self, parameters: list[nn.Parameter], names: Sequence[str], alpha: float, learning_rate: float):
        super().__init__()
        self.parameters, self.alpha, self.learning_rate = parameters, alpha, learning_rate
        self.state = {name: _learnt(1.0) for name in names}

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        gradients = LossGradients(self.parameters)
        factors = {name: weight * self.state[name]["value"] for name, weight in weights.items()}
        means = _sum(forwards, factors, lambda shares: gradients.add(_counted(shares, weights)))
        norms = {name: weights[name] * value for name, value in gradients.norms().items()}
        self._learn({name: means[name] for name, value in norms.items() if value > ZERO}, norms)
        return Shared(means, factors)

    def _learn(self, means: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Moves the factors of the losses that trained in this step; their sum stays as it was."""
        if not means:
            return
        entries = {name: self.state[name] for name in means}
        before = sum(entry["value"] for entry in entries.values())
        lags = {name: _lag(entries[name], mean) for name, mean in means.items()}
        mean_lag = sum(lags.values()) / len(lags)
        mean_norm = sum(entry["value"] * norms[name] for name, entry in entries.items()) / len(entries)
        for name, entry in entries.items():
            rate = lags[name] / mean_lag if mean_lag else 1.0
            excess = entry["value"] * norms[name] - mean_norm * rate**self.alpha
            slope = math.copysign(norms[name], excess) / len(entries) if excess else 0.0
            _descend(entry, slope, self.learning_rate)
            entry["value"] = max(entry["value"], SMALLEST_WEIGHT)
        after = sum(entry["value"] for entry in entries.values())
        for entry in entries.values():
            entry["value"] *= before / after


class Surgery(Balance):
    """Whole gradients of every loss, changed link by link of a chain and added up."""

    def __init__(self, parameters: list[nn.Parameter], chain: list[tuple[str, float]]):
        super().__init__()
        self.parameters, self.chain = parameters, chain

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        gradients, means = LossGradients(self.parameters), {}
        for forward in forwards:
            shares = forward()
            gradients.add(_counted(shares, weights))
            _add_values(means, shares)
        for number, gradient in combined(gradients.found, weights, self.chain).items():
            parameter = self.parameters[number]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return Shared(means, dict(weights))


def build_balance(
    config: BalanceConfig,
    names: Sequence[str],
    last_layer: Callable[[], list[nn.Parameter]],
    trained: Sequence[nn.Parameter],
) -> Balance:
    """The balance a run file names, at its beginning; `last_layer` is asked by those that look at it alone."""
    options = {key: value for key, value in config.model_dump(exclude={"method"}).items() if value is not None}
    match config.method:
        case "none":
            return Balance()
        case "magnitude":
            return Magnitude()
        case "ema":
            return RunningDeviation(**options)
        case "uncertainty":
            return Uncertainty(names, **options)
        case "approx_gradmag" | "approx_gradmag_preserve_mag":
            return GradientMagnitude(last_layer(), preserve=config.method == "approx_gradmag_preserve_mag")
        case "gradnorm":
            return GradNorm(last_layer(), names, **options)
        case chain:
            return Surgery(list(trained), parse_chain(chain))


def last_layer(model: PreTrainedModel) -> list[nn.Parameter]:
    """What is trained in the last of the model's layers; UserError where that is nothing."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UserError(
            f"train.balance: {model.config.model_type} has {len(outer)} stacks of {count} layers, where one last layer "
            "is needed; use a balance that needs none, such as gradmag or uncertainty"
        )
    found = [parameter for parameter in outer[0][-1].parameters() if parameter.requires_grad]
    if not found:
        raise UserError(
            "train.balance: nothing is trained in the last layer; use train.mode=lora or full, or a balance over all "
            "that is trained, such as gradmag"
        )
    return found


def _sum(
    forwards: Sequence[Forward], factors: Mapping[str, float], look: Callable[[dict[str, Tensor]], None] | None = None
) -> dict[str, float]:
    """Backward passes of the factored sum, microbatch by microbatch; the mean of each loss over the step."""
    means: dict[str, float] = {}
    for forward in forwards:
        shares = forward()
        if look is not None:
            look(shares)
        weighted = [factors[name] * share for name, share in shares.items() if factors[name]]
        if weighted:
            torch.stack(weighted).sum().backward()
        _add_values(means, shares)
    return means


def _look_first(forwards: Sequence[Forward], look: Callable[[dict[str, Tensor]], None]) -> Sequence[Forward]:
    """Looks at all microbatches, and returns them for the pass that follows: a single one is not computed again."""
    if len(forwards) == 1:
        shares = forwards[0]()
        look(shares)
        return [lambda: shares]
    for forward in forwards:
        look(forward())
    return forwards


def _values_first(forwards: Sequence[Forward]) -> tuple[Sequence[Forward], dict[str, float]]:
    means: dict[str, float] = {}
    with torch.set_grad_enabled(len(forwards) == 1):
        forwards = _look_first(forwards, lambda shares: _add_values(means, shares))
    return forwards, means


def _add_values(means: dict[str, float], shares: Mapping[str, Tensor]) -> None:
    for name, share in shares.items():
        means[name] = means.get(name, 0.0) + share.item()


def _counted(shares: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses that a schedule has not switched off."""
    return {name: share for name, share in shares.items() if weights[name]}


def _inverse(size: float) -> float:
    """1 / size; 0 for what is no more than rounding noise; NaN, which stops the run, for what is not finite."""
    if not math.isfinite(size):
        return math.nan
    return 1 / size if size > ZERO else 0.0


def _learnt(value: float) -> dict[str, float]:
    return {"value": value, "first_moment": 0.0, "second_moment": 0.0, "updates": 0}


def _descend(entry: dict[str, float], gradient: float, learning_rate: float) -> None:
    """One step of Adam on a number."""
    entry["updates"] += 1
    for key, beta, seen in zip(("first_moment", "second_moment"), ADAM_BETAS, (gradient, gradient**2), strict=True):
        entry[key] = beta * entry[key] + (1 - beta) * seen
    first, second = (
        entry[key] / (1 - beta ** entry["updates"])
        for key, beta in zip(("first_moment", "second_moment"), ADAM_BETAS, strict=True)
    )
    entry["value"] -= learning_rate * first / (math.sqrt(second) + ADAM_EPS)


def _lag(entry: dict[str, float], mean: float) -> float:
    """Share of its first value that a loss still has."""
    initial = entry.setdefault("initial", mean)
    return max(mean, 0.0) / initial if initial > 0 else 1.0
