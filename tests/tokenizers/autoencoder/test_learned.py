"""The two faces of one codec: the house's tokenizer with byte spans, and the checklist's with plain lists."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.ids import BOS, EOS, PAD, UNK
from tokenkit.tokenizers.autoencoder.learned import LearnedTokenizer
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
from tokenkit.tokenizers.load import load_tokenizer

TEXTS = ["the cat 中文", "", "qzx été\r\n", "😀\0\0\0kvjq <|bos|>", " "]


@pytest.fixture(scope="module", params=["compact", "open"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def house(kind, make_folder) -> LearnedTokenizer:
    return load_tokenizer(str(make_folder(kind)))


@pytest.fixture(scope="module")
def listed(kind, make_folder) -> AutoEncoderTokenizer:
    return AutoEncoderTokenizer.load(make_folder(kind))


def test_both_give_the_same_ids(house, listed):
    for text in TEXTS:
        ids = listed.encode(text, add_special_tokens=False)
        assert house.encode(text).ids.tolist() == ids
        assert listed.encode(text) == [BOS, *ids, EOS]
        assert listed.decode([BOS, *ids, EOS]) == house.decode(ids) == text
    assert listed.vocab_size == house.vocab_size
    assert listed.encode_batch(TEXTS) == [*map(listed.encode, TEXTS)]
    assert listed.encode_batch(TEXTS, threads=3) == listed.encode_batch(TEXTS)
    assert listed.decode_batch(listed.encode_batch(TEXTS)) == TEXTS


def test_a_run_of_codes_covers_its_bytes_with_its_last_id(make_folder):
    tokenizer = load_tokenizer(str(make_folder("open")))
    encoding = tokenizer.encode("文")
    assert encoding.starts.tolist() == [0, 0]
    assert encoding.ends.tolist() == [0, 3]
    assert [tokenizer.token_bytes[index] for index in encoding.ids] == [b"", b""]
    assert len(tokenizer.token_bytes[:70]) == 70
    with pytest.raises(IndexError):
        tokenizer.token_bytes[tokenizer.vocab_size]


def test_the_stock_loader_reads_the_compact_form(make_folder, kind):
    stock = AutoTokenizer.from_pretrained(make_folder(kind))
    compact = load_tokenizer(str(make_folder("compact")))
    for text in TEXTS[:3]:
        ids = compact.encode(text).ids.tolist()
        assert stock(text)["input_ids"] == [BOS, *ids]
        assert stock.decode(ids) == text
    assert compact.fixed.fingerprint == compact.fingerprint
    messages = [{"role": "user", "content": "the cat"}]
    assert stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == [
        4,
        *compact.encode("the cat").ids.tolist(),
        EOS,
        5,
    ]


def test_saving_gives_the_same_tokenizer(house, tmp_path):
    house.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == house.fingerprint
    assert again.chat_template == house.chat_template
    for text in TEXTS:
        assert np.array_equal(again.encode(text).ids, house.encode(text).ids)


def test_only_open_tokenizers_have_a_fingerprint_of_their_network(make_folder):
    kinds = {kind: load_tokenizer(str(make_folder(kind))) for kind in ("compact", "open")}
    assert kinds["compact"].fingerprint != kinds["open"].fingerprint
    assert kinds["open"].network().max_bytes == 4
    with pytest.raises(UserError, match="no auto-encoder"):
        kinds["compact"].network()


def test_roles_and_tiers(listed):
    assert (listed.get_pad_token(), listed.get_unk_token()) == (PAD, UNK)
    assert (listed.get_bos_token(), listed.get_eos_token()) == (BOS, EOS)
    assert all(listed.is_special(index) == (index < 64) for index in range(200))
    assert not listed.is_special(-1)


def test_special_ids_are_left_out_or_written(listed):
    ids = [BOS, *listed.encode("the 中", add_special_tokens=False), UNK, EOS]
    assert listed.decode(ids) == "the 中"
    assert listed.decode(ids, skip_special_tokens=False) == "<|bos|>the 中\ufffd<|eos|>"


def test_lone_surrogates_are_three_bytes(listed):
    ids = listed.encode("a\ud800b", add_special_tokens=False)
    assert listed.decode_bytes(ids) == b"a\xed\xa0\x80b"
    assert listed.decode(ids) == "a\ufffd\ufffd\ufffdb"
    assert listed.encode_bytes(b"a\xed\xa0\x80b") == ids


def test_the_house_refuses_lone_surrogates(house):
    with pytest.raises(UserError, match="surrogate"):
        house.encode("a\ud800b")


def test_canonical_ids(listed):
    ids = listed.encode("the cat", add_special_tokens=False)
    spelled = [listed.codec.layout.byte_base + byte for byte in b"the cat"]
    assert listed.is_canonical(ids)
    assert not listed.is_canonical(spelled)
    assert listed.canonicalise(spelled) == ids


def test_reconstruction_is_exact_whatever_is_learned(listed, kind):
    for text in TEXTS:
        result = listed.test_reconstruction(text)
        assert result.reconstruction == text
        assert result.system.exact
        assert (result.learned is None) == (kind == "compact")
    if kind == "open":
        assert listed.test_reconstruction("中文").learned.exact
        assert not listed.test_reconstruction("never seen before").learned.exact


def test_untrained_it_is_already_exact():
    tokenizer = AutoEncoderTokenizer()
    ids = tokenizer.encode("hello world")
    assert len(ids) == len("hello world") + 2
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.decode(ids) == "hello world"


def test_statistics_add_up(make_folder, capsys):
    tokenizer = AutoEncoderTokenizer.load(make_folder("compact"))
    tokenizer.reset_stats()
    ids = tokenizer.encode("the cat")
    tokenizer.decode(ids)
    found = tokenizer.get_stats()
    assert (found["tokens"], found["tokens_decoded"], found["characters"]) == (len(ids), len(ids), 7)
    tokenizer.print_stats()
    assert "tokens" in capsys.readouterr().out
