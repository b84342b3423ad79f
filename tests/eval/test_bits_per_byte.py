"""Bits per byte: every byte once, whatever the window, and the value a plain loop gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.eval.bits_per_byte import bits_per_byte, context_windows
from tokenkit.eval.chunks import score_chunks
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.transfer.apply import transfer_model


@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 19))
@settings(deadline=None, derandomize=True)
def test_windows_score_every_token_but_the_first_once(length, context, stride):
    stride = min(stride, context - 1)
    scored = []
    for start, end, first in context_windows(length, context, stride):
        assert start < first < end <= start + context
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.fixture(scope="module")
def view(model_folder):
    return ModelView(load_model(str(model_folder)))


@torch.no_grad()
def slow_nats(view, tokenizer, text, context, stride):
    """One forward pass per token, in the window that scores it."""
    ids = [tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()]
    nats = 0.0
    for start, end, first in context_windows(len(ids), context, stride):
        for position in range(first, end):
            given_ids = torch.tensor([[tokenizer.start_id(), *ids[start + 1 : position]]])
            logits = view.model(input_ids=given_ids, use_cache=False).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[position]].item()
    return nats


@pytest.mark.parametrize(("context", "stride"), [(200, None), (8, 3), (5, 4)])
def test_equals_one_token_at_a_time(view, bpe, documents, context, stride):
    texts = [documents[0][:60], "short", "é and 日本"]
    found = bits_per_byte(view, bpe, texts, context_tokens=context, stride_tokens=stride, batch_tokens=40)
    slow = sum(slow_nats(view, bpe, text, context, stride or context // 2) for text in texts)
    assert found.num_bytes == sum(len(t.encode()) for t in texts)
    assert found.nats == pytest.approx(slow, rel=1e-5)
    assert found.value == pytest.approx(slow / math.log(2) / found.num_bytes, rel=1e-5)


def test_a_uniform_model_over_bytes_needs_the_logarithm_of_its_vocabulary(model_folder, bpe):
    model = load_model(str(model_folder))
    byte = ByteTokenizer()
    transfer_model(model, bpe, byte)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    found = bits_per_byte(ModelView(model), byte, ["any text", "日本"], context_tokens=16)
    assert found.value == pytest.approx(math.log2(byte.vocab_size), rel=1e-6)
    assert found.num_tokens == found.num_bytes


def test_a_stride_without_context_is_refused(view, bpe):
    with pytest.raises(UserError, match="leaves no context of 8 tokens"):
        bits_per_byte(view, bpe, ["text"], context_tokens=8, stride_tokens=8)


def test_chunks_add_up_to_the_text_and_its_probability(view, bpe, unigram, model_folder, documents):
    other = load_model(str(model_folder))
    transfer_model(other, bpe, unigram)
    text = documents[0][:120] + "\n and more"
    chunks = score_chunks(text, view, bpe, ModelView(other), unigram)
    assert "".join(chunk.text for chunk in chunks) == text
    total = bits_per_byte(view, bpe, [text], context_tokens=256).nats
    assert -sum(chunk.teacher_logp for chunk in chunks) == pytest.approx(total, rel=1e-5)
    for chunk in chunks:
        assert chunk.teacher_tokens
        assert chunk.student_tokens


def test_a_piece_of_a_character_is_shown_as_an_escape(view, bpe):
    chunks = score_chunks("é", view, bpe, view, bpe)
    assert [chunk.text for chunk in chunks] == ["\\xc3", "\\xa9"]
