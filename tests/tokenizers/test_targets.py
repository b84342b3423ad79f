"""What is made of a tokenizer keeps ids, spells the text, and is the same after saving: here, and in transformers."""

import functools
import gzip
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from tokenkit.config import UserError
from tokenkit.tokenizers.bytelevel import ByteTokenizer, byte_definition
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.pieces import TO_BYTES, byte_alphabet
from tokenkit.tokenizers.roles import KIND_KEY, KINDS, kind_roles
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.tokenizers.targets import convert

TEXTS = ["the username", "", " leading", "  two", "the cat\r\nsat\n\n\ton it", "été à 12345 中文 😀 \0"]
TEXTS += ["user model system", "<|im_start|>user\nhi<|im_end|>", "<bos><eos>", "a" * 300, "\u0301x"]
PIECES = ["the", " the", " ", "\n", "cat", "é", "中", "😀", "\0", "<|eot_id|>", "user", "12", "aaaa"]
MIXED = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=10).map("".join)
fuzz = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def changed(tokenizer, **keys):
    """The tokenizer after a conversion, without the detour over a folder."""
    spec = TokenizerSpec(name="made", **keys)
    return HFTokenizer(*convert(tokenizer.definition, tokenizer.config, spec), str(spec))


def ids_of(tokenizer, texts):
    return [encoding.ids.tolist() for encoding in tokenizer.encode_batch(texts)]


def assert_survives(tokenizer, folder, texts):
    """Saved and loaded, it is the same tokenizer; transformers gives the same ids to texts without special tokens."""
    tokenizer.save(folder)
    again, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.token_bytes == tokenizer.token_bytes
    assert again.special_tokens == tokenizer.special_tokens
    assert again.config.get(KIND_KEY) == tokenizer.config.get(KIND_KEY)
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    for ours, other in zip(tokenizer.encode_batch(texts), again.encode_batch(texts)):
        assert np.array_equal(ours.ids, other.ids)
        assert np.array_equal(ours.ends, other.ends)
    for text, ids in zip(texts, ids_of(tokenizer, texts)):
        if not any(literal in text for literal in tokenizer.special_tokens):  # they make tokens of the literals
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert {literal: theirs.convert_tokens_to_ids(literal) for literal in tokenizer.special_tokens} == (
        tokenizer.special_tokens
    )


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The tokenizer of this round, saved."""
    path = tmp_path_factory.mktemp("source") / "tok"
    tokenizer.save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_with_the_specials_of_a_family(kind, tmp_path):
    tokenizer = load_tokenizer(f"byte:target={kind}")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.special_tokens == {literal: 256 + i for i, literal in enumerate(KINDS[kind].specials)}
    assert tokenizer.token_bytes == [bytes([b]) for b in range(256)] + [b""] * len(KINDS[kind].specials)
    assert tokenizer.encode("the username").ids.tolist() == [*b"the username"]
    for text in (*TEXTS, *KINDS[kind].specials, "assistant", "ĊĊ"):
        assert tokenizer.encode(text).ids.tolist() == [*text.encode()]
    roles = KINDS[kind]
    for index, literal in zip(
        (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (roles.bos, roles.eos, roles.pad)
    ):
        assert index == (tokenizer.special_tokens[literal] if literal else None)
    assert tokenizer.config[KIND_KEY] == kind
    assert_survives(tokenizer, tmp_path, TEXTS)


def test_any_tokenizer_becomes_bytes(folder):
    assert load_tokenizer(f"{folder}:conversion=byte").fingerprint == load_tokenizer("byte").fingerprint
    qwen = load_tokenizer(f"{folder}:target=Qwen2:conversion=byte")
    assert qwen.fingerprint == load_tokenizer("byte:target=Qwen2").fingerprint
    assert isinstance(qwen, ByteTokenizer)
    assert qwen.encode("the username").ids.tolist() == [*b"the username"]


def test_bytes_of_a_declared_source_keep_its_specials(bpe, tmp_path):
    bpe.save(tmp_path)
    tokenizer = load_tokenizer(f"{tmp_path}:source=GPT2:conversion=byte")
    assert tokenizer.fingerprint == load_tokenizer("byte:target=GPT2").fingerprint


@pytest.mark.parametrize("kind", ["Qwen3", "Llama3", "Gemma2", "Phi3", "Mistral"])
def test_a_family_s_specials_come_behind_the_last_id(tokenizer, kind, tmp_path):
    made = changed(tokenizer, target=kind)
    new = [literal for literal in KINDS[kind].specials if literal not in tokenizer.special_tokens]
    assert [made.special_tokens[literal] for literal in new] == [tokenizer.vocab_size + i for i in range(len(new))]
    assert made.vocab_size == tokenizer.vocab_size + len(new)
    assert made.token_bytes[: tokenizer.vocab_size] == tokenizer.token_bytes
    assert made.special_tokens.items() >= tokenizer.special_tokens.items()
    assert made.config[KIND_KEY] == kind
    assert made.eos_id == made.special_tokens[KINDS[kind].eos]
    assert ids_of(made, TEXTS) == ids_of(tokenizer, TEXTS)  # the literals in a text stay text
    assert_survives(made, tmp_path, TEXTS)


def test_an_ordinary_token_becomes_the_special_one(bpe):
    plain = changed(bpe, tokens_to_add=("<|im_end|>",))
    assert plain.token_bytes[plain.vocab_size - 1] == b"<|im_end|>"
    made = changed(plain, target="Qwen2")
    assert made.special_tokens["<|im_end|>"] == plain.vocab_size - 1
    assert made.token_bytes[plain.vocab_size - 1] == b""
    assert made.vocab_size == plain.vocab_size + 1  # <|im_start|>; <|endoftext|> was there
    assert made.encode("<|im_end|>").ids.tolist() == bpe.encode("<|im_end|>").ids.tolist()


def test_holes_in_the_ids_are_not_filled(bpe, tmp_path):
    definition = bpe.definition
    vocabulary = definition["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 40
    sparse = HFTokenizer(definition, bpe.config, "sparse")
    made = changed(sparse, target="Gemma2", tokens_to_add=("<x>",))
    size = sparse.vocab_size
    assert [made.special_tokens[literal] for literal in KINDS["Gemma2"].specials] == [*range(size, size + 5)]
    assert made.token_bytes[size + 5] == b"<x>"
    assert ids_of(made, TEXTS) == ids_of(sparse, TEXTS)
    assert_survives(made, tmp_path, TEXTS)


def test_a_template_of_another_family_is_gone(bpe, tmp_path):
    config = bpe.config | {"chat_template": "{{ messages }}", "add_bos_token": True}
    HFTokenizer(bpe.definition, config, "x").save(tmp_path)
    assert load_tokenizer(f"{tmp_path}:source=GPT2").chat_template == "{{ messages }}"
    assert KIND_KEY not in load_tokenizer(f"{tmp_path}:source=GPT2").config  # the template says more
    made = load_tokenizer(f"{tmp_path}:source=GPT2:target=Qwen2")
    assert made.chat_template == kind_roles("Qwen2").jinja()  # turns of the new family, for whoever loads the folder
    assert (made.config[KIND_KEY], made.bos_id) == ("Qwen2", None)


def test_a_source_without_the_specials_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    with pytest.raises(UserError, match=r"source=Llama3: this tokenizer has no '<\|begin_of_text\|>'"):
        load_tokenizer(f"{tmp_path}:source=Llama3:target=Qwen2")
    assert load_tokenizer(f"{tmp_path}:source=GPT2").config[KIND_KEY] == "GPT2"


def test_a_bare_file_gets_the_roles_of_its_source(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert HFTokenizer(bpe.definition).eos_id is None
    assert load_tokenizer(f"{tmp_path}:source=GPT2").eos_id == bpe.eos_id


def test_added_tokens_are_found_in_running_text(tokenizer, tmp_path):
    made = changed(tokenizer, tokens_to_add=("<x>", "<extra 中>"))
    first = tokenizer.vocab_size
    assert made.token_bytes[first:] == [b"<x>", "<extra 中>".encode()]
    assert not {first, first + 1} & made.special_ids
    text = "the cat<x> sat<extra 中>"
    encoding = made.encode(text)
    spans = {int(i): (int(s), int(e)) for i, s, e in zip(encoding.ids, encoding.starts, encoding.ends)}
    raw = text.encode()
    assert raw[slice(*spans[first])] == b"<x>"
    assert raw[slice(*spans[first + 1])] == "<extra 中>".encode()
    assert ids_of(made, TEXTS) == ids_of(tokenizer, TEXTS)
    assert_survives(made, tmp_path, [*TEXTS, text])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(("",), "an empty token"), (("<x>", "<x>"), "'<x>' stands twice"), ((" the",), "' the' is a token already")],
)
def test_tokens_that_cannot_be_added(bpe, tokens, message):
    with pytest.raises(UserError, match=message):
        changed(bpe, tokens_to_add=tokens)
    with pytest.raises(UserError, match="is a token already"):
        changed(bpe, tokens_to_add=("<|endoftext|>",))


def greedy_of(definition):
    """Longest tokens from left to right in each pre-token, by trying every length."""
    alphabet = {*byte_alphabet()}
    vocabulary = {
        piece.translate(TO_BYTES).encode("latin-1"): index
        for piece, index in definition["model"]["vocab"].items()
        if alphabet.issuperset(piece)
    }
    steps = RustTokenizer.from_str(json.dumps(definition)).pre_tokenizer

    def cut(text):
        ids = []
        for word, _ in steps.pre_tokenize_str(text):
            left = word.translate(TO_BYTES).encode("latin-1")
            while left:
                end = next(end for end in range(len(left), 0, -1) if left[:end] in vocabulary)
                ids.append(vocabulary[left[:end]])
                left = left[end:]
        return ids

    return cut


@functools.cache
def greedy_bpe(bpe):
    return changed(bpe, conversion="longest_prefix"), greedy_of(bpe.definition)


@fuzz
@given(text=MIXED)
def test_longest_prefix_is_greedy_and_loses_nothing(bpe, text):
    made, cut = greedy_bpe(bpe)
    ids = made.encode(text).ids.tolist()
    assert ids == cut(text)
    assert b"".join(made.token_bytes[index] for index in ids) == text.encode()


def test_longest_prefix_keeps_the_vocabulary(bpe, tmp_path):
    made, _ = greedy_bpe(bpe)
    assert made.token_bytes == bpe.token_bytes
    assert made.special_tokens == bpe.special_tokens
    assert made.decode(made.encode("x" * 100_000).ids.tolist()) == "x" * 100_000  # cut, or its time is quadratic
    assert_survives(made, tmp_path, TEXTS)


def test_longest_prefix_is_not_the_order_of_merges(tmp_path):
    definition = byte_definition(())
    definition["model"]["vocab"] |= {"bc": 256, "ab": 257}
    definition["model"]["merges"] = [["b", "c"], ["a", "b"]]
    merged = changed(HFTokenizer(definition, {}, "merged"), target="GPT2")
    assert merged.encode("abc").ids.tolist() == [97, 256]
    made = changed(merged, conversion="longest_prefix")
    assert made.encode("abc").ids.tolist() == [257, 99]
    assert_survives(made, tmp_path, ["abc", "ab cab"])


def test_longest_prefix_is_refused_where_bytes_are_missing(tokenizer):
    definition = tokenizer.definition
    vocabulary = definition["model"]["vocab"]
    if {*byte_alphabet()} <= (set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}):
        pytest.skip("has every byte")
    with pytest.raises(UserError, match="longest_prefix: "):
        changed(tokenizer, conversion="longest_prefix")


def test_longest_prefix_is_refused_where_a_special_token_could_be_text(bpe):
    definition = bpe.definition
    definition["pre_tokenizer"] = {**definition["decoder"], "use_regex": False, "add_prefix_space": False}
    with pytest.raises(UserError, match=r"the text '<\|endoftext\|>' would become the special token"):
        changed(HFTokenizer(definition, bpe.config, "unsplit"), conversion="longest_prefix")


def test_prebyteified_reads_the_byte_alphabet(bpe, tmp_path):
    definition = bpe.definition
    definition["pre_tokenizer"] = definition["pre_tokenizer"]["pretokenizers"][0]
    definition["decoder"] = None
    made = HFTokenizer(*convert(definition, bpe.config, TokenizerSpec(name="x", conversion="prebyteified")), "x")
    assert made.token_bytes == bpe.token_bytes
    assert ids_of(made, TEXTS) == ids_of(bpe, TEXTS)
    assert_survives(made, tmp_path, TEXTS)
    assert changed(bpe, conversion="prebyteified").fingerprint == bpe.fingerprint  # it says so already


def test_prebyteified_refuses_other_alphabets(tokenizer):
    if isinstance(tokenizer, ByteTokenizer) or "ByteLevel" in str(tokenizer.definition["pre_tokenizer"]):
        pytest.skip("is byte-level")
    with pytest.raises(UserError, match="prebyteified: "):
        changed(tokenizer, conversion="prebyteified")


def test_byteified_is_the_same_tokenizer(tokenizer):
    assert changed(tokenizer, conversion="byteified").fingerprint == tokenizer.fingerprint


def begins_with_a_space(tokenizer):
    return b"".join(tokenizer.token_bytes[index] for index in tokenizer.encode("a").ids) == b" a"


@functools.cache
def spaced(tokenizer):
    return changed(tokenizer, conversion="manual_add_prefix_space")


@fuzz
@given(text=MIXED)
def test_prefix_space_is_that_of_the_text_with_one(tokenizer, text):
    if begins_with_a_space(tokenizer):
        with pytest.raises(UserError, match="begins texts with a space already"):
            spaced(tokenizer)
        return
    made = spaced(tokenizer)
    with_space = text if text[:1] in ("", " ") else " " + text
    encoding, wanted = made.encode(text), tokenizer.encode(with_space)
    if "▁" not in text:  # the mark of a space begins a text as a space does
        assert np.array_equal(encoding.ids, wanted.ids)
    assert encoding.ends[-1:].sum() == len(text.encode())
    assert np.array_equal(encoding.starts[1:], encoding.ends[:-1])
    assert np.array_equal(made.encode_batch(["x", text])[1].ids, encoding.ids)


def test_prefix_space_has_no_width_and_survives(tokenizer, tmp_path):
    if begins_with_a_space(tokenizer):
        pytest.skip("begins texts with a space")
    made = spaced(tokenizer)
    ids = ids_of(tokenizer, [" cat"])[0]
    encoding = made.encode("cat")
    widths = [len(tokenizer.token_bytes[index]) for index in ids]
    assert encoding.ids.tolist() == ids
    assert (encoding.ends - encoding.starts).tolist() == [widths[0] - 1, *widths[1:]]
    assert made.decode(ids) == "cat"
    assert_survives(made, tmp_path, TEXTS)


def test_names_are_the_specs_that_made_them(bpe, tmp_path):
    bpe.save(tmp_path)
    text = f"{tmp_path}:target=Qwen2"
    assert load_tokenizer(text).name == load_tokenizer(TokenizerSpec.parse(text)).name == text


@pytest.fixture(scope="module")
def declarations(shared):
    """The first lines of a text in 200 languages and more."""
    with gzip.open(shared / "data/corpora/udhr.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"][:200] for line in file]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("gpt2", "GPT2", "Llama3"),
        ("gemma3", "Gemma3", "Qwen2"),
        ("llama2", "TinyLlama", "Phi3"),
        ("qwen2", "Qwen2", "Gemma2"),
        ("mistral_tekken", "Mistral", "Qwen3"),
        ("cl100k_base", "GPT2", "Llama3"),
    ],
)
def test_families_of_published_tokenizers(shared, declarations, tmp_path, name, source, target):
    folder = shared / "data/tokenizers" / name
    plain, made = load_tokenizer(str(folder)), load_tokenizer(f"{folder}:source={source}:target={target}")
    assert made.vocab_size >= plain.vocab_size
    texts = [text + " ".join(KINDS[target].specials) for text in declarations]
    assert ids_of(made, texts) == ids_of(plain, texts)
    assert_survives(made, tmp_path, declarations[:50])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "cl100k_base"])
def test_longest_prefix_of_published_tokenizers(shared, declarations, tmp_path, name):
    folder = shared / "data/tokenizers" / name
    plain, made = load_tokenizer(str(folder)), load_tokenizer(f"{folder}:conversion=longest_prefix")
    cut = greedy_of(plain.definition)
    texts = [text for text in declarations if unicodedata.is_normalized("NFC", text)]
    assert ids_of(made, texts) == [cut(text) for text in texts]
    assert_survives(made, tmp_path, declarations[:50])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3", "llama3"])
def test_prefix_space_of_published_tokenizers(shared, declarations, tmp_path, name):
    folder = shared / "data/tokenizers" / name
    plain, made = load_tokenizer(str(folder)), load_tokenizer(f"{folder}:conversion=manual_add_prefix_space")
    added = {token["id"] for token in plain.added_tokens}
    texts = [text for text in declarations if plain.encode(text).ids[0] not in added]  # those get no space
    assert len(texts) > 300
    assert ids_of(made, texts) == ids_of(plain, [" " + text.removeprefix(" ") for text in texts])
    assert_survives(made, tmp_path, declarations[:50])
