"""How several losses share a step: what each one's gradient is multiplied with, and what has to be known for that.

Everything is decided by the whole step, never by a microbatch, so that cutting a step in another way changes nothing.
Where a factor depends on the step itself and there are several microbatches, the student reads them twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.train import policies
from tokenkit.train.agreement import Agreement, FixedRatio
from tokenkit.train.balance_schema import BalanceConfig, parse_chain
from tokenkit.train.gradients import LossGradients, combined
from tokenkit.train.parallel import ranks, several
from tokenkit.train.passes import (
    ZERO,
    Balance,
    Forward,
    Shared,
    add_values,
    counted,
    inverse,
    look_first,
    plain,
    sum_backward,
    values_first,
)

SMALLEST_WEIGHT = 1e-3  # GradNorm shall neither silence a loss for good nor turn it round
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class Magnitude(Balance):
    """L / |L| with a constant denominator: every loss weighs its weight, whatever its size."""

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        forwards, means = values_first(forwards)
        factors = {name: weight * inverse(abs(means.get(name, 0.0))) for name, weight in weights.items()}
        return Shared(sum_backward(forwards, factors), factors)


class RunningDeviation(Balance):
    """(L - mean) / deviation, with running statistics of the steps before this one.

    Before its first step a loss is taken to deviate by as much as it is large, so the first factor is 1 / |L|.
    """

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        if weights.keys() - self.state.keys():
            forwards, first = values_first(forwards)
            for name, value in first.items():
                self.state.setdefault(name, {"mean": value, "variance": value * value})
        spread = {name: math.sqrt(entry["variance"]) for name, entry in self.state.items()}
        factors = {name: weight * inverse(spread.get(name, 0.0)) for name, weight in weights.items()}
        means = sum_backward(forwards, factors)
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
        means = sum_backward(forwards, factors)
        for name, value in means.items():
            if weights[name]:  # alone, s / 2 would pull s down for ever
                _descend(self.state[name], 0.5 - factors[name] * value, self.learning_rate)
        return Shared(means, factors)


class GradientMagnitude(Balance):
    """Weights over gradient norms in the last layer, and with `preserve` scaled so that the factors add up to 1.

    The multi-task scheme of ALM: Minixhofer, Vulić & Ponti 2025, 2503.20083.
    """

    def __init__(self, parameters: list[nn.Parameter], trained: Sequence[nn.Parameter], *, preserve: bool):
        super().__init__()
        self.parameters, self.trained, self.preserve = parameters, trained, preserve

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        gradients = LossGradients(self.parameters, self.trained)
        forwards = look_first(forwards, lambda shares: gradients.add(counted(shares, weights)))
        gradients.gather([*weights])
        norms = gradients.norms()
        factors = {name: weight * inverse(norms.get(name, 0.0)) for name, weight in weights.items()}
        total = sum(factors.values())
        if self.preserve and total:
            factors = {name: factor / total for name, factor in factors.items()}
        return Shared(sum_backward(forwards, factors), factors)


class GradNorm(Balance):
    """Learnt factors that let losses train at similar rates. Chen+ 2018, 1711.02257.

    The factors of a step come from the steps before, so one pass is enough; they move after it.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        trained: Sequence[nn.Parameter],
        names: Sequence[str],
        alpha: float,
        learning_rate: float,
    ):
        super().__init__()
        self.parameters, self.trained = parameters, trained
        self.alpha, self.learning_rate = alpha, learning_rate
        self.state = {name: _learnt(1.0) for name in names}

    def backward(self, forwards: Sequence[Forward], weights: Mapping[str, float]) -> Shared:
        gradients = LossGradients(self.parameters, self.trained)
        factors = {name: weight * self.state[name]["value"] for name, weight in weights.items()}
        means = sum_backward(forwards, factors, lambda shares: gradients.add(counted(shares, weights)))
        gradients.gather([*weights])
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
        gradients, sums = LossGradients(self.parameters), {}
        for forward in forwards:
            shares = forward()
            gradients.add(counted(shares, weights))
            add_values(sums, shares)
        gradients.gather([*weights])
        for number, gradient in combined(gradients.found, weights, self.chain).items():
            parameter = self.parameters[number]
            if several() and not isinstance(gradient, DTensor):
                gradient = gradient / ranks().data  # every process adds the whole of it
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return Shared(plain(sums), dict(weights))


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
            preserve = config.method == "approx_gradmag_preserve_mag"
            return GradientMagnitude(last_layer(), list(trained), preserve=preserve)
        case "gradnorm":
            return GradNorm(last_layer(), list(trained), names, **options)
        case "fixed_ratio":
            return FixedRatio(list(trained), names, options["alpha"], _main(config, names), options["every"])
        case "project_aux" | "drop_conflict":
            policy = {"project_aux": policies.project_aux, "drop_conflict": policies.drop_conflict}[config.method]
            return Agreement(list(trained), names, policy, _main(config, names), options["every"])
        case "mgda":
            return Agreement(list(trained), names, policies.mgda, -1, options["every"])
        case "cagrad":
            return Agreement(list(trained), names, partial(policies.cagrad, c=options["c"]), -1, options["every"])
        case chain:
            return Surgery(list(trained), parse_chain(chain))


def _main(config: BalanceConfig, names: Sequence[str]) -> int:
    """The number of the loss that the others are measured against."""
    if config.main is None:
        return 0
    if config.main not in names:
        raise UserError(f"train.balance.main: {config.main!r} is no loss of this run; write one of {', '.join(names)}")
    return list(names).index(config.main)


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
