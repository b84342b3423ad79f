"""A user's own losses: every mistake is one line, the registry stays as it was, and each check can fail."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.losses import LOSSES, loss
from tokenkit.objective import Objective, losses_config
from tokenkit.plugins.checks import CHECKS, Broken, check_loss
from tokenkit.plugins.load import load_plugin, load_plugins, tensor_names
from tokenkit.quantities import inputs_of

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "my_loss.py"
HEAD = """import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tokenkit.losses import loss
BT = Float[Tensor, "B T"]
BC = Float[Tensor, "B C"]
BTV = Float[Tensor, "B T V"]
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


def own(write, signature, body, decorator='@loss(per="token")'):
    """The one loss of a file with this function in it."""
    text = f'{HEAD}\n{decorator}\ndef mine({signature}):\n    """Something, in nats."""\n    {body}\n'
    return load_plugin(write(text)).losses["mine"]


@pytest.mark.parametrize("name", ["chunk_huber", "jensen_shannon"])
def test_the_example_passes_what_it_shows(name):
    assert [c for c in check_loss(load_plugin(EXAMPLE).losses[name]) if not c.passed] == []


def test_the_example_by_its_formula():
    losses = load_plugin(EXAMPLE).losses
    student, teacher = torch.tensor([[-1.0, -9.0]]), torch.tensor([[-2.5, -1.0]])
    expected = torch.tensor([[1.5**2 / 2, 2 * (8 - 1)]])
    torch.testing.assert_close(losses["chunk_huber"].fn(student, teacher), expected)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    m = (p + q) / 2
    slow = sum((a * (a / m).log()).sum() for a in (p, q)) / 2
    torch.testing.assert_close(losses["jensen_shannon"].fn(q.log()[None, None], p.log()[None, None])[0, 0], slow)
    assert losses["jensen_shannon"].one_vocabulary


def test_the_page_shows_the_example_as_it_is():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loss.md").read_text("utf-8"), re.S)
    assert EXAMPLE.read_text("utf-8") in blocks


def test_the_registry_is_as_it_was_and_a_file_may_be_read_twice():
    before = dict(LOSSES)
    first, second = load_plugin(EXAMPLE), load_plugin(EXAMPLE)
    assert before == LOSSES
    assert first.losses.keys() == second.losses.keys() == {"chunk_huber", "jensen_shannon"}
    assert first.sha256 == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert "Huber" in first.losses["chunk_huber"].paper


def test_its_options_are_keys_with_types_and_hints():
    schema = losses_config(load_plugin(EXAMPLE).losses)
    section = build(schema, {"chunk_huber": {"delta": 3, "weight": 0.5}, "clm": {}})
    terms = {term.loss.name: term for term in Objective.of(section).terms}
    assert terms["chunk_huber"].options == {"delta": 3.0}
    assert set(terms) == {"clm", "chunk_huber"}
    with pytest.raises(UserError, match=r"chunk_huber\.dleta: unknown key; did you mean 'delta'"):
        build(schema, {"chunk_huber": {"dleta": 3}})
    with pytest.raises(UserError, match="chunk_hubr: unknown key; did you mean 'chunk_huber'"):
        build(schema, {"chunk_hubr": {}})
    with pytest.raises(UserError, match=r"chunk_huber\.delta: .* 'far'"):
        build(schema, {"chunk_huber": {"delta": "far"}})
    with pytest.raises(UserError, match="chunk_huber: unknown key"):
        build(losses_config({}), {"chunk_huber": {}})


def test_every_name_that_is_offered_is_computed():
    assert {"student_chunk_logp", "teacher_logits", "chunk_mask"} <= set(tensor_names())
    for name in tensor_names():
        inputs_of(name)


MISTAKES = {
    "x = (": r"mine\.py, line 1: not valid Python",
    "import no_such_module_here": r"mine\.py, line 1: ModuleNotFoundError: No module named 'no_such_module_here'",
    "x = 1\ny = x / 0": r"mine\.py, line 2: ZeroDivisionError",
    "x = 1": r"mine\.py: no function in it stands under @loss",
    HEAD + '@loss(per="token")\ndef clm(student_label_logp: BT):\n    return 0': "line 8: a loss called 'clm' exists",
    HEAD + '@loss(per="batch")\ndef mine(student_label_logp: BT):\n    return 0': "'row'",
    HEAD + '@loss(per="token")\ndef mine(student_logit: BTV):\n    return 0': "did you mean 'student_logits'",
    HEAD + '@loss(per="token")\ndef mine(zzz: BT):\n    return 0': "no tensor is called 'zzz'; known: ",
    HEAD + '@loss(per="token")\ndef mine(student_logits):\n    return 0': "student_logits has no shape",
    HEAD + '@loss(per="token")\ndef mine(student_logits: Tensor):\n    return 0': "student_logits has no shape",
    HEAD + '@loss(per="token")\ndef mine(**tensors):\n    return 0': "can name neither tensors nor options",
    HEAD + '@loss(per="token")\ndef mine(student_label_logp: BT, *, beta=1.0):\n    return 0': "beta has no type",
    HEAD + '@loss(per="token")\ndef mine(student_label_logp: BT, *, beta: float):\n    return 0': "beta has no default",
    HEAD
    + '@loss(per="token")\ndef mine(student_label_logp: BT, *, beta: float = "x"):\n    return 0': "'x', is not of",
    HEAD + '@loss(per="token")\ndef mine(student_label_logp: BT = None):\n    return 0': "cannot have a default",
    HEAD
    + '@loss(per="token")\ndef mine(student_label_logp: BT, *, by: Tensor = None):\n    return 0': "no run file can",
    "from __future__ import annotations\n"
    + HEAD
    + '@loss(per="token")\ndef mine(student_label_logp: BT):\n    return 0': "annotation as text",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_file(write, text):
    before = dict(LOSSES)
    with pytest.raises(UserError, match=MISTAKES[text]) as caught:
        load_plugin(write(text))
    assert "\n" not in str(caught.value)
    assert "mine.py" in str(caught.value)
    assert before == LOSSES


def test_a_missing_file_a_folder_and_two_of_one_name(write, tmp_path):
    with pytest.raises(UserError, match=r"no\.py: no such plugin"):
        load_plugin(tmp_path / "no.py")
    with pytest.raises(UserError, match="not a Python file"):
        load_plugin(tmp_path)
    text = HEAD + '@loss(per="token")\ndef mine(student_label_logp: BT):\n    """."""\n    return -student_label_logp\n'
    with pytest.raises(UserError, match="a loss called 'mine' stands in"):
        load_plugins([write(text, "a.py"), write(text, "b.py")])
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="would share a name in the run folder"):
        load_plugins([write(text, "a.py"), write(text.replace("mine", "his"), "other/a.py")])


def test_a_key_that_every_loss_has_is_refused(write):
    entry = own(write, "student_label_logp: BT, *, weight: float = 1.0", "return -student_label_logp * weight")
    with pytest.raises(UserError, match="every loss has the key 'weight'"):
        losses_config({"mine": entry})


@pytest.mark.parametrize("option", ["copy", "_beta"])
def test_a_key_that_no_schema_can_have_is_refused(write, option):
    entry = own(write, f"student_label_logp: BT, *, {option}: float = 1.0", f"return -student_label_logp * {option}")
    with pytest.raises(UserError, match="cannot be a key of a run file"):
        losses_config({"mine": entry})
    with pytest.raises(UserError, match="cannot be a key of a run file"):
        losses_config({option: entry})


def test_the_package_refuses_a_second_loss_of_a_name():
    def clm(student_label_logp):
        return -student_label_logp

    with pytest.raises(UserError, match="'clm' exists already"):
        loss(per="token")(clm)


BROKEN = {  # check → signature, body, what it says
    "one value per unit": [
        ("student_label_logp: BT", "return -student_label_logp.mean()", "returns one number for units of shape"),
        ("student_label_logp: BT", "return -student_label_logp.mean(1)", r"returns shape \[3\]"),
        ("student_label_logp: BT", "return -student_label_logp.float()", "returns torch.float32 for float64"),
        ("student_label_logp: BT", "return student_label_logp.log()", "NaN or infinite"),
        ("student_label_logp: BT", "return student_label_logp.clamp_max_(-1)", "changes student_label_logp in place"),
        ('student_labels: Float[Tensor, "B T"]', "return student_labels", "student_labels is int64 with 2 axes, where"),
    ],
    "gradient": [
        ("student_label_logp: BT", "return -student_label_logp.detach()", "no student tensor gets a gradient"),
        ("teacher_label_logp: BT", "return -teacher_label_logp", "no student tensor gets a gradient"),
        (
            "student_label_logp: BT",
            "return student_label_logp.detach() * student_label_logp",
            "the gradient is not that of the value",
        ),
    ],
    "masked units": [
        (
            "student_label_logp: BT",
            "return -student_label_logp.cumsum(1)",
            "depends on positions",
        ),
    ],
    "nothing counts": [
        (
            "student_label_logp: BT",
            "return student_label_logp / student_label_logp.sum(1, keepdim=True)",
            "has a gradient .or NaN.",
        ),
    ],
    "batch order": [
        (
            "student_label_logp: BT",
            "return student_label_logp - student_label_logp.mean(0)",
            "depend on the other",
        ),
    ],
    "padding": [
        (
            "student_label_logp: BT",
            "return student_label_logp / student_label_logp.shape[1]",
            "with more padding",
        ),
    ],
    "bfloat16": [
        ("student_logits: BTV", "return student_logits.exp().sum(-1).log()", "NaN or infinite in torch.float32"),
        (
            "student_logits: BTV",
            "return torch.linalg.det(student_logits.mT @ student_logits)[:, None] + 0 * student_logits.sum(-1)",
            "raises",
        ),
    ],
}


@pytest.mark.parametrize(
    ("check", "signature", "body", "message"), [(name, *case) for name, cases in BROKEN.items() for case in cases]
)
def test_every_check_can_fail(write, check, signature, body, message):
    entry = own(write, signature, body)
    found = {c.name: c for c in check_loss(entry)}[check]
    assert not found.passed
    assert re.search(message, found.text), found.text


def test_units_of_your_own(write):
    units = "def units(student_label_mask: Bool[Tensor, 'B T'], *, skip: int):\n"
    units += "    return student_label_mask & (torch.arange(student_label_mask.shape[1]) >= skip)\n"
    text = f"{HEAD}\n{units}\n@loss(per='token', units=units)\n"
    text += "def mine(student_label_logp: BT, *, skip: int = 2):\n    '''Nats.'''\n    return -student_label_logp\n"
    entry = load_plugin(write(text)).losses["mine"]
    assert [c for c in check_loss(entry) if not c.passed] == []
    with pytest.raises(UserError, match="skip is an option of its units, and not of the loss"):
        load_plugin(write(text.replace(", *, skip: int = 2", "")))


def test_a_loss_without_a_sentence_is_told(write):
    text = HEAD + '@loss(per="token")\ndef mine(student_label_logp: BT):\n    return -student_label_logp\n'
    with pytest.raises(Broken, match="no docstring"):
        CHECKS["signature"](load_plugin(write(text)).losses["mine"])
