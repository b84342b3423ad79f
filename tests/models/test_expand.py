"""Input-id expansion: the fast way equals a plain search, a byte at a time equals all at once, the whole way works."""

import codecs
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models.expand import MAX_BYTES, LongestSuffix, attach_expansion, expansion_of
from tokenkit.models.generate import generate
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.loop import Interrupted
from tokenkit.transfer.apply import transfer_model
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun
from tokenkit.verbs.evaluate import EvalRun, evaluate
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.prepare import prepare


def slow(token_bytes, row):
    """For every position the longest token whose bytes are the ids up to it, by looking."""
    first = {}
    for i, spelling in enumerate(token_bytes):
        first.setdefault(spelling, i)
    found = []
    for end in range(1, len(row) + 1):
        best = -1
        for length in range(1, min(MAX_BYTES, end) + 1):
            part = row[end - length : end]
            if max(part) < 256 and bytes(part) in first:
                best = first[bytes(part)]
        found.append(best)
    return found


@given(
    st.lists(st.binary(max_size=20).map(lambda b: bytes(x % 3 for x in b)), min_size=1, max_size=40),
    st.lists(st.sampled_from([0, 1, 2, 2, 1, 0, 255, 256, 258]), min_size=1, max_size=60),
    st.integers(0, 59),
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_equals_a_plain_search_however_it_is_cut(tokens, row, cut):
    match = LongestSuffix(tokens)
    expected = slow(tokens, row)
    ids = torch.tensor([row])
    assert match(ids).tolist() == [expected]
    head, tail = ids[:, :cut], ids[:, cut:]
    if head.shape[1] and tail.shape[1]:
        assert match(tail, head[:, 1 - MAX_BYTES :]).tolist() == [expected[cut:]]


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_real_vocabularies(shared, name):
    token_bytes = load_tokenizer(str(shared / "data/tokenizers" / name)).token_bytes
    text = (shared / "data/corpora/tinystories/valid.txt").read_bytes()[:4096]
    ids = torch.tensor(list(text)).view(4, -1)
    assert LongestSuffix(token_bytes)(ids).tolist() == [slow(token_bytes, row) for row in ids.tolist()]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_generation_with_a_cache_equals_generation_without(length):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    tokenizer = load_tokenizer("byte")
    tokens = [bytes([a, b]) for a in range(0, 256, 2) for b in range(0, 256, 3)]
    tokens += [bytes([a]) for a in range(0, 256, 5)]
    attach_expansion(model, tokens, torch.randn(len(tokens), 32))
    prompt = torch.randint(0, 256, (2, length)).tolist()
    found = generate(model, tokenizer, prompt, max_new_tokens=24)
    ids = torch.tensor(prompt)
    with torch.no_grad():
        for _ in range(24):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for text, row in zip(found, ids[:, length:].tolist()):
        ended = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
        spelled = b"".join(tokenizer.token_bytes[i] for i in ended)
        assert text == codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)


@pytest.fixture
def run(tmp_path, model_folder, corpus):
    def make(**changes):
        source = {"path": str(corpus), "separator": "\n\n"}
        values = {
            "output": tmp_path / "out",
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "expand_inputs": True,
            "losses": {"alm": {}},
            "data": {"source": source, "window_bytes": 80},
            "train": {"steps": 4, "batch_size": 4, "mode": "full"} | changes.pop("train", {}),
            "eval": {"source": {**source, "max_bytes": 300}, "context_tokens": 64},
        }
        return build(DistillRun, values | changes)

    return make


def test_the_student_reads_old_tokens_and_the_teacher_is_left_alone(run, bpe):
    sides = prepare(run())
    assert expansion_of(sides.teacher.model) is None
    expansion = expansion_of(sides.student.model)
    text = "the cat sat"
    token = expansion.match(torch.tensor([list(text.encode())]))[0].tolist()
    assert [expansion.spellings[i].decode() for i in token][2] == slow_name(bpe.token_bytes, text, 2)
    embedding, plain = sides.student.model.get_input_embeddings(), torch.tensor([list(text.encode())])
    with expansion.off():
        without = embedding(plain)
    torch.testing.assert_close(embedding(plain) - without, expansion.old_rows[token][None])
    assert not any("expansion" in name for name in sides.student.model.state_dict())


def slow_name(token_bytes, text, position):
    return token_bytes[slow(token_bytes, list(text.encode()))[position]].decode()


def test_the_whole_way(run, tmp_path, corpus):
    results = distill(run(report={"prompts": ["the"]}), quiet=True)
    folder = tmp_path / "out/model"
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder / "base")
    source = {"path": str(corpus), "separator": "\n\n", "max_bytes": 300}
    values = {"model": {"source": str(folder)}, "eval": {"source": source, "context_tokens": 64}}
    found = evaluate(build(EvalRun, values))["bits_per_byte"]
    assert found == pytest.approx(results["trained_bits_per_byte"], rel=1e-5)
    values["model"] = {"source": str(folder / "base")}
    assert evaluate(build(EvalRun, values))["bits_per_byte"] != pytest.approx(found, rel=1e-3)
    model, tokenizer = load_pair(ModelChoice(source=str(folder)), "cpu")
    with pytest.raises(UserError, match="inputs are expanded"):
        transfer_model(model, tokenizer, tokenizer)
    assert json.loads((tmp_path / "out/results.json").read_text("utf-8"))["steps"] == 4


@pytest.mark.parametrize("changes", [{"train": {"mode": "embeddings"}}, {"target_tokenizer": None}])
def test_where_it_cannot_be(run, changes, tmp_path):
    with pytest.raises(UserError, match="expand_inputs: only with target_tokenizer=byte"):
        distill(run(**changes), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    whole = distill(run(output=tmp_path / "whole"), quiet=True)
    with pytest.raises(Interrupted):
        distill(run(train={"steps": 4, "batch_size": 4, "mode": "full", "stop_after": 2}), quiet=True)
    resumed = distill(run(), resume=True, quiet=True)
    assert resumed["trained_bits_per_byte"] == whole["trained_bits_per_byte"]
