"""The step is the same however it is cut; units of the whole step divide, never those of a microbatch."""

import math
import multiprocessing
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tokenkit.config import UserError
from tokenkit.data.batch import Batches, DataConfig, collate, reading_of
from tokenkit.data.example import cut, make_examples
from tokenkit.data.pair import Pair
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.train.optimizer import build_optimizer
from tokenkit.train.schema import OptimizerConfig
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask
from tokenkit.transfer.apply import transfer_model


def make_task(model_folder, bpe, target, losses):
    student = load_model(str(model_folder), dtype=torch.float64)
    if target is not bpe:
        transfer_model(student, bpe, target)
    teacher = load_model(str(model_folder), dtype=torch.float64)
    views = ModelView(student), ModelView(teacher)
    objective = Objective.of(LossesConfig.model_validate(losses))
    rows = [view.vocab_rows for view in views]
    pair = Pair(target, bpe, *rows).tensors(objective.pair_needs())
    pair = {name: t.double() if t.is_floating_point() else t for name, t in pair.items()}
    return TextTask(objective, views[0], target, views[1], bpe, pair=pair)


def encode(task, windows, student, teacher):
    """Aligned rows as a run of these losses reads them."""
    source = {"path": "unused"}
    reading = reading_of(DataConfig(source=source), student, teacher, task.objective.shared_needs())
    return make_examples(windows, student, teacher, reading)


def gradients(task, parts, examples):
    for parameter in task.trainable().values():
        parameter.grad = None
    batches, at = [], 0
    for size in parts:
        batches.append(collate(examples[at : at + size], list(range(at, at + size))))
        at += size
    result = accumulate_gradients(task, batches, 0)
    return result, {n: p.grad.clone() for n, p in task.trainable().items() if p.grad is not None}


@pytest.mark.parametrize(
    "losses",
    [
        {"clm": {}},
        {"alm": {}},
        {"alm": {"weight": 0.7}, "clm": {"weight": 0.2}},
        {"alm": {"numerator": "token_count", "denominator": "token_count", "boundary": "eos"}},
        {"alm": {"numerator": "log1p_token_count", "denominator": "token_count", "chunk_sizes": [1, 2]}},
        {"alm": {"preset": "upstream", "merge": False, "denominator": "token_count"}},
        {"hidden_states": {}},
        {"hidden_states": {"states": "all", "chunks": "space", "normalization": "l1"}},
        {"hidden_states": {"states": "qkv", "normalization": "l2"}},
        {"hidden_states": {"project": True}},
        {"side_path": {}},
        {"side_path": {"mapping": "mined", "distance": "log_abs"}},
        {"mined": {}},
        {"dskd": {}},
        {"dskd": {"causal": True, "divergence": "adaptive_kl"}, "alm": {}},
        {"uld": {}},
        {"uld": {"positions": "positional"}},
        {"gold": {}},
        {"p_kl": {"top_k": 20}},
        {"h_kl": {}, "clm": {"weight": 0.1}},
    ],
)
@pytest.mark.parametrize("parts", [(2, 2), (3, 1), (1, 1, 1, 1)])
def test_microbatches_add_up_to_the_step(model_folder, bpe, unigram, documents, losses, parts):
    task = make_task(model_folder, bpe, unigram, losses)
    windows = [w for length in (40, 160, 90, 250) for w in cut(documents[:1], length)[:1]]  # very unequal rows
    examples = encode(task, windows, unigram, bpe)
    whole, expected = gradients(task, (4,), examples)
    result, found = gradients(task, parts, examples)
    assert result.units == whole.units
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "losses",
    [
        {"alm": {}, "forward_kl": {}},
        {"hidden_states": {}, "top_k_kl": {"top_k": 5}},
        {"hidden_states": {"states": "qkv"}},
        {"hidden_states": {"states": "all", "chunks": "space"}},
        {"side_path": {}, "uld": {}},
        {"gold": {"beta": 0.0}, "p_kl": {}, "h_kl": {}},
        {"mined": {}},
    ],
)
def test_same_tokenizer_and_same_weights_leave_nothing_to_learn(model_folder, bpe, documents, losses):
    task = make_task(model_folder, bpe, bpe, losses)
    examples = encode(task, cut(documents[:3], 120), bpe, bpe)
    result, found = gradients(task, (len(examples),), examples)
    assert abs(result.loss) < 1e-9
    assert all(result.units.values())
    assert max(g.abs().max() for g in found.values()) < 1e-9


EVERY = {"alm": {}, "clm": {}, "hidden_states": {}, "side_path": {}, "mined": {}, "dskd": {}, "uld": {}, "gold": {}}
EVERY |= {"p_kl": {}, "h_kl": {}}


@pytest.mark.parametrize("losses", [{name: options} for name, options in EVERY.items()], ids=EVERY.keys())
def test_padding_and_the_order_of_rows_change_nothing(model_folder, bpe, unigram, documents, losses):
    task = make_task(model_folder, bpe, unigram, losses)
    windows = [w for length in (40, 160, 90) for w in cut(documents[:1], length)[:1]]
    examples = encode(task, windows, unigram, bpe)
    whole, expected = gradients(task, (3,), examples)
    again, found = gradients(task, (3,), examples[::-1])
    assert again.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    batch = collate(examples, [0, 1, 2])
    for side in ("student", "teacher"):
        inputs, real = batch.tensors[f"{side}_inputs"], batch.tensors[f"{side}_token_mask"]
        last = torch.zeros_like(real)
        last[:, 1:] = real[:, :-1]
        assert (~(real | last)).any()
        inputs[~(real | last)] = 7  # other content where nothing stands
    for parameter in task.trainable().values():
        parameter.grad = None
    changed = accumulate_gradients(task, [batch], 0)
    assert changed.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(task.trainable()[name].grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("losses", [{name: options} for name, options in EVERY.items()], ids=EVERY.keys())
def test_a_step_in_which_nothing_counts_is_zero(model_folder, bpe, unigram, documents, losses):
    task = make_task(model_folder, bpe, unigram, losses)
    batch = collate(encode(task, cut(documents[:1], 100)[:2], unigram, bpe), [0, 1])
    for side in ("student", "teacher"):
        for name, nothing in (("chunk", -1), ("chunk_end", -1), ("labels", -1), ("label_mask", False)):
            batch.tensors[f"{side}_{name}"].fill_(nothing)
    result = accumulate_gradients(task, [batch], 0)
    assert result.loss == 0
    assert not any(result.units.values())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in task.trainable().values())


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_every_loss_is_finite_in_half_precision(model_folder, bpe, unigram, documents, precision):
    for name, options in EVERY.items():
        task = make_task(model_folder, bpe, unigram, {name: options})
        task.student.model.float()
        task.teacher.model.float()
        task.projectors.float()
        task.pair = {n: t.float() if t.is_floating_point() else t for n, t in task.pair.items()}
        task.precision = precision
        batch = collate(encode(task, cut(documents[:2], 100)[:2], unigram, bpe), [0, 1])
        result = accumulate_gradients(task, [batch], 0)
        assert math.isfinite(result.loss), name
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.trainable().values()), name


def test_what_is_learnt_along_gets_gradients_and_begins_from_the_seed(model_folder, bpe, unigram, documents):
    tasks = [make_task(model_folder, bpe, unigram, {"dskd": {}, "hidden_states": {"project": True}}) for _ in range(2)]
    learnt = {n: p for n, p in tasks[0].trainable().items() if n.startswith("projectors.")}
    assert set(learnt) == {
        f"projectors.{part}.{kind}"
        for part in ("hidden.to_teacher", "dual.query", "dual.to_student", "dual.to_teacher")
        for kind in ("weight", "bias")
    }
    assert all(torch.equal(p, tasks[1].trainable()[n]) for n, p in learnt.items())
    examples = encode(tasks[0], cut(documents[:2], 100)[:2], unigram, bpe)
    gradients(tasks[0], (2,), examples)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learnt.values())
    rates = {}
    for group in build_optimizer(tasks[0].trainable(), OptimizerConfig(learning_rate=1e-3)).param_groups:
        rates |= {id(p): group["lr_scale"] for p in group["params"]}
    assert {name: rates[id(p)] for name, p in tasks[0].trainable().items()} == {
        name: 2.0 if name in learnt else 1.0 for name in tasks[0].trainable()
    }
    teacher = tasks[0].teacher.model
    assert all(p.grad is None for p in teacher.parameters())


def test_eos_needs_an_end_of_text_token(model_folder, bpe, documents, monkeypatch):
    task = make_task(model_folder, bpe, bpe, {"alm": {"boundary": "eos"}})
    examples = make_examples(cut(documents[:1], 100)[:2], bpe, bpe)
    assert accumulate_gradients(task, [collate(examples, [0, 1])], 0).units["alm"] > 0
    monkeypatch.setattr(bpe, "eos_id", None)
    task = make_task(model_folder, bpe, bpe, {"alm": {"boundary": "eos"}})
    with pytest.raises(UserError, match=r"losses\.alm\.boundary: the teacher's tokenizer has no end-of-text token"):
        accumulate_gradients(task, [collate(examples, [0, 1])], 0)


def test_a_microbatch_without_any_unit_changes_nothing(model_folder, bpe, unigram, documents):
    task = make_task(model_folder, bpe, unigram, {"alm": {}})
    examples = make_examples(cut(documents[:1], 100)[:2], unigram, bpe)
    batches = [collate(examples, [0, 1]), collate(examples, [0, 1])]
    batches[1].tensors["student_chunk"].fill_(-1)
    result = accumulate_gradients(task, batches, 0)
    alone = accumulate_gradients(task, batches[:1], 0)
    assert result.units == alone.units
    assert result.loss == pytest.approx(alone.loss)


def test_rows_are_a_permutation_per_epoch_and_a_function_of_the_step(bpe, documents):
    windows = cut(documents, 200)
    batches = Batches(windows, bpe, None, batch_size=3, seed=1)
    drawn = [row for step in range(len(windows)) for row in batches.rows(step)]
    epoch = drawn[: len(windows)]
    assert sorted(epoch) == list(range(len(windows)))
    assert sorted(drawn[len(windows) : 2 * len(windows)]) == sorted(epoch)
    assert drawn[len(windows) : 2 * len(windows)] != epoch
    again = Batches(windows, bpe, None, batch_size=3, seed=1)
    assert again.rows(7) == batches.rows(7)
    assert Batches(windows, bpe, None, batch_size=3, seed=2).rows(7) != batches.rows(7)


def test_windows_hold_every_byte_once(documents):
    texts = [*documents, "日本語のテキスト" * 30, "x" * 1000, "é"]
    for size in (4, 37, 512):
        windows = cut(texts, size)
        for number, text in enumerate(texts):
            own = [w for w in windows if w.document == number]
            assert "".join(w.text for w in own) == text
            assert [w.ends_document for w in own] == [False] * (len(own) - 1) + [True]
            assert all(len(w.text.encode()) <= size for w in own)


def test_labels_are_the_next_inputs_and_the_end_of_a_chunk_predicts_what_follows(bpe, unigram, documents):
    examples = make_examples(cut(documents[:2], 150), unigram, bpe)
    batch = collate(examples, list(range(len(examples)))).tensors
    for side in ("student", "teacher"):
        inputs, labels, mask = (batch[f"{side}_{n}"] for n in ("inputs", "labels", "label_mask"))
        assert (labels[:, :-1][mask[:, :-1]] == inputs[:, 1:][mask[:, :-1]]).all()
        assert not mask[:, -1].any()
        chunk, end = batch[f"{side}_chunk"], batch[f"{side}_chunk_end"]
        for row, c in ((0, 1), (0, 3), (1, 2)):  # chunk 0 is the start token: given, never scored
            assert end[row, c] == torch.nonzero(chunk[row] == c).max() + 1
        assert not (chunk[0] == 0).any()
        assert end[0, 0] == 0
    assert inputs.shape[1] % 32 == 0


def share(rank, store, work, losses, folder):
    """One of two processes: it reads every second row and leaves its gradients behind."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    task, examples = work(losses)
    result, found = gradients(task, (2, 1), examples[rank::2])
    torch.distributed.destroy_process_group()
    save_file(found, folder / f"{rank}.safetensors", {"loss": repr(result.loss)})


@pytest.mark.parametrize(
    "losses", [{"alm": {}, "clm": {}}, {"hidden_states": {}}, {"dskd": {}}, {"mined": {}, "gold": {}}]
)
def test_two_processes_that_share_the_rows_have_the_gradients_of_one(
    model_folder, bpe, unigram, documents, tmp_path, losses
):
    windows = [w for length in (40, 160, 90, 250, 60, 120) for w in cut(documents[:1], length)[:1]]

    def work(losses):
        task = make_task(model_folder, bpe, unigram, losses)
        return task, encode(task, windows, unigram, bpe)

    task, examples = work(losses)
    whole, expected = gradients(task, (6,), examples)
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "store", work, losses, tmp_path)
    processes = [context.Process(target=share, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as file:
            assert float(file.metadata()["loss"]) == pytest.approx(whole.loss, rel=1e-12)
            assert set(file.keys()) == set(expected)
            for name, gradient in expected.items():
                torch.testing.assert_close(file.get_tensor(name), gradient, rtol=1e-9, atol=1e-12)
