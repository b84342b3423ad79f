"""The step is the same however it is cut; units of the whole step divide, never those of a microbatch."""

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.data.batch import Batches, collate
from tokenkit.data.example import cut, make_examples
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask
from tokenkit.transfer.apply import transfer_model


def make_task(model_folder, bpe, target, losses):
    student = load_model(str(model_folder), dtype=torch.float64)
    if target is not bpe:
        transfer_model(student, bpe, target)
    teacher = load_model(str(model_folder), dtype=torch.float64)
    objective = Objective.of(LossesConfig.model_validate(losses))
    return TextTask(objective, ModelView(student), target, ModelView(teacher), bpe)


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
    ],
)
@pytest.mark.parametrize("parts", [(2, 2), (3, 1), (1, 1, 1, 1)])
def test_microbatches_add_up_to_the_step(model_folder, bpe, unigram, documents, losses, parts):
    task = make_task(model_folder, bpe, unigram, losses)
    windows = [w for length in (40, 160, 90, 250) for w in cut(documents[:1], length)[:1]]  # very unequal rows
    examples = make_examples(windows, unigram, bpe)
    whole, expected = gradients(task, (4,), examples)
    result, found = gradients(task, parts, examples)
    assert result.units == whole.units
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_same_tokenizer_and_same_weights_leave_nothing_to_learn(model_folder, bpe, documents):
    task = make_task(model_folder, bpe, bpe, {"alm": {}, "forward_kl": {}})
    examples = make_examples(cut(documents[:3], 120), bpe, bpe)
    result, found = gradients(task, (len(examples),), examples)
    assert abs(result.loss) < 1e-12
    assert max(g.abs().max() for g in found.values()) < 1e-9


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
    epoch = [batches._row(p) for p in range(len(windows))]
    assert sorted(epoch) == list(range(len(windows)))
    assert [batches._row(p + len(windows)) for p in range(len(windows))] != epoch
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
