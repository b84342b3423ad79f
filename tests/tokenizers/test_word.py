"""The old word tokenizer: what it splits, what it loses, and the file that its vocabulary is in."""

import pickle
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError, build
from tokenkit.tokenizers.word import WordTokenizer, read_vocabulary, write_vocabulary
from tokenkit.tokenizers.word_config import WordConfig

CORPUS = ["The cat sat, and the cat ran.", "A dog - the dog! - sat.", "été été Été"]
fuzz = settings(max_examples=100, deadline=None, derandomize=True)


def word_config(**values):
    return build(WordConfig, {"min_frequency": 1, **values})


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer.train(CORPUS, word_config())


def slowly_split(text):
    """Words and signs of a text, letter by letter."""
    words, word = [], ""
    for letter in text.lower():
        if letter.isspace() or letter in string.punctuation:
            words += [word] * bool(word) + [letter] * (letter in string.punctuation)
            word = ""
        else:
            word += letter
    return words + [word] * bool(word)


@fuzz
@given(st.text(st.sampled_from("aB,. \n\té中'-_\0") | st.characters(exclude_categories=["Cs"]), max_size=30))
def test_it_splits_as_letter_by_letter(text):
    words = slowly_split(text)
    tokenizer = WordTokenizer(word_config(), sorted(set(words)))
    ids = tokenizer.encode(text, False)
    assert [tokenizer.words[index - 6] for index in ids] == words
    assert tokenizer.encode(text) == [2, *ids, 3]


def test_ids_and_text(tokenizer):
    ids = tokenizer.encode("The CAT, sat?% unheard-of")
    the, cat, comma, sat, dash = (6 + tokenizer.words.index(word) for word in ("the", "cat", ",", "sat", "-"))
    assert ids == [2, the, cat, comma, sat, 1, 1, 1, dash, 1, 3]
    assert tokenizer.decode(ids) == "the cat, sat-"
    assert tokenizer.decode(ids, False) == "<bos> the cat, sat <unk> <unk> <unk>- <unk> <eos>".replace(" <", "<")
    assert tokenizer.decode([4, the, 5, cat], skip_special_tokens=True) == "the cat"
    for odd in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"id {odd}: "):
            tokenizer.decode([cat, odd])
    assert tokenizer.encode("") == [2, 3]
    assert tokenizer.decode([]) == ""


def test_ids_of_the_old_tokenizer(tokenizer):
    assert [tokenizer.get_pad_token(), tokenizer.get_unk_token()] == [0, 1]
    assert [tokenizer.get_bos_token(), tokenizer.get_eos_token()] == [2, 3]
    assert [index for index in range(-2, 9) if tokenizer.is_special(index)] == [*range(6)]
    assert tokenizer.vocab_size == 6 + len(tokenizer.words)
    assert not tokenizer.lossless


def test_a_batch_is_its_texts(tokenizer):
    rows = tokenizer.encode_batch(CORPUS)
    assert rows == [tokenizer.encode(text) for text in CORPUS]
    assert tokenizer.encode_batch(CORPUS, False) == [row[1:-1] for row in rows]
    assert tokenizer.decode_batch(rows) == [tokenizer.decode(row) for row in rows]


def test_training_keeps_the_most_frequent_words():
    tokenizer = WordTokenizer.train(["b b b a a c c d"], word_config(vocab_size=9))
    assert tokenizer.words == ["b", "a", "c"]
    assert tokenizer.total_tokens == 8
    assert WordTokenizer.train(["b b b a a c c d"], word_config(min_frequency=3)).words == ["b"]
    assert WordTokenizer.train([], word_config()).vocab_size == 6


def test_options_of_normalisation():
    for options, words in (
        ({"lowercase": False}, ["Été"]),
        ({"remove_accents": True}, ["ete"]),
        ({"lowercase": False, "remove_accents": True}, ["Ete"]),
    ):
        assert WordTokenizer.train(["Été"], word_config(normalization=options)).words == words


def test_a_folder_keeps_everything(tokenizer, tmp_path):
    specials = {"pad": "[PAD]", "user": "[U]"}
    config = word_config(special_tokens=specials, normalization={"lowercase": False})
    for made in (tokenizer, WordTokenizer.train(CORPUS, config)):
        made.save(tmp_path)
        again = WordTokenizer.load(tmp_path)
        assert (again.words, again.config, again.total_tokens) == (made.words, made.config, made.total_tokens)
        assert again.encode_batch(CORPUS) == made.encode_batch(CORPUS)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_the_old_file_format(tmp_path):
    path = tmp_path / "old.vocab"
    text = "# made long ago\nvocab_size=9\nnext_id=9\ntotal_tokens=70\n---\n7\tcat\n6\tthe\n8\t#\n"
    path.write_text(text, "utf-8")
    tokenizer = WordTokenizer.load(path)
    assert (tokenizer.words, tokenizer.total_tokens) == (["the", "cat", "#"], 70)
    assert tokenizer.encode("The # cat", False) == [6, 8, 7]
    names = ["[P]", "[U]", "[B]", "[E]", "[USER]", "[ASSISTANT]"]
    head, tail = text.split("---\n")
    path.write_bytes(
        f"{head}---\n".encode() + b"".join(f"{i}\t{name}\r\n".encode() for i, name in enumerate(names)) + tail.encode()
    )
    tokenizer = WordTokenizer.load(path)
    assert tokenizer.config.special_tokens.literals == names
    assert tokenizer.words == ["the", "cat", "#"]
    write_vocabulary(path, tokenizer)
    assert re.match(r"# .*\nvocab_size=9\nnext_id=9\ntotal_tokens=70\n---\n0\t\[P\]\n", path.read_text("utf-8"))
    assert read_vocabulary(path) == (names, ["the", "cat", "#"], 70)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("6\tthe\n", "no line of three dashes"),
        ("---\n6\tthe\nseven\tcat\n", "line 3: 'seven"),
        ("---\n6 the\n", "line 2"),
        ("---\n6\t\n", "line 2"),
        ("---\n6\tthe\n6\tcat\n", "line 3: the id 6 stands twice"),
        ("---\n6\tthe\n8\tcat\n", "no word for the id 7"),
        ("---\n0\t<pad>\n1\t<unk>\n", "no word for the id 2"),
        ("---\n9\tthe\n", "no word for the id 6"),
        ("next_id=9\n---\n6\tthe\n", "cut short"),
        ("next_id=many\n---\n", "line 1: 'next_id=many'"),
        ("words=3\n---\n", "line 1: 'words=3'"),
        ("---\n6\tthe\n7\tthe\n", "'the' stands twice"),
    ],
)
def test_other_files_are_one_line(text, part, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=part):
        WordTokenizer.load(path)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=r"not UTF-8|no vocabulary"):
            WordTokenizer.load(path)
