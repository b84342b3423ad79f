"""Courses of the learning rate, step by step beside those of transformers and torch.

Ours is `(step + 1) / warmup` in the warm-up where theirs is `step / warmup`: no step is taken at a rate of 0.
"""

import math

import pytest
import torch
import transformers

from tokenkit.train.optimizer import learning_rate_factor
from tokenkit.train.schema import OptimizerConfig

STEPS, WARMUP = 60, 12


def ours(steps=STEPS, **options):
    config = OptimizerConfig(**options)
    return [learning_rate_factor(step, steps=steps, config=config) for step in range(steps)]


def theirs(make, count=STEPS, **options):
    """The factors that a scheduler gives at steps 0, 1, ..., `count`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, found = make(optimizer, **options), []
    for _ in range(count + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def joined(found, warmup):
    """Their curve as ours counts: one step earlier while it rises, the same step from then on."""
    return [*found[1 : warmup + 1], *found[warmup:STEPS]]


CURVES = {
    "constant": ({}, transformers.get_constant_schedule_with_warmup, {}),
    "linear": ({}, transformers.get_linear_schedule_with_warmup, {"num_training_steps": STEPS}),
    "cosine": ({}, transformers.get_cosine_schedule_with_warmup, {"num_training_steps": STEPS}),
    "linear_warmup_cosine_decay": (
        {"lr_min_ratio": 0.1},
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        {"num_training_steps": STEPS, "min_lr_rate": 0.1},
    ),
    "polynomial": (
        {"lr_min_ratio": 0.1, "power": 0.7},
        transformers.get_polynomial_decay_schedule_with_warmup,
        {"num_training_steps": STEPS, "lr_end": 0.1, "power": 0.7},
    ),
    "wsd": (
        {"decay_share": 0.25},
        transformers.get_wsd_schedule,
        {"num_training_steps": STEPS, "num_decay_steps": STEPS // 4, "decay_type": "linear"},
    ),
    "inverse_sqrt": ({}, transformers.get_inverse_sqrt_schedule, {}),
}


@pytest.mark.parametrize("warmup", [WARMUP, 1])
@pytest.mark.parametrize("name", CURVES)
def test_equals_transformers(name, warmup):
    options, make, arguments = CURVES[name]
    found = theirs(make, num_warmup_steps=warmup, **arguments)
    expected = joined(found, warmup)
    assert ours(schedule=name, warmup_steps=warmup, **options) == pytest.approx(expected, abs=1e-12)


def test_wsd_with_a_floor_equals_transformers_from_the_peak_on():
    """Theirs rises from the floor, ours from nothing; both fall to the floor."""
    floor = {"num_decay_steps": STEPS // 4, "decay_type": "linear", "min_lr_ratio": 0.1}
    found = theirs(transformers.get_wsd_schedule, num_warmup_steps=WARMUP, num_training_steps=STEPS, **floor)
    own = ours(schedule="wsd", warmup_steps=WARMUP, decay_share=0.25, lr_min_ratio=0.1)
    assert own[WARMUP:] == pytest.approx(found[WARMUP:STEPS], abs=1e-12)
    assert own[-1] == pytest.approx(0.1 + 0.9 / 15)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_equals_torch_without_warmup(name):
    line = {"start_factor": 1.0, "end_factor": 0.2, "total_iters": STEPS}
    make, options, arguments = {
        "linear": (torch.optim.lr_scheduler.LinearLR, {}, line),
        "cosine": (torch.optim.lr_scheduler.CosineAnnealingLR, {}, {"T_max": STEPS, "eta_min": 0.2}),
        "polynomial": (torch.optim.lr_scheduler.PolynomialLR, {"power": 2.0}, {"total_iters": STEPS, "power": 2.0}),
    }[name]
    lowest = 0.0 if name == "polynomial" else 0.2
    found = ours(schedule=name, lr_min_ratio=lowest, **options)
    assert found == pytest.approx(theirs(make, **arguments)[:STEPS], abs=1e-9)


def test_the_inverse_root_ends_above_its_floor_and_begins_at_one_without_warmup():
    assert ours(schedule="inverse_sqrt")[:5] == pytest.approx([1, 1, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5])
    floor = ours(schedule="inverse_sqrt", lr_min_ratio=0.5, warmup_steps=4)
    assert floor[16] == pytest.approx(0.5 + 0.5 * 0.5)


@pytest.mark.parametrize("name", [*CURVES, "one_cycle"])
def test_no_step_is_at_nothing_or_above_the_peak_and_every_course_stays_low_after_its_end(name):
    found = ours(schedule=name, warmup_ratio=0.2, lr_min_ratio=0.05)
    assert all(0 < value <= 1 for value in found)
    assert max(found) == 1
    config = OptimizerConfig(schedule=name, warmup_ratio=0.2, lr_min_ratio=0.05)
    beyond = learning_rate_factor(10 * STEPS, steps=STEPS, config=config)
    assert beyond == (1 if name == "constant" else pytest.approx(0.05, abs=0.15 if name == "inverse_sqrt" else 1e-9))
