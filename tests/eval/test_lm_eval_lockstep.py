"""An ensemble through lm-evaluation-harness: one model answers what it answers alone, bytes keep the chain rule."""

import pytest
from lm_eval.api.instance import Instance

from tokenkit.config import UserError
from tokenkit.data.source import SourceConfig
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.eval.combine import Combination
from tokenkit.eval.ensemble import Ensemble, Member
from tokenkit.eval.lm_eval_lockstep import LockstepLM
from tokenkit.eval.lm_eval_model import TokenkitLM
from tokenkit.eval.lockstep import ByteLockstep, TokenLockstep
from tokenkit.eval.next_byte import ByteModel, CoverConfig
from tokenkit.eval.vocabulary_union import shared_slots
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView

PAIRS = [("the cat", " sat on"), ("the cat ", "ran"), ("", "a mat"), ("the cat", " sat on"), ("who had", " é日")]


@pytest.fixture(scope="module")
def view(model_folder):
    return ModelView(load_model(str(model_folder)))


@pytest.fixture(scope="module")
def tokens(view, bpe):
    members = [Member(view, bpe)] * 2
    slots = shared_slots([bpe, bpe], [view.vocab_rows] * 2, [member.ends for member in members])
    reading = EvalConfig(source=SourceConfig(stdlib="held_out"), context_tokens=128)
    return TokenLockstep(Ensemble(members, slots, Combination("mean_prob", 2)), reading)


@pytest.fixture(scope="module")
def of_bytes(view, bpe):
    exact = CoverConfig(beam=64, threshold=1e-9)
    return ByteLockstep([ByteModel(view.model, bpe, exact)] * 1, Combination("mean_logp", 1), 64)


def asked(kind, *arguments):
    return [Instance(kind, {}, one, 0, metadata=("a task", 0, 1)) for one in arguments]


def test_two_copies_answer_as_the_model_does(view, bpe, tokens):
    ours, alone = LockstepLM(tokens), TokenkitLM(view, bpe)
    pairs = asked("loglikelihood", *PAIRS)
    for (found, greedy), (logp, likeliest) in zip(ours.loglikelihood(pairs), alone.loglikelihood(pairs), strict=True):
        assert found == pytest.approx(logp, abs=1e-4)
        assert greedy == likeliest
    texts = asked("loglikelihood_rolling", ("the cat sat",), ("on a mat",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(alone.loglikelihood_rolling(texts), abs=1e-4)
    prompts = asked("generate_until", ("the cat", {"until": ["\n"], "max_gen_toks": 12}))
    assert ours.generate_until(prompts) == alone.generate_until(prompts)


def test_bytes_keep_the_chain_rule(of_bytes):
    lm = LockstepLM(of_bytes)
    whole, first = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("the cat sat",), ("the cat",)))
    ((second, _),) = lm.loglikelihood(asked("loglikelihood", ("the cat", " sat")))
    assert whole == pytest.approx(first + second, abs=1e-3)
    (text,) = lm.generate_until(asked("generate_until", ("the cat", {"until": ["\n"], "max_gen_toks": 2})))
    assert len(text.encode()) <= 8
    ((_, greedy),) = lm.loglikelihood(asked("loglikelihood", ("the cat", text)))
    assert greedy


def test_a_long_context_loses_its_beginning(tokens, of_bytes):
    for lockstep in (tokens, of_bytes):
        long, short = ("the cat sat on a mat " * 40, "ran"), ("sat on a mat " * 3, "ran")
        assert all(logp < 0 for logp, _ in lockstep.scores([long, short]))
    with pytest.raises(UserError, match="context_bytes: 64, and a continuation has 200"):
        of_bytes.scores([("", "a" * 200)])


def test_an_unknown_option_is_one_line(tokens):
    with pytest.raises(UserError, match="task a task: generation option num_beams"):
        LockstepLM(tokens).generate_until(asked("generate_until", ("a", {"until": [], "num_beams": 3})))
