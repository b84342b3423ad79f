"""Packing: what is read together is read as if alone, and a step of packed rows is the step of the same rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from tokenkit.config import UserError
from tokenkit.data.batch import Batches, collate, reading_of
from tokenkit.data.corpus import DataConfig
from tokenkit.data.example import Window, cut, make_examples
from tokenkit.data.packing import num_bytes, pack, packed, slots, unpack, unpack_maps
from tokenkit.data.source import SourceConfig
from tokenkit.models.packed import check_packing
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.train.on_policy import OnPolicyBatches, OnPolicyConfig
from tokenkit.train.step import accumulate_gradients
from tokenkit.train.tasks.distill import TextTask

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 6},
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def model_of(family, **options):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, pad_token_id=None, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    for parameter in model.parameters():  # as of a trained model: what leaks is seen
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=200), st.integers(4, 30))
def test_packs_hold_every_row_once_and_no_more_bytes_than_they_may(sizes, most):
    windows = [Window(i, 0, "x" * size, True) for i, size in enumerate(sizes)]
    packs = list(packed(windows, most))
    assert sorted(one.document for some in packs for one in some.rows) == list(range(len(windows)))
    assert all(len(some.rows) == 1 or sum(map(num_bytes, some.rows)) <= most for some in packs)
    fewest = -(-sum(map(num_bytes, windows)) // most)
    assert len(packs) <= 2 * fewest + len([size for size in sizes if size > most]) + 1
    assert list(packed(iter(windows), most)) == packs


def test_packing_wastes_little():
    sizes = torch.randint(1, 200, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = list(packed((Window(i, 0, "x" * size, True) for i, size in enumerate(sizes)), 512))
    assert sum(sizes) / (512 * len(packs)) > 0.97


def test_slots_are_there_and_back():
    places = slots([[3, 2], [4]], 5)
    slot, positions = places["slot"], places["positions"]
    assert positions[:, :6].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    values = torch.arange(15).view(3, 5)
    row = pack(values, slot, positions, -7)
    assert row[:, :6].tolist() == [[0, 1, 2, 5, 6, -7], [10, 11, 12, 13, -7, -7]]
    assert torch.where(slot >= 0, unpack(row, slot), -1).tolist() == [
        [0, 1, 2, -1, -1],
        [5, 6, -1, -1, -1],
        [10, 11, 12, 13, -1],
    ]
    maps = torch.rand(2, 2, 3, 32, 32)
    found = unpack_maps(maps, slot)
    assert found.shape == (3, 2, 3, 5, 5)
    assert found[1, :, :, :2, :2].equal(maps[0, :, :, 3:5, 3:5])
    assert not found[1, :, :, 2:].any()


WAYS = [*((name, "eager") for name in FAMILIES), *((name, "sdpa") for name in FAMILIES if name != "gemma2")]


@pytest.mark.parametrize(("family", "attention"), WAYS)
def test_a_document_in_a_pack_is_read_as_if_alone(family, attention):
    view = ModelView(model_of(family, attn_implementation=attention))
    check_packing(view, 0)
    lengths = [[7, 12, 1, 9], [20, 3]]
    ids = torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(2))
    places = slots(lengths, 20)
    slot, positions = places["slot"], places["positions"]
    needs = {"logits", "label_logp", "hidden", "layers"}
    row = pack(ids, slot, positions, 0)
    found = view.leaves(needs, row, row, positions=positions)
    for number, length in enumerate(length for some in lengths for length in some):
        alone = view.leaves(needs, ids[number : number + 1, :length], ids[number : number + 1, :length])
        for name in needs:
            torch.testing.assert_close(unpack(found[name], slot)[number, :length], alone[name][0], atol=1e-5, rtol=1e-5)
    leaky = view.leaves({"logits"}, row, row)["logits"]
    assert (leaky - found["logits"]).abs().max() > 1e-2


LOSSES = {
    "clm": {},
    "alm": {"debias": True, "merge": True},
    "hidden_states": {"states": "last"},
}


def task_of(losses, family="llama", teacher="llama"):
    def make(student_tokenizer, teacher_tokenizer):
        student, other = model_of(family), model_of(teacher)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.9)
        for one, tokenizer in ((student, student_tokenizer), (other, teacher_tokenizer)):
            one.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
        views = ModelView(student), student_tokenizer, ModelView(other), teacher_tokenizer
        return TextTask(Objective.of(LossesConfig.model_validate(losses)), *views)

    return make


@pytest.mark.parametrize(
    "losses",
    [LOSSES, {"attention_maps": {}}, {"uld": {}}, {"dskd": {}}, {"cka": {}}],
    ids=lambda losses: "+".join(losses),
)
def test_a_packed_step_is_the_step_of_its_rows(bpe, unigram, documents, losses):
    one_tokenizer = "attention_maps" in losses or "cka" in losses
    windows = cut([text[:n] for text, n in zip(documents, (20, 150, 61, 300, 9, 44, 80, 33))], 200)
    student, teacher = bpe, bpe if one_tokenizer else unigram
    task, data = task_of(losses)(student, teacher), DataConfig(source=SourceConfig(stdlib="train"))
    reading = reading_of(data, student, teacher, task.objective.shared_needs())
    packs = Batches(windows, student, teacher, batch_size=3, seed=0, pack_bytes=200, reading=reading)
    if "attention_maps" in losses:
        for view in (task.student, task.teacher):
            view.model.set_attn_implementation("eager")
    batches = packs.at(0, 2)
    texts = packs.texts(0)
    assert max(len(packs.single(n)) for n in packs.rows(0)) > 1
    alone = collate(make_examples(texts, student, teacher, reading), list(range(len(texts))))
    results, gradients = [], []
    for parts in (batches, [alone]):
        for parameter in task.trainable().values():
            parameter.grad = None
        results.append(accumulate_gradients(task, parts, 0))
        gradients.append({n: p.grad.clone() for n, p in task.trainable().items() if p.grad is not None})
    together, single = results
    assert together.units == single.units
    assert together.losses == pytest.approx(single.losses, rel=1e-5, abs=1e-6)
    assert (together.num_tokens, together.num_bytes) == (single.num_tokens, single.num_bytes)
    for name, gradient in gradients[1].items():
        near = {"rtol": 1e-4, "atol": 1e-5 * gradient.abs().max().item() + 1e-9}
        torch.testing.assert_close(gradients[0][name], gradient, **near)


def test_what_is_packed_is_read_in_fewer_places(bpe, documents):
    windows = cut([text[:40] for text in documents], 400)
    packs = Batches(windows, bpe, None, batch_size=2, seed=0, pack_bytes=400)
    (batch,) = packs.at(0)
    texts = packs.texts(0)
    assert batch.tensors["student_inputs"].shape[0] == len(texts) > 10
    tokens = int(batch.tensors["student_token_mask"].sum()) + len(texts)
    assert batch.tensors["student_positions"].numel() < 1.5 * tokens
    assert batch.rows == packs.rows(0)


def test_models_that_cannot_keep_documents_apart_are_refused():
    mamba = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="mamba takes no position ids; write packing=false"):
        check_packing(ModelView(AutoModelForCausalLM.from_config(mamba)), 0)
    model = model_of("llama")
    read = model.model.forward

    def summing(input_ids, position_ids=None, use_cache=False):
        """Sums up what it has read, wherever a document begins."""
        found = read(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        found.last_hidden_state = found.last_hidden_state.cumsum(1)
        return found

    model.model.forward = summing
    with pytest.raises(UserError, match="llama lets one see another"):
        check_packing(ModelView(model), 0)


def test_rows_that_a_model_goes_on_with_are_not_packed(bpe, documents):
    batches = Batches(cut(documents, 200), bpe, bpe, batch_size=2, seed=0, pack_bytes=400)
    with pytest.raises(UserError, match="on_policy: rows that are packed"):
        OnPolicyBatches(batches, OnPolicyConfig(share=0.5), ModelView(model_of("llama")))
