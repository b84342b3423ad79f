"""What is told of a ternary model while it is trained: trits, flips, drift, and layers that have gone dead."""

import pytest
import torch
from test_ternary import llama, plain
from torch import nn

from tokenkit.config import UserError
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.ternary import attach_ternary
from tokenkit.models.ternary_watch import TernaryWatch


def test_a_watch_counts_trits_flips_and_drift() -> None:
    model = llama()
    attach_ternary(model, plain())
    watch = TernaryWatch(model)
    first = watch.measure(0)
    assert first["ternary/minus"] + first["ternary/zero"] + first["ternary/plus"] == pytest.approx(1)
    assert first["ternary/gamma_drift"] == 0
    assert first["ternary/strength"] == 1
    assert "ternary/flips" not in first
    assert watch.measure(10)["ternary/flips"] == 0
    layer = ternary_layers(model)["model.layers.0.mlp.up_proj"]
    trits, _ = layer.trits()
    with torch.no_grad():
        layer.weight.neg_()  # every trit that is not 0 flips
        ternary_layers(model)["model.layers.0.mlp.down_proj"].weight.mul_(3)
    values = watch.measure(30)
    flipped = (trits != 0).sum().item() / (2 * (4 * 32 * 32 + 3 * 32 * 48))
    assert values["ternary/flips"] == pytest.approx(flipped)
    assert values["ternary/flips_per_100_steps"] == pytest.approx(flipped * 5)
    assert values["ternary/gamma_drift"] == pytest.approx(2 / 14)
    assert (values["ternary/dead_layers"], watch.warnings()) == (0, [])


def test_a_watch_names_layers_that_have_gone_dead() -> None:
    model = llama()
    attach_ternary(model, plain())
    watch = TernaryWatch(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.zero_()[0, 0] = 1.0
    assert watch.measure(5)["ternary/dead_layers"] == 1
    warnings = watch.warnings()
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "ternary: model.layers.0.mlp.up_proj: all of its weights are 0; lower train.optimizer"
    )
    assert "model.layers.1.mlp.up_proj: 99.9% of its weights" in warnings[1]
    with pytest.raises(UserError, match="no ternary layers to watch"):
        TernaryWatch(nn.Linear(2, 2))
