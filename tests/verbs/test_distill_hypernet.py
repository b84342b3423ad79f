"""A student whose rows a network makes of trained ones: nothing at first, learnt along, plain rows in the end."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenkit.config import UserError, build
from tokenkit.data.corpus import read_training_rows
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.train.loop import Interrupted
from tokenkit.train.step import accumulate_gradients
from tokenkit.verbs.distill import batches_of, distill, task_of
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.prepare import prepare
from tokenkit.verbs.sides import objective_of

NETWORK = {"architecture": "transformer", "num_layers": 1, "num_heads": 2, "max_seq_length": 1}


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes: Any) -> DistillRun:
        source = {"path": str(corpus), "separator": "\n\n"}
        optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
        train = {"steps": 4, "batch_size": 4, "mode": "embeddings", "optimizer": optimizer} | changes.pop("train", {})
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "hypernet": NETWORK,
            "losses": {"alm": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": train,
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        }
        return build(DistillRun, values | changes)

    return make


@pytest.mark.parametrize(
    ("mode", "untie"),
    [
        ("embeddings", True),
        ("lora", False),
        pytest.param("embeddings", False, marks=pytest.mark.slow),
        pytest.param("lora", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_it_changes_nothing_at_first_and_the_exported_model_is_what_was_measured(run, tmp_path, mode, untie):
    keys = {"train": {"mode": mode, "lora": {"rank": 2}}, "transfer": {"untie": untie}}
    with_it = distill(run(**keys), quiet=True)
    without = distill(run(**keys, hypernet=None, output=tmp_path / "plain"), quiet=True)
    assert with_it["zero_shot_bits_per_byte"] == without["zero_shot_bits_per_byte"]
    assert with_it["trained_bits_per_byte"] != without["trained_bits_per_byte"]
    keys_of = [set(AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict()) for n in ("out", "plain")]
    assert keys_of[0] == keys_of[1]
    again = run(
        output=tmp_path / "again", model={"source": str(tmp_path / "out")}, target_tokenizer=None, hypernet=None
    )
    assert distill(again, quiet=True)["zero_shot_bits_per_byte"] == pytest.approx(
        with_it["trained_bits_per_byte"], rel=1e-5
    )


@pytest.mark.parametrize("untie", [False, True])
def test_rows_and_network_are_learnt_together(run, untie):
    made = run(transfer={"untie": untie})
    sides = prepare(made)
    objective = objective_of(made.losses, sides)
    task = task_of(made, sides, objective)
    assert task.hypernet is not None
    assert task.hypernet.matrices == 1 + untie
    batches = batches_of(made, sides, objective, read_training_rows(made.data))
    optimizer = torch.optim.SGD(task.trainable().values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        accumulate_gradients(task, batches.at(step), 0)
        optimizer.step()
    moved = {name for name, p in task.trainable().items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("embed" in name for name in moved)
    assert any(name.startswith("hypernet.") and ".out." in name for name in moved)
    assert any(name.startswith("hypernet.") and ".out." not in name for name in moved)
    task.train_mode(False)
    table = sides.student.head().clone()
    assert not torch.equal(table, head_matrix(sides.student.model))
    task.materialise()
    assert torch.equal(head_matrix(sides.student.model), table)
    assert not sides.student.tables
    assert (input_matrix(sides.student.model) is head_matrix(sides.student.model)) != untie


@pytest.mark.parametrize("mode", ["embeddings", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path, mode):
    train = {"mode": mode, "lora": {"rank": 2}, "eval_at": [2]}
    whole = distill(run(train=train, output=tmp_path / "whole"), quiet=True)
    with pytest.raises(Interrupted):
        distill(run(train=train | {"stop_after": 2}, output=tmp_path / "halves"), quiet=True)
    halves = distill(run(train=train, output=tmp_path / "halves"), resume=True, quiet=True)
    assert halves["trained_bits_per_byte"] == whole["trained_bits_per_byte"]
    models = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "halves")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    logged = [(tmp_path / n / "metrics.jsonl").read_text("utf-8").splitlines() for n in ("whole", "halves")]
    measured = [[row["bits_per_byte"] for row in map(json.loads, lines) if "bits_per_byte" in row] for lines in logged]
    assert measured[0] == measured[1]


def test_it_learns_beside_a_map_of_hidden_states(run, tmp_path):
    """The guide's `hypernet.*` with `latents_do_project`: both are learnt along with the rows."""
    losses = {"alm": {}, "hidden_states": {"project": True}}
    results = distill(run(losses=losses, train={"steps": 12}), quiet=True)
    assert results["trained_bits_per_byte"] < results["zero_shot_bits_per_byte"]
    saved = load_file(sorted((tmp_path / "out/checkpoints").glob("step_*"))[-1] / "model.safetensors")
    assert any(name.startswith("hypernet.") for name in saved)
    assert any(name.startswith("projectors.") for name in saved)


@pytest.mark.parametrize(("changes", "message"), [
    ({"hypernet": {"residual": False}}, "hypernet.residual: false would forget"),
    ({"expand_inputs": True}, "hypernet: beside expand_inputs"),
    ({"hypernet": {**NETWORK, "num_heads": 5}}, "num_heads: 5 do not divide 32"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        distill(run(**changes), quiet=True)
    assert not (tmp_path / "out").exists()
