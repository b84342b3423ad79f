import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tokenkit.align import pair_bias
from tokenkit.align.bias import load_bias
from tokenkit.align.counts import count_tokens
from tokenkit.config import UserError, build
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.verbs import tokenizer_info as verb
from tokenkit.verbs.tokenizer_info import TokenizerInfoRun, tokenizer_info

RESULTS = ("info.json", "counts.safetensors", "bias.safetensors", "bias1_matrix.npz", "bias2_matrix.npz")


@pytest.fixture
def values(bpe, unigram, corpus, tmp_path, monkeypatch):
    bpe.save(tmp_path / "teacher")
    unigram.save(tmp_path / "student")
    monkeypatch.setattr(verb, "CHARACTERS_PER_PART", 3000)
    return {
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "source": {"path": str(corpus), "separator": "\n\n"},
        "npz": True,
        "workers": 1,
    }


def done(values, output, *, resume=False, **changes):
    return tokenizer_info(build(TokenizerInfoRun, {**values, "output": output, **changes}), resume=resume, quiet=True)


def results(folder):
    return [(folder / name).read_bytes() for name in RESULTS]


def test_what_it_says(values, tmp_path, bpe, unigram, corpus):
    info = done(values, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "info.json").read_text("utf-8")) == info
    documents = read_documents(SourceConfig(path=str(corpus), separator="\n\n"))
    counts = load_file(tmp_path / "out" / "counts.safetensors")
    num_bytes = sum(len(text.encode()) for text in documents)
    shared = {spelled for spelled in bpe.token_bytes if spelled} & {s for s in unigram.token_bytes if s}
    for side, tokenizer in (("teacher", bpe), ("student", unigram)):
        wanted = count_tokens(tokenizer, documents)
        assert np.array_equal(counts[side], wanted)
        assert info[side]["tokens"] == wanted.sum()
        assert info[side]["tokens_per_byte"] == wanted.sum() / num_bytes
        inside = sum(int(n) for n, spelled in zip(wanted, tokenizer.token_bytes) if spelled in shared)
        assert info[side]["shared_of_tokens"] == inside / wanted.sum()
        assert info[side]["shared_of_vocabulary"] == len(shared) / len({s for s in tokenizer.token_bytes if s})
        assert info[side]["fingerprint"] == tokenizer.fingerprint
    assert info["corpus"]["bytes"] == num_bytes
    assert info["corpus"]["documents"] == len(documents)
    bias = load_bias(tmp_path / "out", bpe, unigram)
    assert info["pairs"]["listed"] == len(bias)
    assert bias.shape == (bpe.vocab_size, unigram.vocab_size)
    keys = bias.teacher_ids.astype(np.int64) * bias.shape[1] + bias.student_ids
    assert (np.diff(keys) > 0).all()
    assert ((bias.bias1 >= 0) & (bias.bias1 <= 1)).all()
    space = [tokenizer.token_bytes.index(b" ") for tokenizer in (bpe, unigram)]
    assert [found.item() for found in bias.at(*(np.array([index]) for index in space))] == [1, 1]


def test_continued_on_two_cores_to_the_same_bytes(values, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_bias, "PAIRS_PER_BLOCK", 100)
    done(values, tmp_path / "whole")
    done(values, tmp_path / "killed")
    kept = sorted((tmp_path / "killed" / "parts").iterdir())
    assert {path.name.split("-")[0] for path in kept} == {"counts", "bias"}
    assert len(kept) > 6
    for path in kept[::2]:
        path.unlink()
    kept[1].write_bytes(b"cut")
    for name in RESULTS:
        (tmp_path / "killed" / name).unlink()
    with pytest.raises(UserError, match="--resume"):
        done(values, tmp_path / "killed")
    done(values, tmp_path / "killed", resume=True, workers=2)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert [p.read_bytes() for p in kept] == [(tmp_path / "whole" / "parts" / p.name).read_bytes() for p in kept]


def test_the_folder_of_another_pair_is_refused_and_left_alone(values, tmp_path, unigram):
    out = tmp_path / "out"
    done(values, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="student"):
        done(values, out, resume=True, student=values["teacher"])
    unigram.save(tmp_path / "teacher")  # another tokenizer under the same name
    with pytest.raises(UserError, match="another teacher"):
        done(values, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_another_text_under_the_same_name_is_refused(values, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat", "utf-8")
    done(values, tmp_path / "out", source={"path": str(text)})
    text.write_text("the cat sat on the hat", "utf-8")
    with pytest.raises(UserError, match="another corpus"):
        done(values, tmp_path / "out", source={"path": str(text)}, resume=True)


def test_refused_before_anything_is_written(values, tmp_path):
    definition = json.loads((tmp_path / "student" / "tokenizer.json").read_text("utf-8"))
    definition["model"] = {
        "type": "BPE",
        "vocab": {piece: index for index, (piece, _) in enumerate(definition["model"]["vocab"])},
        "merges": [],
        "continuing_subword_prefix": "##",
        "byte_fallback": True,
    }
    (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    with pytest.raises(UserError, match="continuing_subword_prefix"):
        done(values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"workers": 0}, "workers"), ({"smoothing": 0}, "smoothing"), ({"smooth": 1}, "did you mean 'smoothing'")],
)
def test_mistakes_are_one_line(values, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        done(values, tmp_path / "out", **changes)
