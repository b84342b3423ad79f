"""A file of own losses on the command line: checked, described, trained with, kept, and refused when it has changed."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from tokenkit.losses import LOSSES

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_loss.py"
BAD = '''from jaxtyping import Float
from torch import Tensor
from tokenkit.losses import loss


@loss(per="token")
def averaged(student_label_logp: Float[Tensor, "B T"]):
    """Nats."""
    return -student_label_logp.mean()


@loss(per="token")
def fine(student_label_logp: Float[Tensor, "B T"]):
    """Nats."""
    return -student_label_logp
'''


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE.read_text("utf-8"), "utf-8")
    return path


@pytest.fixture
def words(tmp_path, model_folder, corpus, plugin):
    source = f"{{path: {corpus}, separator: '\\n\\n'}}"
    return [
        f"output={tmp_path / 'out'}",
        f"plugins=[{plugin}]",
        f"model.source={model_folder}",
        "target_tokenizer=byte",
        "losses={chunk_huber: {delta: 1.5}}",
        f"data.source={source}",
        "data.window_bytes=40",
        "train={steps: 2, batch_size: 2, log_every: 1}",
        f"eval.source={{path: {corpus}, max_bytes: 200}}",
    ]


def one_line(result, *parts):
    code, _, error = result
    assert code == 2
    assert error.count("\n") == 1, error
    for part in parts:
        assert str(part) in error


def test_the_example_is_checked_and_every_check_is_told(tokenkit):
    code, out, error = tokenkit("check-loss", EXAMPLE)
    assert (code, error) == (0, "")
    for word in ("chunk_huber", "jensen_shannon", "gradient", "bfloat16", "finite"):
        assert word in out
    code, out, _ = tokenkit("check-loss", EXAMPLE, "--name", "jensen_shannon")
    assert "chunk_huber" not in out
    one_line(tokenkit("check-loss", EXAMPLE, "--name", "jensen_shanon"), "did you mean 'jensen_shannon'")
    one_line(tokenkit("check-loss", "no.py"), "no.py: no such plugin")


def test_a_failure_is_a_line_and_exit_code_2(tokenkit, plugin):
    plugin.write_text(BAD, "utf-8")
    code, out, error = tokenkit("check-loss", plugin)
    assert code == 2
    assert "FAILS" in out
    assert all(line.startswith(f"tokenkit: {plugin}: averaged: ") for line in error.splitlines())
    assert "averaged: one value per unit: returns one number for units of shape [3, 9]" in error
    assert tokenkit("check-loss", plugin, "--name", "fine")[0] == 0


def test_a_run_with_it_from_end_to_end(tokenkit, words, plugin, tmp_path):
    registry = dict(LOSSES)
    code, _, error = tokenkit("distill", "-q", *words)
    assert code == 0, error
    text = plugin.read_text("utf-8")
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["losses"] == ["chunk_huber"]
    assert results["plugins"] == {str(plugin): hashlib.sha256(text.encode()).hexdigest()}
    assert (tmp_path / "out/plugins/mine.py").read_text("utf-8") == text
    assert yaml.safe_load((tmp_path / "out/run.yaml").read_text("utf-8"))["losses"]["chunk_huber"]["delta"] == 1.5
    assert "loss/chunk_huber" in (tmp_path / "out/metrics.jsonl").read_text("utf-8")
    assert registry == LOSSES


def test_resume_goes_on_with_the_same_file_and_refuses_another(tokenkit, words, plugin, tmp_path):
    assert tokenkit("distill", "-q", *words, "train.stop_after=1")[0] == 0
    text = plugin.read_text("utf-8")
    plugin.write_text(text.replace("near / 2", "near / 3"), "utf-8")
    before = (tmp_path / "out/metrics.jsonl").read_text("utf-8")
    one_line(tokenkit("distill", "-q", "--resume", *words), plugin, "has changed since this run began")
    assert (tmp_path / "out/metrics.jsonl").read_text("utf-8") == before
    assert (tmp_path / "out/plugins/mine.py").read_text("utf-8") == text
    plugin.write_text(text, "utf-8")
    code, _, error = tokenkit("distill", "-q", "--resume", *words)
    assert code == 0, error
    assert json.loads((tmp_path / "out/results.json").read_text("utf-8"))["steps"] == 2


def test_mistakes_around_it_write_nothing(tokenkit, words, plugin, tmp_path):
    one_line(tokenkit("distill", *words, "losses.chunk_huber.dleta=1"), "did you mean 'delta'")
    one_line(tokenkit("distill", *words, "plugins=[]"), "losses.chunk_huber: unknown key")
    one_line(tokenkit("distill", *words, "plugins=mine.py"), "losses.chunk_huber: unknown key", "1 more")
    one_line(tokenkit("distill", *words, f"plugins=[{tmp_path / 'no.py'}]"), "no.py: no such plugin")
    one_line(tokenkit("distill", *words, "losses={jensen_shannon: {}}"), "jensen_shannon: needs one vocabulary")
    plugin.write_text(BAD + "oops(", "utf-8")
    one_line(tokenkit("distill", *words), plugin, "not valid Python")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_and_the_schema_show_its_options(tokenkit, words, plugin):
    code, out, _ = tokenkit("distill", "--dry-run", *words)
    assert code == 0
    shown = yaml.safe_load(out)["losses"]["chunk_huber"]
    assert (shown["weight"], shown["delta"]) == (1.0, 1.5)
    assert "chunk_huber" not in tokenkit("schema", "distill")[1]
    schema = json.loads(tokenkit("schema", "distill", "--plugin", plugin)[1])
    assert schema["$defs"]["chunk_huber_options"]["properties"]["delta"] == {
        "default": 2.0,
        "title": "Delta",
        "type": "number",
    }
    assert schema["additionalProperties"] is False
