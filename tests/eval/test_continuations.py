"""Continuations: read together or alone, shared or not, the scores are those of one request at a time."""

import itertools

import pytest
import torch

from tokenkit.config import UserError
from tokenkit.eval import continuations
from tokenkit.eval.continuations import scores
from tokenkit.eval.pairs import Pairs, begins_texts, tokens_before
from tokenkit.models.factorised_view import attach_factorised
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.load import load_tokenizer

TEXTS = [
    ("the cat sat on", " a mat"),
    ("the cat sat on ", "a mat"),
    ("", "the cat"),
    (" ", "the cat"),
    ("so much to see, naïve — ", "жук 🙂 and then"),
    ("the ca", "t sat"),
    ("one\n\n", "two"),
]


@pytest.fixture(scope="module")
def view(model_folder):
    return ModelView(load_model(str(model_folder)).eval())


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@torch.no_grad()
def one_by_one(view, ids, labels):
    """The obvious way."""
    logp = view.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)[-len(labels) :]
    chosen = logp.gather(1, torch.tensor([labels]).T).sum().item()
    return chosen, logp.argmax(-1).tolist() == list(labels)


def draw_requests(view, count):
    """Contexts of many lengths; some with several continuations, equal rows, and the model's own likeliest ids."""
    generator = torch.Generator().manual_seed(count)

    def ids(length):
        return torch.randint(0, view.vocab_rows, (length,), generator=generator).tolist()

    found = []
    for number in range(count):
        context = ids(1 + number * 7 % 60)
        for length in (1, 1, 2, 5)[: 1 + number % 4]:
            continuation = ids(length)
            found.append((context + continuation[:-1], continuation))
        likeliest = view.model(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
        found.append((context, [likeliest]))
    return found


@pytest.mark.parametrize(("share", "batch_tokens"), [*itertools.product([True, False], [1, 100, 4096])])
def test_scores_are_those_of_one_request_at_a_time(view, share, batch_tokens):
    requests = draw_requests(view, 14)
    found = scores(view, requests, batch_tokens=batch_tokens, share=share)
    for (ids, labels), (logp, greedy) in zip(requests, found, strict=True):
        expected, likeliest = one_by_one(view, ids, labels)
        assert logp == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest
    assert sum(greedy for _, greedy in found) >= 14


def test_logits_in_parts_are_the_same_scores(view, monkeypatch):
    requests = draw_requests(view, 9)
    whole = scores(view, requests)
    monkeypatch.setattr(continuations, "ENTRIES", view.vocab_rows * 3)
    parts = scores(view, requests)
    assert [logp for logp, _ in parts] == pytest.approx([logp for logp, _ in whole], abs=1e-4)
    assert [greedy for _, greedy in parts] == [greedy for _, greedy in whole]
    assert scores(view, [([1, 2], [])]) == [(0.0, True)]


def test_open_codes_are_scored_by_their_parts(open_folder, model_folder):
    tokenizer = load_tokenizer(str(open_folder))
    model = load_model(str(model_folder)).eval()
    with torch.no_grad():
        model.resize_token_embeddings(tokenizer.codec.layout.open_base, mean_resizing=False)
        view = attach_factorised(model, tokenizer)
        pairs = Pairs(tokenizer, 64).encode([("the cat ", "sat on a mat"), ("", "see how")])
        for (context, continuation), (logp, greedy) in zip(pairs, scores(view, [(c + t[:-1], t) for c, t in pairs])):
            ids = torch.tensor([context + continuation])
            listed = view.leaves({"logits"}, ids[:, :-1], ids[:, 1:])["logits"][0, -len(continuation) :].double()
            assert logp == pytest.approx(listed.gather(1, ids[:, -len(continuation) :].T).sum().item(), abs=1e-3)
            assert not greedy


@pytest.mark.parametrize("kind", ["bpe", "byte", "compact", "open"])
def test_a_pair_is_one_text_cut_at_a_byte(kind, tokenizer, compact_folder, open_folder):
    folders = {"compact": compact_folder, "open": open_folder}
    known = tokenizer if kind == "bpe" else load_tokenizer(str(folders.get(kind, kind)))
    pairs = Pairs(known, 64)
    for (context, continuation), (left, right) in zip(TEXTS, pairs.encode(TEXTS), strict=True):
        assert left[0] == known.start_id()
        assert left[1:] + right == known.encode(context + continuation).ids.tolist()
        kept = context.rstrip().encode()
        spelled = known.decode(left[1:]).encode()
        assert kept.startswith(spelled)  # what crosses the border is of the continuation
        if kind == "byte":
            assert spelled == kept
    bare = Pairs(known, 64, begin=False).encode(TEXTS)
    assert [pair[1] for pair in bare] == [pair[1] for pair in pairs.encode(TEXTS)]
    assert all(left for left, _ in bare)  # without a context the start token is given


def test_a_run_of_codes_is_not_cut(open_folder):
    tokenizer = load_tokenizer(str(open_folder))
    encoding = tokenizer.encode("the cat qzx vwx")
    assert (encoding.ends == encoding.starts).any(), "no run of codes in the text"
    for border in range(16):
        cut = tokens_before(encoding, border)
        assert cut == 0 or encoding.ends[cut - 1] > encoding.starts[cut - 1]


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused(tokenizer):
    pairs = Pairs(tokenizer, 4)
    ids, labels = pairs.cut(([1, 2, 3, 4, 5], [6, 7]), "task x")
    assert (ids, labels) == ([3, 4, 5, 6], [6, 7])
    assert pairs.cut(([1], [2, 3, 4, 5]), "task x") == ([1, 2, 3, 4], [2, 3, 4, 5])
    with pytest.raises(UserError, match=r"task x: a continuation of 5 tokens, but the model reads 4"):
        pairs.cut(([1], [2, 3, 4, 5, 6]), "task x")


@pytest.mark.parametrize("positions", [3, 8, 100])
def test_windows_score_every_token_once_with_what_the_model_can_read(tokenizer, positions):
    pairs = Pairs(tokenizer, positions)
    text = "the cat sat on a mat and then ran home"
    ids = tokenizer.encode(text).ids.tolist()
    windows = pairs.windows(text)
    assert [label for _, labels in windows for label in labels] == ids
    for number, window in enumerate(windows):
        read, _ = pairs.cut(window, "x")
        assert len(read) == (positions if number else min(positions, len(ids)))
    assert pairs.windows("") == []


def test_what_the_files_say_of_the_start_token(tokenizer, shared):
    llama = load_tokenizer(str(shared / "data/tokenizers/llama3"))
    gpt2 = load_tokenizer(str(shared / "data/tokenizers/gpt2"))
    stories = load_tokenizer(str(shared / "data/weights/stories260K"))
    assert (begins_texts(stories), begins_texts(gpt2), begins_texts(load_tokenizer("byte"))) == (True, False, True)
    assert begins_texts(llama) in (True, False)
