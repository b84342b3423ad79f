"""Training is deterministic, byte-exact and worth its size."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tokenkit.config import UserError
from tokenkit.tokenizers.train import train_tokenizer

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "for",
    "was",
    "with",
    "not",
    "his",
    "are",
    "this",
    "have",
    "from",
    "or",
]
WORDS += [first + second for first in WORDS for second in WORDS[:5]]
CORPUS = [" ".join(WORDS[(i * i * k + i // 3) % len(WORDS)] for i in range(60)) for k in range(1, 25)]
TRAIN = """
from tokenkit.tokenizers.train import train_tokenizer
import sys, json
print(train_tokenizer(json.loads(sys.argv[1]), "unigram", 360).fingerprint)
"""


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_two_trainings_are_equal(kind):
    first, second = (train_tokenizer(iter(CORPUS), kind, 360) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 360


def test_unigram_does_not_depend_on_the_process_or_the_order_of_texts():
    prints = {train_tokenizer(CORPUS[::-1], "unigram", 360).fingerprint}
    for seed in ("1", "2"):
        command = [sys.executable, "-c", TRAIN, json.dumps(CORPUS)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed})
        prints.add(done.stdout.strip())
    assert len(prints) == 1


def test_unigram_is_no_longer_than_the_librarys_trainer():
    ours = train_tokenizer(CORPUS, "unigram", 360)
    fixed = 259
    theirs = Tokenizer(models.Unigram())
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    theirs.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=360 - fixed, show_progress=False))
    count_ours = sum(len(encoding) for encoding in ours.encode_batch(CORPUS))
    assert count_ours <= 1.02 * sum(len(one.ids) for one in theirs.encode_batch(CORPUS))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_roles(kind):
    default = train_tokenizer(CORPUS, kind, 360)
    assert default.bos_id == default.eos_id != default.pad_id
    own = train_tokenizer(CORPUS, kind, 360, {"eos": "<end>"})
    assert own.bos_id is None
    assert own.pad_id is None
    assert own.special_tokens["<end>"] == own.eos_id == own.start_id()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_text_still_spells_every_byte(kind):
    tokenizer = train_tokenizer([], kind, 500)
    text = "été 😀\0"
    assert tokenizer.decode(tokenizer.encode(text).ids.tolist()) == text


def test_mistakes():
    with pytest.raises(UserError, match="vocab_size 100: too small"):
        train_tokenizer(CORPUS, "bpe", 100)
    with pytest.raises(UserError, match="vocab_size 260: too small"):
        train_tokenizer(CORPUS, "unigram", 260)
