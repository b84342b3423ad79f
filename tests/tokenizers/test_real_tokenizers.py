"""Published tokenizers: reference ids, tokens that spell the text, what the lossy ones change (golden E, vectors)."""

import functools
import json
import lzma

import numpy as np
import pytest
import tokenizers

from tokenkit.config import UserError
from tokenkit.tokenizers.base import require_lossless
from tokenkit.tokenizers.changes import NFC, NFKC
from tokenkit.tokenizers.load import load_tokenizer

SUPPORTED = ["cl100k_base", "deepseek_v3", "focus_de_bpe_50k", "focus_sw_bpe_50k", "gemma3", "gpt2", "gpt_neox_20b"]
SUPPORTED += ["llama2", "llama3", "mistral_tekken", "mistral_v1", "olmo2_dolma2", "olmo_dolma_v1_5", "phi3_mini"]
SUPPORTED += ["qwen2", "roberta_base", "smollm2"]
load = functools.cache(load_tokenizer)


CHANGED = {
    "bert_base_uncased": ("lower-cases letters", "strips accents", "drops white space", "lacks some characters"),
    "clip_base": ("lower-cases letters", "drops white space", NFC),
    "focus_de_xlmr_unigram_50k": ("drops white space", NFC, NFKC, "lacks some characters"),
    "t5_small": ("drops white space", NFC, NFKC, "lacks some characters"),
    "gpt_neox_20b": (NFC,),
    "qwen2": (NFC,),
    "smollm2": ("lacks some bytes",),
    "llama2": (),
    "roberta_base": (),
}
LOSSY = [name for name, words in CHANGED.items() if "drops white space" in words]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_changes_are_named(shared, name):
    tokenizer = load(str(shared / "data/tokenizers" / name))
    assert tokenizer.changes == CHANGED[name]
    assert tokenizer.lossless == (name not in LOSSY)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_tokenizers_are_refused_where_the_text_is_needed_back(shared, name):
    with pytest.raises(UserError, match=r"drops white space.*, so it cannot be the target of a transfer") as caught:
        require_lossless(load(str(shared / "data/tokenizers" / name)), "the target of a transfer")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSY)
def test_golden_ids_of_lossy_tokenizers(shared, name):
    texts = [item["text"] for item in json.loads((shared / "golden/E_byteify_texts.json").read_text("utf-8"))]
    with np.load(shared / "golden/E_byteify.npz") as golden:
        ids, ptr = golden[f"{name}__ids"], golden[f"{name}__ptr"]
    tokenizer, refused = load(str(shared / "data/tokenizers" / name)), 0
    for item, text in enumerate(texts):
        try:
            encoding = tokenizer.encode(text)
        except UserError:
            refused += 1
            continue
        assert np.array_equal(encoding.ids, ids[ptr[item] : ptr[item + 1]])
        assert encoding.ends[-1:].sum() == len(text.encode())
        assert np.array_equal(encoding.starts, [0, *encoding.ends[:-1]][: len(encoding)])
    assert refused == {"bert_base_uncased": 45, "clip_base": 2}.get(name, 18)  # control characters, white space alone


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOSSY, "gpt_neox_20b", "phi3_mini"])
def test_random_texts_of_changing_tokenizers(shared, checker, name):
    check = checker.Checker(load(str(shared / "data/tokenizers" / name)))
    check.check([*checker.EDGES, *checker.random_texts(3000, 2)])
    found = check.found
    assert found.wrong == 0, found.failures
    assert found.ids == found.tiled == found.strings - found.refused.total()


def test_a_deleted_first_character_is_refused(shared):
    tokenizer = load(str(shared / "data/tokenizers/t5_small"))  # behind it, the library's offsets are too low by one
    for text in ("\x19the\u0301", "\x01U \u4e2d"):
        with pytest.raises(UserError, match=r"character 0, .* belongs to no token"):
            tokenizer.encode_batch(["fine", text])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama2", "mistral_v1", "phi3_mini", "gemma3", "roberta_base", "focus_de_bpe_50k", "qwen2"]
)
def test_a_text_behind_a_special_token(shared, name):
    tokenizer = load(str(shared / "data/tokenizers" / name))
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    plain = [
        t["content"] for t in tokenizer.definition["added_tokens"] if t["special"] and not (t["lstrip"] or t["rstrip"])
    ]
    texts = ["Hello world", " Hello", "\n\nx", "  é", "▁x", "user"]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, continued=True)):
        assert encoding.ids.tolist() == library.encode(plain[0] + text, add_special_tokens=False).ids[1:]
        assert encoding.ends[-1] == len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_golden_byte_view(shared, name):
    texts = [item["text"] for item in json.loads((shared / "golden/E_byteify_texts.json").read_text("utf-8"))]
    with np.load(shared / "golden/E_byteify.npz") as golden:
        if f"{name}__ids" not in golden.files:
            pytest.skip(f"no golden ids of {name}")
        ids, ptr, flags = (golden[f"{name}__{part}"] for part in ("ids", "ptr", "flags"))
    tokenizer = load(str(shared / "data/tokenizers" / name))
    for item, text in enumerate(texts):
        equal, after_space, after_nfc = flags[item, :3]
        if not (equal or after_space or after_nfc):  # the vocabulary lacks bytes of this text
            with pytest.raises(UserError, match="is spelled by no token"):
                tokenizer.encode(text)
            continue
        encoding = tokenizer.encode(text)
        assert np.array_equal(encoding.ids, ids[ptr[item] : ptr[item + 1]])
        assert encoding.ends[-1:].sum() == len(text.encode())
        assert np.array_equal(encoding.starts[1:], encoding.ends[:-1])
        spelled = b"".join(tokenizer.token_bytes[index] for index in encoding.ids)
        assert (spelled == text.encode()) == equal
        if after_space and not equal:
            assert spelled == b" " + text.encode()


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_reference_vectors(shared, name):
    folder = shared / "data/tokenizers/vectors"
    tokenizer = load(str(shared / "data/tokenizers" / name))
    llama_cpp = json.loads((folder / "llama_cpp.json").read_text("utf-8"))
    many = json.loads(lzma.decompress((folder / "reference_multilingual.json.xz").read_bytes()))
    cases = [*zip(llama_cpp["inputs"], llama_cpp["expected"].get(name, []))]
    known = many["known_differences"].get(name, [])
    if name in many["expected"]:
        cases += [
            (item["text"], ids)
            for index, (item, ids) in enumerate(zip(many["texts"], many["expected"][name]["ids"]))
            if index not in known
        ]
    if not cases:
        pytest.skip(f"no vectors of {name}")
    for text, ids in cases:
        assert tokenizer.encode(text).ids.tolist() == ids
