"""Next-byte distributions against enumeration of every token sequence, on vocabularies small enough for that."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.builtin_tasks import BuiltinBackend, HeldOut
from tokenkit.eval.byte_agreement import byte_agreement
from tokenkit.eval.byte_ensemble import byte_windows, continue_bytes, score_bytes
from tokenkit.eval.byte_order import ByteOrder
from tokenkit.eval.combine import Combination
from tokenkit.eval.ends import end_ids
from tokenkit.eval.harness import Subject
from tokenkit.eval.next_byte import END, ByteModel, CoverConfig
from tokenkit.models.load import load_model
from tokenkit.models.sample import DrawConfig, Drawing
from tokenkit.models.temperature import TemperatureConfig
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.apply import transfer_model

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


TEXTS = [b"", b"ab", b"cab", b"aabcc"]


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


@pytest.mark.parametrize("how", ["mean_prob", "mean_logp"])
def test_three_models_of_three_tokenizers_are_the_enumerated_joint(how):
    """The joint distribution of a text: the product over bytes of the combined next-byte distributions."""
    sides, weights = [pair(FIRST, 1), pair(SECOND, 2), pair(THIRD, 3)], [0.5, 0.2, 0.3]
    models = [ByteModel(*side, EXACT) for side in sides]
    text = "abca"
    begins = [[enumerated(*side, text.encode()[:n])[0] for n in range(len(text) + 1)] for side in sides]
    following = np.array(
        [[[enumerated(*side, text.encode()[:n] + bytes([b]))[0] for b in b"abc"] for n in range(4)] for side in sides]
    )
    ends = np.array([[enumerated(*side, text.encode()[:n])[1] for n in range(4)] for side in sides])
    chance = np.concatenate([following, ends[..., None]], 2) / np.array(begins)[:, :4, None]
    shares = np.array(weights)[:, None, None]
    joint = (chance * shares).sum(0) if how == "mean_prob" else np.exp((np.log(chance) * shares).sum(0))
    joint /= joint.sum(1, keepdims=True)
    expected = -sum(math.log(joint[n, b"abc".index(byte)]) for n, byte in enumerate(text.encode()))
    found, own = score_bytes(models, Combination(how, 3, weights), [text])
    assert found.nats == pytest.approx(expected, abs=1e-9)
    assert [one.nats for one in own] == pytest.approx([-math.log(b[-1]) for b in begins], abs=1e-9)


def test_a_beam_is_a_distribution_and_says_what_it_may_have_lost():
    model, tokenizer = pair(FIRST, 1)
    text = b"abcabcaab"
    exact, _ = walk(ByteModel(model, tokenizer, EXACT), text)
    losses = []
    for beam in (1, 2, 4, 8):
        total, prefix = walk(ByteModel(model, tokenizer, CoverConfig(beam=beam, threshold=0.0)), text)
        assert np.exp(prefix.next_logp()).sum() == pytest.approx(1, abs=1e-12)
        assert total - prefix.dropped_nats <= exact + 1e-9
        losses.append(prefix.dropped_nats)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0


def test_canonical_covers_are_the_tokenizers_own_ids():
    model, tokenizer = pair(FIRST, 1)
    reading = ByteModel(model, tokenizer, CoverConfig(beam=None, threshold=0.0, canonical=True))
    text = b"abcaab"
    _, prefix = walk(reading, text)
    closed = [node for group in prefix.groups for node in group.nodes]
    for node in closed:
        ids = reading.tree.path(node)[1:]
        assert ids == tokenizer.encode(b"".join(tokenizer.token_bytes[i] for i in ids).decode()).ids.tolist()
    assert len(closed) == len(set(closed)) <= 3  # one for each place a token may have begun


def test_a_byte_vocabulary_has_one_cover_and_plain_scores(model_folder):
    model = load_model(str(model_folder))
    old = load_tokenizer(str(model_folder))
    byte = ByteTokenizer()
    transfer_model(model, old, byte)
    documents = ["the cat é 日本", "sat on"]
    found, _ = score_bytes([ByteModel(model, byte, EXACT)], Combination("mean_prob", 1), documents)
    # the plain score counts special tokens too, which are no bytes
    plain = 0.0
    for document in documents:
        ids = torch.tensor([[byte.start_id(), *byte.encode(document).ids.tolist()]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1, [*range(256), *end_ids(model, byte)]].log_softmax(-1)
        plain -= logp[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
    assert found.nats == pytest.approx(plain, rel=1e-5)


@given(st.text(max_size=40), st.integers(2, 12), st.integers(1, 11))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_windows_score_every_byte_once(text, context, stride):
    windows = list(byte_windows(text, context, min(stride, context - 1)))
    assert b"".join(window.text[window.first :] for window in windows) == text.encode()
    assert all(window.text[0] & 0xC0 != 0x80 for window in windows)


def test_long_documents_slide(model_folder, bpe, documents):
    model = load_model(str(model_folder))
    reading = ByteModel(model, bpe, CoverConfig(beam=2))
    whole, _ = score_bytes([reading], Combination("mean_prob", 1), [documents[0][:90]], context_bytes=120)
    slid, _ = score_bytes([reading], Combination("mean_prob", 1), [documents[0][:90]], context_bytes=60)
    assert whole.num_bytes == slid.num_bytes == 90
    assert slid.nats == pytest.approx(whole.nats, rel=0.2)
    with pytest.raises(UserError, match=r"context_bytes: 300 bytes can be as many tokens, and .* write 256 or less"):
        score_bytes([reading], Combination("mean_prob", 1), ["a" * 300], context_bytes=300)


def test_a_byte_that_no_token_spells_is_one_line():
    reading = ByteModel(*pair(THIRD, 3), EXACT)
    with pytest.raises(UserError, match=r"spelled: none of its tokens goes on to the last byte of b'ax'"):
        score_bytes([reading], Combination("mean_prob", 1), ["ax"])
    with pytest.raises(UserError, match=r"spelled: none of its tokens goes on to the last byte of b'x'"):
        score_bytes([reading], Combination("mean_prob", 1), ["xa"])


def test_what_comes_before_a_document_is_given(shared):
    """A sentencepiece tokenizer writes a space before the text; the text's probability is without it."""
    folder = shared / "data" / "weights" / "stories260K"
    reading = ByteModel(load_model(str(folder)), load_tokenizer(str(folder)), CoverConfig())
    (prefix,) = reading.open([[reading.tokenizer.start_id()]])
    assert prefix.text == b" "
    assert chr(int(prefix.next_logp().argmax())) == "O"
    text = "Once upon a time, there was a little girl named"
    found, own = score_bytes([reading], Combination("mean_prob", 1), [text])
    plain = bits_per_byte(ModelView(reading.model), reading.tokenizer, [text])
    assert found.nats < plain.nats  # all spellings, and not the tokenizer's alone
    assert own[0].dropped < 1e-3


def drawing(count, temperature=0.0):
    config = DrawConfig(temperature=TemperatureConfig(start=temperature))
    return Drawing(config, config.temperature.over(count), count, 0, frozenset({END}), ())


def test_writing_is_the_likeliest_byte_and_seeded():
    models = [ByteModel(*side, EXACT) for side in (pair(FIRST, 1), pair(SECOND, 2))]
    combine = Combination("mean_prob", 2)
    (text,) = continue_bytes(models, combine, ["ab"], drawing(5))
    written = b"ab"
    while len(written) < 2 + len(text.encode()):
        logp = combine([torch.from_numpy(walk(one, written)[1].next_logp()) for one in models])
        written += bytes([int(logp.argmax())])
    assert written.decode() == "ab" + text
    hot = [continue_bytes(models, combine, ["ab", "c"], drawing(8, 1.0), seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    first = hot[0][0]
    (stopped,) = continue_bytes(models, combine, ["ab"], drawing(8, 1.0), seed=1, stop=[first[2:4]])
    assert stopped == first[: first.index(first[2:4])]


def test_agreement_with_itself_is_whole_and_with_another_is_the_divergence(model_folder, bpe):
    first, second = ByteModel(*pair(FIRST, 1), EXACT), ByteModel(*pair(SECOND, 2), EXACT)
    same = byte_agreement(first, first, ["abca"])
    assert same.kl == pytest.approx(0, abs=1e-12)
    assert (same.top1, same.num_tokens) == (1.0, 4)
    found, expected = byte_agreement(second, first, ["abca"]), 0.0
    for n in range(4):
        p, q = (walk(side, b"abca"[:n])[1].next_logp() for side in (first, second))
        expected += sum(math.exp(a) * (a - b) for a, b in zip(p, q) if a > -math.inf) / 4
    assert found.kl == pytest.approx(expected, abs=1e-9)
    assert found.kl > 0


def test_a_node_is_a_range_and_its_sums_are_those_of_its_tokens():
    generator = np.random.default_rng(0)
    spellings = [bytes(generator.integers(97, 100, generator.integers(0, 5)).tolist()) for _ in range(200)]
    order, mass = ByteOrder(spellings, 190), generator.random(190)
    for length in range(4):
        for letters in itertools.product(b"abc", repeat=length):
            node = order.root
            for byte in letters:
                node = node.child(byte) if node.range(byte) else None
                if node is None:
                    break
            if node is None:
                continue
            low, high = node.low + node.whole, node.low + node.whole + node.longer
            sums = node.sums(mass[order.ids[low:high]][None])[0]
            for byte, found in zip(node.bytes.tolist(), sums):
                wanted = bytes([*letters, byte])
                expected = sum(mass[i] for i, s in enumerate(spellings[:190]) if s.startswith(wanted))
                assert found == pytest.approx(expected, rel=1e-12)


def test_prompts_together_are_what_each_is_alone():
    models = [ByteModel(*side, EXACT) for side in (pair(FIRST, 1), pair(SECOND, 2))]
    combine, prompts = Combination("mean_logp", 2), ["ab", "c", "", "abca"]
    together = continue_bytes(models, combine, prompts, drawing(6))
    assert together == [continue_bytes(models, combine, [prompt], drawing(6))[0] for prompt in prompts]
    ids = [[[one.tokenizer.bos_id, *one.tokenizer.encode(p).ids.tolist()] for one in models] for p in prompts]
    assert len(continue_bytes(models, combine, ids, drawing(6))) == 4


def test_a_token_that_ends_a_text_is_no_spelling():
    """A model may declare an ordinary token as its end: its mass is the end's, once."""
    model, tokenizer = pair(FIRST, 1)
    model.generation_config.eos_token_id = [tokenizer.eos_id, 3]  # b"ab"
    reading = ByteModel(model, tokenizer, EXACT)
    (prefix,) = reading.open([[tokenizer.bos_id]])
    logp = prefix.next_logp()
    assert np.exp(logp).sum() == pytest.approx(1, abs=1e-12)
    with torch.no_grad():
        scored = [*(i for i, s in enumerate(tokenizer.token_bytes) if s), tokenizer.eos_id]
        logits = model(torch.tensor([[tokenizer.bos_id]])).logits[0, -1, scored]
    chance = dict(zip(scored, logits.softmax(-1).tolist()))
    assert math.exp(logp[END]) == pytest.approx(chance[3] + chance[tokenizer.eos_id], abs=1e-12)
    assert math.exp(logp[ord("a")]) == pytest.approx(chance[0] + chance[4] + chance[6], abs=1e-12)


def test_the_tokenizers_own_spelling_is_one_of_those_that_count(model_folder, bpe, documents):
    """The probability of a text is at least that of its tokens, among all covers and among canonical ones."""
    model = load_model(str(model_folder))
    text = documents[0][:60]
    ids = torch.tensor([[bpe.start_id(), *bpe.encode(text).ids.tolist()]])
    scored = [*(i for i, s in enumerate(bpe.token_bytes) if s), *end_ids(model, bpe)]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    own = logits.gather(1, ids[0, 1:, None])[:, 0] - logits[:, scored].logsumexp(-1)
    canonical = CoverConfig(beam=None, threshold=0.0, canonical=True)
    found, _ = score_bytes([ByteModel(model, bpe, canonical)], Combination("mean_prob", 1), [text])
    assert found.nats <= -own.sum().item() + 1e-9


def test_byte_agreement_is_a_built_in_task(model_folder, bpe, unigram):
    """Of a teacher with another tokenizer; `agreement` says that it cannot be run, this one has figures."""
    other = load_model(str(model_folder))
    transfer_model(other, bpe, unigram)
    sides = {"student": (other, unigram), "teacher": (load_model(str(model_folder)), bpe)}

    def load(subject):
        model, tokenizer = sides[subject.source]
        return ModelView(model), tokenizer

    reading = EvalConfig(source=SourceConfig(stdlib="held_out"), context_tokens=64)
    backend = BuiltinBackend(load, HeldOut(["the cat sat", "on a mat"], reading), teacher=Subject("teacher"))
    options = {"limit": 1, "num_fewshot": None}
    rows = backend.evaluate(Subject("student"), ["agreement", "byte_agreement"], **options)
    assert [(row.task, row.value is None) for row in rows] == [("agreement", True)] * 2 + [
        ("byte_agreement", False)
    ] * 2
    assert rows[2].value > 0
    same = backend.evaluate(Subject("teacher"), ["byte_agreement"], **options)
    assert [row.value for row in same] == [pytest.approx(0, abs=1e-9), 1.0]
