"""Token-level ensembles: one model is itself, absent ids have no mass, any member's end is the end."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.align.vocabulary import mined_map
from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.combine import Combination
from tokenkit.eval.ensemble import Ensemble, Member
from tokenkit.eval.vocabulary_union import mined_slots, shared_slots
from tokenkit.models.generate import generate
from tokenkit.models.sample import DrawConfig, Drawing
from tokenkit.models.temperature import TemperatureConfig
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.hf import HFTokenizer

CONFIG = EvalConfig(source=SourceConfig(stdlib="held_out"), context_tokens=128)


def llama(rows, seed, scale=0.3):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def member(tokenizer, seed, more=0):
    return Member(ModelView(llama(tokenizer.vocab_size + more, seed)), tokenizer)


def ensemble(members, how="mean_prob", weights=None, maps=None):
    sides = [m.tokenizer for m in members]
    about = sides, [m.view.vocab_rows for m in members], [m.ends for m in members]
    slots = shared_slots(*about) if maps is None else mined_slots(*about, maps)
    return Ensemble(members, slots, Combination(how, len(members), weights), mapped=maps is not None)


def drawing(slots, count, temperature=0.0):
    config = DrawConfig(temperature=TemperatureConfig(start=temperature))
    return Drawing(config, config.temperature.over(count), count, 0, frozenset({slots.end}), slots.silent())


def renumbered(tokenizer):
    """The same tokenizer with its ids in another order: id 0 is another token, every id means another."""
    definition = tokenizer.definition
    size = tokenizer.vocab_size
    new = {i: (i * 7 + 3) % size for i in range(size)}
    assert len(set(new.values())) == size
    vocabulary = definition["model"]["vocab"]
    definition["model"]["vocab"] = {piece: new[i] for piece, i in vocabulary.items()}
    for token in definition["added_tokens"]:
        token["id"] = new[token["id"]]
    return HFTokenizer(definition, tokenizer.config), [new[i] for i in range(size)]


def permuted(model, order):
    """The same model with its rows where the new ids want them."""
    other = llama(len(order), 0)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for matrix, old in (
            (other.get_input_embeddings().weight, model.get_input_embeddings().weight),
            (other.lm_head.weight, model.lm_head.weight),
        ):
            matrix[torch.tensor(order)] = old.clone()
    return other


@pytest.mark.parametrize("how", ["mean_prob", "mean_logp"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_copies_of_a_model_are_the_model(bpe, documents, how, count):
    one = member(bpe, 1)
    alone = bits_per_byte(one.view, bpe, documents[:4], context_tokens=128)
    found = ensemble([one] * count, how).bits_per_byte(documents[:4], CONFIG)
    assert found.value == pytest.approx(alone.value, abs=1e-6)
    assert (found.num_tokens, found.num_bytes) == (alone.num_tokens, alone.num_bytes)


@pytest.mark.parametrize("how", ["mean_prob", "mean_logp"])
def test_all_weight_on_one_is_that_one(bpe, documents, how):
    sides = [member(bpe, 1), member(bpe, 2)]
    for weights, chosen in (([1.0, 0.0], 0), ([0.0, 1.0], 1)):
        alone = bits_per_byte(sides[chosen].view, bpe, documents[:4], context_tokens=128)
        found = ensemble(sides, how, weights).bits_per_byte(documents[:4], CONFIG)
        assert found.value == pytest.approx(alone.value, abs=1e-6)


def test_a_mixture_is_no_worse_than_the_mean_of_its_members(bpe, documents):
    sides = [member(bpe, seed) for seed in (1, 2, 3)]
    alone = [bits_per_byte(side.view, bpe, documents[:4], context_tokens=128).value for side in sides]
    product = ensemble(sides, "mean_logp").bits_per_byte(documents[:4], CONFIG).value
    mixture = ensemble(sides, "mean_prob").bits_per_byte(documents[:4], CONFIG).value
    mean = sum(alone) / 3
    assert product <= mean + 1e-9  # the product is scaled up
    assert mixture <= mean + 1e-9  # Jensen


@pytest.mark.parametrize("how", ["mean_prob", "mean_logp"])
def test_ids_mean_nothing_between_members(bpe, documents, how):
    """A member whose vocabulary is numbered otherwise, id 0 an ordinary token of both, scores and writes the same."""
    other, order = renumbered(bpe)
    assert bpe.token_bytes[0] or other.token_bytes[0]
    one, two = member(bpe, 1), Member(ModelView(permuted(llama(bpe.vocab_size, 1), order)), other)
    mixed, plain = ensemble([one, two], how), ensemble([one, one], how)
    assert len(mixed.slots.spelled) == sum(bool(s) for s in bpe.token_bytes)
    zeros = [int((row == 0).sum()) for row in mixed.slots.ids]
    assert zeros == [int(bool(bpe.token_bytes[0])), int(bool(other.token_bytes[0]))]
    # the shared slots leave special tokens out, which a random model likes as much as others
    texts = documents[:3]
    renormalised = ensemble([one, Member(one.view, renumbered_back(bpe))], how)
    assert mixed.bits_per_byte(texts, CONFIG).value == pytest.approx(
        renormalised.bits_per_byte(texts, CONFIG).value, abs=1e-5
    )
    prompts = ["the cat", "ran home to"]
    written = [side.continued(prompts, drawing(side.slots, 12)) for side in (mixed, renormalised)]
    assert written[0] == written[1]
    assert plain.continued(prompts, drawing(plain.slots, 12)) == generate(
        one.view.model, bpe, prompts, max_new_tokens=12
    )


def renumbered_back(tokenizer):
    """The same ids, and not the same vocabulary: one special token has another literal."""
    definition = tokenizer.definition
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": tokenizer.vocab_size, "content": "<x>"})
    return HFTokenizer(definition, tokenizer.config)


def test_id_0_is_scored(bpe, documents):
    """A token of id 0 has the probability that the model gives it."""
    other, order = renumbered(bpe)
    index = order.index(0)
    assert bpe.token_bytes[index]
    one = Member(ModelView(permuted(llama(bpe.vocab_size, 1), order)), other)
    slots = ensemble([one]).slots
    logits = torch.randn(1, other.vocab_size)
    slot = int(slots.slot_of[0])
    assert slots.spelled[slot] == other.token_bytes[0]
    assert slots.logp(0, logits)[0, slot].item() == pytest.approx(logits.log_softmax(-1)[0, 0].item(), abs=1e-6)


def test_holes_and_padded_rows_have_no_mass(bpe, unigram):
    rows = [bpe.vocab_size + 5, unigram.vocab_size + 3]
    slots = shared_slots([bpe, unigram], rows, [[bpe.eos_id], [unigram.eos_id]])
    for number, (tokenizer, count) in enumerate(zip((bpe, unigram), rows)):
        logits = torch.zeros(1, count)
        logits[:, tokenizer.vocab_size :] = 100.0
        logp = slots.logp(number, logits)
        assert logp.exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert torch.allclose(logp, torch.full_like(logp, -math.log(len(slots.spelled) + 1)))
        for slot, spelled in enumerate(slots.spelled):
            assert tokenizer.token_bytes[int(slots.ids[number, slot])] == spelled


def test_an_absent_slot_has_no_mass_and_id_0_is_not_it(bpe, unigram):
    found = mined_map(bpe, unigram)
    found.teacher_id[5] = -1
    slots = mined_slots([bpe, unigram], [bpe.vocab_size, unigram.vocab_size], [[bpe.eos_id], [unigram.eos_id]], [found])
    slot = int(slots.slot_of[5]) if bpe.token_bytes[5] else None
    logits = torch.zeros(1, unigram.vocab_size)
    logits[0, 0] = 50.0
    if slot is not None:
        assert slots.logp(1, logits)[0, slot] == -torch.inf
        assert slots.logp(0, torch.zeros(1, bpe.vocab_size))[0, slot] > -torch.inf


def test_the_end_of_any_member_is_the_end(bpe):
    """Each member's end ids, several for one of them, are one slot; the ensemble stops where it is drawn."""
    sides = [member(bpe, 1), member(bpe, 2)]
    extra = bpe.encode(" cat").ids.tolist()[0]
    sides[1].view.model.generation_config.eos_token_id = [bpe.eos_id, extra]
    assert sides[1].ends == [bpe.eos_id, extra]
    side = ensemble(sides, weights=[0.0, 1.0])
    logits = torch.zeros(1, bpe.vocab_size)
    logits[0, extra] = 50.0
    assert side.slots.logp(1, logits)[0].argmax() == side.slots.end
    head = sides[1].view.model.lm_head  # from here on it says nothing but its further end
    head.bias = torch.nn.Parameter(torch.zeros(bpe.vocab_size).index_fill(0, torch.tensor([extra]), 100.0))
    for weights, written in (([0.0, 1.0], True), ([0.4, 0.6], True), ([1.0, 0.0], False)):
        (text,) = ensemble(sides, weights=weights).continued(["the"], drawing(side.slots, 8))
        assert (text == "") == written
    texts = ["the cat and the cat sat"]
    assert ensemble(sides, weights=[1.0, 0.0]).bits_per_byte(texts, CONFIG).value == pytest.approx(
        bits_per_byte(sides[0].view, bpe, texts).value, abs=1e-6
    )


def test_texts_that_are_cut_differently_are_refused(bpe, unigram, documents):
    side = ensemble([member(bpe, 1), member(unigram, 2)])
    with pytest.raises(UserError, match=r"cut the text differently, so no .* write mode=byte"):
        side.bits_per_byte(documents[:2], CONFIG)


def test_a_mapped_member_reads_its_own_ids_of_the_pivots_tokens(bpe, unigram, documents):
    """With the pivot's own vocabulary as a map of equal bytes it is the shared ensemble; with another it is finite."""
    other, order = renumbered(bpe)
    one, two = member(bpe, 1), Member(ModelView(permuted(llama(bpe.vocab_size, 1), order)), other)
    mapped = ensemble([one, two], maps=[mined_map(bpe, other)])
    shared = ensemble([one, two])
    texts = documents[:3]
    found = mapped.bits_per_byte(texts, CONFIG)
    assert found.value == pytest.approx(shared.bits_per_byte(texts, CONFIG).value, abs=1e-5)
    far = ensemble([one, member(unigram, 2)], maps=[mined_map(bpe, unigram)])
    assert math.isfinite(far.bits_per_byte(texts, CONFIG).value)
    assert len(far.continued(["the cat"], drawing(far.slots, 5))[0]) > 0


def test_a_batch_writes_what_each_prompt_alone_does(bpe):
    side = ensemble([member(bpe, 1), member(bpe, 2)])
    prompts = ["the cat", "a", "ran home to see who had been eating"]
    options = {"seed": 3}
    together = side.continued(prompts, drawing(side.slots, 8, 0.0), **options)
    assert together == [side.continued([p], drawing(side.slots, 8, 0.0))[0] for p in prompts]
    hot = [side.continued(prompts, drawing(side.slots, 8, 1.0), seed=seed) for seed in (3, 3, 4)]
    assert hot[0] == hot[1] != hot[2]
    stop = together[0][1:3]
    assert side.continued(prompts[:1], drawing(side.slots, 8), stop=[stop]) == [together[0][: together[0].index(stop)]]


@pytest.mark.parametrize(
    ("weights", "said"),
    [([0.5, 0.4], "do not sum to 1"), ([1.5, -0.5], "none below 0"), ([1.0], "1 of them for 2 models")],
)
def test_weights_are_shares_of_one(weights, said):
    with pytest.raises(UserError, match=said):
        Combination("mean_prob", 2, weights)


def test_experts_that_agree_on_nothing_say_so():
    first, second = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    with pytest.raises(UserError, match="agree on no symbol"):
        Combination("mean_logp", 2)([first, second])
    assert torch.allclose(Combination("mean_prob", 2)([first, second]).exp(), torch.tensor([[0.5, 0.5]]))
