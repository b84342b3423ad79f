"""The auto-encoder learns through the one loop, and a resumed run is the run that was never stopped."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.data.chunk_batches import ChunkBatches, DrawConfig
from tokenkit.data.chunks import ChunkTable, TokenizerDataset, count_chunks
from tokenkit.eval.reconstruction import HeldOut, answers, entropy_ratios, measure
from tokenkit.losses import LOSSES as LOSS
from tokenkit.objective import Objective
from tokenkit.tokenizers.autoencoder.bundle import read_bundle
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker
from tokenkit.tokenizers.autoencoder.config import TokenizerConfig
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig, scored_positions, symbols_of
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
from tokenkit.train.checkpoint_files import BEST, FINAL, step_files
from tokenkit.train.loop import Interrupted
from tokenkit.train.recipe import LOSSES
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.autoencode import AutoencodeTask, rare, saturated, unused
from tokenkit.train.tokenizer_trainer import TokenizerCheckpoint, TokenizerTrainer
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.tokenizer.checklist import checklist_run
from tokenkit.verbs.tokenizer.pretrain import TokenizerPretrainRun, pretrain_tokenizer

ROOT = Path(__file__).parents[2]


def task_of(documents, losses=LOSSES, batch_size=32, **shape):
    torch.manual_seed(0)
    network = AutoEncoder(NetworkConfig(**{"hidden": 32, "byte_width": 8, **shape})).double()
    table = ChunkTable.of(count_chunks(documents, make_chunker("word"))).cut(network.max_bytes)
    batches = ChunkBatches(table, network.config, DrawConfig(), batch_size=batch_size, seed=1)
    task = AutoencodeTask(network, Objective.of(losses), batches)
    task.begin()
    return task


def tensors_of(folder):
    return read_bundle(folder / "checkpoints" / FINAL)[0]


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    measured = ("tokens_per_second", "time/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert {part: tensors.keys() for part, tensors in a.items()} == {part: t.keys() for part, t in b.items()}
    return all(torch.equal(tensor, b[part][name]) for part, tensors in a.items() for name, tensor in tensors.items())


@pytest.mark.parametrize("stop", [6, 12, 14])  # before, at and between the searches for failing chunks
def test_stopped_and_resumed_equals_never_stopped(pretrain, tmp_path, stop):
    pretrain("whole")
    with pytest.raises(Interrupted):
        pretrain("cut", stop_after=stop)
    pretrain("cut", resume=True)
    assert len(tensors_of(tmp_path / "whole")["state"]["batches.failing"])
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_ten_steps_and_ten_more_equal_twenty_straight(pretrain, tmp_path):
    pretrain("whole", schedule_steps=20)
    pretrain("longer", steps=10, schedule_steps=20)
    pretrain("longer", resume=True, schedule_steps=20)
    assert same(tmp_path / "whole", tmp_path / "longer")
    assert max(step_files(tmp_path / "longer/checkpoints")) == 20
    with pytest.raises(UserError, match=r"train.steps: 30 are more than train.schedule_steps \(20\)"):
        pretrain("longer", resume=True, steps=30, schedule_steps=20)
    pretrain("fixed", steps=10)
    with pytest.raises(UserError, match=r"train\.steps differ"):
        pretrain("fixed", resume=True, steps=12)


def test_the_losses_by_their_formulas(documents):
    task = task_of(documents)
    batch = task.batches.at(0)[0]
    tensors = {**batch.tensors, **task.student_tensors(batch, {}, {})}
    units, sums = task.objective.units(tensors), task.objective.sums(tensors, task.objective.units(tensors))
    sums = {name: value.detach() for name, value in sums.items()}
    symbols = batch.tensors["symbols"]
    logits, latents, _ = task.network(symbols, batch.tensors["kept"])
    slow = [
        -logits[i, t].detach().log_softmax(-1)[symbols[i, t]]
        for i in range(len(symbols))
        for t in range(8)
        if scored_positions(symbols)[i, t]
    ]
    torch.testing.assert_close(sums["reconstruction"].item(), float(sum(slow)))
    assert units["reconstruction"].counts().item() == len(slow)
    mean = (sums["saturation"] / units["saturation"].counts()).item()
    expected = torch.relu(latents.abs() - 4).square().mean().item()
    assert mean == pytest.approx(expected, rel=1e-6)


def test_crowded_levels_draw_towards_the_emptier_neighbour():
    fn, shares = LOSS["crowded_levels"].fn, torch.tensor([[0.5, 2.0, 1.0, 0.5]])
    cells = torch.tensor([[-0.4], [0.25], [1.5], [3.3]], requires_grad=True)
    values = fn(cells, shares)
    torch.testing.assert_close(values.flatten(), torch.tensor([-1.1, -0.125, 0.5, -0.65]))
    values.sum().backward()
    assert torch.equal(cells.grad.sign().flatten(), torch.tensor([1.0, 1.0, -1.0, -1.0]))
    assert fn(torch.rand(5, 1) * 3, torch.ones(1, 4)).abs().max() < 1e-6


def test_cells_and_shares_are_those_of_the_digits(documents):
    task = task_of(documents, levels=(8, 5, 3), mode="S")
    found = task.student_tensors(task.batches.at(0)[0], {}, {})
    digits = task.network.digits(task.batches.at(0)[0].tensors["symbols"]).flatten(1)
    assert torch.equal(found["student_cells"].add(0.5).floor().long(), digits)
    for step in range(200):
        task.student_tensors(task.batches.at(0)[0], {}, {})
        task.stepped(step + 1, 10_000)
    shares = task.state()["shares"]
    for place, level in enumerate([8, 5, 3] * 3):
        expected = torch.bincount(digits[:, place], minlength=8) / len(digits) * level
        torch.testing.assert_close(shares[place].double(), expected.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("parts", [2, 3])
def test_microbatches_add_up_to_the_step(documents, parts):
    task = task_of(documents)
    whole = accumulate_gradients(task, task.batches.at(4), 0)
    expected = {name: p.grad.clone() for name, p in task.trainable().items()}
    task.network.zero_grad()
    cut = accumulate_gradients(task, task.batches.at(4, parts), 0)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
    assert cut.units == whole.units
    for name, parameter in task.trainable().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-11)


def test_every_digit_is_used_before_the_first_step(documents, caplog):
    with caplog.at_level(logging.WARNING):
        task = task_of(documents, batch_size=256)
    assert caplog.text == ""
    symbols = task.batches.at(3)[0].tensors["symbols"]
    digits, levels = task.network.digits(symbols), task.network.quantizer.levels
    assert unused(digits, levels) == []
    latents = task.network.latents(symbols)
    torch.testing.assert_close(latents.flatten(1).std(0), torch.ones(24).double(), rtol=0.5, atol=0)


def test_the_alarm_on_codes_that_collapse(documents, caplog):
    task = task_of(documents, batch_size=256)
    with torch.no_grad():
        task.network.latent.weight.mul_(0)
        task.network.latent.bias.fill_(9.0)
    for step in (99, 100, 200, 300):
        for number in range(2):
            task.student_tensors(task.batches.at(number)[0], {}, {})
        task.stepped(step, 1000)
    assert caplog.text.count("has 0% of its even share") == 1
    assert caplog.text.count("of the bounded values are beyond 0.99") == 1
    collapsed = torch.zeros(100, 1, 2, dtype=torch.long)
    assert unused(collapsed, [8, 2]) == ["digit 0 of group 0 takes 1 of 8 levels"]
    assert rare(collapsed, [8, 2])
    assert rare(torch.arange(8).repeat(4).view(-1, 1, 1), [8]) is None
    assert saturated(torch.full((10, 1, 1), 0.5)) is None


def test_the_average_follows_the_weights(documents):
    task = task_of(documents)
    start = task.network.latent.weight.detach().clone()
    with torch.no_grad():
        task.network.latent.weight.add_(1.0)
    task.stepped(1, 100)
    torch.testing.assert_close(task.average.latent.weight, start + 10 / 11)
    other = task_of(documents)
    other.load_state(task.state())
    torch.testing.assert_close(other.average.latent.weight, task.average.latent.weight)
    assert task.state().keys() == {*(f"ema.{name}" for name in task.network.state_dict()), "shares"}


def test_failing_chunks_are_those_that_do_not_come_back(documents):
    task = task_of(documents)
    task.mine(500)
    rows, symbols = task.batches.failing, torch.from_numpy(task.batches.symbols).long()
    exact = answers(task.average, symbols, task.network.config.min_groups).exact
    assert sorted(set(range(len(symbols))) - set(np.flatnonzero(exact).tolist())) == rows.tolist()
    task.batches.mine(np.empty(0, np.int64))
    for step, mined in ((400, False), (499, False), (500, True), (1000, False)):
        task.batches.mine(np.empty(0, np.int64))
        task.stepped(step, 1000)
        assert bool(len(task.batches.failing)) == mined, step


def test_measures_by_hand():
    torch.manual_seed(0)
    network = AutoEncoder(NetworkConfig(hidden=32, byte_width=8)).eval()
    train, held_out = ChunkTable.of({b"ab": 3, b"c": 1}), ChunkTable.of({b"ab": 5, b"xyz": 2, b"longer than eight": 1})
    data = HeldOut.of(held_out, train, 8)
    assert dict(zip(data.counts.tolist(), data.seen.tolist()))[5.0]
    found = measure(network, data, shortest=True)
    chunks = held_out.cut(8)
    total = right = 0
    for chunk, count in chunks.as_dict().items():
        symbols = symbols_of([chunk], 8)
        said = network(symbols)[0].argmax(-1)[0, : len(chunk)]
        total += count * len(chunk)
        right += count * int((said == symbols[0, : len(chunk)]).sum())
    assert found["learned_byte_accuracy"] == pytest.approx(right / total)
    assert found["seen_share"] == pytest.approx(5 / chunks.counts.sum())
    assert found["reconstruction_perplexity"] > 50
    assert 0 <= found["digit_entropy_min"] <= found["digit_entropy_mean"] <= 1
    even = np.arange(8)[:, None, None]
    assert entropy_ratios(even, [8], np.ones(8))[0, 0] == pytest.approx(1)
    assert entropy_ratios(np.zeros_like(even), [8], np.ones(8))[0, 0] == 0


PLAIN = {"output": "x", "data": {"source": {"stdlib": "train"}}, "train": {"steps": 1}}


def test_a_language_model_cannot_be_taught_to_reconstruct(tmp_path, model_folder, corpus):
    source = {"path": str(corpus)}
    values = {"output": tmp_path, "model": {"source": str(model_folder)}, "losses": {"reconstruction": {}}}
    values |= {"data": {"source": source}, "train": {"steps": 1}, "eval": {"source": source}}
    run = build(DistillRun, values | {"output": tmp_path / "new"})
    with pytest.raises(UserError, match=r"losses.reconstruction: needs student_byte_logits, which an auto-encoder has"):
        distill(run, quiet=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"losses.clm: needs student_label_logp, which an auto-encoder has not"):
        build(
            TokenizerPretrainRun,
            {"output": "x", "data": {"source": source}, "train": {"steps": 1}, "losses": {"clm": {}}},
        )


def test_a_run_is_the_recipe_unless_it_says_otherwise(run_file):
    run = run_file("x", optimizer={"learning_rate": 0.01})
    optimizer = run.train.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (0.01, (0.9, 0.98), 0.01)
    assert (optimizer.warmup_steps, optimizer.lr_min_ratio, optimizer.schedule) == (100, 0.02, "cosine")
    assert run.train.keep_checkpoints == 5
    assert Objective.of(run.losses).weights() == {"reconstruction": 1.0, "saturation": 1e-4, "crowded_levels": 0.3}
    small = build(TokenizerPretrainRun, {"output": "x", "data": {"source": {"stdlib": "train"}}, "train": {"steps": 1}})
    assert small.network.plain() == NetworkConfig()
    nano = {
        "output": "x",
        "data": {"source": {"stdlib": "train"}},
        "train": {"steps": 1},
        "network": {"preset": "nano", "groups": 3},
    }
    assert (build(TokenizerPretrainRun, nano).network.hidden, build(TokenizerPretrainRun, nano).network.groups) == (
        192,
        3,
    )
    with pytest.raises(UserError, match=r"network.preset: 'tiny' is none; write one of nano, small"):
        build(TokenizerPretrainRun, nano | {"network": "tiny"})


def test_the_packaged_tokenizer_is_lossless_and_has_the_averaged_network(pretrain, tmp_path, documents):
    results = pretrain("run", pins=50)
    tokenizer = AutoEncoderTokenizer.load(tmp_path / "run/tokenizer", kind="open")
    averaged = tensors_of(tmp_path / "run")["state"]
    for name, tensor in tokenizer.package.network.state_dict().items():
        assert torch.equal(tensor, averaged[f"task.ema.{name}"])
    for text in (documents[0], "Ünïcödé 🙂 and ` code(x)`\n\0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads((tmp_path / "run/results.json").read_text("utf-8")) == results
    assert (tmp_path / "run/tokenizer/metrics.json").is_file()


def test_fine_tuning_begins_with_the_weights_of_a_checkpoint(pretrain, run_file, tmp_path):
    pretrain("run")
    run = run_file("tuned", steps=1, optimizer={"learning_rate": 1e-9, "warmup_steps": 0})
    run = run.model_copy(update={"init": tmp_path / "run/checkpoints" / FINAL})
    pretrain_tokenizer(run, quiet=True)
    before, after = tensors_of(tmp_path / "run")["state"], tensors_of(tmp_path / "tuned")["model"]
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[f"task.ema.{name}"], rtol=1e-4, atol=1e-6)


CHECKLIST = {
    "network": {"hidden": 32, "byte_width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "groups": 2},
    "training": {
        "batch_size": 16,
        "max_steps": 40,
        "warmup_steps": 5,
        "eval_interval": 4,
        "checkpoint_interval": 2,
        "target_char_accuracy": None,
    },
}


def checklist(tmp_path, **paths):
    return TokenizerConfig.model_validate({**CHECKLIST, "paths": {"checkpoint_dir": str(tmp_path / "ckpt"), **paths}})


def test_the_trainer_of_the_checklist(tmp_path, documents):
    config = checklist(tmp_path)
    given = AutoEncoderTokenizer(config, kind="open")
    data = TokenizerDataset(documents, 8, 16)
    train, held_out = data.split(0.3)
    trainer = TokenizerTrainer(given, config)
    before = trainer.evaluate(held_out)
    state = trainer.train(train, held_out, steps=12)
    assert (state.step, len(state.accuracy_history)) == (12, 3)
    assert trainer.evaluate(held_out) > before
    assert trainer.best.is_file()
    saved = trainer.save_checkpoint(100, 0.5, is_best=False)
    assert trainer.get_state().best_accuracy == state.best_accuracy
    assert TokenizerCheckpoint.load(saved).val_accuracy == 0.5
    assert trainer.cleanup_old_checkpoints(2)[0].name == "checkpoint_step_10.bin"
    assert [*step_files(tmp_path / "ckpt")] == [100, 12]
    text = documents[0]
    for tokenizer in (given, trainer.tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    loaded = TokenizerTrainer(given, config)
    assert loaded.load_checkpoint(tmp_path / "ckpt/checkpoint_step_12.bin").step == 12
    assert loaded.evaluate(held_out) == trainer.evaluate(held_out)


def test_the_checkpoint_of_the_checklist(pretrain, tmp_path):
    pretrain("run")
    found = TokenizerCheckpoint.load(tmp_path / "run/checkpoints" / BEST)
    tensors = read_bundle(tmp_path / "run/checkpoints" / BEST)[0]
    assert found.encoder.keys() | found.decoder.keys() == tensors["model"].keys()
    assert found.fsq["levels"] == [8, 8, 8, 8, 8, 5, 5, 5]
    assert found.val_accuracy is not None
    assert found.optimizer_state.keys() == tensors["optimizer"].keys()


def test_the_configuration_of_the_checklist_is_a_run(tmp_path, corpus):
    config = checklist(tmp_path, training_data=str(corpus), validation_data="", model_save_dir=str(tmp_path / "model"))
    run = checklist_run(config, steps=10)
    assert (run.train.steps, run.train.horizon, run.train.eval_every, run.train.save_every) == (10, 40, 4, 2)
    assert run.checkpoint_folder == tmp_path / "ckpt"
    assert run.train.early_stopping.patience == 5
    missing = checklist(tmp_path, training_data=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"paths.training_data: .*none.txt does not exist"):
        checklist_run(missing)


@pytest.mark.slow
def test_the_script_of_the_checklist_trains_and_goes_on(tmp_path, corpus):
    paths = {"training_data": str(corpus), "validation_data": "none", "model_save_dir": str(tmp_path / "model")}
    (tmp_path / "config.json").write_text(json.dumps({**CHECKLIST, "paths": paths}), "utf-8")
    folder = tmp_path / "checkpoints"

    def script(*words):
        command = [
            sys.executable,
            ROOT / "scripts/pretrain_tokenizer.py",
            "--config",
            tmp_path / "config.json",
            "--quiet",
        ]
        return subprocess.run([*map(str, command), *map(str, words)], capture_output=True, text=True, cwd=tmp_path)

    first = script("--steps", 10, "--checkpoint-dir", folder, "--checkpoint-interval", 5, "--eval-interval", 5)
    assert first.returncode == 0, first.stderr
    assert {"checkpoint_step_10.bin", "training_state.json"} <= {path.name for path in folder.iterdir()}
    options = ("--checkpoint-interval", 5, "--eval-interval", 5)
    second = script("--steps", 20, "--resume", folder / "checkpoint_step_10.bin", *options)
    assert json.loads(second.stdout)["steps"] == 20, second.stderr
    assert max(step_files(folder)) == 20
    assert (tmp_path / "model/tokenizer.json").is_file()
    tuned = script("--steps", 5, "--resume", folder / BEST, "--fine-tune", "--checkpoint-dir", tmp_path / "tuned")
    assert json.loads(tuned.stdout)["steps"] == 5, tuned.stderr
    refused = script("--fine-tune")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_nano_learns_the_standard_library_in_twenty_cpu_seconds(tmp_path):
    values = {
        "output": tmp_path / "nano",
        "network": "nano",
        "data": {
            "source": {"stdlib": "train", "max_bytes": 400_000},
            "held_out": {"stdlib": "held_out", "max_bytes": 100_000},
        },
        "train": {"steps": 500, "device": "cpu"},
        "pins": 0,
    }
    results = pretrain_tokenizer(build(TokenizerPretrainRun, values), quiet=True)
    assert results["learned_byte_accuracy"] > 0.9
    assert results["digit_entropy_min"] > 0.9
    curve = json.loads((tmp_path / "nano/checkpoints/training_state.json").read_text("utf-8"))["loss_curve"]
    losses = [loss for _, loss in curve]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) / 2
