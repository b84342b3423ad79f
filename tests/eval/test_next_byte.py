"""Next-byte distributions against enumeration of every token sequence, on vocabularies small enough for that."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.eval.byte_order import ByteOrder
from tokenkit.eval.next_byte import END, ByteModel, CoverConfig
from tokenkit.models.tree_reader import ROOT, TreeReader

EXACT = CoverConfig(beam=None, threshold=0.0)


class Spelled:
    """A tokenizer that is a list of spellings; id 0 is an ordinary token, the start and end are the last."""

    def __init__(self, *spellings: bytes):
        self.name = "spelled"
        self.token_bytes = [*spellings, b"", b"", b""]  # a hole, then the start, then the end
        self.bos_id, self.eos_id, self.pad_id = len(spellings) + 1, len(spellings) + 2, None
        self.vocab_size = len(self.token_bytes)
        self.special_tokens = {"<s>": self.bos_id, "</s>": self.eos_id}
        self.special_ids = frozenset({self.bos_id, self.eos_id})
        self.config, self.added_tokens, self.chat_template = {}, [], None
        self.lossless, self.changes, self.fingerprint = True, (), repr(spellings)

    def start_id(self):
        return self.bos_id

    def _greedy(self, text):
        """The longest token at every place."""
        ids = []
        while text:
            ids.append(max((s, i) for i, s in enumerate(self.token_bytes) if s and text.startswith(s))[1])
            text = text[len(self.token_bytes[ids[-1]]) :]
        return ids

    def encode(self, text, *, special=False):
        return self.encode_batch([text])[0]

    def decode(self, ids):
        return b"".join(self.token_bytes[i] for i in ids).decode()

    def save(self, folder):
        raise NotImplementedError

    def encode_batch(self, texts, *, special=False, continued=False):
        return [SimpleNamespace(ids=np.array(self._greedy(text.encode()), np.int32)) for text in texts]


def llama(rows, seed, **options):
    """A tiny random model in float64, far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config).double().eval()


FIRST = Spelled(b"a", b"b", b"c", b"ab", b"abc", b"ca", b"a")  # the last doubles the first
SECOND = Spelled(b"c", b"bc", b"b", b"a", b"aab", b"ba", b"cc", b"cab")
THIRD = Spelled(b"b", b"a", b"c")
PADDED = 3


def pair(tokenizer, seed):
    return llama(tokenizer.vocab_size + PADDED, seed), tokenizer


@torch.no_grad()
def enumerated(model, tokenizer, text):
    """The probability that a text begins with these bytes, and that it is these bytes: over all token sequences."""
    scored = [i for i, s in enumerate(tokenizer.token_bytes) if s] + [tokenizer.eos_id]

    def sums(ids, rest):
        logits = model(torch.tensor([[tokenizer.bos_id, *ids]]), use_cache=False).logits[0, -1, scored]
        chance = dict(zip(scored, logits.softmax(-1).tolist()))
        if not rest:
            return 1.0, chance[tokenizer.eos_id]
        begins = whole = 0.0
        for i in scored[:-1]:
            spelled = tokenizer.token_bytes[i]
            if rest.startswith(spelled):
                more = sums([*ids, i], rest[len(spelled) :])
                begins, whole = begins + chance[i] * more[0], whole + chance[i] * more[1]
            elif spelled.startswith(rest):
                begins += chance[i]
        return begins, whole

    return sums([], text)


def walk(reading, text):
    """Log-probability of the bytes, one after the other, and the last next-byte distribution."""
    (prefix,) = reading.open([[reading.tokenizer.bos_id]])
    total = 0.0
    for byte in text:
        total += prefix.next_logp()[byte]
        reading.advance([(prefix, byte)])
    return total, prefix


TEXTS = [b"", b"a", b"ab", b"cab", b"abcab", b"aabcc"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("tokenizer", "seed"), [(FIRST, 1), (SECOND, 2), (THIRD, 3)])
def test_equals_the_sum_over_all_token_sequences(tokenizer, seed, text):
    model, _ = pair(tokenizer, seed)
    total, prefix = walk(ByteModel(model, tokenizer, EXACT), text)
    begins, whole = enumerated(model, tokenizer, text)
    assert total == pytest.approx(math.log(begins), abs=1e-9)  # the chain rule
    logp = prefix.next_logp()
    assert np.exp(logp).sum() == pytest.approx(1, abs=1e-12)
    assert logp[END] == pytest.approx(math.log(whole / begins), abs=1e-9)
    for byte in b"abc":
        expected = enumerated(model, tokenizer, text + bytes([byte]))[0] / begins
        assert logp[byte] == pytest.approx(math.log(expected), abs=1e-9)
    assert prefix.dropped_nats == 0
