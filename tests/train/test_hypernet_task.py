"""Training a hypernetwork: the vocabulary that a step runs over, its gradients, and what stays as it was."""

from typing import Any

import numpy as np
import pytest
import torch

from tokenkit.config import UserError, build
from tokenkit.data.example import Window, cut
from tokenkit.models.hypernet import Hypernet, hypernet_for, matrices_of
from tokenkit.models.hypernet_layers import HypernetConfig
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.sampler import SamplerConfig, TokenizerSampler
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.hypernet import LEXICAL, HypernetObjective, HypernetTask, SampledBatches, softmax_ids
from tokenkit.transfer.plan import plan_transfer

LONGEST = 6


def batches_of(documents: list[str], source: HFTokenizer, *, teacher: bool = False, **changes: Any) -> SampledBatches:
    config = build(SamplerConfig, {"vocab_size": 420, "vocab_spread": 0.2, "bpe_bytes": 5000})
    options: dict[str, Any] = {"negatives": None, "every": 1, "longest": LONGEST} | changes
    return SampledBatches(
        cut(documents, 90),
        source,
        source if teacher else None,
        batch_size=4,
        seed=0,
        sampler=TokenizerSampler(documents, config),
        source=source,
        source_rows=source.vocab_size,
        **options,
    )


def task_of(
    folder,
    source: HFTokenizer,
    *,
    losses: dict | None = None,
    copies: bool = True,
    untied: bool = False,
    **options: Any,
) -> HypernetTask:
    model = load_model(str(folder))
    if untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    network = hypernet_for(HypernetConfig(num_heads=2, max_seq_length=LONGEST), model, source.vocab_size, seed=0)
    network.byte_rows.requires_grad_(False)
    objective = Objective.of(build(LossesConfig, losses or {"clm": {}}))
    around = HypernetObjective.around(objective, options.pop("lexical", 0.0), options.pop("identity_steps", 0))
    return HypernetTask(around, network, ModelView(model), source, copies=copies, **options)


def learnt(network: Hypernet) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.networks.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradients(task: HypernetTask, parts: list) -> tuple[float, dict[str, torch.Tensor]]:
    for parameter in task.trainable().values():
        parameter.grad = None
    loss = accumulate_gradients(task, parts, 0).loss
    return loss, {name: p.grad.clone() for name, p in task.trainable().items() if p.grad is not None}


def test_a_batch_says_the_text_in_the_drawn_tokens(documents, bpe):
    """Of a whole vocabulary and of a part of it: the pieces of a row's tokens spell its window, in the same tokens."""
    whole, part = (batches_of(documents, bpe, negatives=negatives, longest=40) for negatives in (None, 20))
    for step in range(4):
        (all_of_them,), (some,) = whole.at(step), part.at(step)
        assert len(some.tensors["sampled_lengths"]) < len(all_of_them.tensors["sampled_lengths"])
        for row, number in enumerate(all_of_them.rows):
            window = whole.windows[number]
            assert isinstance(window, Window)
            for batch in (all_of_them, some):
                assert window.text.encode() in spelled(batch.tensors, bpe, row)
        ids = [batch.tensors["student_labels"] for batch in (all_of_them, some)]
        assert torch.equal(ids[0] >= 0, ids[1] >= 0)


def spelled(tensors: dict[str, torch.Tensor], source: HFTokenizer, row: int) -> bytes:
    """What the source pieces of the tokens of a row spell; special tokens spell nothing."""
    forms, lengths = tensors["sampled_forms"].tolist(), tensors["sampled_lengths"].tolist()
    places = tensors["student_inputs"][row].tolist()
    return b"".join(source.token_bytes[piece] for place in places for piece in forms[place][: lengths[place]])


def test_tokens_are_made_of_the_pieces_that_a_transfer_would_make_them_of(documents, bpe):
    made = batches_of(documents, bpe)
    (batch,) = made.at(0)
    plan = plan_transfer(bpe, made.student, source_rows=bpe.vocab_size)
    for i in range(len(plan)):
        if plan.lengths[i]:
            wanted = plan.pieces[plan.offsets[i] : plan.offsets[i + 1]][:LONGEST].tolist()
            length = int(batch.tensors["sampled_lengths"][i])
            assert batch.tensors["sampled_forms"][i, :length].tolist() == wanted


def test_an_untrained_network_gives_the_loss_of_fast_vocabulary_transfer(documents, bpe, model_folder):
    """The slow, obvious way: means of pieces as whole tables, the library's own cross-entropy."""
    task, made = task_of(model_folder, bpe), batches_of(documents, bpe)
    (batch,) = made.at(0)
    table = matrices_of(task.student.model)[0].detach()
    forms, lengths = batch.tensors["sampled_forms"], batch.tensors["sampled_lengths"].tolist()
    rows = torch.stack([table[form[:length]].mean(0) for form, length in zip(forms, lengths)])
    view = ModelView(task.student.model, tables={"input": rows, "head": rows})
    logits = view.hidden(batch.tensors["student_inputs"]) @ rows.T
    labels = batch.tensors["student_labels"]
    wanted = torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0])
    assert gradients(task, [batch])[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_tokens_that_stand_for_several_give_the_whole_sum_on_average():
    rng = np.random.default_rng(0)
    held, logits = rng.random(400) < 0.2, rng.standard_normal(400)
    sums = []
    for _ in range(3000):
        ids, bias = softmax_ids(held, 30, rng)
        assert held[ids].sum() == held.sum()
        assert len(ids) == held.sum() + 30
        sums.append(np.exp(logits[ids] + bias).sum())
    assert np.mean(sums) == pytest.approx(np.exp(logits).sum(), rel=5e-3)
    for negatives in (None, 400):
        ids, bias = softmax_ids(held, negatives, rng)
        assert ids.tolist() == list(range(400))
        assert not bias.any()


@pytest.mark.parametrize("negatives", [None, 50])
@pytest.mark.parametrize("losses", [{"clm": {}}, {"alm": {}}, {"alm": {"boundary": "eos"}, "clm": {}}], ids=str)
def test_a_step_cut_in_two_has_the_same_gradients(documents, bpe, model_folder, losses, negatives):
    task = task_of(model_folder, bpe, losses=losses)
    learnt(task.network)
    made = batches_of(documents, bpe, teacher="alm" in losses, negatives=negatives)
    (loss, whole), (again, halves) = (gradients(task, made.at(3, count)) for count in (1, 2))
    assert again == pytest.approx(loss, rel=1e-5)
    assert whole.keys() == halves.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().sum() > 0 for gradient in whole.values())


def test_the_model_is_frozen_and_without_dropout(documents, bpe, model_folder):
    """The folder's model has dropout on in training; the same step twice has the same gradients."""
    task, (batch,) = task_of(model_folder, bpe), batches_of(documents, bpe).at(0)
    before = {name: p.clone() for name, p in task.student.model.named_parameters()}
    learnt(task.network)
    task.train_mode(True)
    first, second = (gradients(task, [batch])[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert set(first) == {name for name in task.trainable() if name.startswith("hypernet.networks")}
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in task.student.model.named_parameters())


def test_copies_keep_their_rows_and_predicted_ones_are_held_to_them(documents, bpe, model_folder):
    (batch,) = batches_of(documents, bpe).at(0)
    for copies in (True, False):
        task = task_of(model_folder, bpe, copies=copies, lexical=0.0 if copies else 0.5)
        learnt(task.network)
        found = task.student_tensors(batch, {}, {})
        if copies:
            assert "sampled_distance" not in found
            continue
        single = batch.tensors["sampled_single"]
        distances = found["sampled_distance"][single]
        special = batch.tensors["sampled_special"][None][single]
        assert (distances[~special] > 0).all()
        assert (distances[special] == 0).all()  # those are always the source's own
        loss = accumulate_gradients(task, [batch], 0)
        assert loss.losses[LEXICAL] == pytest.approx(distances.mean().item(), rel=1e-5)
        assert loss.loss == pytest.approx(loss.losses["clm"] + 0.5 * loss.losses[LEXICAL], rel=1e-5)


def test_identity_is_learnt_alone_for_so_many_steps(bpe, model_folder):
    task = task_of(model_folder, bpe, copies=False, lexical=0.25, identity_steps=3)
    weights = [task.objective.weights_at(step, 10) for step in range(5)]
    assert weights[:3] == [{"clm": 0.0, LEXICAL: 1.0}] * 3
    assert weights[3:] == [{"clm": 1.0, LEXICAL: 0.25}] * 2


def test_two_matrices_are_predicted_beside_each_other(documents, bpe, model_folder):
    task, made = task_of(model_folder, bpe, untied=True), batches_of(documents, bpe)
    assert task.network.matrices == 2
    losses = []
    optimizer = torch.optim.AdamW(task.trainable().values(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(accumulate_gradients(task, made.at(0), 0).loss)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


def test_a_tokenizer_serves_several_steps_and_any_step_can_come_first(documents, bpe):
    made, other = (batches_of(documents, bpe, every=3, negatives=30) for _ in range(2))
    seen = []
    for step in range(6):
        made.at(step)
        seen.append(made.student.fingerprint)
    assert len(set(seen[:3])) == len(set(seen[3:])) == 1
    assert seen[0] != seen[3]
    (jumped,), (wanted,) = other.at(5), made.at(5)
    for name, tensor in wanted.tensors.items():
        assert torch.equal(jumped.tensors[name], tensor), name


def test_a_padding_id_of_the_model_means_nothing_among_drawn_ids(documents, bpe, model_folder):
    """Beyond the drawn vocabulary, or inside it: no row is without gradient for that."""
    plain = task_of(model_folder, bpe)
    learnt(plain.network)
    (batch,) = batches_of(documents, bpe).at(0)
    _, wanted = gradients(plain, [batch])
    for padding in (40, bpe.vocab_size - 1):
        task = task_of(model_folder, bpe)
        learnt(task.network)
        embedding = task.student.model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        embedding.padding_idx = padding
        _, found = gradients(task, [batch])
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert embedding.padding_idx == padding


def test_losses_over_one_vocabulary_are_refused(bpe, model_folder):
    with pytest.raises(UserError, match="is not computed while a hypernetwork is trained; take clm or alm"):
        task_of(model_folder, bpe, losses={"hidden_states": {"project": True}})
