"""Managing the checkpoints of a learned tokenizer: which is the best, what is kept, archived, compared."""

import json
import math

import pytest
import torch
from test_tokenizer_tools import checkpoint, network, step

from tokenkit.config import UserError, build
from tokenkit.tokenizers.autoencoder.bundle import read_bundle, read_network
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, package_of
from tokenkit.train.checkpoint_files import BEST, FINAL, step_files
from tokenkit.verbs.tokenizer.manage_checkpoints import (
    TokenizerCheckpointsRun,
    best_checkpoint,
    checkpoint_lines,
    clean_checkpoints,
    list_checkpoints,
    manage_checkpoints,
)


def curve(folder, **values):
    rows = [[int(number), value] for number, value in values.items()]
    (folder / "training_state.json").write_text(json.dumps({"accuracy_curve": rows}), "utf-8")


def run_checkpoints(action, folder, **options):
    return manage_checkpoints(build(TokenizerCheckpointsRun, {"action": action, "folder": folder, **options}))


def test_steps_are_numbers_and_best_and_final_are_kept(tmp_path):
    for number in (900, 2000, 10000):
        step(tmp_path, number, 0.5)
    for name in (BEST, FINAL):
        checkpoint(tmp_path, name, 1000, 0.9)
    names = [row.file for row in list_checkpoints(tmp_path)]
    assert names == [*(f"checkpoint_step_{n}.bin" for n in (900, 2000, 10000)), FINAL, BEST]
    assert [row.marks for row in list_checkpoints(tmp_path)] == [(), (), ("newest",), ("final",), ("best",)]
    found = clean_checkpoints(tmp_path, 1)
    assert found["dropped"] == ["checkpoint_step_900.bin", "checkpoint_step_2000.bin"]
    assert found["freed_megabytes"] > 0
    assert [*step_files(tmp_path)] == [10000]
    assert (tmp_path / BEST).is_file()
    assert (tmp_path / FINAL).is_file()
    assert clean_checkpoints(tmp_path, 1)["dropped"] == []


def test_a_checkpoint_that_was_not_measured_is_never_the_best(tmp_path):
    step(tmp_path, 10)
    with pytest.raises(UserError, match="no checkpoint was measured"):
        best_checkpoint(tmp_path)
    step(tmp_path, 20, 0.3)
    assert best_checkpoint(tmp_path)[1]["step"] == 20


def test_a_value_of_an_earlier_step_is_not_that_of_the_file(tmp_path):
    step(tmp_path, 10, 0.7, best=(0.9, 5))
    step(tmp_path, 20, 0.6, best=(0.9, 5))
    step(tmp_path, 24, 0.6, best=(0.9, 5))
    curve(tmp_path, **{"5": 0.9, "10": 0.7, "20": 0.6})
    assert [row.value for row in list_checkpoints(tmp_path)] == [0.7, 0.6, None]
    assert best_checkpoint(tmp_path)[1] == {
        "file": "checkpoint_step_10.bin",
        "step": 10,
        "metric": "learned_byte_accuracy",
        "value": 0.7,
    }
    checkpoint(tmp_path, BEST, 5, 0.9)
    assert best_checkpoint(tmp_path)[0].name == BEST


def test_of_perplexities_the_lowest_is_the_best(tmp_path):
    for number, value in ((1, 3.0), (2, 1.5), (3, 2.0)):
        step(tmp_path, number, value, metric="reconstruction_perplexity")
    assert best_checkpoint(tmp_path)[1]["step"] == 2


def test_the_best_becomes_a_tokenizer_or_a_file_of_weights(tmp_path):
    folder = tmp_path / "c"
    step(folder, 1, 0.2)
    step(folder, 2, 0.4)
    chosen = run_checkpoints("select-best", folder, output=tmp_path / "model")
    assert (chosen["step"], chosen["value"]) == (2, 0.4)
    weights = run_checkpoints("select-best", folder, output=tmp_path / "m/model.bin")
    assert weights["file"] == "checkpoint_step_2.bin"
    first, second = AutoEncoderTokenizer.load(tmp_path / "model"), read_network(tmp_path / "m/model.bin")
    assert first.package.config.chunker == "word"
    for name, tensor in network(2).state_dict().items():
        assert torch.equal(first.package.network.state_dict()[name], tensor)
        assert torch.equal(second.state_dict()[name], tensor)
    assert read_bundle(tmp_path / "m/model.bin")[0]["optimizer"] == {}
    assert (tmp_path / "m/model.bin").stat().st_size < (folder / "checkpoint_step_2.bin").stat().st_size * 0.6
    with pytest.raises(UserError, match="exists, and nothing is overwritten"):
        run_checkpoints("select-best", folder, output=tmp_path / "model")


def test_the_best_takes_the_pins_of_a_tokenizer(tmp_path):
    folder = tmp_path / "c"
    step(folder, 2, 0.4)
    pins = select_pins({b"hello": 3, b" world": 2}, 2)
    old = AutoEncoderTokenizer(package=package_of(network(5), pins, chunker="word", kind="compact"))
    old.save(tmp_path / "old")
    run_checkpoints("select-best", folder, output=tmp_path / "new", pins=tmp_path / "old")
    new = AutoEncoderTokenizer.load(tmp_path / "new")
    assert new.encode("hello world") == old.encode("hello world")
    AutoEncoderTokenizer(package=package_of(None, pins)).save(tmp_path / "other")
    with pytest.raises(UserError, match="has chunks joined, the checkpoint word"):
        run_checkpoints("select-best", folder, output=tmp_path / "newer", pins=tmp_path / "other")
    assert not (tmp_path / "newer").exists()


def test_an_archive_is_whole_and_says_what_it_holds(tmp_path):
    folder = tmp_path / "c"
    step(folder, 2, 0.4)
    curve(folder, **{"2": 0.4})
    run_checkpoints("archive", folder, output=tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "SHA256SUMS",
        "archive.json",
        "checkpoint_step_2.bin",
        "training_state.json",
    ]
    assert json.loads((tmp_path / "a/archive.json").read_text("utf-8"))["value"] == 0.4
    (folder / "checkpoint_step_2.bin").write_bytes(b"damaged")
    checkpoint(folder, BEST, 1, 0.9)
    blob = (folder / BEST).read_bytes()
    (folder / BEST).write_bytes(blob[:3000] + bytes([blob[3000] ^ 1]) + blob[3001:])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        run_checkpoints("archive", folder, output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_two_checkpoints_beside_each_other(tmp_path):
    paths = step(tmp_path, 1, 0.2), step(tmp_path, 2, 0.4)
    found = manage_checkpoints(build(TokenizerCheckpointsRun, {"action": "compare", "checkpoints": paths}))
    assert found["change"]["step"] == 1
    assert found["change"]["value"] == pytest.approx(0.2)
    assert found["same_configuration"]
    assert found["a"]["char_accuracy_positional"] <= 0.2
    assert math.isfinite(found["change"]["reconstruction_perplexity"])


def test_a_damaged_file_is_listed_as_such(tmp_path):
    step(tmp_path, 1, 0.2)
    (tmp_path / "checkpoint_step_2.bin").write_bytes(b"no")
    rows = run_checkpoints("list", tmp_path)["checkpoints"]
    assert rows[1]["step"] is None
    assert "damaged" in rows[1]["marks"][-1]
    assert best_checkpoint(tmp_path)[1]["step"] == 1
    assert "damaged" in checkpoint_lines(rows)[2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"action": "list"}, "folder: missing"),
        ({"action": "list", "folder": "none"}, "does not exist"),
        ({"action": "compare", "checkpoints": ["a.bin"]}, "1 files; write the two"),
        ({"action": "select-best", "folder": "x"}, "output: missing"),
        ({"action": "clean", "folder": "x", "keep": 0}, "keep"),
        ({"action": "delete", "folder": "x"}, "action"),
    ],
)
def test_bad_input_is_one_line(values, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        manage_checkpoints(build(TokenizerCheckpointsRun, values))
    assert "\n" not in str(caught.value)
