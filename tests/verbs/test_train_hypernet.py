"""`tokenkit train-hypernet` and what comes of it: learnt, resumed, used for a tokenizer it never saw."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models.hypernet import FILE
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.train.loop import Interrupted
from tokenkit.transfer.apply import transfer_model
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.plan import Kind, plan_transfer
from tokenkit.verbs.train_hypernet import TrainHypernetRun, train_hypernet
from tokenkit.verbs.transfer import TransferRun, transfer

Make = Callable[..., TrainHypernetRun]


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, corpus: Path, unigram: HFTokenizer) -> Make:
    unigram.save(tmp_path / "unigram")

    def make(**changes: Any) -> TrainHypernetRun:
        source = {"path": str(corpus), "separator": "\n\n"}
        optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "hypernet": {"num_layers": 1, "num_heads": 2},
            "sampler": {"vocab_size": 400, "vocab_spread": 0.2, "bpe_bytes": 4000},
            "negatives": 60,
            "data": {"source": source, "window_bytes": 80},
            "train": {"steps": 6, "batch_size": 4, "optimizer": optimizer} | changes.pop("train", {}),
            "eval": {
                "source": {**source, "max_bytes": 300},
                "context_tokens": 64,
                "tokenizers": [str(tmp_path / "unigram"), "byte"],
            },
        }
        return build(TrainHypernetRun, values | changes)

    return make


def test_it_begins_as_fast_vocabulary_transfer_and_leaves_the_model_alone(run: Make, tmp_path, model_folder):
    before = load_model(str(model_folder)).state_dict()
    results = train_hypernet(run(train={"eval_at": [0]}), quiet=True)
    first = json.loads((tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()[0])
    for name, value in results["fvt"].items():
        assert first[name] == pytest.approx(value, rel=1e-5)
    assert set(results["hypernet"]) == {"bits_per_byte/unigram", "bits_per_byte/byte"}
    assert results["hypernet"]["bits_per_byte/unigram"] != results["fvt"]["bits_per_byte/unigram"]
    after = load_model(str(model_folder)).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((tmp_path / "out/results.json").read_text("utf-8")) == json.loads(json.dumps(results))


def test_it_learns(run: Make, tmp_path):
    train_hypernet(run(train={"steps": 24, "log_every": 1}, negatives=None, steps_per_tokenizer=24), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"losses": {"alm": {}}, "steps_per_tokenizer": 4, "negatives": None},
        {"copies": False, "lexical_weight": 0.5, "identity_steps": 2},
    ],
    ids=["clm", "alm", "predicted"],
)
def test_a_stopped_run_goes_on_bit_for_bit(run: Make, tmp_path, changes):
    train_hypernet(run(output=tmp_path / "whole", **changes), quiet=True)
    with pytest.raises(Interrupted):
        train_hypernet(run(output=tmp_path / "halves", train={"stop_after": 3}, **changes), quiet=True)
    assert not (tmp_path / "halves" / FILE).exists()
    train_hypernet(run(output=tmp_path / "halves", **changes), resume=True, quiet=True)
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "halves" / FILE).read_bytes()
    for part in ("model", "optimizer"):
        found = [load_file(tmp_path / n / f"checkpoints/step_00000006/{part}.safetensors") for n in ("whole", "halves")]
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def moved(tmp_path: Path, model_folder: Path, name: str, **transfer_keys: Any) -> tuple[dict[str, Any], torch.Tensor]:
    values = {
        "output": tmp_path / name,
        "model": {"source": str(model_folder)},
        "target_tokenizer": str(tmp_path / "unigram"),
        "transfer": transfer_keys,
    }
    report = transfer(build(TransferRun, values))
    return report, AutoModelForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight.detach()


def test_a_transfer_to_a_tokenizer_that_it_never_saw(run: Make, tmp_path, model_folder, bpe, unigram):
    """Copies are copies, what goes by rule goes by rule, and every other row is the network's."""
    results = train_hypernet(run(), quiet=True)
    report, rows = moved(tmp_path, model_folder, "moved", initializer="hypernet", hypernet=str(tmp_path / "out"))
    plain_report, plain = moved(tmp_path, model_folder, "plain")
    plan = plan_transfer(bpe, unigram, source_rows=bpe.vocab_size)
    free = torch.zeros(len(plan), dtype=torch.bool)
    free[torch.from_numpy(plan.free)] = True
    assert report["origins"]["input"]["initializer"] == int(free.sum()) > 0
    assert "initializer" not in plain_report["origins"]["input"]
    assert torch.equal(rows[~free], plain[~free])
    assert (plan.kinds == Kind.COPIED).sum() > 0
    assert (rows[free] != plain[free]).any(1).all()
    assert results["hypernet"] == train_results(run, results)


def train_results(run: Make, results: dict[str, Any]) -> dict[str, Any]:
    """What a finished run says when it is asked again: it is not trained further."""
    return train_hypernet(run(), resume=True, quiet=True)["hypernet"]


def test_a_network_of_another_model_or_shape_is_refused(run: Make, tmp_path, model_folder, unigram, bpe):
    train_hypernet(run(), quiet=True)
    keys = {"initializer": "hypernet", "hypernet": str(tmp_path / "out")}
    other = tmp_path / "other"
    model = load_model(str(model_folder))
    model.resize_token_embeddings(unigram.vocab_size)
    model.save_pretrained(other)
    unigram.save(other)
    with pytest.raises(UserError, match="whose tokenizer is another than"):
        moved(tmp_path, other, "a", **keys)
    untied = load_model(str(model_folder))
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 2)
    untied.save_pretrained(tmp_path / "untied")
    bpe.save(tmp_path / "untied")
    with pytest.raises(UserError, match="makes rows of 1 matrices, and this model has 2"):
        moved(tmp_path, tmp_path / "untied", "b", **keys)
    with pytest.raises(UserError, match=r"transfer.hypernet=FOLDER, of `tokenkit train-hypernet`"):
        moved(tmp_path, model_folder, "c", initializer="hypernet")


def test_two_matrices_are_made_by_one_network_which_reads_both(run: Make, tmp_path, model_folder, bpe, unigram):
    """Streamed and in memory the same rows, for input and output."""
    model = load_model(str(model_folder))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(1).clone())
    model.save_pretrained(tmp_path / "untied")
    bpe.save(tmp_path / "untied")
    train_hypernet(run(model={"source": str(tmp_path / "untied")}, train={"steps": 2}), quiet=True)
    keys = {"initializer": "hypernet", "hypernet": str(tmp_path / "out")}
    report, _ = moved(tmp_path, tmp_path / "untied", "streamed", **keys)
    assert report["origins"]["input"]["initializer"] == report["origins"]["head"]["initializer"] > 0
    transfer_model(model, bpe, unigram, Choice("hypernet"), evidence=Evidence(bpe, unigram, hypernet=tmp_path / "out"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert torch.equal(input_matrix(found), input_matrix(model))
    assert torch.equal(head_matrix(found), head_matrix(model))


@pytest.mark.parametrize(("changes", "message"), [
    ({"hypernet": {"architecture": "identity"}}, "hypernet.architecture: 'identity' learns nothing"),
    ({"lexical_weight": 0.5}, "lexical_weight: 0.5 beside copies=true"),
    ({"identity_steps": 5}, "identity_steps: 5 beside copies=true"),
    ({"losses": {"jsd": {}}}, "needs one vocabulary"),
])  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_written(run: Make, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train_hypernet(run(**changes), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line_knows_it(tokenkit: Any, tmp_path):
    code, out, _ = tokenkit("train-hypernet", "--help")
    assert code == 0
    assert "any tokenizer for one model" in out
