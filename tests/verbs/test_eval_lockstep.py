"""`tokenkit eval-lockstep`: the three modes from a command line, and one line for what is wrong."""

import json

import pytest
import yaml

from tokenkit.config import load
from tokenkit.eval.bits_per_byte import bits_per_byte
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.transfer.apply import transfer_model
from tokenkit.verbs.eval_lockstep import EvalLockstepRun


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, model_folder, bpe, unigram):
    """The tiny model with a Unigram vocabulary."""
    folder = tmp_path_factory.mktemp("lockstep") / "unigram"
    model = load_model(str(model_folder))
    transfer_model(model, bpe, unigram)
    model.save_pretrained(folder)
    unigram.save(folder)
    return folder


@pytest.fixture
def words(model_folder, other_folder, corpus):
    """A run of two models on a little text."""
    return [
        f"models=[{{source: {model_folder}}}, {{source: {other_folder}}}]",
        f"source.path={corpus}",
        "source.max_bytes=150",
        "context_tokens=128",
        "context_bytes=64",
    ]


def values_of(out):
    return yaml.safe_load(out[out.index("mode:") :])


def test_one_tokenizer_and_itself(tokenkit, model_folder, bpe, corpus, tmp_path):
    same = [f"models=[{{source: {model_folder}}}, {{source: {model_folder}}}]", f"source.path={corpus}"]
    short = ["source.max_bytes=600", "context_tokens=128"]
    code, out, _ = tokenkit("eval-lockstep", *same, *short, "prompts=[the cat]", f"output={tmp_path / 'found.json'}")
    assert code == 0
    assert "all, mean_prob, tokens" in out
    found = values_of(out)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["bits_per_byte"] == pytest.approx(found["members"][0]["bits_per_byte"], abs=1e-6)
    text = corpus.read_text("utf-8")[:600]
    alone = bits_per_byte(ModelView(load_model(str(model_folder))), bpe, [text], context_tokens=128)
    assert found["members"][0]["bits_per_byte"] == pytest.approx(alone.value, rel=1e-9)
    code, out, _ = tokenkit("generate", f"model.source={model_folder}", "prompts=[the cat]")
    assert "the cat" + found["continuations"][0] in out


def test_bytes_of_two_tokenizers(tokenkit, words):
    code, out, _ = tokenkit(
        "eval-lockstep", "mode=byte", *words, "prompts=[the c]", "max_new_tokens=4", "weights=[1,0]"
    )
    assert code == 0
    found = values_of(out)
    assert found["bits_per_byte"] == pytest.approx(found["members"][0]["bits_per_byte"], abs=1e-9)
    assert found["bytes"] == 150
    assert len(found["continuations"]) == 1


def test_a_token_map(tokenkit, words, model_folder, other_folder, tmp_path):
    tokenkit("mined-mapping", f"teacher={other_folder}", f"student={model_folder}", f"output={tmp_path}")
    mined = ["mode=mined", f"mappings=[{tmp_path}]", "prompts=[the cat]"]
    code, out, _ = tokenkit("eval-lockstep", *mined, *words, "prompt_mode=direct_encode_no_force_eos")
    assert code == 0
    assert "all, mean_prob, mined" in out
    code, _, err = tokenkit("eval-lockstep", *mined, words[0].replace(str(model_folder), "X", 1), *words[1:])
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["weights=[0.5,0.6]"], "do not sum to 1"),
        (["mode=mined"], "0 folders, where mode=mined of 2 models takes 1"),
        (["source=null"], "nothing to do; write a source to score or prompts to continue"),
        (["mode=bytes"], "mode"),
        (["source.max_bytes=3000"], "cut the text differently, so no sequence of tokens is both's; write mode=byte"),
        (["mode=byte", "context_bytes=4096", "source.max_bytes=3000"], "has positions for 256; write 256 or less"),
    ],
)
def test_mistakes_are_one_line(tokenkit, words, change, said):
    code, out, err = tokenkit("eval-lockstep", *words, *change)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_run_of_one_model(model_folder):
    run = load(EvalLockstepRun, [f"models=[{{source: {model_folder}}}]", "prompts=[a]"])
    assert (run.covers.beam, run.covers.canonical) == (8, False)
