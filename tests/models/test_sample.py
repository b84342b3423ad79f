"""Sampling equals a slow loop over full forward passes, follows the distribution, and does not know its batch."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models.expand import attach_expansion
from tokenkit.models.sample import Drawing, SamplingConfig, draw, drawing_of, gumbel, kept_ids, sample, sequence_key
from tokenkit.tokenizers.load import load_tokenizer

BYTES = load_tokenizer("byte")
ROWS = 300
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PROMPTS = [[BYTES.start_id(), *text.encode()] for text in ("", "Hi", "Ho", "a long prompt", "", "xy", "", "one more")]
KEYS = [sequence_key(3, number) for number in range(len(PROMPTS))]


def made(kind: str):
    torch.manual_seed(1)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        return GPT2LMHeadModel(config).eval()
    if kind == "mamba":
        config = MambaConfig(vocab_size=ROWS, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.2)
        return MambaForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, initializer_range=0.2, **SIZES)).eval()


@pytest.fixture(scope="module")
def llama():
    return made("llama")


def drawing(ends=(), **keys) -> Drawing:
    return drawing_of(build(SamplingConfig, {"max_new_tokens": 12, **keys}), BYTES, ROWS, ends)


@torch.no_grad()
def slow(model, prompt: list[int], key: int, how: Drawing) -> tuple[list[int], float]:
    ids, logp = list(prompt), 0.0
    for n in range(how.max_new_tokens):
        logits = model(torch.tensor([ids])).logits[:, -1].double()
        ids.append(int(draw(logits, torch.tensor([key]), n, how)))
        logp += float(logits.log_softmax(-1)[0, ids[-1]])
        if ids[-1] in how.stop_ids:
            break
    return ids[len(prompt) :], logp


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_it_equals_the_slow_loop_whatever_the_batch(kind):
    model = made(kind)
    how = drawing(temperature={"kind": "exponential", "start": 3, "end": 0.5}, top_p=0.95)
    wanted = [slow(model, prompt, key, how) for prompt, key in zip(PROMPTS, KEYS)]
    assert len({tuple(ids) for ids, _ in wanted}) == len(PROMPTS)  # equal prompts, different texts
    for size in (1, 3, 8):
        found = sample(model, PROMPTS, how, KEYS, batch_size=size)
        assert [row.ids for row in found] == [ids for ids, _ in wanted]
        assert [row.logp for row in found] == pytest.approx([logp for _, logp in wanted], abs=1e-4)


def test_many_sequences_are_the_same_in_batches_of_1_3_and_8(llama):
    how = drawing(max_new_tokens=24)
    keys = [sequence_key(0, number) for number in range(16)]
    found = [sample(llama, [PROMPTS[0]] * 16, how, keys, batch_size=size) for size in (1, 3, 8)]
    assert [row.ids for row in found[0]] == [row.ids for row in found[1]] == [row.ids for row in found[2]]
    assert sum(len(row.ids) for row in found[0]) > 16 * 15
    later = sample(llama, [PROMPTS[0]] * 4, how, keys[12:], batch_size=2)
    assert [row.ids for row in later] == [row.ids for row in found[0][12:]]  # whoever was drawn before


def test_seeds_and_streams_differ_and_nothing_else_is_touched(llama):
    how, before = drawing(), torch.get_rng_state()
    one, other, stream = (
        sample(llama, PROMPTS[:1], how, [sequence_key(*key)])[0].ids for key in ((0, 0), (1, 0), (0, 0, 1))
    )
    assert one != other
    assert one != stream
    llama.train()
    sample(llama, PROMPTS[:1], how, [sequence_key(0, 0)])
    assert llama.training
    llama.eval()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [10.0, 0.5])
def test_the_first_token_has_the_entropy_of_the_softmax(temperature):
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    p = (logits[0] / temperature).softmax(-1)
    entropy = float(-(p * p.log()).sum())
    count = 20_000
    keys = torch.tensor([sequence_key(0, number) for number in range(count)])
    config = SamplingConfig.model_validate({"temperature": temperature, "min_new_tokens": 0})
    how = Drawing(config, config.temperature.over(4), 4, 0, frozenset(), ())
    seen = torch.bincount(draw(logits.expand(count, -1), keys, 0, how), minlength=60) / count
    assert float(-torch.special.xlogy(seen, seen).sum()) == pytest.approx(entropy, rel=0.02)
    assert float((seen - p).abs().sum()) < 0.06


def test_noise_is_splitmix64_and_as_gumbel_wrote_it():
    word = (1 << 64) - 1

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    keys = [sequence_key(0, 0), sequence_key(5, 7)]
    found = gumbel(torch.tensor(keys), 3, 11)
    for row, key in enumerate(keys):
        at = mixed((key + 4 * 0x9E3779B97F4A7C15) & word)
        for i in range(11):
            bits = mixed((at + (i + 1) * 0x9E3779B97F4A7C15) & word) >> 12
            assert float(found[row, i]) == pytest.approx(-math.log(-math.log((bits + 0.5) / 2**52)), rel=1e-12)
    many = gumbel(torch.tensor([sequence_key(1, n) for n in range(400)]), 0, 500).numpy()
    assert many.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert many.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01


def test_towards_zero_the_likeliest_wins(llama):
    greedy = sample(llama, PROMPTS, drawing(temperature=0), KEYS)
    for cold in (5e-324, 1e-200, 1e-6):
        how = drawing(temperature=cold, top_p=0.9, min_p=0.1)
        assert [row.ids for row in sample(llama, PROMPTS, how, KEYS)] == [row.ids for row in greedy]
    again = [slow(llama, prompt, 0, drawing(temperature=0))[0] for prompt in PROMPTS]
    assert [row.ids for row in greedy] == again


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()

    def kept(temperature=1.0, **keys):
        return kept_ids(logits, temperature, SamplingConfig.model_validate(keys))[0].tolist()

    assert kept() == [True, True, True, True]
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True, True, True, True]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(min_p=0.3) == [True, True, True, False]
    assert kept(min_p=0.3, temperature=100.0) == [True, True, True, True]
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]  # of the two: 0.625
    tied = torch.zeros(1, 3, dtype=torch.float64)
    assert kept_ids(tied, 1.0, SamplingConfig(top_k=1)).all()


def biased(ids: list[int]):
    """A model that says the ids in turn, whatever it reads."""
    model, position = made("llama"), iter(ids)

    def hook(_module: object, _inputs: object, output: object) -> object:
        wanted = next(position)
        output.last_hidden_state = model.lm_head.weight[wanted].detach().expand(output.last_hidden_state.shape) * 1e3
        return output

    model.base_model.register_forward_hook(hook)
    return model


def test_the_end_of_text_stops_stands_or_is_forbidden(llama):
    eos, a = BYTES.eos_id, ord("a")
    stopped = sample(biased([a, eos, a, a]), PROMPTS[:1], drawing(max_new_tokens=4), KEYS[:1])[0]
    assert (stopped.ids, stopped.ended) == ([a, eos], True)
    kept = sample(biased([a, eos, a, a]), PROMPTS[:1], drawing(max_new_tokens=4, end_of_text="keep"), KEYS[:1])[0]
    assert (kept.ids, kept.ended) == ([a, eos, a, a], False)
    how = drawing(max_new_tokens=4, end_of_text="forbid")
    forbidden = sample(biased([eos] * 4), PROMPTS[:1], how, KEYS[:1])[0]
    assert eos not in forbidden.ids
    assert len(forbidden.ids) == 4
    late = sample(biased([eos] * 4), PROMPTS[:1], drawing(max_new_tokens=4, min_new_tokens=2), KEYS[:1])[0]
    assert late.ids.index(eos) == 2


def test_ids_that_spell_nothing_are_never_drawn(llama):
    how = drawing(temperature=100, max_new_tokens=30)
    ids = {i for row in sample(llama, PROMPTS, how, KEYS) for i in row.ids}
    assert ids <= {*range(256), BYTES.eos_id}
    assert len(ids) > 100


def test_limits_and_enough(llama):
    how = drawing(end_of_text="forbid")
    limits = [3, 0, 5, 1, 2, 12, 7, 4]
    whole = sample(llama, PROMPTS, how, KEYS)
    short = sample(llama, PROMPTS, how, KEYS, limits=limits)
    assert [row.ids for row in short] == [row.ids[:limit] for row, limit in zip(whole, limits)]
    enough = sample(llama, PROMPTS, how, KEYS, until=lambda ids: len(ids) == 4)
    assert [row.ids for row in enough] == [row.ids[:4] for row in whole]
    assert sample(llama, [], how, []) == []


def test_expanded_inputs_are_read_as_in_one_pass():
    model = made("llama")
    torch.manual_seed(2)
    attach_expansion(model, [bytes([a, b]) for a in range(97, 123) for b in range(97, 123)], torch.randn(676, 32))
    how = drawing(temperature=0.7)
    for row, prompt, key in zip(sample(model, PROMPTS, how, KEYS), PROMPTS, KEYS):
        assert row.ids == slow(model, prompt, key, how)[0]


def test_what_is_refused():
    with pytest.raises(UserError, match="the model has 64 positions; write 10 less"):
        sample(made("gpt2"), [PROMPTS[0]], drawing(max_new_tokens=74), KEYS[:1])
    assert (
        len(sample(made("gpt2"), [PROMPTS[0]], drawing(max_new_tokens=64, end_of_text="forbid"), KEYS[:1])[0].ids) == 64
    )
    broken = made("llama")
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not numbers at new token 0"):
        sample(broken, [PROMPTS[0]], drawing(), KEYS[:1])
