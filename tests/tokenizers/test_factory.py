"""One interface for every kind of tokenizer that a configuration names."""

import json
from pathlib import Path

import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.factory import ChecklistTokenizer, create_tokenizer
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.tokenizers.word import WordTokenizer
from tokenkit.tokenizers.word_config import WordConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = ["hello world", "Hello,  World!\n", "", "naïve 日本語 👩‍👩‍👧", "<|user|> <pad>", "\0\t\x7f", "a" * 100]
KINDS = ["word", "bytes", "hf", "autoencoder"]


@pytest.fixture(scope="module", params=KINDS)
def created(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "word":
        WordTokenizer.train(TEXTS, WordConfig(min_frequency=1)).save(folder)
        return create_tokenizer({"tokenizer_type": "word", "vocab_file": str(folder / "vocab.txt")})
    if request.param == "hf":
        train_tokenizer(TEXTS * 4, "bpe", 300).save(folder)
        return create_tokenizer({"type": f"hf:{folder}"})
    if request.param == "bytes":
        return create_tokenizer({"tokenizer_type": "bytes"})
    return create_tokenizer(CONFIGS / "autoencoder_tokenizer_config.json")


def test_what_every_tokenizer_does(created):
    assert isinstance(created, ChecklistTokenizer)
    rows = created.encode_batch(TEXTS)
    plain = created.encode_batch(TEXTS, False)
    assert rows == [created.encode(text) for text in TEXTS]
    begin, end = created.get_bos_token(), created.get_eos_token()
    for text, row, ids in zip(TEXTS, rows, plain):
        assert created.encode(text, add_special_tokens=False) == ids
        assert row == [*([] if begin is None else [begin]), *ids, *([] if end is None else [end])]
        assert all(0 <= index < created.vocab_size for index in row)
        assert not any(created.is_special(index) and index != created.get_unk_token() for index in ids)
        if created.lossless:
            assert created.decode(row) == text
            assert created.decode(ids, skip_special_tokens=False) == text
    assert created.decode_batch(rows) == [created.decode(row) for row in rows]
    assert all(created.is_special(index) for index in (begin, end, created.get_pad_token()) if index is not None)


def test_any_ids_can_be_decoded(created):
    size = created.vocab_size
    for row in [[*range(min(300, size))], [size - 1] * 3, [0, 1, 2, 3, 4, 5], [size - 1, 2, size - 2, 7, 0]]:
        assert isinstance(created.decode(row), str)
        assert isinstance(created.decode(row, False), str)
    for row in ([-1], [0, size]):
        with pytest.raises(UserError, match=f"id {row[-1]}: this tokenizer has ids 0 .. {size - 1}"):
            created.decode(row)


def test_what_is_saved_is_created_again(created, tmp_path):
    created.save(tmp_path / "saved")
    again = create_tokenizer(tmp_path / "saved")
    assert type(again) is type(created)
    assert again.encode_batch(TEXTS) == created.encode_batch(TEXTS)
    assert type(created).load(tmp_path / "saved").encode_batch(TEXTS) == created.encode_batch(TEXTS)


def test_special_tokens_by_their_literals():
    tokenizer = create_tokenizer({"tokenizer_type": "bytes"})
    inner = ByteTokenizer()
    assert tokenizer.encode("hé") == [inner.bos_id, 104, 195, 169, inner.eos_id]
    assert tokenizer.decode(tokenizer.encode("hé"), skip_special_tokens=False) == "<|bos|>hé<|eos|>"


def test_the_literal_network():
    tokenizer = create_tokenizer(CONFIGS / "autoencoder_tokenizer_compat.json")
    assert [index for index in range(9) if tokenizer.is_special(index)] == [0, 1, 2, 3]
    for text in ("é", "a\n", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_old_file_says_no_type(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vocab_size": 100, "min_frequency": 2}), "utf-8")
    assert isinstance(create_tokenizer(path), WordTokenizer)
    assert isinstance(create_tokenizer(str(CONFIGS / "word_tokenizer_config.json")), WordTokenizer)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tokenizer_type": "sentence"}, ["tokenizer_type: 'sentence'", "word, autoencoder, bytes or hf:FOLDER"]),
        ({"tokenizer_type": "word", "vocab_sise": 3}, ["vocab_sise", "did you mean 'vocab_size'"]),
        ({"tokenizer_type": "word", "vocab_file": "/nowhere/vocab.txt"}, ["/nowhere/vocab.txt: no vocabulary"]),
        ({"tokenizer_type": "bytes", "levels": [8]}, ["levels: unknown key"]),
        ({"type": "hf:/nowhere/at/all"}, ["/nowhere/at/all", "no such file"]),
        ({"type": "bytes", "tokenizer_type": "word"}, ["type: 'bytes'", "keep one"]),
    ],
)
def test_mistakes_are_one_line(values, parts, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), "utf-8")
    for config in (values, path):
        with pytest.raises(UserError) as caught:
            create_tokenizer(config)
        for part in parts:
            assert part in str(caught.value)
    assert str(caught.value).startswith(str(path))
