"""What a run writes into the README of its model, and that a stranger can repeat the run from it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tokenkit.config import UserError, build
from tokenkit.data.batch import Batches
from tokenkit.data.corpus import read_training_rows
from tokenkit.export.private import found_private
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.counted import Counted
from tokenkit.train.loop import Interrupted
from tokenkit.verbs.card import write_cards
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.pretrain import PretrainRun, pretrain


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        train = {"steps": 4, "batch_size": 4, "log_every": 1, "optimizer": {"learning_rate": 1e-2}}
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "losses": {"forward_kl": {}, "clm": {"weight": 0.1}},
            "student": {"config": {"num_hidden_layers": 1}},
            "data": {"source": source, "window_bytes": 80},
            "train": train | changes.pop("train", {}),
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        }
        return build(DistillRun, values | changes)

    return make


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def section(text, title):
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def test_a_run_writes_a_card_that_says_what_is_so(run, tmp_path):
    results = distill(run(card={"license": "apache-2.0", "language": ["en"], "name": "small"}), quiet=True)
    text = (tmp_path / "out/model/README.md").read_text("utf-8")
    data = ModelCard(text).data
    assert (data.license, data.language, data.tags) == ("apache-2.0", ["en"], ["tokenkit", "distillation"])
    assert data.base_model is None  # a local folder is no model of the hub
    assert data.model_name == "small"
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured["bits_per_byte"] == results["trained_bits_per_byte"]
    size = load_file(tmp_path / "out/model/model.safetensors")
    parameters = sum(tensor.numel() for tensor in size.values())
    assert f"| this model | {parameters:,} | " in section(text, "Student and teacher")
    assert f"| teacher tiny | {results['student']['parameters_before']:,} | " in section(text, "Student and teacher")
    assert "| num_hidden_layers | 2 | 1 |" in section(text, "Student and teacher")
    assert "`forward_kl` × 1" in section(text, "Objective")
    assert "`clm` × 0.1" in section(text, "Objective")
    losses = losses_of(tmp_path / "out")
    assert f"first {losses[0]:.4f}, lowest {min(losses):.4f}, last {losses[-1]:.4f}" in section(text, "Training")
    assert "resident memory (RSS) at most" in section(text, "Resources")
    assert "GPU" not in section(text, "Resources")
    assert "| retention |" in section(text, "Evaluation")
    assert "## Benchmarks" not in text
    assert "held-out text, and on nothing else" in section(text, "Limits")
    assert "push_to_hub" in section(text, "Privacy")


def test_nothing_private_is_in_a_card(run, tmp_path, model_folder):
    prompts = ["my key is hf_abcdefghijklmnopqrstuvwxyz", "look into /home/ann/notes.txt"]
    distill(run(report={"prompts": prompts, "max_new_tokens": 2}, train={"steps": 1}), quiet=True)
    text = (tmp_path / "out/model/README.md").read_text("utf-8")
    assert not found_private(text)
    for private in ("/home", "/root", "hf_a", str(tmp_path), str(model_folder.parent), os.uname().nodename):
        assert private not in text


def test_valid_and_padded_tokens_are_counted(run, tmp_path, corpus):
    """Four rows of different lengths, padded to a multiple of 32; and the counts of a run that was stopped go on."""
    distill(run(), quiet=True)
    rows = read_training_rows(run().data)
    tokenizer = load_tokenizer(run().model.source)
    batches = Batches(rows, tokenizer, tokenizer, batch_size=4, seed=0)
    valid = positions = learnt = 0
    for step in range(4):
        lengths = [1 + len(tokenizer.encode(rows[row].text)) + rows[row].ends_document for row in batches.rows(step)]
        valid += sum(lengths)
        learnt += sum(length - 1 for length in lengths)
        positions += 4 * -(-max(lengths) // 32) * 32
    expected = f"{valid:,} valid ({learnt:,} of them learnt) and {positions - valid:,} of padding, in 4 steps"
    assert expected in section((tmp_path / "out/model/README.md").read_text("utf-8"), "Data")
    stopped = run(train={"stop_after": 2}, output=tmp_path / "halves")
    with pytest.raises(Interrupted):
        distill(stopped, quiet=True)
    distill(run(output=tmp_path / "halves"), resume=True, quiet=True)
    assert expected in (tmp_path / "halves/model/README.md").read_text("utf-8")


def test_counts_of_older_checkpoints_are_none():
    class Nothing:
        def state(self):
            return {"x": torch.ones(1)}

        def load_state(self, tensors):
            assert set(tensors) == {"x"}

        def at(self, step, num_microbatches=1, rank=0, ranks=1):
            return []

        def place(self, step):
            return "nowhere"

    counted = Counted(Nothing())
    counted.load_state({"x": torch.ones(1)})
    assert counted.counts["steps"] == 0
    counted.at(0)
    again = Counted(Nothing())
    again.load_state(counted.state())
    assert (again.counts["steps"], again.place(0)) == (1, "nowhere")


def test_ternary_tags_stand_for_ternary_matrices(run, tmp_path):
    distill(run(train={"steps": 1, "mode": "full"}, ternary={}, student=None), quiet=True)
    for folder in ("model", "ternary"):
        text = (tmp_path / "out" / folder / "README.md").read_text("utf-8")
        assert {"bitnet", "1.58-bit"} <= {*ModelCard(text).data.tags}
        assert re.search(r"weights are -1, 0 or 1, in 14 matrices", text)
    packed = (tmp_path / "out/ternary/README.md").read_text("utf-8")
    sizes = [float(re.search(r"\| this model \| [\d,]+ \| ([\d.]+)", t)[1]) for t in (text, packed)]
    assert sizes[1] <= sizes[0]


def test_a_card_that_fails_is_logged_and_the_run_is_good(run, tmp_path, monkeypatch, caplog):
    def broken(facts):
        raise RuntimeError("no paper")

    monkeypatch.setattr("tokenkit.verbs.card.render_card", broken)
    results = distill(run(train={"steps": 1}), quiet=True)
    assert results["steps"] == 1
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert not (tmp_path / "out/model/README.md").exists()
    assert "card: not written (RuntimeError: no paper)" in caplog.text
    with pytest.raises(RuntimeError, match="no paper"):
        write_cards(tmp_path / "out")  # whoever asks for the card alone is told


def test_the_command_writes_cards_again(run, tmp_path, tokenkit):
    distill(run(train={"steps": 1}), quiet=True)
    path = tmp_path / "out/model/README.md"
    before = path.read_text("utf-8")
    path.unlink()
    code, out, _ = tokenkit("card", tmp_path / "out")
    assert (code, str(path) in out) == (0, True)
    assert path.read_text("utf-8") == before
    tokenkit("card", tmp_path / "out", "card.license=mit")
    assert ModelCard(path.read_text("utf-8")).data.license == "mit"
    assert ModelCard(before).data.license is None
    (tmp_path / "empty").mkdir()
    code, _, err = tokenkit("card", tmp_path / "empty")
    assert (code, err) == (2, f"tokenkit: {tmp_path / 'empty'}: no run.yaml here; give the folder of a finished run\n")
    (tmp_path / "out/results.json").unlink()
    assert tokenkit("card", tmp_path / "out")[0] == 2
    code, _, err = tokenkit("card", tmp_path / "out", "push_to_hub=true")
    assert (code, "hub.repo_id=OWNER/NAME" in err) == (2, True)


def test_no_card_where_none_is_wanted(run, tmp_path):
    distill(run(train={"steps": 1}, card={"write": False}), quiet=True)
    assert not (tmp_path / "out/model/README.md").exists()


def test_a_run_that_went_on_with_another_commit_says_so(run, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        distill(run(train={"stop_after": 2}), quiet=True)
    from tokenkit.report.provenance import provenance

    later = {**provenance(), "commit": "e" * 40, "dirty": False}
    monkeypatch.setattr("tokenkit.verbs.card.provenance", lambda: later)
    distill(run(), resume=True, quiet=True)
    text = (tmp_path / "out/model/README.md").read_text("utf-8")
    assert "The run began with" in text
    assert f"It went on with tokenkit-torch {later['version']} (Apache-2.0), commit {'e' * 40};" in text


def test_a_pretrained_model_has_a_card_too(tmp_path, corpus):
    source = {"path": str(corpus), "separator": "\n\n"}
    values = {
        "output": tmp_path / "out",
        "tokenizer": {"load": "byte"},
        "model": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "data": {"source": source, "window_bytes": 64},
        "train": {"steps": 2, "batch_size": 2, "log_every": 1},
        "eval": {"source": {**source, "max_bytes": 200}, "context_tokens": 64},
    }
    results = pretrain(build(PretrainRun, values), quiet=True)
    text = (tmp_path / "out/model/README.md").read_text("utf-8")
    data = ModelCard(text).data
    assert data.tags == ["tokenkit"]
    assert data.eval_results[0].metric_value == results["bits_per_byte"]
    assert "tokenkit pretrain run.yaml" in section(text, "Reproduce")
    assert not found_private(text)


@pytest.mark.slow
def test_the_printed_command_repeats_the_run_bit_for_bit(run, tmp_path, model_folder, corpus):
    """From the card alone, in an empty folder, with what it says should lie there."""
    distill(run(), quiet=True)
    reproduce = section((tmp_path / "out/model/README.md").read_text("utf-8"), "Reproduce")
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", reproduce, re.S)[1], "utf-8")
    (command,) = re.search(r"```sh\n(.*?)```", reproduce, re.S)[1].splitlines()
    named = re.findall(r"^- `(.*)`$", reproduce, re.M)
    assert sorted(named) == sorted([model_folder.name, corpus.name])
    shutil.copytree(model_folder, clean / model_folder.name)
    shutil.copy(corpus, clean / corpus.name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    subprocess.run(f"{command} --quiet", shell=True, cwd=clean, env=environment, check=True, capture_output=True)
    assert losses_of(clean / "out") == losses_of(tmp_path / "out")
    weights = [load_file(folder / "model/model.safetensors") for folder in (clean / "out", tmp_path / "out")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_an_unfinished_run_has_no_card(run, tmp_path):
    with pytest.raises(Interrupted):
        distill(run(train={"stop_after": 2}), quiet=True)
    with pytest.raises(UserError, match="continue it with --resume"):
        write_cards(tmp_path / "out")
