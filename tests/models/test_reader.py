"""Logits read a piece at a time, padded, picked and taken back are those of one pass over each row alone."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from tokenkit.config import UserError
from tokenkit.models.expand import attach_expansion
from tokenkit.models.factorised_view import attach_factorised
from tokenkit.models.reader import Reader
from tokenkit.tokenizers.load import load_tokenizer

ROWS = 300
SIZES = {
    "vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "initializer_range": 0.2,
}  # fmt: skip
KINDS = ["llama", "gpt2", "qwen2", "gemma2", "expanded"]


def made(kind: str):
    """A random model, in float64 where it can be."""
    torch.manual_seed(1)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        return GPT2LMHeadModel(config).double().eval()
    if kind == "mamba":
        config = MambaConfig(vocab_size=ROWS, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.2)
        return MambaForCausalLM(config).double().eval()
    if kind == "qwen2":
        config = Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1, sliding_window=6)
        return Qwen2ForCausalLM(config).double().eval()
    if kind == "gemma2":  # a window of six, soft caps, scaled inputs
        config = Gemma2Config(**SIZES, head_dim=8, sliding_window=6, final_logit_softcapping=3.0)
        return Gemma2ForCausalLM(config).eval()  # in float32: its softmax is, and makes minus infinity of the mask
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    if kind == "expanded":
        tokens = [bytes([a, b]) for a in range(0, 256, 2) for b in range(0, 256, 3)] + [bytes(16)]
        tokens += [bytes([a]) for a in range(0, 256, 5)]
        attach_expansion(model, tokens, torch.randn(len(tokens), 32, dtype=torch.float64))
    return model


def drawn(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, row: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=5e-6, rtol=5e-6)  # norms compute in float32


@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (9, 10, 20), (15, 16, 17), (4, 12)])
def test_pieces_are_the_whole(kind, cuts):
    model, ids = made(kind), drawn(2, 24)
    reader, start = Reader(model), 0
    for end in (*cuts, 24):
        found = reader.all(ids[:, start:end])
        for row in range(2):
            same(found[row], whole(model, ids[row, :end].tolist())[start:])
        start = end
    assert reader.length == 24


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_rows_alone(kind):
    model, lengths, longest = made(kind), [3, 20, 1, 11], 20
    ids, more = drawn(4, longest), drawn(4, 6, 1)
    mask = torch.tensor([[False] * (longest - n) + [True] * n for n in lengths])
    ids = torch.where(mask, ids, 0)
    reader = Reader(model)
    rows = [ids[row, longest - n :].tolist() for row, n in enumerate(lengths)]
    found = reader(ids, mask)
    for step in range(6):
        for row in range(4):
            same(found[row], whole(model, rows[row])[-1])
            rows[row].append(int(more[row, step]))
        found = reader(more[:, step : step + 1])
    found, kept = reader(drawn(4, 3, 2)), reader.length
    reader.crop(kept - 2)
    reader.select(torch.tensor([2, 0, 2]))
    again = reader(drawn(4, 3, 2)[[2, 0, 2], 1:])
    same(again, found[[2, 0, 2]].double())


@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
def test_what_was_read_can_be_taken_back_and_picked(kind):
    model, ids, other = made(kind), drawn(3, 20), drawn(3, 20, 1)
    reader = Reader(model)
    reader(ids[:, :12])
    reader.all(ids[:, 12:])
    for length in (14, 9, 1, 0):
        reader.crop(length)
        assert reader.length == length
        found = reader.all(other[:, length:])
        for row in range(3):
            same(found[row], whole(model, [*ids[row, :length].tolist(), *other[row, length:].tolist()])[length:])
        reader.crop(length)
    reader(ids[:, :10])
    reader.select(torch.tensor([2, 2]))
    found = reader(torch.tensor([[5], [7]]))
    for row, last in enumerate((5, 7)):
        same(found[row], whole(model, [*ids[2, :10].tolist(), last])[-1])


def test_logits_are_float32_at_least_and_the_mode_stays():
    model = made("llama").to(torch.bfloat16)
    reader = Reader(model)
    assert reader(drawn(1, 4)).dtype == torch.float32
    assert reader.all(drawn(1, 4)).shape == (1, 4, ROWS)
    assert not reader(drawn(1, 1)).requires_grad


def test_a_head_with_a_bias_counts_it_once():
    model = made("llama")
    head = torch.nn.Linear(32, ROWS).double()
    head.weight = model.lm_head.weight
    model.lm_head = head
    same(Reader(model)(drawn(1, 4))[0], whole(model, drawn(1, 4)[0].tolist())[-1])


def test_open_codes_are_refused(open_folder):
    tokenizer = load_tokenizer(str(open_folder))
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 600}))
    attach_factorised(model, tokenizer)
    with pytest.raises(UserError, match="open codes"):
        Reader(model)
