"""A learned tokenizer inside transformers: everything that its callers do, with the ids of the codec."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer, DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.huggingface import CODE_FILE, FSQTokenizer
from tokenkit.tokenizers.autoencoder.ids import BOS, EOS, PAD, UNK
from tokenkit.tokenizers.autoencoder.package import CONFIG, fingerprint_of

TEXTS = ["the cat 中文 sat", "", " qzx, été\r\n😀!", "👩‍👩‍👧 e\u0301 \0\0\0", "<0x41><c:1.2.3> <|reserved_9|>"]
WORDS = ["the", " cat", "中", "文", "qzx", "😀", "жу", " ", "\n", "1234", "é", "<|bos|>", "<|user|>", "<0x41>"]
WORDS += ["\ud800"]
ANY = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=10).map("".join)
fuzz = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=["compact", "open"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, make_folder) -> FSQTokenizer:
    return FSQTokenizer(make_folder(kind))


@pytest.fixture
def fresh(make_folder) -> FSQTokenizer:
    return FSQTokenizer(make_folder("open"))


def test_ids_are_those_of_the_codec_behind_a_bos(tokenizer):
    for text in TEXTS:
        ids = tokenizer.codec.encode(text)
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == [BOS, *ids]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer(text).keys() == {"input_ids", "attention_mask"}
        assert tokenizer.decode(ids) == tokenizer.decode([BOS, *ids, EOS, PAD], skip_special_tokens=True) == text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


@fuzz
@given(text=ANY)
def test_decode_inverts_encode(tokenizer, text):
    wanted = text.encode("utf-8", "surrogatepass")
    for ids in (tokenizer.encode_untrusted(text, add_special_tokens=False), tokenizer.encode(text)[1:]):
        spelled = tokenizer.decode(ids)
        assert spelled == wanted.decode("utf-8", "replace")
    assert tokenizer.decode_bytes(tokenizer.encode_untrusted(text)) == wanted
    assert tokenizer.encode_bytes(wanted) == tokenizer.encode_untrusted(text, add_special_tokens=False)


@fuzz
@given(data=st.binary(max_size=30))
def test_any_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@fuzz
@given(data=st.data())
def test_every_id_has_a_string_of_its_own(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert len(set(tokens)) == len(set(ids))
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(tokenizer.decode(ids, skip_special_tokens=True), str)
    assert tokenizer.convert_tokens_to_string(tokens) == tokenizer.decode(ids)


def test_strings_of_ids_are_readable(fresh):
    layout = fresh.layout
    assert fresh.convert_ids_to_tokens([0, 9, 64 + 65, 64]) == ["<|pad|>", "<|reserved_9|>", "<0x41>", "<0x00>"]
    assert fresh.convert_ids_to_tokens(layout.vocab_size - 1) == "<c:4.4.4>"
    assert fresh.convert_ids_to_tokens(layout.open_base) == "<c:0.0.0+>"
    assert " the" in fresh.tokenize("see the cat")
    assert fresh.convert_tokens_to_ids(["no such token at all", "<c:9.9.9>", "<c:1>"]) == [UNK] * 3


def test_the_vocabulary_is_not_built(fresh):
    vocabulary = fresh.get_vocab()
    assert len(vocabulary) == len(fresh) == fresh.vocab_size == fresh.layout.vocab_size
    assert all(vocabulary[surface] == index for index, surface in enumerate(vocabulary))
    assert " the" in vocabulary
    assert "no such token" not in vocabulary
    assert vocabulary.get("<0xFF>") == 64 + 255


def test_batches(tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    single = [tokenizer(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, single))
    assert batch["input_ids"].tolist() == [[PAD] * (longest - len(ids)) + ids for ids in single]
    assert batch["attention_mask"].sum(1).tolist() == [*map(len, single)]
    right = tokenizer(TEXTS, padding="max_length", max_length=longest + 3, padding_side="right")
    assert right["input_ids"] == [ids + [PAD] * (longest + 3 - len(ids)) for ids in single]
    assert tokenizer(TEXTS, padding=True, pad_to_multiple_of=8, return_tensors="pt")["input_ids"].shape[1] % 8 == 0
    assert tokenizer([])["input_ids"] == []
    assert tokenizer([[*ids[1:]] for ids in single if ids[1:]])["input_ids"] == [ids for ids in single if ids[1:]]
    assert tokenizer(TEXTS[0], return_tensors="np")["input_ids"].tolist() == [single[0]]


def test_a_batch_asks_the_network_once(fresh, monkeypatch):
    calls = []
    encode_batch = fresh.codec.encode_batch
    monkeypatch.setattr(fresh.codec, "encode_batch", lambda texts: calls.append(texts) or encode_batch(texts))
    fresh(["a<|user|>b", "c", "d"])
    assert calls == [["a", "b", "c", "d"]]


def test_truncation(tokenizer):
    text = "the cat sat on the mat"
    ids = tokenizer(text)["input_ids"]
    cut = tokenizer(text, truncation=True, max_length=4, return_overflowing_tokens=True, return_length=True)
    assert cut["input_ids"] == ids[:4]
    assert cut["overflowing_tokens"] == ids[4:]
    assert cut["num_truncated_tokens"] == len(ids) - 4
    assert cut["length"] == 4
    strided = tokenizer(text, truncation=True, max_length=4, stride=2, return_overflowing_tokens=True)
    assert strided["overflowing_tokens"] == ids[2:]
    batch = tokenizer([text, "the"], truncation=True, max_length=4, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 4)
    pair = tokenizer(text, "the cat", truncation="only_first", max_length=6)
    assert len(pair["input_ids"]) == 6
    assert pair["input_ids"][-len(tokenizer.encode("the cat")) :] == tokenizer.encode("the cat")
    with pytest.raises(ValueError, match="only_first"):
        tokenizer(text, "x", truncation=True, max_length=3, return_overflowing_tokens=True)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_what_frames_a_text_is_stored(fresh, tmp_path, bos, eos):
    fresh.add_bos_token, fresh.add_eos_token = bos, eos
    fresh.save_pretrained(tmp_path)
    for tokenizer in (fresh, FSQTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(fresh))):
        assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (bos, eos)
        assert tokenizer.encode("a") == [BOS] * bos + [64 + 97] + [EOS] * eos
        assert tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"] == [1] * bos + [0] + [1] * eos
    made = FSQTokenizer(fresh._folder, add_bos_token=bos, add_eos_token=eos)
    assert made.encode("a") == fresh.encode("a")


@fuzz
@given(text=ANY)
def test_offsets_are_characters(tokenizer, text):
    found = tokenizer(text, return_offsets_mapping=True)
    offsets = found["offset_mapping"]
    assert offsets[0] == (0, 0)
    reached = 0
    for index, (first, last) in zip(found["input_ids"][1:], offsets[1:]):
        assert 0 <= first <= last <= len(text)
        assert first in (reached, reached - 1)  # parts of one character share its span
        reached = last
        string = tokenizer.codec.token_strings([index])[0]
        if not tokenizer.layout.is_special(index) and not tokenizer.layout.is_open(index):
            assert string in text[first:last].encode("utf-8", "surrogatepass")
    assert reached == len(text)
    for place in range(len(text)):
        first, last = offsets[found.char_to_token(place)]
        assert first <= place < last


def test_spans_of_padded_and_paired_rows(fresh):
    text = "the 😀中 <|eos|>!"
    plain = fresh(text, return_offsets_mapping=True)
    batch = fresh([text, text * 3], padding=True, return_offsets_mapping=True, return_tensors="pt")
    shift = batch["input_ids"].shape[1] - len(plain["input_ids"])
    assert batch["offset_mapping"][0].tolist() == [[0, 0]] * shift + [[*span] for span in plain["offset_mapping"]]
    assert batch.char_to_token(0, 5) == plain.char_to_token(5) + shift
    assert batch.token_to_chars(0, 0) is None
    assert batch.token_to_chars(0, batch.char_to_token(0, 7)) == (7, 14)  # the literal is one token
    assert text[7:14] == "<|eos|>"
    pair = fresh("ab", "cd", return_offsets_mapping=True)
    one, two = len(fresh.encode("ab")) - 1, len(fresh.encode("cd")) - 1
    assert pair.sequence_ids() == [None, *[0] * one, None, *[1] * two]
    assert pair.char_to_token(0, sequence_index=1) == one + 2
    assert pair.n_sequences == 2
    cut = fresh("a b c d", truncation=True, max_length=3)
    assert cut.char_to_token(6) is None
    words = fresh(["the", " cat"], is_split_into_words=True, return_offsets_mapping=True)
    assert words["input_ids"] == fresh("the")["input_ids"] + fresh(" cat")["input_ids"][1:]
    assert words["offset_mapping"][-1][1] == 4


def test_a_run_of_codes_has_its_span_at_its_last_id(fresh):
    assert fresh("a文", return_offsets_mapping=True)["offset_mapping"][1:] == [(0, 1), (1, 1), (1, 2)]


def test_literals_of_special_tokens(tokenizer):
    text = "<|eos|>the<|user|>"
    assert tokenizer.encode(text)[1] == EOS
    untrusted = tokenizer.encode_untrusted(text)
    assert untrusted[0] == BOS
    assert min(untrusted[1:]) >= tokenizer.layout.first_regular_id
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == untrusted
    assert tokenizer.decode(untrusted[1:]) == tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_skipping_special_tokens_drops_no_bytes(fresh):
    fresh.add_tokens(["<word>"])
    ids = [BOS, *fresh.encode("a <word>中 , b", add_special_tokens=False), UNK, 9, EOS]
    assert fresh.decode(ids, skip_special_tokens=True) == "a <word>中 , b"
    assert fresh.decode(ids) == "<|bos|>a <word>中 , b\ufffd<|reserved_9|><|eos|>"
    assert fresh.decode(ids[1:-3], clean_up_tokenization_spaces=True) == "a <word>中 , b"
    assert fresh.batch_decode([ids, ids], skip_special_tokens=True) == ["a <word>中 , b"] * 2
    assert fresh.decode(np.array(ids[1:-3])) == fresh.decode(torch.tensor(ids[1:-3])) == "a <word>中 , b"
    first = fresh.encode("中", add_special_tokens=False)[0]
    assert isinstance(fresh.decode([first, EOS, first]), str)
    assert fresh.decode(64 + 65) == "A"


def test_tokens_are_added_inside_the_reserved_block(fresh, tmp_path):
    size = len(fresh)
    assert fresh.add_special_tokens({"extra_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False) == 1
    assert fresh.add_tokens(["<word>", AddedToken("<other>", normalized=False), "<word>"]) == 2
    assert len(fresh) == size
    assert fresh.convert_tokens_to_ids(["<|tool|>", "<word>", "<other>"]) == [7, 8, 9]
    assert fresh.encode("a<word>b")[1:] == [64 + 97, 8, 64 + 98]
    fresh.save_pretrained(tmp_path)
    again = FSQTokenizer.from_pretrained(tmp_path)
    assert len(again) == size
    assert again.encode("a<word>b<|tool|>") == fresh.encode("a<word>b<|tool|>")
    assert again.decode([7, 8], skip_special_tokens=True) == "<word>"
    assert again.add_tokens(["<next>"]) == 1
    assert again.convert_tokens_to_ids("<next>") == 10
    with pytest.raises(UserError, match="no reserved id is free"):
        again.add_tokens([f"<{n}>" for n in range(60)])
    with pytest.raises(UserError, match="white space"):
        again.add_tokens([AddedToken("<x>", lstrip=True)])


def test_conversations(fresh):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "the <|eos|> 中"}]
    found = fresh.apply_chat_template(messages, add_generation_prompt=True)
    assert found["input_ids"] == found.input_ids
    assert found["input_ids"][0] == 6
    assert found["input_ids"][-1] == 5
    assert found["input_ids"].count(EOS) == 3
    safe = fresh.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)
    assert safe["input_ids"].count(EOS) == 2
    split = fresh.apply_chat_template(messages, tokenize=False)
    assert split == "<|system|>be<|eos|><|user|>the <|eos|> 中<|eos|>"
    assert fresh.decode(safe["input_ids"]) == split + "<|assistant|>"
    template = "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    masked = fresh.apply_chat_template(messages, chat_template=template, return_assistant_tokens_mask=True)
    assert [i for i, mask in zip(masked["input_ids"], masked["assistant_masks"]) if not mask] == [6, 4]


def test_saving_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = FSQTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint == fingerprint_of(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    assert (again.padding_side, again.model_max_length) == (tokenizer.padding_side, tokenizer.model_max_length)
    again.save_pretrained(tmp_path)  # over itself
    assert FSQTokenizer.from_pretrained(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["auto_map"]["AutoTokenizer"] == ["fsq_tokenizer.FSQTokenizer", None]
    assert str(tmp_path) not in json.dumps(config)


def test_a_package_folder_may_be_named_itself(make_folder, kind):
    tokenizer = FSQTokenizer.from_pretrained(make_folder(kind))
    assert tokenizer.encode(TEXTS[0]) == FSQTokenizer(make_folder(kind)).encode(TEXTS[0])
    assert tokenizer.add_tokens(["<|tool|>"]) == 1  # reserved ids are not taken by their own names


def test_it_can_be_sent_and_reads_its_network_anew(make_folder, tmp_path):
    folder = shutil.copytree(make_folder("open"), tmp_path / "open")
    tokenizer = FSQTokenizer(folder)
    ids = tokenizer.encode(TEXTS[0])
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 50_000
    copy = pickle.loads(sent)
    assert copy._codec is None
    assert copy.encode(TEXTS[0]) == ids
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"max_chunk": 16', '"max_chunk": 12'))
    with pytest.raises(UserError, match="another tokenizer"):
        pickle.loads(sent).encode("a")
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer.save_pretrained(tmp_path / "other")


def test_mistakes_are_one_line(fresh, tmp_path):
    with pytest.raises(UserError, match=r"no fsq_config\.json"):
        FSQTokenizer()
    with pytest.raises(ValueError, match="as a text"):
        fresh(3)
    with pytest.raises(ValueError, match="as many"):
        fresh(["a", "b"], ["c"])
    with pytest.raises(UserError, match="filename_prefix"):
        fresh.save_pretrained(tmp_path, filename_prefix="x")


def test_a_collator_and_a_model_take_it(fresh):
    rows = [{"input_ids": fresh(text)["input_ids"]} for text in TEXTS]
    batch = DataCollatorForLanguageModeling(fresh, mlm=False)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fresh), **sizes)).eval()
    prompt = fresh(["the 中", "a"], padding=True, return_tensors="pt")
    assert model(**prompt).logits.shape == (*prompt["input_ids"].shape, len(fresh))
    with torch.random.fork_rng():
        out = model.generate(**prompt, max_new_tokens=20, do_sample=True, pad_token_id=PAD)
    assert all(isinstance(text, str) for text in fresh.batch_decode(out))
    assert model.resize_token_embeddings(len(fresh)).num_embeddings == len(fresh)


SCRIPT = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(tokenizer).__name__, tokenizer(sys.argv[2])["input_ids"])
tokenizer.save_pretrained(sys.argv[3])
"""


def run_alone(tmp_path: Path, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"} | changes
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_the_auto_class_loads_it(fresh, tmp_path):
    saved = tmp_path / "saved"
    fresh.save_pretrained(saved)
    root = str(Path(__file__).parents[3])
    done = run_alone(tmp_path, saved, TEXTS[0], tmp_path / "again", PYTHONPATH=root)
    assert done.stdout.strip() == f"FSQTokenizer {fresh.encode(TEXTS[0])}", done.stderr
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(p.name for p in saved.iterdir())
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(saved, trust_remote_code=False)


def test_without_tokenkit_the_file_says_what_is_missing(fresh, tmp_path):
    fresh.save_pretrained(tmp_path / "saved")
    code = f"import sys; sys.modules['tokenkit'] = None; exec(open({str(tmp_path / 'saved' / CODE_FILE)!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install tokenkit-torch" in done.stderr
