"""Likelihoods by parts are those of one distribution over all ids."""

import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.models.test_latents import tiny_llama
from tokenkit.config import UserError
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.export.expanded import export_model
from tokenkit.models.factorised import Factorised, OpenShape
from tokenkit.models.factorised_view import attach_factorised, factorised_of, view_of, without_factorised
from tokenkit.models.generate import generate
from tokenkit.models.set_tokenizer import logits_of, set_tokenizer
from tokenkit.scores import LogitForm
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.apply import transfer_model
from tokenkit.verbs.model import ModelChoice, load_pair

SHAPE = OpenShape(first_regular_id=4, num_pins=3, levels=(3, 2), digit_order="msf", min_groups=2, groups=3)
SIZE = SHAPE.layout.vocab_size
FORMS = {"plain": LogitForm(), "bias and cap": LogitForm(torch.linspace(-1, 1, 263).double(), 0.5, 2.0)}


def made(shape: OpenShape = SHAPE, width: int = 8) -> tuple[Factorised, torch.Tensor]:
    torch.manual_seed(0)
    factorised = Factorised(shape, width, std=0.5, seed=3).double()
    with torch.no_grad():
        for parameter in factorised.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return factorised, torch.randn(shape.layout.open_base, width, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_sum_over_all_ids_is_one_and_labels_are_its_entries(form):
    factorised, head = made()
    hidden = torch.randn(2, 3, 8, dtype=torch.float64)
    every = factorised.listed(hidden, head, form)
    assert every.shape == (2, 3, SIZE)
    torch.testing.assert_close(every.logsumexp(-1), torch.zeros(2, 3, dtype=torch.float64))
    for start in range(0, SIZE, 6):
        labels = torch.arange(start, start + 6).clamp_max(SIZE - 1).view(2, 3)
        own = factorised.label_logp(hidden, head, labels, form)
        torch.testing.assert_close(own, every.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    assert (factorised.label_logp(hidden, head, torch.full((2, 3), -1), form) == 0).all()


def test_without_pins_the_sum_is_one_too():
    factorised, head = made(SHAPE.model_copy(update={"num_pins": 0}))
    every = factorised.listed(torch.randn(1, 8, dtype=torch.float64), head)
    torch.testing.assert_close(every.logsumexp(-1), torch.zeros(1, dtype=torch.float64))
    assert factorised.sample(torch.randn(50, 8, dtype=torch.float64), head, temperature=0.0).max() < SIZE


def test_the_definition_digit_by_digit():
    """p(type | h) p(first digit | h, type) p(second | h, type, first), with the layers written out."""
    factorised, head = made()
    h = torch.randn(8, dtype=torch.float64)
    last, digits = 1, (2, 1)
    label = SHAPE.layout.open_base + 6 + 2 * 2 + 1
    logp = factorised.types(h).log_softmax(-1)[4]
    context = h + factorised.told[last]
    for digit, begin, level in zip(digits, (0, 3), (3, 2)):
        logits = factorised.leave(torch.nn.functional.gelu(factorised.enter(context)))[begin : begin + level]
        logp = logp + logits.log_softmax(-1)[digit]
        context = context + factorised.told[2 + begin + digit]
    torch.testing.assert_close(factorised.label_logp(h[None], head, torch.tensor([label]))[0], logp)


def test_inputs_of_codes_are_sums_of_small_tables():
    factorised, head = made()
    embedding = torch.nn.Embedding.from_pretrained(head)
    base = SHAPE.layout.open_base
    ids = torch.tensor([[0, 100, base, base + 6 + 5]])
    found = factorised.embed(embedding, ids)
    assert torch.equal(found[0, :2], head[[0, 100]])
    torch.testing.assert_close(found[0, 2], factorised.inputs[[0, 2, 5]].sum(0))
    torch.testing.assert_close(found[0, 3], factorised.inputs[[1, 4, 6]].sum(0))


def test_gradients_reach_every_table():
    factorised, head = made()
    head.requires_grad_()
    base = SHAPE.layout.open_base
    embedding = torch.nn.Embedding.from_pretrained(head, freeze=False)
    labels = torch.tensor([[1, 10, 261, base, base + 3, base + 11]])
    hidden = factorised.embed(embedding, labels.roll(1))
    (-factorised.label_logp(hidden, head, labels).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factorised.parameters())
    assert head.grad is not None
    assert embedding.weight.grad.abs().sum() > 0
    check = lambda h: factorised.label_logp(h, head, labels[0])  # noqa: E731
    assert torch.autograd.gradcheck(check, hidden[0].detach().requires_grad_())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0)])
def test_sampled_ids_are_as_frequent_as_they_are_likely(temperature, top_p):
    factorised, head = made()
    hidden, number = torch.randn(8, dtype=torch.float64), 40_000
    torch.manual_seed(1)
    ids = factorised.sample(hidden.expand(number, -1), head, temperature=temperature, top_p=top_p)
    found = torch.bincount(ids, minlength=SIZE).double() / number
    if temperature == 1:
        chances = factorised.listed(hidden[None], head)[0].exp()
        assert (found - chances).abs().max() < 5 * math.sqrt(0.25 / number)
        assert 0.5 * (found - chances).abs().sum() < 0.05
    kinds = (factorised._type_logp(hidden[None])[0] / temperature).softmax(-1)
    own = torch.bincount(factorised.type_of(ids), minlength=5).double() / number
    assert (own - kinds).abs().max() < 5 * math.sqrt(0.25 / number)


def test_the_likeliest_is_the_best_of_every_kind():
    factorised, head = made()
    hidden = torch.randn(64, 8, dtype=torch.float64)
    chosen = factorised.sample(hidden, head, temperature=0.0)
    every = factorised.listed(hidden, head)
    best = every[:, : SHAPE.layout.open_base].argmax(1)
    ordinary = chosen < SHAPE.layout.open_base
    assert torch.equal(chosen[ordinary], best[ordinary])
    own, fixed = (every.gather(1, ids[:, None])[:, 0] for ids in (chosen, best))
    assert (own >= fixed - 1e-9).all()
    factorised.types.bias.data[4] += 50  # the last code of a chunk, surely
    assert (factorised.type_of(factorised.sample(hidden, head, temperature=0.0)) == 4).all()


def test_valid_runs_have_the_length_of_a_spelling():
    factorised, head = made()
    factorised.types.bias.data[3] += 2
    hidden = torch.randn(500, 8, dtype=torch.float64)
    run, lengths = torch.zeros(500, dtype=torch.long), []
    for _ in range(12):
        kind = factorised.type_of(factorised.sample(hidden, head, run=run))
        assert not ((run > 0) & (kind < 3)).any()
        lengths += (run[kind == 4] + 1).tolist()
        run = torch.where(kind == 3, run + 1, 0)
        assert run.max() < SHAPE.groups
    assert set(lengths) == {2, 3}


def test_saved_and_loaded(tmp_path):
    factorised, head = made()
    factorised.save(tmp_path / "x.safetensors")
    again = Factorised.load(tmp_path / "x.safetensors")
    hidden = torch.randn(4, 8, dtype=torch.float64)
    assert again.shape == SHAPE
    assert torch.equal(again.listed(hidden, head), factorised.listed(hidden, head))
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no factorised tables"):
        Factorised.load(tmp_path / "y.safetensors")


def test_a_large_grid_is_not_listed():
    shape = SHAPE.model_copy(update={"levels": (8, 8, 8, 8, 8, 5, 5, 5)})
    factorised, head = made(shape)
    hidden = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(UserError, match="too many"):
        factorised.listed(hidden, head)
    labels = torch.tensor([0, shape.layout.open_base, shape.layout.vocab_size - 1])
    assert factorised.label_logp(hidden, head, labels).isfinite().all()
    assert sum(p.numel() for p in factorised.parameters()) < 8 * (2 * 57 + 5 + 8 + 55) + 8 + 55 + 5 + 1


@pytest.fixture(scope="module")
def tokenizer(open_folder):
    return load_tokenizer(str(open_folder))


@pytest.fixture
def view(tokenizer):
    return set_tokenizer(tiny_llama(300), tokenizer)


def test_bits_per_byte_is_the_sum_over_the_listed_vocabulary(view, tokenizer, documents):
    found = bits_per_byte(view, tokenizer, documents[:3], context_tokens=256)
    nats = 0.0
    for document in documents[:3]:
        ids = torch.tensor([[2, *tokenizer.encode(document).ids.tolist()]])
        assert (ids >= tokenizer.codec.layout.open_base).any()
        logp = logits_of(view, ids).log_softmax(-1)[0, :-1]
        nats -= float(logp.gather(1, ids[0, 1:, None]).double().sum())
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_logits_have_the_shape_of_the_vocabulary(view, tokenizer, compact_folder):
    ids = torch.tensor([[2, *tokenizer.encode("the cat жук").ids.tolist()]])
    assert logits_of(view, ids).shape == (1, ids.shape[1], tokenizer.vocab_size)
    compact = load_tokenizer(str(compact_folder))
    ids = torch.tensor([[2, *compact.encode("the cat").ids.tolist()]])
    model = tiny_llama(300, tied=False)
    plain = set_tokenizer(model, compact)
    assert model(ids).logits.shape == (1, ids.shape[1], compact.vocab_size)
    assert torch.equal(logits_of(plain, ids), model(ids).logits)


def test_whatever_is_sampled_decodes(view, tokenizer):
    """Encode, model, sample, decode: never an error, for any temperature and for ids that no model would say."""
    prompts = ["the cat", "жук \udc80", ""]
    rows = [[2, *tokenizer.codec.encode(prompt)] for prompt in prompts]
    for seed, temperature in enumerate((0.0, 1.0, 5.0)):
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": seed}
        texts = generate(view.model, tokenizer, rows, **options)
        assert len(texts) == 3
        assert texts == generate(view.model, tokenizer, rows, **options)
    torch.manual_seed(0)
    for row in view.continued(rows, max_new_tokens=60, temperature=2.0, valid=False):
        assert isinstance(tokenizer.codec.decode(row), str)
    for row in torch.randint(0, tokenizer.vocab_size, (200, 12)).tolist():
        assert isinstance(tokenizer.decode(row), str)


def test_a_batch_continues_as_each_row_alone(view, tokenizer):
    rows = [[2, *tokenizer.encode(text).ids.tolist()] for text in ("the cat sat on", "who", "green fish and then ran")]
    together = view.continued(rows, max_new_tokens=12)
    assert together == [view.continued([row], max_new_tokens=12)[0] for row in rows]


def test_the_cached_continuation_is_that_of_reading_everything_again(view, tokenizer):
    row = [2, *tokenizer.encode("the cat sat").ids.tolist()]
    found = view.continued([row], max_new_tokens=10, valid=False)[0]
    for new in found:
        last = view.hidden(torch.tensor([row]))[:, -1]
        assert view.factorised.sample(last, view.head(), view.form(), temperature=0.0).item() == new
        row = [*row, new]


def test_a_folder_is_written_verified_and_read_again(view, tokenizer, tmp_path, documents):
    folder = export_model(view.model, tokenizer, tmp_path / "model", dtype=torch.float32)
    with pytest.raises(UserError, match="eval and generate alone"):
        load_pair(ModelChoice(source=str(folder)), "cpu")
    model, again = load_pair(ModelChoice(source=str(folder)), "cpu", codes=True)
    assert again.fingerprint == tokenizer.fingerprint
    expected = bits_per_byte(view, tokenizer, documents[:2])
    assert bits_per_byte(view_of(model), again, documents[:2]).nats == pytest.approx(expected.nats, rel=1e-6)
    assert factorised_of(model) is not None
    assert "factorised.inputs" in model.state_dict()
    with without_factorised(model):
        assert factorised_of(model) is None
        assert "factorised.inputs" not in model.state_dict()


def test_a_model_that_scales_its_embeddings_scales_the_sums_alike(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=340, head_dim=16, num_key_value_heads=1, pad_token_id=0, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    view = set_tokenizer(model, tokenizer)
    embedding, layout = model.get_input_embeddings(), tokenizer.codec.layout
    codes = view.factorised.embed(embedding, torch.arange(layout.open_base, layout.vocab_size)[None])
    plain = embedding(torch.arange(layout.open_base))
    assert codes.detach().std().item() == pytest.approx(plain.detach().std().item(), rel=0.3)


def test_what_does_not_fit_is_one_line(tokenizer, bpe):
    with pytest.raises(UserError, match="not a learned tokenizer"):
        set_tokenizer(tiny_llama(300), bpe)
    with pytest.raises(UserError, match="resize the model first"):
        attach_factorised(tiny_llama(100), tokenizer)
    view = set_tokenizer(tiny_llama(300), tokenizer)
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(UserError, match="compact form"):
        view.leaves({"boundary_logp"}, ids, ids)


def test_a_transfer_is_to_the_compact_form(tokenizer, compact_folder, bpe):
    model = tiny_llama(bpe.vocab_size)
    with pytest.raises(UserError, match="take the compact form"):
        transfer_model(model, bpe, tokenizer)
    compact = load_tokenizer(str(compact_folder))
    assert transfer_model(model, bpe, compact).rows == compact.vocab_size
