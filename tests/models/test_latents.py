"""Rows made of latents have the scale of the model's own, and strings that are spelled alike begin alike."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.models.latents import _one_byte_apart, latent_rows, likeness, resize_and_init, rms, smooth_table
from tokenkit.models.load import head_matrix, input_matrix
from tokenkit.tokenizers.load import load_tokenizer

METHODS = pytest.mark.parametrize("method", ["digit_sum", "decoder"])


def tiny_llama(vocab_size: int, *, tied: bool = True, width: int = 32, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def compact(compact_folder):
    return load_tokenizer(str(compact_folder))


@METHODS
@pytest.mark.parametrize("width", [16, 64])
def test_scale_mean_and_likeness(compact, method, width):
    rows = latent_rows(compact.network(), compact.codec, width, method=method, std=0.02, seed=1)
    assert rows.shape == (compact.codec.layout.open_base, width)
    assert rows.isfinite().all()
    for part in rows.split([64, 256, len(rows) - 320]):
        assert rms(part) == pytest.approx(0.02, rel=0.1)
        assert abs(float(part.mean())) < 0.002
    found = likeness(rows, compact.codec)
    assert found.pairs > 10
    assert found.neighbours > found.random
    assert torch.equal(rows, latent_rows(compact.network(), compact.codec, width, method=method, std=0.02, seed=1))


def test_vectors_of_close_digits_are_alike():
    table = smooth_table(8, 512, torch.Generator().manual_seed(0))
    cosine = torch.cosine_similarity(table[:, None], table[None], dim=-1)
    assert (cosine.diagonal(1) > 0.5).all()
    assert cosine[0, 7] < 0
    assert table.mean(0).abs().max() < 1e-5


def test_pairs_are_those_one_byte_apart():
    pieces = [b"cat", b"cut", b"cats", b" cat", b"dog", b"cart", b"at"]
    near = {frozenset((pieces[a], pieces[b])) for a, b in _one_byte_apart(pieces)}
    pairs = [(b"cat", b"cut"), (b"cat", b"cats"), (b"cat", b" cat"), (b"cat", b"cart"), (b"cat", b"at")]
    assert near == {frozenset(pair) for pair in pairs}


@METHODS
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gets_rows_in_its_own_scale(compact, method, tied):
    model = tiny_llama(500, tied=tied)
    report = resize_and_init(model, compact, method=method)
    assert len(input_matrix(model)) == model.config.vocab_size == compact.vocab_size == report.rows
    assert (head_matrix(model) is input_matrix(model)) == tied
    assert report.rms == pytest.approx(report.std, rel=0.1)
    assert rms(head_matrix(model)) == pytest.approx(0.02, rel=0.1)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (2, 3)
    assert model(torch.tensor([[2, 70, 71]])).logits.shape == (1, 3, compact.vocab_size)


def test_an_open_tokenizer_has_no_row_per_id(open_folder):
    with pytest.raises(UserError, match="no rows"):
        resize_and_init(tiny_llama(100), load_tokenizer(str(open_folder)))


def test_a_saved_tokenizer_keeps_its_network(compact, tmp_path):
    compact.save(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert torch.equal(again.network().latent.weight, compact.network().latent.weight)
