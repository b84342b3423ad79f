"""Positions may count by what the teacher knows there; weights of 0 change nothing; padding says nothing."""

import pytest
import torch

from tokenkit.config import build
from tokenkit.losses import LOSSES
from tokenkit.objective import LossesConfig, Objective
from tokenkit.plugins.checks import example
from tokenkit.quantities import Quantities


def objective(**options):
    return Objective.of(build(LossesConfig, {"forward_kl": options}))


def mean(made, tensors):
    units = made.units(tensors)["forward_kl"]
    sums = made.sums(tensors, {"forward_kl": units})["forward_kl"]
    return (sums / units.counts().to(sums.dtype)).sum(), units


@pytest.mark.parametrize(("kind", "weight"), [("entropy", lambda h: h), ("certainty", lambda h: (-h).exp())])
def test_the_weights_have_a_mean_of_one(kind, weight):
    tensors = Quantities(example(LOSSES["forward_kl"], 0))
    found, units = mean(objective(token_weight=kind), tensors)
    mask = tensors["student_label_mask"]
    values = LOSSES["forward_kl"].values(tensors, {"temperature": 1.0, "temperature_squared": True})[mask]
    raw = weight(tensors["teacher_entropy"])[mask]
    torch.testing.assert_close(found, (raw / raw.mean() * values).mean(), rtol=1e-5, atol=1e-6)
    assert units.weight[~mask].abs().max() == 0


def test_an_entropy_that_is_the_same_everywhere_weighs_nothing():
    leaves = example(LOSSES["forward_kl"], 1)
    tensors = Quantities(leaves | {"teacher_entropy": torch.full_like(leaves["teacher_entropy"], 1.7)})
    weighted, plain = (mean(objective(token_weight=kind), tensors)[0] for kind in ("entropy", "none"))
    torch.testing.assert_close(weighted, plain)
