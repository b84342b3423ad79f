"""sentencepiece models: the ids of sentencepiece itself, on models trained here and on the published ones."""

import functools
import gzip
import io
import itertools
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenkit.config import UserError
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.formats.sentencepiece import read_sentencepiece
from tokenkit.tokenizers.hf import HFTokenizer

sentencepiece = pytest.importorskip("sentencepiece")
LINES = [
    "The cat sat on the mat, and the other cat sat there too.",
    "Once upon a time there were  two spaces, three lines\tand a tab.",
    "été à la crème; Größe über alles; 12 and 345 and 6789!",
    "<sym>the<sym> cat  there<|im|>",
    "日本語 の 文字 x y z",
] * 20
SYMBOLS = ["<sym>", "<|im|>", "▁▁", "th", "\n\n", "a.b-[c]"]
PARTS = [
    "<sym>",
    "<|im|>",
    " ",
    "  ",
    "▁",
    "a",
    "b",
    "s",
    "e",
    "\n",
    "é",
    "日",
    "Z",
    "th",
    "the",
    " cat",
    "<s>",
    "<0x41>",
    "12",
    "a.b-[c]",
]
TEXTS = ["", " ", " a", "  a  b   c   ", "a\n\nb\t c", " ▁ ", "▁▁▁", "\0", "e\u0301", "😀👩‍👩‍👧", "      x", "ａ１ﬁ"]


def trained(kind: str, **options: Any) -> bytes:
    """A small model as its trainer writes it."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=content,
        model_type=kind,
        vocab_size=380 if options.get("byte_fallback") else 110,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
        **options,
    )
    return content.getvalue()


def random_texts(number: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(PARTS, k=generator.randint(1, 12))) for _ in range(number)]


def library_ids(raw: bytes, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of sentencepiece, and those of the converted tokenizer.json in the tokenizers library."""
    definition, _ = read_sentencepiece(raw, "small")
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.encode_special_tokens = True
    ours = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    return sentencepiece.SentencePieceProcessor(model_proto=raw).encode(texts), ours


BPE = list(itertools.product((True, False), (True, False), (True, False), (True, False)))


@pytest.mark.parametrize(("byte_fallback", "dummy_prefix", "extra_spaces", "symbols"), BPE)
def test_bpe(byte_fallback, dummy_prefix, extra_spaces, symbols):
    raw = trained(
        "bpe",
        byte_fallback=byte_fallback,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=extra_spaces,
        normalization_rule_name="identity",
        **({"user_defined_symbols": SYMBOLS} if symbols else {}),
    )
    texts = TEXTS + random_texts(300)
    for text, theirs, ours in zip(texts, *library_ids(raw, texts)):
        assert ours == theirs, text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_charsmap(kind):
    raw = trained(kind, byte_fallback=kind == "bpe", normalization_rule_name="nmt_nfkc")
    texts = [text for text in TEXTS if "\u0301" not in text] + ["ａ ｂ\u3000ﬁ ① ½", "x\u2028y\u00a0z", "\u200b"]
    for text, theirs, ours in zip(texts, *library_ids(raw, texts)):
        assert ours == theirs, text


def score(processor: Any, ids: list[int]) -> float:
    return sum(processor.get_score(index) for index in ids)


@pytest.mark.parametrize(("dummy_prefix", "extra_spaces"), list(itertools.product((True, False), (True, False))))
def test_unigram(dummy_prefix, extra_spaces):
    """Equal ids, or two segmentations of one score: the two libraries add in different precision."""
    raw = trained(
        "unigram",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=extra_spaces,
        normalization_rule_name="identity",
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    for theirs, found in zip(*library_ids(raw, TEXTS + random_texts(300))):
        assert found == theirs or score(processor, found) == pytest.approx(score(processor, theirs), abs=1e-4)


def test_literals_of_special_pieces_are_text():
    for kind in ("bpe", "unigram"):
        raw = trained(kind, byte_fallback=True, normalization_rule_name="identity")
        ours = HFTokenizer(*read_sentencepiece(raw, kind), kind)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
        for text in ("<s>", "a </s> b", "<0x41><0x0A>", "the <unk> cat"):
            assert ours.encode(text).ids.tolist() == theirs.encode(text)


@pytest.fixture(scope="module")
def small() -> tuple[HFTokenizer, Any]:
    raw = trained("bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    return HFTokenizer(*read_sentencepiece(raw, "small"), "small"), processor


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text(small, text):
    ours, theirs = small
    encoding = ours.encode(text)
    assert encoding.ids.tolist() == theirs.encode(text)
    spelled = b"".join(ours.token_bytes[index] for index in encoding.ids.tolist())
    assert spelled == ((" " + text).encode() if text else b"").replace("▁".encode(), b" ")


def test_roles_and_specials(small):
    ours, theirs = small
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id(), theirs.eos_id(), None)
    assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_kinds_that_no_tokenizer_json_can_say():
    with pytest.raises(UserError, match="of type char; use BPE or Unigram"):
        read_sentencepiece(trained("char"), "small")
    with pytest.raises(UserError, match="treat_whitespace_as_suffix"):
        read_sentencepiece(trained("bpe", treat_whitespace_as_suffix=True), "small")


def test_a_file_that_is_cut_between_two_records_is_told(tmp_path):
    """Every record of it is whole: only what should follow shows that something is missing."""
    raw = trained("bpe", byte_fallback=True)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    read_format(tmp_path)
    spans = records(raw)
    for number, missing in ((1, "no trainer_spec and no normalizer_spec after 2 pieces"), (2, "no normalizer_spec")):
        end = spans[1][1] if number == 1 else next(end for field, end in spans if field == 2)
        (tmp_path / "tokenizer.model").write_bytes(raw[:end])
        with pytest.raises(UserError, match=rf"not a whole sentencepiece model \({missing}.*; fetch the file again"):
            read_format(tmp_path)


def records(raw: bytes) -> list[tuple[int, int]]:
    """Field number and end of every record of a ModelProto, all of which have a length."""
    found, place = [], 0
    while place < len(raw):
        number, length, shift = raw[place] >> 3, 0, 0
        while True:
            place += 1
            length |= (raw[place] & 0x7F) << shift
            shift += 7
            if raw[place] < 0x80:
                break
        place += 1 + length
        found.append((number, place))
    return found


FILES = {"llama2": "tokenizer.model", "mistral_v1": "tokenizer.model", "t5_small": "spiece.model"}


def published(folder: Path) -> HFTokenizer:
    packed = folder / "tokenizer.json.xz"
    raw = lzma.decompress(packed.read_bytes()) if packed.exists() else (folder / "tokenizer.json").read_bytes()
    return HFTokenizer(json.loads(raw), json.loads((folder / "tokenizer_config.json").read_bytes()), folder.name)


@functools.cache
def corpus(shared: Path) -> list[str]:
    """Over 100,000 distinct strings in 380 languages, code and English, white space as it is."""
    texts: list[str] = []
    for name in ("ntrex/valid", "ntrex/train", "udhr", "code/multipl_e_humaneval", "c4_en_mini/train"):
        with gzip.open(shared / f"data/corpora/{name}.jsonl.gz", "rt") as rows:
            for row in rows:
                values = [value for value in json.loads(row).values() if isinstance(value, str)]
                texts += values if name.startswith("ntrex") else [line for v in values for line in v.split("\n")]
                texts += values if name.startswith("code") else []
    texts += (shared / "data/corpora/wikitext2/test.txt").read_text("utf-8").split("\n")
    return list(dict.fromkeys(texts))


def compare(folder: Path, file: str, texts: list[str]) -> tuple[list[str], list[str]]:
    """The texts whose ids differ from sentencepiece's, and those that differ from the folder's own tokenizer.json."""
    definition, config = read_format(folder / file)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / file))
    backends = []
    for one in (definition, published(folder).definition):
        backend = tokenizers.Tokenizer.from_str(json.dumps(one))
        backend.encode_special_tokens = True
        backends.append([found.ids for found in backend.encode_batch(texts, add_special_tokens=False)])
    ours, theirs = backends
    reference = processor.encode(texts)
    assert config == {key: token for key, token in published(folder).config.items() if key in config}
    # the published tokenizer.json of T5 takes the literals of its special tokens for the tokens
    literal = [any(token in text for token in ("<unk>", "<pad>", "</s>")) for text in texts]
    return (
        [text for text, a, b in zip(texts, ours, reference) if a != b],
        [text for text, a, b, skip in zip(texts, ours, theirs, literal) if a != b and not skip],
    )


@pytest.mark.parametrize("name", FILES)
def test_published_models_on_some_texts(name, shared):
    texts = [text for text in corpus(shared)[:: 211 if name == "t5_small" else 97] if text.isascii()] + TEXTS[:3]
    from_library, from_json = compare(shared / "data/tokenizers" / name, FILES[name], texts)
    assert from_library == []
    assert [text for text in from_json if not text.startswith(" ")] == []


@functools.cache
def unigram_backend(path: Path) -> tokenizers.Tokenizer:
    definition, _ = read_format(path)
    return tokenizers.Tokenizer.from_str(json.dumps(definition | {"added_tokens": []}))


def is_known_difference(folder: Path, text: str) -> bool:
    """Whether the library drops what follows a match of the charsmap inside a grapheme cluster, or two scores tie."""
    model = str(folder / "spiece.model")
    backend = unigram_backend(folder / "spiece.model")
    wanted = sentencepiece.SentencePieceNormalizer(model_file=model).normalize(text).replace(" ", "▁").strip("▁")
    if wanted != backend.normalizer.normalize_str(text).strip("▁"):
        return True
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    ours, theirs = backend.encode(text, add_special_tokens=False).ids, processor.encode(text)
    return score(processor, ours) == pytest.approx(score(processor, theirs), abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_published_models_on_100_000_strings(name, shared):
    texts = corpus(shared)
    assert len(texts) >= 100_000
    from_library, from_json = compare(shared / "data/tokenizers" / name, FILES[name], texts)
    print(f"{name}: {len(texts)} strings, differing {len(from_library)} (sentencepiece), {len(from_json)} (its JSON)")
    if name == "t5_small":
        folder = shared / "data/tokenizers" / name
        assert 0 < len(from_library) < len(texts) // 200
        assert all(is_known_difference(folder, text) for text in from_library)
        assert len(from_json) <= 2  # ties, where we are with sentencepiece
        return
    assert from_library == []
    # Metaspace gives no dummy space to a text that begins with a space, sentencepiece does
    assert [text for text in from_json if name == "llama2" or text[:1] not in (" ", "▁")] == []
