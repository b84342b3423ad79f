"""docs/objectives.md names everything a run file may say, its examples are run files, its picture is the code's."""

import importlib.util
import re
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from tokenkit.config import build, parse_yaml
from tokenkit.losses import LOSSES
from tokenkit.losses.aligned import Layers, Norm, Projector
from tokenkit.objective import LossesConfig
from tokenkit.verbs.distill_run import StatisticsConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "objectives.md").read_text("utf-8")
WORDS = [*get_args(get_args(Layers)[0]), *get_args(Projector), *get_args(Norm)]


def test_the_picture_is_what_the_script_draws():
    spec = importlib.util.spec_from_file_location("draw_pipeline", ROOT / "scripts" / "draw_pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text("utf-8") == module.picture(), "run scripts/draw_pipeline.py"
    root = ElementTree.fromstring(module.picture())
    shown = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert set(WORDS) - {"none"} <= set(shown.split())
    width, height = map(int, root.attrib["viewBox"].split()[2:])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert int(box.attrib.get("x", 0)) + int(box.attrib["width"]) <= width
        assert int(box.attrib.get("y", 0)) + int(box.attrib["height"]) <= height


@pytest.mark.parametrize("word", sorted(set(WORDS)))
def test_every_word_of_the_aligner_is_explained(word):
    assert f"`{word}`" in PAGE


def of_one_tokenizer() -> list[str]:
    """Losses that compare two models with one tokenizer."""
    return [n for n, entry in LOSSES.items() if entry.one_vocabulary or "layers" in entry.options]


@pytest.mark.parametrize("name", of_one_tokenizer())
def test_every_objective_of_one_tokenizer_is_listed_with_its_options(name):
    line = next(line for line in PAGE.splitlines() if f"`{name}`" in line)
    assert line
    aligner = {"layers", "projector", "ensemble", "norm", "norm_sides", "norm_affine", "norm_first"}
    for option in LOSSES[name].options.keys() - aligner:
        assert f"`{option}`" in PAGE or f"`{option}:" in PAGE, option


def test_options_that_the_page_shows_have_these_defaults():
    checked = 0
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        name = cells[1].strip("`") if len(cells) > 4 else ""
        if name in LOSSES:
            for option, value in re.findall(r"`(\w+)`(?: λ)? ([\w.-]+)", cells[-3]):
                default = LOSSES[name].options[option].default
                if not isinstance(default, tuple):
                    assert parse_yaml(value) == default, (name, option)
                    checked += 1
    assert checked > 20


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
def test_examples_are_accepted(text):
    values = parse_yaml(text)
    build(LossesConfig, values["losses"])
    build(StatisticsConfig, values.get("teacher_statistics", {}))
