"""With a draft the text is, id for id, the model's own; how fast it comes is all that the draft decides."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tokenkit.config import build
from tokenkit.models.expand import attach_expansion
from tokenkit.models.generate import WritingConfig, stream, write
from tokenkit.models.sample import Drawing, SamplingConfig, sequence_key
from tokenkit.models.speculative import Draft, Tally, speculated
from tokenkit.tokenizers.load import load_tokenizer

BYTES = load_tokenizer("byte")
SIZES = {"num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
PROMPTS = ["Hello", "a much longer prompt, é and 東", ""]
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "filtered": {"temperature": 2.0, "top_p": 0.9, "top_k": 40},
    "penalised": {"temperature": 1.0, "repetition_penalty": 1.2, "no_repeat_ngram": 2, "min_new_tokens": 9},
    "a schedule": {"temperature": {"kind": "linear", "start": 3.0, "end": 0.5}},
}


def llama(seed: int, rows: int = 300, width: int = 32, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=rows, hidden_size=width, num_hidden_layers=layers, **SIZES)
    return LlamaForCausalLM(config).eval()


def near(model: LlamaForCausalLM, noise: float) -> LlamaForCausalLM:
    """A draft that is right now and then: the model with noise on its weights."""
    other = llama(1)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator) * parameter.std()
    return other


def config(**keys) -> WritingConfig:
    return build(WritingConfig, {"max_new_tokens": 24, "stop": ("ab",), **keys})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guesses", [1, 4])
def test_the_text_is_the_models_own(way, guesses):
    model, how, tally = llama(1), config(**WAYS[way]), Tally()
    wanted = write(model, BYTES, PROMPTS, how, scored=True, batch_size=1)
    draft = Draft(near(model, 0.05), guesses)
    found = write(model, BYTES, PROMPTS, how, scored=True, draft=draft, tally=tally)
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert [(one.text, one.ended) for one in found] == [(one.text, one.ended) for one in wanted]
    assert [one.logp for one in found] == pytest.approx([one.logp for one in wanted], abs=1e-4)
    assert tally.written == sum(len(one.ids) for one in wanted)
    assert 0 < tally.accepted < tally.checked
    assert tally.calls < tally.written
    texts = ["", "", ""]
    for place, piece in stream(model, BYTES, PROMPTS, how, draft=draft):
        texts[place] += piece
    assert texts == [one.text for one in wanted]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_guesses_for_itself_is_always_right(temperature):
    model, tally = llama(1), Tally()
    how = build(WritingConfig, {"max_new_tokens": 25, "min_new_tokens": 25, "temperature": temperature})
    write(model, BYTES, ["Hello"], how, draft=Draft(model, 4), tally=tally)
    assert tally.acceptance == 1.0
    assert (tally.calls, tally.tokens_per_call) == (5, 5.0)


def test_a_draft_of_another_family_with_more_rows_and_expanded_inputs():
    model = llama(1)
    torch.manual_seed(3)
    attach_expansion(model, [bytes([a, b]) for a in range(97, 123) for b in range(97, 123)], torch.randn(676, 32))
    torch.manual_seed(2)
    draft = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=90)).eval()
    model.train()
    how = config(temperature=0.7)
    wanted = [one.ids for one in write(model, BYTES, PROMPTS, how)]
    assert [one.ids for one in write(model, BYTES, PROMPTS, how, draft=Draft(draft))] == wanted
    assert model.training
    assert not draft.training


@torch.no_grad()
def test_two_tokens_have_the_models_distribution():
    """Chi-square over all pairs of a vocabulary of four, 15 degrees of freedom: below 30.6 in 99 of 100 cases."""
    model, draft = llama(1, rows=4, width=16, layers=1), Draft(llama(2, rows=4, width=16, layers=1), 2)
    settings = SamplingConfig(max_new_tokens=2, min_new_tokens=0, end_of_text="keep")
    drawing = Drawing(settings, settings.temperature.over(2), 2, 0, frozenset(), ())
    count, seen, tally = 600, torch.zeros(4, 4), Tally()
    rows: list[list[int]] = [[] for _ in range(count)]
    options = {"limits": [2] * count, "enough": lambda place, i: rows[place].append(i), "scored": False}
    keys = [sequence_key(0, number) for number in range(count)]
    for _ in speculated(model, draft, [[0, 1]] * count, (drawing, drawing), keys, tally=tally, **options):
        pass
    for first, second in rows:
        seen[first, second] += 1
    start = model(torch.tensor([[0, 1]])).logits[0, -1].softmax(-1)
    after = model(torch.tensor([[0, 1, i] for i in range(4)])).logits[:, -1].softmax(-1)
    wanted = count * start[:, None] * after
    assert float(((seen - wanted) ** 2 / wanted).sum()) < 30.6
    assert 0.1 < tally.acceptance < 0.99
