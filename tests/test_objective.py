"""The `losses:` section: presets fill what is not written, options choose tensors, weights sum up to the formula."""

import pytest
import torch

from tokenkit.config import UserError, build, resolved
from tokenkit.losses import LOSSES
from tokenkit.losses.alm import PRESETS
from tokenkit.objective import LossesConfig, Objective
from tokenkit.quantities import Quantities

ALM_NEEDS = {"label_logp", "boundary_logp"}


def section(alm):
    return build(LossesConfig, {"alm": alm})


def options_of(alm):
    return dict(Objective.of(section(alm)).terms[0].options)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_shown_resolved_and_what_is_written_goes_before(name):
    shown = resolved(section({"preset": name}))["alm"]
    assert {key: shown[key] for key in PRESETS[name]} == PRESETS[name]
    assert shown["preset"] == name
    assert build(LossesConfig, {"alm": shown}) == section({"preset": name})  # what a resumed run reads
    assert options_of({"preset": name, "temperature": 7.0}) == options_of({"preset": name}) | {"temperature": 7.0}
    assert options_of({"preset": name}).keys() == LOSSES["alm"].options.keys()


def test_the_best_preset_is_the_default_and_upstream_differs_in_two_options():
    default, upstream = options_of({}), options_of({"preset": "upstream"})
    assert options_of({"preset": "best"}) == default
    changed = {key: value for key, value in upstream.items() if default[key] != value}
    assert changed == {"divergence": "ce", "temperature": 100.0}


@pytest.mark.parametrize(
    ("alm", "message"),
    [
        ({"preset": "papers"}, "losses|alm.preset: .*'upstream' or 'best'"),
        ({"numerator": "tokens"}, "alm.numerator: .*'token_count'"),
        ({"chunk_sizes": []}, "alm.chunk_sizes: .*at least 1 item"),
        ({"chunk_sizes": [0]}, "alm.chunk_sizes.0: .*greater than or equal to 1"),
        ({"temperature": 0}, "alm.temperature: .*greater than 0"),
        ({"threshold": 2}, "alm.threshold: .*less than or equal to 1"),
        ({"renyi_order": 0}, "alm.renyi_order: .*greater than 0"),
    ],
)
def test_a_wrong_option_is_one_line(alm, message):
    with pytest.raises(UserError, match=message) as caught:
        section(alm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_takes_a_temperature_of_0(name):
    options = {option for option in LOSSES[name].options if option.endswith("temperature")}
    for option in options:
        with pytest.raises(UserError, match=f"{name}.{option}: .*greater than 0"):
            build(LossesConfig, {name: {option: 0}})
    for option in {"top_k", "chunk"} & LOSSES[name].options.keys():
        with pytest.raises(UserError, match=f"{name}.{option}: .*greater than or equal to 1"):
            build(LossesConfig, {name: {option: 0}})


def test_the_end_of_text_takes_the_place_of_the_boundary():
    objective = Objective.of(section({}))
    assert objective.needs("teacher") == objective.needs("student") == ALM_NEEDS
    objective = Objective.of(section({"boundary": "eos"}))
    assert objective.needs("teacher") == objective.needs("student") == {"label_logp", "eos_logp"}
    assert objective.counting_needs_teacher
    assert not Objective.of(section({"merge": False})).terms[0].options["merge"]


def example(**options):
    """Two rows of four chunks; the third of the second row is scored by the teacher alone."""
    generator = torch.Generator().manual_seed(0)
    logp, mass = (-4 * torch.rand(2, 2, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    chunk = torch.tensor([[0, 0, 1, 2, 2, 3, 3, 3, -1], [0, 1, 1, 1, 2, 2, 3, -1, -1]])
    end = torch.tensor([[1, 2, 4, 7], [0, 3, 5, 6]])
    leaves = {}
    for number, side in enumerate(("student", "teacher")):
        leaves |= {f"{side}_label_logp": logp[number], f"{side}_boundary_logp": mass[number]}
        leaves |= {f"{side}_chunk": chunk, f"{side}_chunk_end": end}
    leaves["student_chunk"] = torch.where(torch.tensor([[False], [True]]) & (chunk == 2), -1, chunk)
    objective = Objective.of(section({"merge": False, "debias": False, **options}))
    tensors = Quantities(leaves)
    units = objective.units(tensors)
    return tensors, units["alm"], objective.sums(tensors, units)["alm"]


@pytest.mark.parametrize("numerator", ["chunk_count", "token_count", "log1p_token_count"])
@pytest.mark.parametrize("denominator", ["chunk_count", "token_count"])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1)])
def test_numerator_denominator_and_sizes_equal_a_double_loop(numerator, denominator, sizes):
    tensors, units, total = example(
        divergence="abs", numerator=numerator, denominator=denominator, chunk_sizes=list(sizes)
    )
    tokens = tensors["teacher_chunk_tokens"].clone()
    tokens[1, 2] = 0
    teacher, student = tensors["teacher_chunk_logp"], tensors["student_chunk_logp"]
    expected, count = 0.0, 0.0
    for size in sizes:
        for row in range(2):
            for first in range(0, 4, size):
                inside = [c for c in range(first, min(first + size, 4)) if tokens[row, c]]
                n = sum(int(tokens[row, c]) for c in inside)
                weight = {"chunk_count": float(n > 0), "token_count": n, "log1p_token_count": torch.tensor(n).log1p()}
                gap = abs(sum(float(teacher[row, c] - student[row, c]) for c in inside))
                expected += gap * float(weight[numerator]) / len(sizes)
                count += float(weight[denominator])
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert units.count.sum().item() == pytest.approx(count)
