"""Rows learnt from hidden states: the objective falls, nothing else moves, and the model is as it was."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.transfer import INITIALIZERS, snippets
from tokenkit.transfer.apply import transfer_model
from tokenkit.transfer.evidence import Evidence, Texts
from tokenkit.transfer.initialize import Choice
from tokenkit.transfer.mixture import Mixture, Origin, pieces_mixture
from tokenkit.transfer.plan import Side, TransferPlan, plan_transfer
from tokenkit.transfer.rows import TensorRows
from tokenkit.transfer.snippets import Snippet, chosen_snippets, cut
from tokenkit.transfer.token_distillation import LearntRows

OPTIONS = {"passes": 4, "snippet_characters": 40, "learning_rate": 0.3, "head": "fvt"}


@pytest.fixture(scope="module")
def pair(tokenizers: dict[str, Tokenizer]) -> tuple[Tokenizer, Tokenizer, TransferPlan]:
    source, target = tokenizers["small"], tokenizers["large"]
    return source, target, plan_transfer(source, target, source_rows=source.vocab_size)


def tiny(pair: tuple, *, tied: bool = True, **options: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=pair[0].vocab_size, tie_word_embeddings=tied, **sizes, **options)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that states depend on what was read
    return model


def learn(
    model: LlamaForCausalLM, pair: tuple, documents: list[str], side: Side = "input", **options: object
) -> LearntRows | Mixture:
    source, target, plan = pair
    matrix = model.get_input_embeddings() if side == "input" else model.get_output_embeddings()
    fn = INITIALIZERS["token_distillation"].fn
    rows = TensorRows(matrix.weight.detach())
    return fn(rows, plan, model, Texts(documents), source, target, side=side, **{**OPTIONS, **options})


def chosen(pair: tuple, documents: list[str], per_token: int = 50) -> list[Snippet]:
    source, target, plan = pair
    return chosen_snippets(
        Texts(documents), source, target, plan.free, snippet_characters=40, per_token=per_token, seed=0
    )


# snippets


@pytest.mark.parametrize("size", [1, 7, 40])
def test_pieces_of_a_text_are_all_of_it(corpus: list[str], size: int) -> None:
    for text in [*corpus, "", "  \n\n  a", "x" * 100, "word " * 30]:
        pieces = list(cut(text, size))
        assert "".join(pieces) == text
        assert all(1 <= len(piece) <= size for piece in pieces)
    pieces = list(cut("word " * 30, 12))
    assert {piece.strip() for piece in pieces} <= {"word", "word word"}  # no word is cut


def test_both_sides_have_read_the_same_bytes_at_common_ends(
    tokenizers: dict[str, Tokenizer], corpus: list[str]
) -> None:
    for source, target in ((tokenizers["marked"], tokenizers["large"]), (tokenizers["byte"], tokenizers["marked"])):
        plan = plan_transfer(source, target, source_rows=source.vocab_size)
        found = chosen_snippets(Texts(corpus), source, target, plan.free, snippet_characters=40, per_token=9, seed=1)
        assert found
        for one in found:
            assert (one.source_ids[0], one.target_ids[0]) == (source.start_id(), target.start_id())
            assert (one.source_ends[0], one.target_ends[0]) == (0, 0)
            assert (one.source_ends[-1], one.target_ends[-1]) == (len(one.source_ids) - 1, len(one.target_ids) - 1)
            for s, t in zip(one.source_ends, one.target_ends, strict=True):
                read = [
                    b"".join(tokenizer.token_bytes[i] for i in ids[1 : end + 1]).removeprefix(
                        b" " if tokenizer is tokenizers["marked"] else b""
                    )
                    for tokenizer, ids, end in ((source, one.source_ids, s), (target, one.target_ids, t))
                ]
                assert read[0] == read[1]


@pytest.mark.parametrize("per_token", [1, 3])
def test_every_snippet_is_needed_and_no_token_is_missed(
    monkeypatch: pytest.MonkeyPatch, pair: tuple, corpus: list[str], per_token: int
) -> None:
    monkeypatch.setattr(snippets, "BLOCK", 4)
    _, target, plan = pair
    every, some = chosen(pair, corpus, 10**6), chosen(pair, corpus, per_token)
    counts = [
        np.bincount(np.concatenate([np.unique(one.target_ids) for one in found]), minlength=target.vocab_size)[
            plan.free
        ]
        for found in (every, some)
    ]
    assert counts[0].any()
    assert (counts[1] >= np.minimum(counts[0], per_token)).all()
    seen = np.zeros(target.vocab_size, int)
    for one in some:
        distinct = np.unique(one.target_ids)
        assert (seen[np.intersect1d(distinct, plan.free)] < per_token).any()
        seen[distinct] += 1


# learning


def objective(model: LlamaForCausalLM, moved: LlamaForCausalLM, found: list[Snippet], layer: int = -1) -> float:
    """Squared distance of the states of one model to those of another, one snippet at a time."""
    total = 0.0
    for one in found:
        states = []
        for which, ids, ends in ((model, one.source_ids, one.source_ends), (moved, one.target_ids, one.target_ends)):
            with torch.no_grad():
                output = which(torch.from_numpy(ids)[None], output_hidden_states=True)
            states.append(output.hidden_states[layer][0][torch.from_numpy(ends)])
        total += float((states[0] - states[1]).square().sum())
    return total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layer", [-1, 1])
def test_states_come_nearer_to_those_of_the_pieces(pair: tuple, corpus: list[str], tied: bool, layer: int) -> None:
    source, target, _ = pair
    found, before = chosen(pair, corpus), tiny(pair, tied=tied)
    distance = {}
    for name, options in (("fvt", {}), ("token_distillation", {**OPTIONS, "layer": layer})):
        moved, evidence = tiny(pair, tied=tied), tiny(pair, tied=tied)
        known = Evidence(source, target, texts=Texts(corpus), model=evidence)
        report = transfer_model(moved, source, target, Choice(name, options={name: options}), evidence=known)
        distance[name] = objective(before, moved, found, layer)
        assert report.tied is tied
    assert distance["token_distillation"] < 0.7 * distance["fvt"]


def test_only_rows_of_free_tokens_in_the_texts_are_learnt(pair: tuple, corpus: list[str]) -> None:
    _, target, plan = pair
    model = tiny(pair)
    chain = pieces_mixture(TensorRows(model.get_input_embeddings().weight.detach()), plan, "input")
    for documents in (corpus, corpus[:1], []):
        one, every = learn(model, pair, documents), np.arange(len(plan))
        ids = [e.ids for text in documents for e in target.encode_batch([*cut(text, 40)])]
        wanted = np.intersect1d(np.concatenate([np.zeros(0, int), *ids]), plan.free)
        learnt = np.flatnonzero(one.origin == Origin.INITIALIZER)
        assert learnt.tolist() == wanted.tolist()
        assert len(learnt) == 0 or len(learnt) < len(plan.free) or documents == corpus
        rows, before = one(every), chain(every)
        kept = np.setdiff1d(every, learnt)
        assert torch.equal(rows[kept], before[kept])
        assert (rows[learnt] != before[learnt]).any(1).all()
        assert torch.equal(one(every[::-1].copy()), rows.flip(0))


@pytest.mark.parametrize("side", ["input", "head"])
def test_the_model_is_as_it_was(pair: tuple, corpus: list[str], side: Side) -> None:
    model = tiny(pair, tied=False, pad_token_id=3)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    padding = model.model.embed_tokens.padding_idx
    assert padding == 3

    def state() -> Iterator[object]:
        yield {name: parameter.clone() for name, parameter in model.state_dict().items()}
        yield {name: module.training for name, module in model.named_modules()}
        yield {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    before, random = list(state()), torch.get_rng_state()
    learn(model, pair, corpus, side, head="cross_entropy")
    after = list(state())
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.model.embed_tokens.padding_idx == padding
    assert torch.equal(torch.get_rng_state(), random)


def test_what_the_source_pads_with_changes_nothing(pair: tuple, corpus: list[str]) -> None:
    rows = []
    for padding in (None, 0, 7):
        model = tiny(pair)
        model.model.embed_tokens.padding_idx = padding
        rows.append(learn(model, pair, corpus).rows)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("side", ["input", "head"])
def test_the_seed_and_the_texts_decide(pair: tuple, corpus: list[str], side: Side) -> None:
    first, same, other = (
        learn(tiny(pair), pair, corpus, side, seed=seed, head="cross_entropy", batch_size=3, passes=1)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.rows, same.rows)
    assert not torch.equal(first.rows, other.rows)


def test_steps_end_where_they_are_told_to(pair: tuple, corpus: list[str]) -> None:
    few = learn(tiny(pair), pair, corpus, max_steps=1, batch_size=1)
    plan = pair[2]
    chain = pieces_mixture(TensorRows(tiny(pair).get_input_embeddings().weight.detach()), plan, "input")
    moved = (few.rows != chain(few.ids)).any(1).sum()
    first = np.random.default_rng(0).permutation(len(chosen(pair, corpus)))[0]
    assert moved == len(np.intersect1d(chosen(pair, corpus)[first].target_ids, plan.free))


# output rows


def test_output_rows_can_be_those_of_fvt(pair: tuple, corpus: list[str]) -> None:
    model = tiny(pair, tied=False)
    one = learn(model, pair, corpus, "head")
    chain = pieces_mixture(TensorRows(model.get_output_embeddings().weight.detach()), pair[2], "head")
    every = np.arange(len(chain))
    assert torch.equal(one(every), chain(every))
    assert np.array_equal(one.origin, chain.origin)


@pytest.mark.parametrize("tied", [False, True])
def test_output_rows_predict_what_follows(pair: tuple, corpus: list[str], tied: bool) -> None:
    """The likelihood of target tokens after the model's own states, one snippet at a time; tied rows are both."""
    model, plan = tiny(pair, tied=tied), pair[2]
    head = TensorRows(model.get_output_embeddings().weight.detach())
    one = learn(model, pair, corpus, "input" if tied else "head", head="cross_entropy")
    chain, every = pieces_mixture(head, plan, "head"), np.arange(len(plan))

    def nats(rows: torch.Tensor) -> float:
        total = 0.0
        for snippet in chosen(pair, corpus):
            with torch.no_grad():
                states = model.model(torch.from_numpy(snippet.source_ids)[None]).last_hidden_state[0]
            for s, t in zip(snippet.source_ends[:-1], snippet.target_ends[:-1], strict=True):
                total -= float((rows @ states[s]).log_softmax(0)[snippet.target_ids[t + 1]])
        return total

    assert nats(one(every)) < 0.95 * nats(chain(every))
    learnt = one.origin == Origin.INITIALIZER
    assert 0 < learnt.sum() <= len(plan.free)
    assert set(np.flatnonzero(learnt)) <= set(plan.free)


@pytest.mark.parametrize(
    "options, where",
    [
        ({"layer": 3}, "layer: 3, where the model has 2; write one from 1 to 2, or from -2 to -1"),
        ({"layer": 0}, "layer: 0"),
        ({"passes": 0}, "passes: 0, where a whole number from 1 is needed"),
        ({"snippet_characters": -4}, "snippet_characters: -4"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0, where a number above 0 is needed"),
    ],
)
def test_options_out_of_range_are_one_line(pair: tuple, options: dict[str, object], where: str) -> None:
    with pytest.raises(UserError, match=f"transfer.token_distillation.{where}") as error:
        learn(tiny(pair), pair, ["the cat"], **options)
    assert "\n" not in str(error.value)
