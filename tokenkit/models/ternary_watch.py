"""What becomes of ternary weights while they are trained: how many are zero, how many change, how their scale moves."""

import torch
from torch import Tensor, nn

from tokenkit.config import UserError
from tokenkit.models.bitlinear import ternary_layers

ALMOST_DEAD = 0.95  # share of zeros from which a layer is named


class TernaryWatch:
    """Looks at a model's ternary layers whenever it is asked to; between two looks it keeps a byte per weight.

    Scales are compared with those at the time it was made: before a run's first step, also when the run goes on.
    """

    def __init__(self, model: nn.Module):
        self.layers = ternary_layers(model)
        if not self.layers:
            raise UserError("ternary: the model has no ternary layers to watch; write a section `ternary`")
        self.first = torch.stack([layer.trits()[1] for layer in self.layers.values()])
        self._last: dict[str, Tensor] = {}
        self._last_step = 0
        self._zeros: dict[str, float] = {}

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Of all ternary weights: shares of -1, 0 and 1; of the layers: the scale's drift, and how many have gone dead.

        From the second look on also the share of weights whose trit is not what it was at the look before, and that
        per 100 steps. `ternary/gamma_drift` is the mean over layers of |gamma / gamma at first - 1|.
        """
        counts, gammas, flips = [], [], []
        for name, layer in self.layers.items():
            trits, gamma = layer.trits()
            counts.append(torch.stack([(trits == value).sum() for value in (-1, 0, 1)]))
            gammas.append(gamma)
            if name in self._last:
                flips.append((trits != self._last[name]).sum())
            self._last[name] = trits
        counted, gamma = torch.stack(counts).double().cpu(), torch.stack(gammas)
        drift = (gamma / self.first - 1).abs()
        shares = (counted.sum(0) / counted.sum()).tolist()
        self._zeros = dict(zip(self.layers, (counted[:, 1] / counted.sum(1)).tolist(), strict=True))
        values = dict(zip(("ternary/minus", "ternary/zero", "ternary/plus"), shares, strict=True))
        values |= {
            "ternary/gamma_drift": drift.mean().item(),
            "ternary/dead_layers": float(sum(share == 1 for share in self._zeros.values())),
            "ternary/strength": next(iter(self.layers.values())).strength,
        }
        if flips:
            flipped = torch.stack(flips).sum().item() / counted.sum().item()
            values["ternary/flips"] = flipped
            if step > self._last_step:
                values["ternary/flips_per_100_steps"] = flipped * 100 / (step - self._last_step)
        self._last_step = step
        return values

    def warnings(self) -> list[str]:
        """Lines about layers that were all zeros, or nearly, at the last look."""
        return [
            f"ternary: {name}: {'all' if share == 1 else f'{share:.1%}'} of its weights are 0; "
            "lower train.optimizer.weight_decay, or learning_rate"
            for name, share in self._zeros.items()
            if share >= ALMOST_DEAD
        ]
