"""Published tokenizers: reference ids, tokens that spell the text, refusal of the lossy ones (golden E, vectors)."""

import functools
import json
import lzma

import numpy as np
import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.load import load_tokenizer

SUPPORTED = ["cl100k_base", "deepseek_v3", "focus_de_bpe_50k", "focus_sw_bpe_50k", "gemma3", "gpt2", "gpt_neox_20b"]
SUPPORTED += ["llama2", "llama3", "mistral_tekken", "mistral_v1", "olmo2_dolma2", "olmo_dolma_v1_5", "phi3_mini"]
SUPPORTED += ["qwen2", "roberta_base", "smollm2"]
load = functools.cache(load_tokenizer)


@pytest.mark.parametrize("name", ["clip_base", "focus_de_xlmr_unigram_50k", "t5_small"])
def test_lossy_tokenizers_are_refused(shared, name):
    with pytest.raises(UserError, match="changes ordinary text") as caught:
        load_tokenizer(str(shared / "data/tokenizers" / name))
    assert "\n" not in str(caught.value)


def test_word_piece_is_refused(shared):
    with pytest.raises(UserError, match="WordPiece tokenizers do not keep the bytes"):
        load_tokenizer(str(shared / "data/tokenizers/bert_base_uncased"))


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
            with pytest.raises(UserError, match="changes the text"):
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
