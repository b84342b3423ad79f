"""A transferred model is a whole model: rows, bias, ties, configuration; the same tokenizer changes no answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer.apply import transfer_model
from tokenkit.transfer.evidence import Evidence
from tokenkit.transfer.initialize import Choice, all_rows
from tokenkit.transfer.plan import Side, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.shards import open_checkpoint
from tokenkit.transfer.stream import stream_transfer


def tiny(rows: int, **options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes, **options)).eval()


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["small", "marked", "byte"])
def test_the_same_tokenizer_gives_identical_logits(tokenizers: dict[str, Tokenizer], name: str, tied: bool) -> None:
    one = tokenizers[name]
    model = tiny(one.vocab_size + 5, tie_word_embeddings=tied)
    ids = [one.start_id(), *one.encode("the cat\n東京").ids.tolist()]
    before = logits(model, ids)[:, : one.vocab_size]
    report = transfer_model(model, one, one)
    assert torch.equal(logits(model, ids), before)
    assert (report.rows, report.source_rows, report.tied) == (one.vocab_size, one.vocab_size + 5, tied)
    assert report.plan["overlap"] == 1.0


@pytest.mark.parametrize("untie", [True, False])
def test_tied_stays_tied_unless_asked(tokenizers: dict[str, Tokenizer], untie: bool) -> None:
    source, target = tokenizers["large"], tokenizers["one_role"]
    model = tiny(source.vocab_size, tie_word_embeddings=True)
    old = model.get_input_embeddings().weight.detach().clone()
    report = transfer_model(model, source, target, untie=untie)
    plan = plan_transfer(source, target, source_rows=len(old))
    assert report.tied is not untie
    assert model.config.tie_word_embeddings is not untie
    matrix, known = TensorRows(old), Evidence(source, target)
    sides: tuple[Side, Side] = ("input", "head")
    expected = [all_rows(Choice().maker(side, matrix, plan, known), matrix, plan, len(plan)) for side in sides]
    assert torch.equal(model.get_input_embeddings().weight, expected[0])
    assert torch.equal(model.get_output_embeddings().weight, expected[1 if untie else 0])
    model.tie_weights()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is not untie


def test_rows_are_padded_and_the_configuration_follows(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    model = tiny(source.vocab_size, bos_token_id=source.bos_id, eos_token_id=source.eos_id, pad_token_id=2)
    model.generation_config.suppress_tokens = [1, 2]
    report = transfer_model(model, source, target, pad_to_multiple_of=64)
    rows, last = 384, target.vocab_size - 1
    assert report.rows == rows > last + 1 > 384 - 64
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == rows
    assert logits(model, [1, last]).shape == (2, rows)
    for config in (model.config, model.generation_config):
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (target.bos_id, target.eos_id, target.pad_id)
    assert model.generation_config.suppress_tokens is None
    model(torch.tensor([[1, last, 1]]), labels=torch.tensor([[1, last, 1]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[last].abs().sum() > 0


def test_transfer_leaves_the_random_state_alone_and_depends_on_the_seed_only(
    tokenizers: dict[str, Tokenizer],
) -> None:
    source, target = tokenizers["byte"], tokenizers["large"]
    weights = []
    for _ in range(2):
        model = tiny(200)
        torch.manual_seed(len(weights))
        state = torch.get_rng_state()
        transfer_model(model, source, target, Choice(seed=7), pad_to_multiple_of=8)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(model.get_input_embeddings().weight)
    assert torch.equal(*weights)


def test_a_head_bias_moves_with_its_rows(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=source.vocab_size, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    ).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    old = model.lm_head.bias.detach().clone()
    transfer_model(model, source, target)
    plan = plan_transfer(source, target, source_rows=source.vocab_size)
    pieces = [part.tolist() for part in np.split(plan.head_pieces, plan.offsets[1:-1])]
    expected = torch.stack([old[part].mean() for part in pieces])
    torch.testing.assert_close(model.lm_head.bias.detach(), expected)


def test_a_nested_text_configuration_is_updated(tokenizers: dict[str, Tokenizer]) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "head_dim": 8,
    }
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    text = {**sizes, "vocab_size": source.vocab_size, "num_key_value_heads": 1}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, image_token_index=5))
    assert transfer_model(model, source, target).tied
    assert model.config.get_text_config().vocab_size == target.vocab_size
    assert model.config.get_text_config().eos_token_id == target.eos_id
    assert len(model.get_input_embeddings().weight) == target.vocab_size


def test_unknown_initialisers_are_one_line(tokenizers: dict[str, Tokenizer]) -> None:
    one = tokenizers["small"]
    with pytest.raises(UserError, match="'focal' is unknown; write one of "):
        transfer_model(tiny(one.vocab_size), one, one, Choice("focal"))
    with pytest.raises(UserError, match="pad_to_multiple_of: 0"):
        transfer_model(tiny(one.vocab_size), one, one, pad_to_multiple_of=0)


def test_output_rows_are_chosen_only_where_there_are_some(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    source, target = tokenizers["small"], tokenizers["large"]
    choice = Choice("fvt", "zero")
    tied = tiny(source.vocab_size, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="head_initializer: the model has one matrix"):
        transfer_model(tied, source, target, choice)
    with pytest.raises(UserError, match="head_initializer: the model has one matrix"):
        stream_transfer(open_checkpoint(tmp_path), source, target, choice)
    assert transfer_model(tied, source, target, choice, untie=True).head_initializer == "zero"
