"""`tokenkit tokenizer migrate`: each word of an old list is one id, and its row in a model is kept."""

import json

import pytest
import torch

from tests.models.test_latents import tiny_llama
from tokenkit.config import UserError, build
from tokenkit.models.load import head_matrix, input_matrix, load_model
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.word import WordTokenizer
from tokenkit.verbs.tokenizer.migrate import TokenizerMigrateRun, migrate

EXTRA = ["2024", "incomprehensibilities", "naïve"]  # cut by the chunker; too long; not ASCII


@pytest.fixture
def words(tmp_path, documents):
    trained = WordTokenizer.train(documents)
    found = WordTokenizer(trained.config, [*trained.words, *EXTRA], trained.total_tokens)
    found.save(tmp_path / "words")
    return found


def run_of(tmp_path, corpus, compact_folder, **changes):
    whole = {
        "vocabulary": tmp_path / "words",
        "source": {"path": str(corpus), "separator": "\n\n"},
        "auto_encoder": compact_folder,
        "output": tmp_path / "new",
        "pins": 100,
    }
    return build(TokenizerMigrateRun, {**whole, **changes})


def test_every_word_is_one_id(tmp_path, corpus, compact_folder, words):
    report = migrate(run_of(tmp_path, corpus, compact_folder))
    tokenizer = load_tokenizer(str(tmp_path / "new" / "tokenizer"))
    lines = (tmp_path / "new" / "mapping.tsv").read_text("utf-8").splitlines()
    table = [line.split("\t") for line in lines]
    assert table[0] == ["old_id", "word", "bare_id", "spaced_id"]
    assert [row[0] for row in table[1:]] == [str(index) for index in range(words.vocab_size)]
    assert table[4] == ["3", "<eos>", "3", ""]
    for _, word, bare, spaced in table[7:]:
        for form, index in ((word, bare), (f" {word}", spaced)):
            ids = tokenizer.encode(form).ids.tolist()
            assert ids == [int(index)] if index else len(ids) > 1
    assert [bool(row[2]) for row in table if row[1] in EXTRA] == [False, False, True]
    assert report == json.loads((tmp_path / "new" / "migration.json").read_text("utf-8"))
    assert report["words"] == {"all": len(words.words), "as_one_id": len(words.words) - 2, **report["words"]}
    assert report["learned"]["round_trip"] == 1.0
    assert report["word"]["round_trip"] < 1.0
    assert report["learned"]["bytes_per_id"] > 3
    assert tokenizer.network().config.max_bytes == 8


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_words_are_copied_and_the_rest_made(tmp_path, corpus, compact_folder, words, tied):
    old = tiny_llama(words.vocab_size, tied=tied)
    with torch.no_grad():
        input_matrix(old).normal_(std=0.3)
    old.save_pretrained(tmp_path / "old")
    run = run_of(tmp_path, corpus, compact_folder, model=tmp_path / "old", accept_loss=True)
    report = migrate(run)["model"]
    model, tokenizer = load_model(str(tmp_path / "new/model")), load_tokenizer(str(tmp_path / "new/model"))
    assert len(input_matrix(model)) == tokenizer.vocab_size
    copied = {3: 3}
    for number, word in enumerate(words.words):
        for form in (word, f" {word}"):
            ids = tokenizer.encode(form).ids.tolist()
            copied |= {ids[0]: 6 + number} if len(ids) == 1 else {}
    for matrix in (input_matrix, head_matrix):
        for new, before in copied.items():
            assert torch.equal(matrix(model)[new], matrix(old)[before])
    assert report["copied"] == len(copied) + 5
    assert report["made"]["std"] == pytest.approx(0.3, rel=0.1)
    rest = [i for i in range(64, tokenizer.vocab_size) if i not in copied]
    assert input_matrix(model)[rest].std().item() == pytest.approx(0.3, rel=0.15)


def test_what_is_lost_is_said_before_a_model_is_converted(tmp_path, corpus, compact_folder, words):
    tiny_llama(words.vocab_size).save_pretrained(tmp_path / "old")
    with pytest.raises(UserError, match=r"lower-cases text, drops spaces.*accept_loss=true"):
        migrate(run_of(tmp_path, corpus, compact_folder, model=tmp_path / "old"))
    with pytest.raises(UserError, match="give auto_encoder"):
        migrate(run_of(tmp_path, corpus, compact_folder, model=tmp_path / "old", auto_encoder=None))
    tiny_llama(7).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="not its model"):
        migrate(run_of(tmp_path, corpus, compact_folder, model=tmp_path / "small", accept_loss=True))
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("new.tmp*"))


def test_nothing_is_overwritten_and_few_pins_are_refused(tmp_path, corpus, compact_folder, words):
    with pytest.raises(UserError, match="are to be kept"):
        migrate(run_of(tmp_path, corpus, compact_folder, pins=10))
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="exists already"):
        migrate(run_of(tmp_path, corpus, compact_folder))
